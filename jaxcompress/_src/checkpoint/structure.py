"""Containers as data, and back. What a file names is looked up in a table, never imported."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.checkpoint.containers import Container, container_of, is_known, rebuild_container
from jaxcompress._src.checkpoint.keys import encode_key
from jaxcompress._src.checkpoint.manifest import LeafRecord, Manifest, StructureNode
from jaxcompress._src.tree.paths import path_string
from jaxcompress._src.types import is_compressed


def describe_structure(tree: Any) -> tuple[StructureNode, list[tuple[tuple[Any, ...], Any]]]:
    """The containers of a tree, and its leaves with their key paths (compressed arrays are leaves).

    Raises:
        TypeError: a key cannot be stored; names the container.
    """
    leaves: list[tuple[tuple[Any, ...], Any]] = []
    return _describe_node(tree, (), leaves), leaves


def rebuild_structure(node: StructureNode, leaves: Sequence[Any]) -> Any:
    """The tree that `describe_structure` described, from the values of its leaves.

    Raises:
        ValueError: a container is unknown, or only its class can rebuild it; says which.
    """
    if node.kind == "leaf":
        return leaves[node.leaf or 0]
    keys = [key for key, _ in node.children]
    return rebuild_container(
        node.kind, keys, [rebuild_structure(child, leaves) for _, child in node.children], node.static
    )


def check_rebuildable(node: StructureNode) -> None:
    """Checks that every container can be rebuilt without `like`.

    Raises:
        ValueError: one cannot; names it.
    """
    for path, container in node.walk():
        if container.opaque:
            raise ValueError(
                f"{path_string(path)!r} is a {container.kind}, which is never imported because a file names it. "
                "Pass `like=`, a tree of the same structure (its leaves may be abstract)"
            )
        if container.kind != "leaf" and not is_known(container.kind):
            raise ValueError(f"{path_string(path)!r} is a container of the unknown kind {container.kind!r}")


def order_like(manifest: Manifest, like: Any) -> tuple[Any, list[int]]:
    """Where the stored leaves go in the structure of another tree.

    Args:
        manifest: of the checkpoint.
        like: a tree with leaves at the same key paths.

    Returns:
        The structure of `like`, and for each of its leaves the number of the stored one.

    Raises:
        ValueError: the paths differ (both sides are listed), or so does a shape or dtype.
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_compressed)
    numbers = {_encoded(leaf.path): at for at, leaf in enumerate(manifest.leaves)}
    wanted = {_encoded(path): path for path, _ in keyed}
    if set(wanted) != set(numbers):
        missing = [path_string(path) for key, path in wanted.items() if key not in numbers]
        unused = [leaf.name for leaf in manifest.leaves if _encoded(leaf.path) not in wanted]
        raise ValueError(
            f"`like` has leaves that are not stored: {_listed(missing)}; and lacks stored leaves: {_listed(unused)}"
        )
    order = [numbers[_encoded(path)] for path, _ in keyed]
    for at, (_, leaf) in zip(order, keyed, strict=True):
        _check_like(manifest.leaves[at], leaf)
    return treedef, order


# No inner function of `describe_structure`: one that calls itself is a cycle, which would hold the leaves, large arrays
# on devices, until the garbage collector comes by.
def _describe_node(value: Any, path: tuple[Any, ...], leaves: list[tuple[tuple[Any, ...], Any]]) -> StructureNode:
    container = None if is_compressed(value) else container_of(value)
    if container is None:
        leaves.append((path, value))
        return StructureNode(kind="leaf", leaf=len(leaves) - 1)
    _check_keys(container, path)
    return StructureNode(
        kind=container.kind,
        opaque=container.opaque,
        static=container.static,
        children=tuple((key, _describe_node(child, (*path, key), leaves)) for key, child in container.children),
    )


def _check_keys(container: Container, path: tuple[Any, ...]) -> None:
    for key, _ in container.children:
        try:
            encode_key(key)
        except TypeError as err:
            raise TypeError(f"In the {container.kind} at {path_string(path)!r}, {err}.") from err


def _check_like(stored: LeafRecord, leaf: Any) -> None:
    if stored.value.shape is None or stored.value.dtype is None or not hasattr(leaf, "shape"):
        return
    # Random keys have a dtype that NumPy does not know, and only that has a name of its own.
    found = tuple(leaf.shape), getattr(leaf.dtype, "name", None) or jnp.dtype(leaf.dtype).name
    if found != (stored.value.shape, stored.value.dtype):
        raise ValueError(
            f"leaf {stored.name!r} is {stored.value.dtype}{list(stored.value.shape)}; "
            f"in `like` it is {found[1]}{list(found[0])}"
        )


def _encoded(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((type(key).__name__, str(key)) for key in path)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
