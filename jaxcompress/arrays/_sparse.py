"""Arrays that store their nonzeros only: a bit mask with values, or N of every M."""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer, Shaped

from jaxcompress.arrays._packed import PackedArray, pack


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
    def dtype(self) -> Any:
        """That of the values."""
        return self.values.dtype

    @property
    def nbits(self) -> int:
        """Stored bits."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def mask(self) -> Bool[Array, "..."]:
        """Which entries are stored, in the logical shape."""
        return self.index.materialize().astype(bool).reshape(self.shape)

    def materialize(self) -> Shaped[Array, "..."]:
        """The plain array."""
        values = _plain(self.values)
        mask = self.index.materialize().astype(bool)
        lead, (rows, columns), shards = mask.shape[:-2], mask.shape[-2:], values.shape[-2]
        positions = self.starts[..., None] + jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1
        positions = positions.reshape(*lead, shards, rows // shards * columns)
        found = jnp.take_along_axis(values, positions, axis=-1, mode="clip").reshape(mask.shape)
        return jnp.where(mask, found, jnp.zeros((), found.dtype)).reshape(self.shape)

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

    def take_mask_rows(self, rows: Integer[Array, "..."]) -> Bool[Array, "..."]:
        """`mask()[rows]`."""
        return self._mask_rows(rows).reshape(*rows.shape, *self.row_shape)

    def _mask_rows(self, rows: Integer[Array, "..."]) -> Bool[Array, "..."]:
        return dataclasses.replace(self.index, data=self.index.data[rows]).materialize().astype(bool)

    def _take_values(self, positions: Integer[Array, "..."], run: Integer[Array, "..."]) -> Array:
        if isinstance(self.values, PackedArray) and self.values.shape[0] == 1:
            return self.values.take(positions.reshape(1, -1)).reshape(positions.shape)
        return _plain(self.values)[run, positions]


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
    def dtype(self) -> Any:
        """That of the values."""
        return self.values.dtype

    @property
    def nbits(self) -> int:
        """Stored bits."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def mask(self) -> Bool[Array, "..."]:
        """Which entries are stored, in the logical shape."""
        return self._spread(jnp.ones(self.values.shape, bool))

    def materialize(self) -> Shaped[Array, "..."]:
        """The plain array."""
        return self._spread(_plain(self.values))

    def take_rows(self, rows: Integer[Array, "..."]) -> Shaped[Array, "..."]:
        """`materialize()[rows]`, reading those rows only if the axis is not the first."""
        return self._rows(rows).materialize() if self._rows_are_free() else self.materialize()[rows]

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
        places = _plain(self.index).reshape(*before, count, kept, 1, *after)
        values = values.reshape(*before, count, kept, 1, *after)
        slots = jnp.arange(run, dtype=places.dtype).reshape(*(1,) * (at + 2), run, *(1,) * len(after))
        spread = jnp.where(places == slots, values, jnp.zeros((), values.dtype))
        # At most one of the N places equals a slot: the sum picks that value, exactly.
        picked = spread.any(axis=at + 1) if values.dtype == bool else spread.sum(axis=at + 1, dtype=values.dtype)
        return jax.lax.slice_in_dim(picked.reshape(*before, count * run, *after), 0, self.width, axis=at)


SparseArray: TypeAlias = BitmaskSparseArray | NMSparseArray
"""Either storage; usable in `isinstance`."""


def sparsify(
    array: Shaped[Array, "..."],
    mask: Bool[Array, "..."],
    *,
    pattern: tuple[int, int] | None = None,
    axis: int = -1,
    stack_ndim: int = 0,
    shards: int = 1,
) -> SparseArray:
    """Stores `array` where `mask` is set. The counts are data, so this runs outside `jit`.

    Args:
        array: any dtype; at least one unstacked axis.
        mask: of the same shape.
        pattern: (N, M): at most N of every M consecutive entries along `axis` are set in `mask`; gives values and
            places. None: a bit mask.
        axis: the axis of the pattern.
        stack_ndim: number of leading axes that are stacked copies (layers, experts); for the bit mask only.
        shards: equal runs of rows that may lie on different devices; for the bit mask only.

    Returns:
        An `NMSparseArray` with a pattern, else a `BitmaskSparseArray`.

    Raises:
        ValueError: shapes differ, `shards` does not divide the rows, or the mask breaks the pattern.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 4.0, 0.0]])
        >>> sparsify(x, x != 0, pattern=(2, 4)).values
        Array([[1., 2.],
               [3., 4.]], dtype=float32)
        >>> sparsify(x, x != 0).values
        Array([[1., 2., 3., 4.]], dtype=float32)
    """
    if mask.shape != array.shape or array.ndim - stack_ndim < 1:
        raise ValueError(
            f"Array of shape {array.shape}, {stack_ndim} stacked axes and mask of shape {mask.shape} do not fit."
        )
    if pattern is not None:
        return _sparsify_n_of_m(array, mask, pattern, axis if axis < 0 else axis - array.ndim)
    return _sparsify_bitmask(np.asarray(array), np.asarray(mask), stack_ndim, shards)


def sparsify_like(array: Shaped[Array, "..."], like: SparseArray) -> SparseArray:
    """Stores `array` at the entries that `like` stores; nothing of `like` but its values changes.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 0.0, 0.0, 2.0]])
        >>> sparsify_like(10 * x, sparsify(x, x != 0)).materialize()
        Array([[10.,  0.,  0., 20.]], dtype=float32)
    """
    if isinstance(like, NMSparseArray):
        return sparsify(array, like.mask(), pattern=like.pattern, axis=like.axis)
    shards, stack_ndim = like.values.shape[-2], like.starts.ndim - 1
    return sparsify(array, like.mask(), stack_ndim=stack_ndim, shards=shards)


def _sparsify_bitmask(array: np.ndarray, mask: np.ndarray, stack_ndim: int, shards: int) -> BitmaskSparseArray:
    stack, rows = array.shape[:stack_ndim], array.shape[stack_ndim]
    if shards < 1 or rows % shards:
        raise ValueError(f"`shards` must divide the {rows} rows of an array of shape {array.shape}, got {shards}.")
    row_shape = array.shape[stack_ndim + 1 :]
    flat = mask.reshape(*stack, rows, math.prod(row_shape))
    counts = flat.sum(axis=-1, dtype=np.int64).reshape(*stack, shards, rows // shards)
    starts = (np.cumsum(counts, axis=-1) - counts).reshape(*stack, rows).astype(np.int32)
    # At least one slot, because Orbax cannot save arrays of size 0.
    longest = max(int(counts.sum(axis=-1).max(initial=0)), 1)
    run_mask = mask.reshape(-1, rows // shards * flat.shape[-1])
    values = np.zeros((len(run_mask), longest), array.dtype)
    for line, run, kept in zip(values, array.reshape(run_mask.shape), run_mask, strict=True):
        line[: kept.sum()] = run[kept]
    index = pack(jnp.asarray(flat, jnp.uint8), bits=1)
    values = jnp.asarray(values.reshape(*stack, shards, longest))
    return BitmaskSparseArray(values=values, index=index, starts=jnp.asarray(starts), row_shape=row_shape)


def _sparsify_n_of_m(
    array: Shaped[Array, "..."], mask: Bool[Array, "..."], pattern: tuple[int, int], axis: int
) -> NMSparseArray:
    kept, run = pattern
    at, width = axis + array.ndim, array.shape[axis]
    tail = -width % run
    padding = [(0, tail if i == at else 0) for i in range(array.ndim)]
    runs = (*array.shape[:at], (width + tail) // run, run, *array.shape[at + 1 :])
    mask = jnp.pad(mask, padding).reshape(runs)
    if bool((mask.sum(axis=at + 1) > kept).any()):
        raise ValueError(f"The mask keeps more than {kept} of {run} entries along axis {axis} of shape {array.shape}.")
    # A stable sort brings the kept places of each run to the front, in ascending order.
    places = jnp.sort(
        jnp.argsort(~mask, axis=at + 1, stable=True)[(slice(None),) * (at + 1) + (slice(0, kept),)], at + 1
    )
    clean = jnp.where(mask, jnp.pad(array, padding).reshape(runs), jnp.zeros((), array.dtype))
    values = jnp.take_along_axis(clean, places, axis=at + 1)
    stored = (*array.shape[:at], runs[at] * kept, *array.shape[at + 1 :])
    index = pack(places.reshape(stored).astype(jnp.uint8), bits=max((run - 1).bit_length(), 1), axis=axis)
    return NMSparseArray(values=values.reshape(stored), index=index, pattern=pattern, axis=axis, width=width)


def _plain(part: Any) -> Array:
    return part.materialize() if isinstance(part, PackedArray) else part
