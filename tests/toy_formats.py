"""Number formats of a test's own: a table, one without a zero, and whole numbers with a range rule of their own."""

import dataclasses
from typing import Any

import numpy as np

from jaxcompress._src.quantization.formats.number_format import NumberFormat
from jaxcompress._src.quantization.formats.tables import Table

TABLE = Table(name="toy", levels=(-1.0, -0.375, -0.125, 0.0, 0.25, 0.75))
NO_ZERO = Table(name="toy without zero", levels=(-1.0, -0.25, 0.25, 1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thirds(NumberFormat):
    """Whole numbers in ±3, of which the largest weight gets 9/2: a third of the range is cut off."""

    bits: Any = 3

    @property
    def code_range(self):
        return -3, 3

    @property
    def largest(self):
        return 4.5


THIRDS = Thirds(name="thirds")
TOYS = {each.name: each for each in (TABLE, NO_ZERO, THIRDS)}


def rounded_by_hand(w, toy):
    """The nearest weights that one scale for each column can store, in float64."""
    levels, w = np.arange(-3.0, 4.0) if toy.levels is None else np.asarray(toy.levels), np.asarray(w, np.float64)
    scale = np.abs(w).max(0) / (4.5 if toy.levels is None else 1.0)
    return levels[np.abs((w / scale)[..., None] - levels).argmin(-1)] * scale
