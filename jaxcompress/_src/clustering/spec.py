"""How weights share values."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.weights.selection import BlockError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookSpec:
    """How many values weights may take, and which of them share a table.

    Attributes:
        values: number of values of a table, in [2, 256], 0 included if `zero`.
        zero: keep 0 as one of them: weights that are exactly 0 (pruned ones) stay so, whatever becomes of the table.
        per: "leaf": one table per leaf (per stacked copy). "output": one for each output channel.
        group_size: inputs that share a table, in runs along the last input axis; None: all of them.
        rate: λ. Weights go to the value that minimises error + λ · bits, with bits = -log2 of the share of the weights
            that have it, and error = h (w - value)², relative to the mean of h w². 0 is k-means; a few thousandths buy
            much shorter codes, and more zeros, for a little error.
        dtype: of the table, "float32" or "bfloat16".
    """

    values: int
    zero: bool = True
    per: Literal["leaf", "output"] = "leaf"
    group_size: int | None = None
    rate: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Checks the options."""
        if not 2 <= self.values <= 256:
            raise ValueError(f"`values` must be in [2, 256], got {self.values}.")
        if self.per not in ("leaf", "output"):
            raise ValueError(f"`per` must be 'leaf' or 'output', got {self.per!r}.")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"`group_size` must be at least 1, or None, got {self.group_size}.")
        if not 0 <= self.rate < float("inf"):
            raise ValueError(f"`rate` must be at least 0 and finite, got {self.rate}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"`dtype` must be 'float32' or 'bfloat16', got {self.dtype!r}.")

    @property
    def entries(self) -> int:
        """Stored values of a table: all but 0."""
        return self.values - self.zero

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.values - 1).bit_length()

    def blocks(self, shape: Sequence[int], layout: LeafLayout) -> tuple[int, ...]:
        """The number of tables along every axis.

        Raises:
            trace.BlockError: there are no inputs to group, or the groups do not divide them.

        Example:
            >>> layout = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
            >>> CodebookSpec(values=4).blocks((3, 16, 8), layout)
            (3, 1, 1)
            >>> CodebookSpec(values=4, group_size=4).blocks((3, 16, 8), layout)
            (3, 4, 1)
        """
        outer = {*layout.stack_axes, *(layout.output_axes if self.per == "output" and layout.input_axes else ())}
        counts = [size if axis in outer else 1 for axis, size in enumerate(shape)]
        if self.group_size is not None:
            inputs = [shape[axis] for axis in layout.input_axes]
            if not inputs or inputs[-1] % self.group_size:
                raise BlockError(f"`group_size` {self.group_size} does not divide the input axes of sizes {inputs}.")
            counts[layout.input_axes[-1]] = inputs[-1] // self.group_size
        return tuple(counts)
