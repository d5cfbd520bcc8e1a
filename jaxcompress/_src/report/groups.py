"""Which group a leaf is counted in."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

from jaxcompress._src.tree.maps import flatten_like, leaves_with_paths
from jaxcompress._src.types import Params, Selector, is_compressed

GroupBy: TypeAlias = Mapping[str, Selector] | Callable[[str, Any], str]
"""Names with selectors, or `(path, leaf) -> name`."""

REST = "other"
"""Where leaves go that no selector marks."""


def group_names(params: Params, group_by: GroupBy | None) -> list[str]:
    """The group of every leaf, in the order of the tree (compressed arrays are leaves).

    Args:
        params: the tree.
        group_by: how to name them; None: by the first key of the path.

    Raises:
        ValueError: two groups select the same leaf; names it.

    Example:
        >>> group_names({"encoder": {"kernel": 1, "bias": 2}, "head": 3}, None)
        ['encoder', 'encoder', 'head']
    """
    leaves = leaves_with_paths(params)
    if not isinstance(group_by, Mapping):
        choose = group_by or _first_key
        return [choose(path, leaf) for path, leaf in leaves]
    treedef = jax.tree.structure(params, is_leaf=is_compressed)
    marks = {name: flatten_like(treedef, select(params)) for name, select in group_by.items()}
    names = []
    for at, (path, _) in enumerate(leaves):
        matching = [name for name in group_by if marks[name][at]]
        if len(matching) > 1:
            raise ValueError(
                f"Leaf {path!r} is in the groups {', '.join(map(repr, matching))}; groups must not overlap."
            )
        names.append(matching[0] if matching else REST)
    return names


def _first_key(path: str, _: Any) -> str:
    return path.split("/", 1)[0]
