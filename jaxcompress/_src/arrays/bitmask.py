"""Sparse arrays without a pattern: a bit mask, and the values under it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Integer, Shaped

from jaxcompress._src.arrays.packed import PackedArray, pack, unpacked
from jaxcompress._src.arrays.protocol import StoredArray, array_kind, describe_leaf, product_with_plain
from jaxcompress._src.arrays.sharding import spec_entries, ways
from jaxcompress._src.arrays.static_fields import INTS
from jaxcompress._src.arrays.validate import require, validate_array
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed


@array_kind(row_shape=INTS)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BitmaskSparseArray(StoredArray):
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
    def dtype(self) -> Any:
        """That of the values."""
        return self.values.dtype

    @on_auto_axes
    def mask(self) -> Bool[Array, "..."]:
        """Which entries are stored, in the logical shape."""
        return self.index.materialize().astype(bool).reshape(self.shape)

    @on_auto_axes
    def materialize(self) -> Shaped[Array, "..."]:
        """The plain array."""
        return _materialize(self)

    @property
    def packing_axis(self) -> int:
        """The axis along which dense codes are packed: that of the rows."""
        return self.starts.ndim - 1 - self.ndim

    def expanded(self) -> Any:
        """The plain array."""
        return self.materialize()

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> Shaped[Array, "..."]:
        """`materialize()[rows]`, reading those rows only; not for stacked leaves."""
        mask = self._mask_rows(rows)
        shards, count = self.values.shape[-2:]
        run = rows // (self.starts.shape[-1] // shards)
        positions = self.starts[rows][..., None] + jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
        taken = self._take_values(
            jnp.clip(positions, 0, max(count - 1, 0)), jnp.broadcast_to(run[..., None], mask.shape)
        )
        plain = jnp.where(mask, taken, jnp.zeros((), taken.dtype))
        return plain.reshape(*rows.shape, *self.row_shape)

    @on_auto_axes
    def take_mask_rows(self, rows: Integer[Array, "..."]) -> Bool[Array, "..."]:
        """`mask()[rows]`."""
        return self._mask_rows(rows).reshape(*rows.shape, *self.row_shape)

    def with_packed_values(self, bits: int) -> "BitmaskSparseArray":
        """The same array of integers, `bits` to each."""
        return dataclasses.replace(self, values=pack(unpacked(self.values), bits=bits))

    def cast(self, dtype: Any) -> Any:
        """Plain values of another dtype."""
        return None if is_compressed(self.values) else dataclasses.replace(self, values=self.values.astype(dtype))

    def can_unstack(self) -> bool:
        """If it was built of stacked entries."""
        return self.starts.ndim > 1

    def dot(self, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> jax.Array:
        """The product of the plain array."""
        return product_with_plain(self.materialize(), other, side, parameters)

    def shardings(self, sharding: NamedSharding) -> Any:
        """Along stacked axes, and along rows into as many shards as it was built for."""
        entries = spec_entries(sharding, self.ndim)
        stack_ndim = self.starts.ndim - 1
        stack, rows, columns = entries[:stack_ndim], entries[stack_ndim], entries[stack_ndim + 1 :]
        shards = self.values.shape[-2]
        if any(columns) or ways(sharding, rows) not in (1, shards):
            raise ValueError(
                f"A BitmaskSparseArray of shape {self.shape} built for {shards} shards can be cut into {shards} along "
                f"its rows (axis {stack_ndim}) only, got {sharding.spec}; rebuild it with `shards=`."
            )

        def part(*spec: Any) -> NamedSharding:
            return NamedSharding(sharding.mesh, PartitionSpec(*stack, *spec))

        values = part(rows, None)
        if isinstance(self.values, PackedArray):
            values = dataclasses.replace(self.values, data=values)
        index = dataclasses.replace(self.index, data=part(rows, None))
        return dataclasses.replace(self, values=values, index=index, starts=part(rows))

    @property
    def pattern_name(self) -> str:
        """That there is none."""
        return "bitmask"

    def describe(self) -> str:
        """Such as `float32 bitmask`."""
        return f"{describe_leaf(self.values)} {self.pattern_name}"

    def validate(self) -> None:
        """Checks the invariants."""
        rows, columns = self.index.shape[-2:]
        shards, longest = self.values.shape[-2:]
        size = np.prod(self.row_shape, dtype=int)
        require(columns == size, f"Rows of shape {self.row_shape} do not have {columns} columns.")
        require(self.starts.shape == self.index.shape[:-1], f"One start per row is needed, got {self.starts.shape}.")
        require(rows % shards == 0, f"{shards} shards do not divide {rows} rows.")
        counts = np.asarray(self.index.materialize()).sum(-1, dtype=np.int64)
        counts = counts.reshape(*counts.shape[:-1], shards, rows // shards)
        starts = (np.cumsum(counts, -1) - counts).reshape(self.starts.shape)
        require((starts == np.asarray(self.starts)).all(), "The starts do not count the mask.")
        require((counts.sum(-1) <= longest).all(), f"The mask keeps more values than the {longest} stored.")
        for part in (self.values, self.index):
            validate_array(part)

    def _mask_rows(self, rows: Integer[Array, "..."]) -> Bool[Array, "..."]:
        return dataclasses.replace(self.index, data=self.index.data[rows]).materialize().astype(bool)

    def _take_values(self, positions: Integer[Array, "..."], run: Integer[Array, "..."]) -> Array:
        if isinstance(self.values, PackedArray) and self.values.shape[0] == 1:
            return self.values.take(positions.reshape(1, -1)).reshape(positions.shape)
        return unpacked(self.values)[run, positions]


@functools.partial(jax.jit, inline=True)
def _materialize(array: BitmaskSparseArray) -> Shaped[Array, "..."]:
    values, bits = unpacked(array.values), array.index.data
    lead, (rows, columns), shards = bits.shape[:-2], array.index.shape[-2:], values.shape[-2]
    # Places are counted byte by byte, then within the byte: a cumulative sum over bits takes several times as long.
    counts = jax.lax.population_count(bits)
    places = jnp.arange(8, dtype=jnp.uint8).reshape(*(1,) * bits.ndim, 8)
    below = (jnp.uint8(1) << places) - jnp.uint8(1)
    within = jax.lax.population_count(bits[..., None] & below).astype(jnp.int32)
    positions = (array.starts[..., None] + _counted_before(counts))[..., None] + within
    mask = (bits[..., None] >> places) & jnp.uint8(1)
    positions = positions.reshape(*lead, shards, rows // shards * bits.shape[-1] * 8)
    taken = jnp.take_along_axis(values, positions, axis=-1, mode="clip")
    plain = jnp.where(mask.astype(bool), taken.reshape(mask.shape), jnp.zeros((), taken.dtype))
    return plain.reshape(*lead, rows, bits.shape[-1] * 8)[..., :columns].reshape(array.shape)


def _counted_before(counts: Integer[Array, "... n"]) -> Integer[Array, "... n"]:
    """The sum of all entries before each one, along the last axis."""
    width, run = counts.shape[-1], 32
    blocks = jnp.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(0, -width % run)])
    blocks = blocks.reshape(*counts.shape[:-1], blocks.shape[-1] // run, run).astype(jnp.float32)
    # Whole numbers, which float32 sums exactly; a matmul is the fastest cumulative sum of short runs.
    within = (blocks @ jnp.triu(jnp.ones((run, run), jnp.float32), 1)).astype(jnp.int32)
    totals = blocks.sum(-1).astype(jnp.int32)
    before = within + (jnp.cumsum(totals, axis=-1) - totals)[..., None]
    return before.reshape(*counts.shape[:-1], before.shape[-2] * run)[..., :width]
