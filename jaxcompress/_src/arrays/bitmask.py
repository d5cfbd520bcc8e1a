"""Sparse arrays without a pattern: a bit mask, and the values under it."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer, Shaped

from jaxcompress._src.arrays.packed import PackedArray, unpacked
from jaxcompress._src.meshes import on_auto_axes


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "index", "starts"], meta_fields=["row_shape"]
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BitmaskSparseArray:
    """A bit mask, and the values where it is set, row by row.

    A row is one entry of the first unstacked axis. Rows are cut into `shards` equal runs, and the values of each run
    are padded with zeros to the longest run, so that runs (and stacked leaves) have equal shapes.

    Invariants: row r belongs to run `r // (rows / shards)`; its kept values lie, in order of their columns, at
    `values[..., run, starts[r]:]`.

    Attributes:
        values: (..., shards, count), any dtype, or a `PackedArray` of integers, packed along the last axis.
        index: a 1-bit `PackedArray` of shape (..., rows, columns): which entries are stored.
        starts: int32 (..., rows).
        row_shape: shape of one row; its product is the number of columns.
    """

    values: Any
    index: Any
    starts: Any
    row_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return (*self.index.shape[:-1], *self.row_shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

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
        return self.index.materialize().astype(bool).reshape(self.shape)

    @on_auto_axes
    def materialize(self) -> Shaped[Array, "..."]:
        """The plain array."""
        values = unpacked(self.values)
        mask = self.index.materialize().astype(bool)
        lead, (rows, columns), shards = mask.shape[:-2], mask.shape[-2:], values.shape[-2]
        positions = self.starts[..., None] + jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
        positions = positions.reshape(*lead, shards, rows // shards * columns)
        found = jnp.take_along_axis(values, positions, axis=-1, mode="clip").reshape(mask.shape)
        return jnp.where(mask, found, jnp.zeros((), found.dtype)).reshape(self.shape)

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> Shaped[Array, "..."]:
        """`materialize()[rows]`, reading those rows only; not for stacked leaves."""
        mask = self._mask_rows(rows)
        shards, count = self.values.shape[-2:]
        run = rows // (self.starts.shape[-1] // shards)
        positions = self.starts[rows][..., None] + jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
        found = self._take_values(
            jnp.clip(positions, 0, max(count - 1, 0)), jnp.broadcast_to(run[..., None], mask.shape)
        )
        plain = jnp.where(mask, found, jnp.zeros((), found.dtype))
        return plain.reshape(*rows.shape, *self.row_shape)

    @on_auto_axes
    def take_mask_rows(self, rows: Integer[Array, "..."]) -> Bool[Array, "..."]:
        """`mask()[rows]`."""
        return self._mask_rows(rows).reshape(*rows.shape, *self.row_shape)

    def _mask_rows(self, rows: Integer[Array, "..."]) -> Bool[Array, "..."]:
        return dataclasses.replace(self.index, data=self.index.data[rows]).materialize().astype(bool)

    def _take_values(self, positions: Integer[Array, "..."], run: Integer[Array, "..."]) -> Array:
        if isinstance(self.values, PackedArray) and self.values.shape[0] == 1:
            return self.values.take(positions.reshape(1, -1)).reshape(positions.shape)
        return unpacked(self.values)[run, positions]
