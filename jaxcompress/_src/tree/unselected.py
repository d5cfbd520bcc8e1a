"""The mark of a leaf that is left alone."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.export

from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.types import Params, is_compressed


@jax.tree_util.register_static
class _Unselected:
    """Singleton; a pytree node without children, so that `jax.tree.map` passes over it."""

    def __new__(cls) -> "_Unselected":
        global _instance
        _instance = _instance or super().__new__(cls)
        return _instance

    def __repr__(self) -> str:
        return "Unselected"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Unselected, ())


_instance: _Unselected | None = None

jax.export.register_pytree_node_serialization(
    _Unselected,
    serialized_name="jaxcompress.Unselected",
    serialize_auxdata=lambda _: b"[]",
    deserialize_auxdata=lambda _: (),
    from_children=lambda aux_data, children: _Unselected(),
)

Unselected: Final = _Unselected()
"""Stands where a partial tree (masks, scores, a partition) has no entry. Never `None`, which JAX treats as a tree."""


def is_unselected(leaf: Any) -> bool:
    """Whether `leaf` is the sentinel `Unselected`."""
    return leaf is Unselected


def map_selected(fn: Callable[..., Any], selected: Params, *rest: Params) -> Params:
    """`fn(path, entry, *leaves_of_rest)` where `selected` has an entry; `Unselected` elsewhere.

    Args:
        fn: called as `fn(path, entry, *others)`; its errors name the leaf.
        selected: a partial tree; compressed arrays are leaves.
        *rest: trees of (at least) the same structure.

    Returns:
        A partial tree.

    Example:
        >>> map_selected(lambda path, x, y: x + y, {"a": 1, "b": Unselected}, {"a": 2, "b": 3})
        {'a': 3, 'b': Unselected}
    """

    def visit(path: str, entry: Any, *others: Any) -> Any:
        return Unselected if is_unselected(entry) else fn(path, entry, *others)

    return map_with_path(visit, selected, *rest, is_leaf=lambda leaf: is_unselected(leaf) or is_compressed(leaf))


def partial_tree(params: Params, entries: Mapping[str, Any]) -> Params:
    """The tree of some entries by path, `Unselected` where there is none.

    Example:
        >>> partial_tree({"a": 1, "b": 2}, {"b": "two"})
        {'a': Unselected, 'b': 'two'}
    """
    return map_with_path(lambda path, _: entries.get(path, Unselected), params)


def without_compressed(selected: Params, params: Params, *, but: tuple[Any, ...] = ()) -> Params:
    """A partial tree without the entries of leaves that are compressed already: they stay as they are.

    Args:
        selected: a partial tree.
        params: the leaves.
        but: compressed classes that count as plain, such as sparse arrays where values are quantized.

    Raises:
        ValueError: no entry is left.

    Example:
        >>> import jax.numpy as jnp
        >>> without_compressed({"a": 1, "b": Unselected}, {"a": jnp.ones(2), "b": jnp.ones(2)})
        {'a': 1, 'b': Unselected}
    """
    left, compressed = [], []

    def visit(path: str, entry: Any, leaf: Any) -> Any:
        done = is_compressed(leaf) and not isinstance(leaf, but)
        (compressed if done else left).append(path)
        return Unselected if done else entry

    uncompressed = map_selected(visit, selected, params)
    if compressed and not left:
        raise ValueError(f"Every selected leaf is compressed already: {', '.join(compressed)}. Nothing is left to do.")
    return uncompressed
