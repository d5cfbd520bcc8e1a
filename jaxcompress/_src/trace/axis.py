"""One axis of a value that is a re-arrangement of a parameter: which entries of the parameter it runs over."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

LONGEST = 1 << 22
"""Entries of the longest axis that is followed entry by entry: what is merged into more (all weights in one vector)
costs too much to follow."""

Table = Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a value.

    The entry (i, j, ...) of the value is the entry Σ table[i] + Σ table[j] + ... of the parameter, along each of the
    parameter's axes, where the sums are over the axes of the value that have a table for it.

    Attributes:
        size: number of entries.
        tables: axis of the parameter -> its share in the index, for each entry. No table: the same for all entries.
        present: which entries come from the parameter; the others are constants, or belong to another one. None: all.
    """

    size: int
    tables: Mapping[int, Table] = dataclasses.field(default_factory=dict)
    present: Bool[np.ndarray, " n"] | None = None

    @property
    def mask(self) -> Bool[np.ndarray, " n"]:
        """`present`, as an array."""
        return np.ones(self.size, bool) if self.present is None else self.present

    def take(self, entries: slice | Int[np.ndarray, " m"]) -> "Axis":
        """Some entries, in the order given."""
        tables = {axis: table[entries] for axis, table in self.tables.items()}
        present = None if self.present is None else self.present[entries]
        size = len(np.arange(self.size)[entries])
        return Axis(size, tables, None if present is None or present.all() else present)

    def spread(self, size: int) -> "Axis":
        """An axis of size 1, repeated."""
        return self if size == self.size else self.take(np.zeros(size, int))

    def within(self, size: int, at: int) -> "Axis":
        """The same entries inside a longer axis, from `at` on."""
        present, inside = np.zeros(size, bool), slice(at, at + self.size)
        present[inside] = self.mask
        tables = {}
        for axis, table in self.tables.items():
            tables[axis] = np.zeros(size, np.int64)
            tables[axis][inside] = table
        return Axis(size, tables, None if present.all() else present)

    def equals(self, other: "Axis") -> bool:
        """Whether both run over the same entries, in the same order."""
        return (
            self.size == other.size
            and self.tables.keys() == other.tables.keys()
            and all(np.array_equal(table, other.tables[axis]) for axis, table in self.tables.items())
            and np.array_equal(self.mask, other.mask)
        )


def merged(axes: Sequence[Axis]) -> Axis:
    """Several axes as one, the last of them running fastest.

    Example:
        >>> merged([Axis(2, {0: np.array([0, 1])}), Axis(2, {1: np.array([0, 1])})]).tables[1].tolist()
        [0, 1, 0, 1]
    """
    if len(axes) == 1:
        return axes[0]
    shape = tuple(axis.size for axis in axes)

    def wide(place: int, values: np.ndarray) -> np.ndarray:
        return values.reshape([-1 if place == k else 1 for k in range(len(axes))])

    tables: dict[int, np.ndarray] = {}
    for place, axis in enumerate(axes):
        for number, table in axis.tables.items():
            tables[number] = tables.get(number, np.zeros((), np.int64)) + wide(place, table)
    flat = {number: np.broadcast_to(table, shape).reshape(-1) for number, table in tables.items()}
    if all(axis.present is None for axis in axes):
        return Axis(math.prod(shape), flat)
    present = np.ones(shape, bool)
    for place, axis in enumerate(axes):
        present &= wide(place, axis.mask)
    return Axis(math.prod(shape), flat, present.reshape(-1))


def split(axis: Axis, sizes: Sequence[int]) -> tuple[list[Axis], dict[int, int]] | None:
    """The inverse of `merged`, with what is the same for all entries; None where the entries don't lie on a grid.

    Example:
        >>> (major, minor), fixed = split(Axis(6, {0: np.arange(6)}), (2, 3))
        >>> major.tables[0].tolist(), minor.tables[0].tolist(), fixed
        ([0, 3], [0, 1, 2], {})
        >>> split(Axis(4, {0: np.array([3, 1, 0, 2])}), (2, 2)) is None
        True
    """
    if len(sizes) == 1:
        return [axis], {}
    parts: list[dict[int, np.ndarray]] = [{} for _ in sizes]
    fixed = {}
    for number, table in axis.tables.items():
        grid = table.reshape(sizes)
        first = int(grid[(0,) * len(sizes)])
        lines = [
            grid[tuple(slice(None) if k == place else 0 for k in range(len(sizes)))] for place in range(len(sizes))
        ]
        total = sum(
            (line - first).reshape([-1 if k == place else 1 for k in range(len(sizes))])
            for place, line in enumerate(lines)
        )
        if not np.array_equal(np.broadcast_to(total, sizes), grid - first):
            return None
        moving = [place for place, line in enumerate(lines) if (line != first).any()]
        for place in moving:
            # What all entries share goes to the first of them.
            parts[place][number] = lines[place] - (first if place != moving[0] else 0)
        if not moving:
            fixed[number] = first
    masks = _split_mask(axis, sizes)
    if masks is None:
        return None
    return [Axis(size, tables, mask) for size, tables, mask in zip(sizes, parts, masks, strict=True)], fixed


def _split_mask(axis: Axis, sizes: Sequence[int]) -> Sequence[Any] | None:
    if axis.present is None:
        return [None] * len(sizes)
    grid = axis.present.reshape(sizes)
    masks = [grid.any(axis=tuple(k for k in range(len(sizes)) if k != place)) for place in range(len(sizes))]
    product = np.ones(sizes, bool)
    for place, mask in enumerate(masks):
        product &= mask.reshape([-1 if k == place else 1 for k in range(len(sizes))])
    return [None if mask.all() else mask for mask in masks] if np.array_equal(product, grid) else None
