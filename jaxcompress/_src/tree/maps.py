"""Maps whose errors name the leaf; a compressed array is one leaf, and so are the statistics of one."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcompress._src.tree.paths import path_string
from jaxcompress._src.types import Params, is_entry


def leaves_with_paths(tree: Params, *, is_leaf: Callable[[Any], bool] = is_entry) -> list[tuple[str, Any]]:
    """All leaves with their paths, in the order of `jax.tree.leaves`; see `types.is_entry`.

    Example:
        >>> leaves_with_paths({"dense": {"bias": 1, "kernel": 2}})
        [('dense/bias', 1), ('dense/kernel', 2)]
    """
    return [(path_string(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]


def leaves_by_path(tree: Params) -> dict[str, Any]:
    """All leaves by their paths; of a partial tree those that are there.

    Example:
        >>> leaves_by_path({"dense": {"bias": 1, "kernel": 2}})
        {'dense/bias': 1, 'dense/kernel': 2}
    """
    return dict(leaves_with_paths(tree))


def with_leaves(params: Params, leaves: Mapping[str, Any]) -> Params:
    """`params` with other leaves, by path.

    Raises:
        ValueError: a path that `params` does not have.

    Example:
        >>> with_leaves({"dense": {"bias": 1, "kernel": 2}}, {"dense/kernel": 3})
        {'dense': {'bias': 1, 'kernel': 3}}
        >>> with_leaves({"kernel": 2}, {"bias": 3})
        Traceback (most recent call last):
        ValueError: The tree has no leaf 'bias'.
    """
    unknown = set(leaves)

    def put(path: str, leaf: Any) -> Any:
        unknown.discard(path)
        return leaves.get(path, leaf)

    changed = map_with_path(put, params)
    if unknown:
        raise ValueError(f"The tree has no leaf {min(unknown)!r}.")
    return changed


def leaf_paths(tree: Params) -> list[str]:
    """The paths of all leaves; see `path_string`."""
    return [path for path, _ in leaves_with_paths(tree)]


def map_with_path(
    fn: Callable[..., Any], tree: Params, *rest: Params, is_leaf: Callable[[Any], bool] = is_entry
) -> Params:
    """`fn(path, leaf, *leaves_of_rest)` on every leaf; an error in `fn` carries the path as a note.

    Args:
        fn: called as `fn(path, leaf, *others)`.
        tree: gives the structure. Compressed arrays are leaves, and so are the statistics of a leaf.
        *rest: trees that have at least that structure.
        is_leaf: what else counts as a leaf of `tree`.

    Returns:
        A tree of the structure of `tree`.

    Raises:
        ValueError: a tree in `rest` has another structure.

    Example:
        >>> map_with_path(lambda path, x: f"{path}={x}", {"a": 1, "b": {"c": 2}})
        {'a': 'a=1', 'b': {'c': 'b/c=2'}}
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    columns = [flatten_like(treedef, other) for other in rest]
    return treedef.unflatten(
        [_call(fn, path_string(item[0]), item[1], *others) for item, *others in zip(keyed, *columns, strict=True)]
    )


def flatten_like(treedef: Any, tree: Params) -> list[Any]:
    """The subtrees of `tree` at the leaves of `treedef`, with an error that shows both structures."""
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as err:
        raise ValueError(f"The trees differ in structure: {err}") from err


def _call(fn: Callable[..., Any], path: str, *args: Any) -> Any:
    try:
        return fn(path, *args)
    except Exception as err:
        err.add_note(f"at leaf {path!r}")
        raise
