"""What a one-shot method did to a leaf, or to each entry of a stack."""

import dataclasses
import math
from typing import Any

import jax

from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import CompressedArray, Params
from jaxcompress._src.weights.infos import entry_names

FALLBACKS = {"keep": "rounded to nearest", "zero": "set to 0"}
"""What became of weights whose inputs were never seen, for the warning."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundingInfo:
    """What happened to one leaf, or to one stack entry.

    Errors are relative: ||X W - X W'|| / ||X W|| over the calibration rows. A static node: traced functions may
    return infos.

    Attributes:
        bits_per_weight: what is stored of the leaf, scales and zero points included.
        error_before: of rounding every weight to the nearest, with the same spec; None without statistics, and where no
            row was seen.
        error: of what was stored; None in the same cases.
        damping: share of the mean diagonal that was added to X'X; None where nothing is inverted.
        retries: how often the damping had to grow; above 0 the matrix was singular beyond the damping asked for.
        unseen_inputs: number of inputs that are 0 in every row; see the argument `unseen`.
        unseen_entries: 1 if all inputs are such (an expert that no row reached), otherwise 0.
        note: why the leaf was left as it is; empty otherwise.
    """

    bits_per_weight: float
    error_before: float | None = None
    error: float | None = None
    damping: float | None = None
    retries: int = 0
    unseen_inputs: int = 0
    unseen_entries: int = 0
    note: str = ""

    @classmethod
    def of(cls, leaf: CompressedArray, **figures: Any) -> "RoundingInfo":
        """With the bits of a compressed leaf."""
        return cls(bits_per_weight=leaf.nbits / max(math.prod(leaf.shape), 1), **figures)


def storage_infos(compressed: Params, layouts: Params) -> dict[str, RoundingInfo]:
    """Of methods without data: the bits of every leaf that has a layout, by the names of its stack entries."""
    leaves = dict(leaves_with_paths(compressed))
    return {
        name: RoundingInfo.of(leaves[path])
        for path, layout in leaves_with_paths(layouts)
        for name in entry_names(path, leaves[path].shape, layout)
    }
