"""Which containers a checkpoint rebuilds by itself."""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import DictKey, SequenceKey

from jaxcompress._src.tree.unselected import Unselected
from jaxcompress._src.types import TransformState


class Container(NamedTuple):
    """One level of a tree.

    Attributes:
        kind: name in the table, or the class name if `opaque`.
        children: key entries and values.
        static: what else it holds, as JSON.
        opaque: the table does not know it.
    """

    kind: str
    children: list[tuple[Any, Any]]
    static: Mapping[str, Any]
    opaque: bool


class ContainerType(NamedTuple):
    """A class of containers that a checkpoint rebuilds.

    Attributes:
        cls: the class, matched exactly.
        build: `(keys, children) -> container`; the keys of a mapping, None for anything else.
    """

    cls: type
    build: Callable[[Sequence[Any], Sequence[Any]], Any]


def container_of(value: Any) -> Container | None:
    """Takes one container apart; None if JAX sees `value` as a leaf.

    Dicts keep their order. Any container that the table does not know is opaque: a file that named classes to import
    could run anything.
    """
    kind = next((name for name, row in _table().items() if row.cls is type(value)), None)
    if kind in _MAPPINGS:
        return Container(kind, [(DictKey(key), child) for key, child in value.items()], {}, False)
    if kind in ("list", "tuple"):
        return Container(kind, [(SequenceKey(at), child) for at, child in enumerate(value)], {}, False)
    children = _children(value)
    if children is None:
        return None
    if kind is not None:
        return Container(kind, children, {}, False)
    return _variable(value, children) or Container(
        f"{type(value).__module__}.{type(value).__qualname__}", children, {}, True
    )


def is_known(kind: str) -> bool:
    """Whether `rebuild_container` knows a kind."""
    return kind in _table() or _variable_class(kind) is not None


def rebuild_container(kind: str, keys: Sequence[Any], children: Sequence[Any], static: Mapping[str, Any]) -> Any:
    """The container that `container_of` took apart.

    Raises:
        ValueError: the kind is unknown, or does not have such children.
    """
    variable = _variable_class(kind)
    try:
        if variable is not None:
            (value,) = children
            return variable.from_metadata(value, {name: _decode_metadata(item) for name, item in static.items()})
        return _table()[kind].build([getattr(key, "key", None) for key in keys], children)
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"a container {kind!r} with {len(children)} children cannot be rebuilt: {err!r}") from err


_MAPPINGS = ("dict", "OrderedDict", "FrozenDict")


@functools.cache
def _table() -> dict[str, ContainerType]:
    from flax import nnx
    from flax.core import FrozenDict

    def mapping(cls: type) -> ContainerType:
        return ContainerType(cls, lambda keys, children: cls(zip(keys, children, strict=True)))

    def sequence(cls: type) -> ContainerType:
        return ContainerType(cls, lambda _, children: cls(children))

    return {
        "dict": mapping(dict),
        "OrderedDict": mapping(collections.OrderedDict),
        "FrozenDict": ContainerType(
            FrozenDict, lambda keys, children: FrozenDict(dict(zip(keys, children, strict=True)))
        ),
        "nnx.State": mapping(nnx.State),
        "list": sequence(list),
        "tuple": sequence(tuple),
        "None": ContainerType(type(None), lambda _, children: None),
        "Unselected": ContainerType(type(Unselected), lambda _, children: Unselected),
        "TransformState": ContainerType(TransformState, lambda _, children: TransformState(*children)),
    }


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    # Stopping at everything but the root flattens one level, for any registered class.
    flat = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda node: node is not value)[0]
    if len(flat) == 1 and flat[0][0] == ():
        return None
    return [(path[0], child) for path, child in flat]


def _variable(value: Any, children: list[tuple[Any, Any]]) -> Container | None:
    """A variable of a class of flax.nnx, if its metadata are plain values."""
    kind = f"nnx.{type(value).__name__}"
    if _variable_class(kind) is not type(value):
        return None
    try:
        static = {name: _encode_metadata(item) for name, item in value.get_metadata().items()}
    except TypeError:
        return None
    return Container(kind, children, static, False)


def _variable_class(kind: str) -> Any:
    """The class `nnx.NAME`, if it is a variable of flax itself."""
    from flax import nnx

    prefix, _, name = kind.partition(".")
    cls = getattr(nnx, name, None) if prefix == "nnx" and name.isidentifier() else None
    return cls if isinstance(cls, type) and issubclass(cls, nnx.Variable) else None


def _encode_metadata(item: Any) -> Any:
    if item is None or type(item) in (bool, int, str):
        return item
    if type(item) is float:
        return {"float": repr(item)}
    if type(item) is tuple:
        return [_encode_metadata(entry) for entry in item]
    raise TypeError(f"{item!r} is not plain")


def _decode_metadata(item: Any) -> Any:
    if isinstance(item, list):
        return tuple(_decode_metadata(entry) for entry in item)
    return float(item["float"]) if isinstance(item, dict) else item
