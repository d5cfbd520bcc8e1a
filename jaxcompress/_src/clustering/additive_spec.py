"""How runs of weights share the entries of several tables."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdditiveSpec:
    """How long runs are, and from how many tables of how many entries they are summed.

    Codes take `bits_per_weight`; the tables of a leaf take `tables * values * length` numbers more.

    Attributes:
        length: d, weights of a run, at least 1: consecutive along an input axis.
        tables: M, tables from each of which one entry is added, in [1, 8]. 1 is product quantization with one table
            for all places.
        values: K, entries of a table, in [2, 256].
        scaled: whether weights are divided by the root mean square of their output channel first, which is stored as a
            scale: output channels of unlike size can then share entries.
        beam: sums that the search for codes keeps, at least 1. More is slower and finds better codes; it does not
            matter with one table.
        rounds: how often tables and codes are improved in turn.
        dtype: of the tables and scales, "bfloat16" or "float32".
    """

    length: int
    tables: int
    values: int
    scaled: bool = True
    beam: int = 8
    rounds: int = 8
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.length < 1:
            raise ValueError(f"`length` must be at least 1, got {self.length}.")
        if not 1 <= self.tables <= 8:
            raise ValueError(f"`tables` must be in [1, 8], got {self.tables}.")
        if not 2 <= self.values <= 256:
            raise ValueError(f"`values` must be in [2, 256], got {self.values}.")
        if self.beam < 1:
            raise ValueError(f"`beam` must be at least 1, got {self.beam}.")
        if self.rounds < 0:
            raise ValueError(f"`rounds` must be at least 0, got {self.rounds}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"`dtype` must be 'float32' or 'bfloat16', got {self.dtype!r}.")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.values - 1).bit_length()

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes for each weight, without tables.

        Example:
            >>> AdditiveSpec(length=8, tables=2, values=256).bits_per_weight
            2.0
        """
        return self.tables * self.bits / self.length
