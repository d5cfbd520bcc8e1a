"""What a default selection leaves out, and the warning that names it."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths
from jaxcompress._src.types import Params

SHARE = 0.01
"""Leaves above this share of the parameters are named when a default selection leaves them out."""


class LeftOutWarning(UserWarning):
    """A default selection leaves out leaves that look like weights; give `select` to say that it is meant.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", LeftOutWarning)  # in a script that must not miss a weight
        >>> warnings.simplefilter("default", LeftOutWarning)
    """


def large_left_out(params: Params, layouts: Params) -> dict[str, str]:
    """The leaves that a default selection leaves out although they may well be weights.

    They hold more than 1 % of the numbers of the tree, and the model uses them, but in a way that is not followed.
    What is spread over the activations (norms, biases, learned positions) is none of them, nor is anything with a
    single axis longer than 1.

    Args:
        params: the tree.
        layouts: of it, from `layouts`.

    Returns:
        path -> what the model does with the leaf.
    """
    leaves, by_path = leaves_with_paths(params), leaves_by_path(layouts)
    total = sum(_size(leaf) for _, leaf in leaves)
    return {
        path: by_path[path].reason or "it is used otherwise"
        for path, leaf in leaves
        if is_doubtful(leaf, by_path[path]) and _size(leaf) > SHARE * total
    }


def is_doubtful(leaf: Any, layout: LeafLayout) -> bool:
    """Whether a leaf of the kind "other" may well be a weight."""
    lengths = [n for axis, n in enumerate(getattr(leaf, "shape", ())) if axis not in layout.stack_axes]
    return layout.kind == "other" and not layout.spread and sum(n > 1 for n in lengths) >= 2


def warn_left_out(reasons: Mapping[str, str], what: str, *, advice: str, stacklevel: int) -> None:
    """One warning for all leaves; none without leaves.

    Args:
        reasons: path -> why the leaf is left out.
        what: the start of the sentence, such as "The default selection leaves out".
        advice: what to do.
        stacklevel: as of `warnings.warn`, counted from the caller.
    """
    if reasons:
        warnings.warn(f"{what} {listed(reasons)}\n{advice}", LeftOutWarning, stacklevel=stacklevel + 1)


def listed(reasons: Mapping[str, str]) -> str:
    """The leaves and their reasons, a line each, below their number."""
    lines = [f"  {path!r}: {reason}" for path, reason in reasons.items()]
    return f"{len(lines)} {'leaf' if len(lines) == 1 else 'leaves'}:\n" + "\n".join(lines)


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape) if hasattr(leaf, "shape") else 0
