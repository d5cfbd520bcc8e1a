"""What a one-shot method did to a leaf."""

import dataclasses
import math
from typing import Any

from jaxcompress.types import CompressedArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundingInfo:
    """What happened to one leaf. Errors are relative: ||X W - X W'|| / ||X W|| over the calibration rows.

    Attributes:
        bits_per_weight: what is stored, scales and zero points included.
        error_before: of rounding every weight to the nearest, with the same spec; None without statistics.
        error: of what was stored; likewise.
        damping: share of the mean diagonal that was added to X'X; None where nothing is inverted.
        retries: how often the damping had to grow; above 0 the matrix was singular beyond the damping asked for.
        dead_inputs: number of inputs that are 0 in every row.
    """

    bits_per_weight: float
    error_before: float | None = None
    error: float | None = None
    damping: float | None = None
    retries: int = 0
    dead_inputs: int = 0

    @classmethod
    def of(cls, leaf: CompressedArray, **figures: Any) -> "RoundingInfo":
        """With the bits of a compressed leaf."""
        return cls(bits_per_weight=leaf.nbits / max(math.prod(leaf.shape), 1), **figures)
