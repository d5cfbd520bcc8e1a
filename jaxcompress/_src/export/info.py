"""What an export did with each leaf, and how what it cannot hold is refused."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np

Unsupported: TypeAlias = Literal["error", "dense"]
"""What becomes of compressed leaves that a format cannot hold: an error, or plain arrays."""


class CannotHoldError(ValueError):
    """Why a format cannot hold a leaf without changing what it stands for; the message is a half-sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedLeaf:
    """A leaf in a file.

    Attributes:
        form: what the file holds: such as "int4 g32", "Q4_0", or "float16" of a plain array.
        nbytes: of all of its tensors.
        rounding: largest absolute difference between a weight in the file and in the leaf, in float32; 0 if exact.
    """

    form: str
    nbytes: int
    rounding: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportInfo:
    """What an export wrote.

    Attributes:
        leaves: by path.

    Example:
        >>> leaf = ExportedLeaf(form="Q4_0", nbytes=18)
        >>> info = ExportInfo(leaves={"a/kernel": leaf, "b/kernel": ExportedLeaf(form="F16", nbytes=64, rounding=1e-4)})
        >>> info.nbytes, info.rounding
        (82, 0.0001)
    """

    leaves: Mapping[str, ExportedLeaf]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    @property
    def rounding(self) -> float:
        """The largest `rounding` of a leaf."""
        return max((leaf.rounding for leaf in self.leaves.values()), default=0.0)


def largest_difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest absolute difference of an entry; none where both are NaN, or the same infinity."""
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    return float(np.abs(np.subtract(found, wanted, where=~same, out=np.zeros_like(wanted))).max(initial=0))


def check_unsupported(refusals: Mapping[str, str], unsupported: Unsupported, *, target: str) -> None:
    """Raises for leaves that a format cannot hold, unless they may become plain arrays.

    Args:
        refusals: path -> reason.
        unsupported: the caller's choice.
        target: the format, in words.

    Raises:
        ValueError: there are any, or `unsupported` is no choice.
    """
    if unsupported not in ("error", "dense"):
        raise ValueError(f"`unsupported` must be 'error' or 'dense', got {unsupported!r}.")
    if not refusals or unsupported == "dense":
        return
    by_reason: dict[str, list[str]] = {}
    for path, reason in refusals.items():
        by_reason.setdefault(reason, []).append(path)
    parts = [
        f"{', '.join(map(repr, paths[:3]))}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}: {reason}"
        for reason, paths in by_reason.items()
    ]
    raise ValueError(
        f"{target} cannot hold these compressed leaves. {'. '.join(parts)}. Quantize them otherwise, or write them as "
        'plain arrays with `unsupported="dense"`.'
    )
