"""Sparse arrays with a pattern: N of every M consecutive entries, and their places."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Integer, Shaped

from jaxcompress._src.arrays.packed import pack, unpacked
from jaxcompress._src.arrays.protocol import (
    StoredArray,
    array_kind,
    describe_leaf,
    product_with_plain,
    slice_axis,
    transpose,
)
from jaxcompress._src.arrays.sharding import component_shardings, entries_here, whole_blocks
from jaxcompress._src.arrays.static_fields import INT, INTS
from jaxcompress._src.arrays.validate import require, validate_array
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed


@array_kind(pattern=INTS, axis=INT, width=INT)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NMSparseArray(StoredArray):
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
        shape[self.axis] = self._entries_here
        return tuple(shape)

    @property
    def _entries_here(self) -> int:
        count, run = self.pattern
        return entries_here(self.width, self.values.shape[self.axis], block=run, stored_per_block=count)

    def why_no_share(self) -> str | None:
        """Values that are no whole runs."""
        (count, run), stored = self.pattern, self.values.shape[self.axis]
        if stored == -(-self._entries_here // run) * count:
            return None
        axis = self.axis + len(self.values.shape)
        return f"{stored} values along axis {axis} are no share of {self.width} entries in whole runs of {run}"

    @property
    def dtype(self) -> Any:
        """That of the values."""
        return self.values.dtype

    @on_auto_axes
    def mask(self) -> Bool[Array, "..."]:
        """Which entries are stored, in the logical shape."""
        return self._spread(jnp.ones(self.values.shape, bool))

    @on_auto_axes
    def materialize(self) -> Shaped[Array, "..."]:
        """The plain array."""
        return self._spread(unpacked(self.values))

    @property
    def packing_axis(self) -> int:
        """The axis along which dense codes are packed: that of the pattern."""
        return self.axis

    def expanded(self) -> Any:
        """The plain array."""
        return self.materialize()

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> Shaped[Array, "..."]:
        """`materialize()[rows]`, reading those rows only if the axis is not the first."""
        return self._rows(rows).materialize() if self._rows_are_free() else self.materialize()[rows]

    @on_auto_axes
    def take_mask_rows(self, rows: Integer[Array, "..."]) -> Bool[Array, "..."]:
        """`mask()[rows]`."""
        return self._rows(rows).mask() if self._rows_are_free() else self.mask()[rows]

    def with_packed_values(self, bits: int) -> "NMSparseArray":
        """The same array of integers, `bits` to each."""
        return dataclasses.replace(self, values=pack(unpacked(self.values), bits=bits, axis=self.axis))

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The axes in another order."""
        axis = tuple(permutation).index(self.axis + self.ndim) - self.ndim
        values, index = (transpose(part, permutation) for part in (self.values, self.index))
        return dataclasses.replace(self, values=values, index=index, axis=axis)

    def slice_axis(self, axis: int, start: Any, size: int) -> Any:
        """Entries along an axis other than that of the pattern."""
        if axis == self.axis + self.ndim:
            return None
        return jax.tree.map(lambda part: slice_axis(part, axis, start, size), self)

    def cast(self, dtype: Any) -> Any:
        """Plain values of another dtype."""
        return None if is_compressed(self.values) else dataclasses.replace(self, values=self.values.astype(dtype))

    def can_unstack(self) -> bool:
        """Unless the pattern runs along the first axis."""
        return self._rows_are_free()

    def dot(self, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> jax.Array:
        """The product of the plain array."""
        return product_with_plain(self.materialize(), other, side, parameters)

    def shardings(self, sharding: NamedSharding) -> Any:
        """Whole runs of M on every device."""
        whole_blocks(self, self.axis, self.pattern[1], sharding)
        values, index = (component_shardings(part, sharding) for part in (self.values, self.index))
        return dataclasses.replace(self, values=values, index=index)

    @property
    def pattern_name(self) -> str:
        """Such as `2:4`."""
        return f"{self.pattern[0]}:{self.pattern[1]}"

    def describe(self) -> str:
        """Such as `float32 2:4`."""
        return f"{describe_leaf(self.values)} {self.pattern_name}"

    def validate(self) -> None:
        """Checks the invariants."""
        count, run = self.pattern
        require(1 <= count <= run, f"The pattern (N, M) needs 1 <= N <= M, got {self.pattern}.")
        shapes = f"Values {self.values.shape} and places {self.index.shape} differ."
        require(self.values.shape == self.index.shape, shapes)
        needed, stored = -(-self.width // run) * count, self.values.shape[self.axis]
        require(stored == needed, f"{self.width} entries of pattern {count}:{run} store {needed} values, got {stored}.")
        places = np.moveaxis(np.asarray(self.index.materialize()), self.axis, -1).reshape(-1, count).astype(int)
        require((places < run).all(), f"Places must be below {run}.")
        require((np.diff(places, axis=-1) > 0).all(), "The places of one run must be distinct and ascending.")
        for part in (self.values, self.index):
            validate_array(part)

    def _rows_are_free(self) -> bool:
        return self.axis != -self.ndim

    def _rows(self, rows: Integer[Array, "..."]) -> "NMSparseArray":
        return jax.tree.map(lambda part: part[rows], self)

    def _spread(self, values: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return _spread(values, self.index, self.pattern, self.axis, self._entries_here)


_UNROLLED = 16


@functools.partial(jax.jit, static_argnames=("pattern", "axis", "width"), inline=True)
def _spread(
    values: Shaped[Array, "..."], index: Any, pattern: tuple[int, int], axis: int, width: int
) -> Shaped[Array, "..."]:
    """Values along the whole axis, 0 where none is kept."""
    (kept, run), at = pattern, axis + values.ndim
    before, after = values.shape[:at], values.shape[at + 1 :]
    count = values.shape[at] // kept
    places = unpacked(index).reshape(*before, count, kept, *after)
    values = values.reshape(*before, count, kept, *after)
    slots = jnp.arange(run, dtype=places.dtype).reshape(*(1,) * (at + 1), run, *(1,) * len(after))
    picked = jnp.zeros((*before, count, run, *after), values.dtype)
    # At most one of the N places equals a slot. Value by value, because XLA on the CPU takes three times as long for a
    # sum over them; a loop where N is large, because programs grow with it.

    def pick(number: Any, picked: jax.Array) -> jax.Array:
        place, value = (jax.lax.dynamic_slice_in_dim(part, number, 1, at + 1) for part in (places, values))
        return jnp.where(place == slots, value, picked)

    if kept > _UNROLLED:
        picked = jax.lax.fori_loop(0, kept, pick, picked)
    else:
        for number in range(kept):
            picked = pick(number, picked)
    return jax.lax.slice_in_dim(picked.reshape(*before, count * run, *after), 0, width, axis=at)
