"""Sparse arrays with a pattern: N of every M consecutive entries, and their places."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer, Shaped

from jaxcompress._src.arrays.packed import unpacked
from jaxcompress._src.meshes import on_auto_axes


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "index"], meta_fields=["pattern", "axis", "width"]
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NMSparseArray:
    """N values of every M consecutive entries along one axis, with their places.

    Invariants: `values` and `index` have the logical shape but for the axis, where N entries stand for M; the places of
    one run of M are distinct and ascending; unused slots hold zeros. The last run may be short; beyond it lies nothing.

    Attributes:
        values: any dtype, or a `PackedArray` of integers.
        index: a `PackedArray` of ceil(log2 M) bits: the place of each value in its run.
        pattern: (N, M).
        axis: negative.
        width: entries along the axis.
    """

    values: Any
    index: Any
    pattern: tuple[int, int]
    axis: int
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        shape = list(self.values.shape)
        shape[self.axis] = self.width
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.values.shape)

    @property
    def size(self) -> int:
        """Number of logical entries."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """That of the values."""
        return self.values.dtype

    @property
    def nbits(self) -> int:
        """Stored bits."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.nbits // 8

    @on_auto_axes
    def mask(self) -> Bool[Array, "..."]:
        """Which entries are stored, in the logical shape."""
        return self._spread(jnp.ones(self.values.shape, bool))

    @on_auto_axes
    def materialize(self) -> Shaped[Array, "..."]:
        """The plain array."""
        return self._spread(unpacked(self.values))

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> Shaped[Array, "..."]:
        """`materialize()[rows]`, reading those rows only if the axis is not the first."""
        return self._rows(rows).materialize() if self._rows_are_free() else self.materialize()[rows]

    @on_auto_axes
    def take_mask_rows(self, rows: Integer[Array, "..."]) -> Bool[Array, "..."]:
        """`mask()[rows]`."""
        return self._rows(rows).mask() if self._rows_are_free() else self.mask()[rows]

    def _rows_are_free(self) -> bool:
        return self.axis != -self.ndim

    def _rows(self, rows: Integer[Array, "..."]) -> "NMSparseArray":
        return jax.tree.map(lambda part: part[rows], self)

    def _spread(self, values: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        kept, run = self.pattern
        at = self.axis + values.ndim
        before, after = values.shape[:at], values.shape[at + 1 :]
        count = values.shape[at] // kept
        places = unpacked(self.index).reshape(*before, count, kept, 1, *after)
        values = values.reshape(*before, count, kept, 1, *after)
        slots = jnp.arange(run, dtype=places.dtype).reshape(*(1,) * (at + 2), run, *(1,) * len(after))
        spread = jnp.where(places == slots, values, jnp.zeros((), values.dtype))
        # At most one of the N places equals a slot: the sum picks that value, exactly.
        picked = spread.any(axis=at + 1) if values.dtype == bool else spread.sum(axis=at + 1, dtype=values.dtype)
        return jax.lax.slice_in_dim(picked.reshape(*before, count * run, *after), 0, self.width, axis=at)
