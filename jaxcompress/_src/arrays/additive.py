"""Runs of weights that are sums of entries of several tables."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Integer, UInt8

from jaxcompress._src.arrays.codebook import validate_codes
from jaxcompress._src.arrays.coded import reshape_codes, take_code_rows, take_parameter_rows
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.protocol import (
    StoredArray,
    array_kind,
    describe_leaf,
    product_with_plain,
    slice_axis,
    transpose,
)
from jaxcompress._src.arrays.reshaping import reshape_runs, reshaped_blocks
from jaxcompress._src.arrays.sharding import (
    component_shardings,
    entries_here,
    ones_replicated,
    spec_entries,
    whole_blocks,
)
from jaxcompress._src.arrays.static_fields import DTYPE, INT
from jaxcompress._src.arrays.validate import is_finite, require
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import plain


@array_kind(dtype=DTYPE, axis=INT, width=INT)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AdditiveCodebookArray(StoredArray):
    """Codes of runs of d consecutive weights, and M tables of K runs of which one each is added up.

    Invariant: run number i along `axis` is `original[d i : d (i + 1)] ≈ scale * Σ_m table[block, m, codes[i, m]]`.
    `codes` has the logical axes, with one entry for each run on `axis`, and M as its last axis; a last run that reaches
    beyond `width` is cut off. The axes of `table` but the last three, and those of `scale`, are those of the array: of
    size 1 (one for all), or of full size (one for each entry), and of size 1 on `axis`. Codes are below K.

    A kernel (in, out) with runs along its inputs has codes (ceil(in / d), out, M), tables (1, 1, M, K, d) and scales
    (1, out); under a scan of L layers they are (L, ceil(in / d), out, M), (L, 1, 1, M, K, d) and (L, 1, out).

    Attributes:
        data: the codes: uint8, or an unsigned `PackedArray`.
        table: float32 or bfloat16, (*blocks, M, K, d).
        dtype: logical dtype; sums are made in float32.
        axis: of the runs; negative, so that leading axes may come and go.
        width: logical size of that axis.
        scale: None, or float32 or bfloat16.

    References:
        Babenko and Lempitsky 2014, "Additive quantization for extreme vector compression"; with M = 1, the codes of
        Jégou, Douze and Schmid 2011, "Product quantization for nearest neighbor search", with one table for all places.
    """

    data: Any
    table: Any
    dtype: jnp.dtype
    axis: int
    width: int
    scale: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        shape = list(self.data.shape[:-1])
        shape[self.axis] = self._weights_here
        return tuple(shape)

    @property
    def _weights_here(self) -> int:
        runs = self.data.shape[self.axis - 1]
        return entries_here(self.width, runs, block=self.length, stored_per_block=1)

    def why_no_share(self) -> str | None:
        """Codes that are not of whole runs."""
        runs = self.data.shape[self.axis - 1]
        if runs == -(-self._weights_here // self.length):
            return None
        axis = self.axis + self.ndim
        return f"{runs} codes along axis {axis} are no share of {self.width} weights in whole runs of {self.length}"

    @property
    def length(self) -> int:
        """Weights of a run."""
        return self.table.shape[-1]

    @property
    def bits(self) -> int:
        """Bits per stored code, without tables."""
        return self.data.bits if isinstance(self.data, PackedArray) else 8

    @on_auto_axes
    def codes(self) -> UInt8[Array, "..."]:
        """The codes as uint8: the logical axes, with runs in place of weights on one of them, then the tables."""
        return plain(self.data)

    @on_auto_axes
    def materialize(self) -> Float[Array, "..."]:
        """The plain array, of the logical shape and dtype."""
        return _add_entries(self.codes(), self.table, self.scale, self.axis, self._weights_here, self.dtype)

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> Float[Array, "..."]:
        """`materialize()[rows]`, adding up those rows only; `rows` index the first axis and must be in range."""
        if self.axis == -self.ndim:
            return self.materialize()[rows]
        flat = rows.reshape(-1)
        codes = take_code_rows(self.data, flat)
        table, scale = (take_parameter_rows(part, flat, self.shape[0]) for part in (self.table, self.scale))
        taken = _add_entries(codes, table, scale, self.axis, self._weights_here, self.dtype)
        return taken.reshape(*rows.shape, *self.shape[1:])

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The axes in another order; those of tables, entries and runs stay the last."""
        ndim = self.ndim
        data = transpose(self.data, (*permutation, ndim))
        table = self.table.transpose(*permutation, ndim, ndim + 1, ndim + 2)
        scale = None if self.scale is None else self.scale.transpose(permutation)
        axis = tuple(permutation).index(self.axis + ndim) - ndim
        return dataclasses.replace(self, data=data, table=table, scale=scale, axis=axis)

    def reshape(self, shape: Sequence[int]) -> Any:
        """Another shape, in which the axis of the runs is one axis as before."""
        *blocks, count, values, length = self.table.shape
        runs, at = reshape_runs(self.shape, shape), self.axis + self.ndim
        before, after = next(run for run in runs if at in run[0])
        sizes = reshaped_blocks(self.shape, shape, blocks, runs)
        ones = [1] * self.ndim
        of_scale = reshaped_blocks(self.shape, shape, ones if self.scale is None else self.scale.shape, runs)
        if sizes is None or of_scale is None or len(before) != 1 or len(after) != 1:
            return None
        stored = [*shape, count]
        stored[after[0]] = self.data.shape[at]
        data = reshape_codes(self.data, stored, [*runs, ([self.ndim], [len(shape)])])
        data = self.codes().reshape(stored) if data is None else data
        table = self.table.reshape(*sizes, count, values, length)
        scale = None if self.scale is None else self.scale.reshape(of_scale)
        return dataclasses.replace(self, data=data, table=table, scale=scale, axis=after[0] - len(shape))

    def slice_axis(self, axis: int, start: Any, size: int) -> Any:
        """Entries along an axis other than that of the runs."""
        if axis == self.axis + self.ndim:
            return None
        data = slice_axis(self.data, axis, start, size)
        data = slice_axis(self.codes(), axis, start, size) if data is None else data
        table, scale = (
            part if part is None or part.shape[axis] != self.shape[axis] else slice_axis(part, axis, start, size)
            for part in (self.table, self.scale)
        )
        return dataclasses.replace(self, data=data, table=table, scale=scale)

    def cast(self, dtype: Any) -> Any:
        """Another logical dtype: a narrowing cast of float32 only, elsewhere the plain array is rounded twice."""
        same = self.dtype == dtype or self.dtype == jnp.float32
        return dataclasses.replace(self, dtype=jnp.dtype(dtype)) if same else None

    def can_unstack(self) -> bool:
        """If runs and packed codes lie within the entries of the first axis, which have tables of their own."""
        packed = isinstance(self.data, PackedArray) and self.data.axis == -self.data.ndim
        parts = [part for part in (self.table, self.scale) if part is not None]
        return not packed and self.axis != -self.ndim and all(part.shape[0] == self.shape[0] for part in parts)

    def dot(self, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> jax.Array:
        """The product of the plain array."""
        return product_with_plain(self.materialize(), other, side, parameters)

    def shardings(self, sharding: NamedSharding) -> Any:
        """Whole runs on every device."""
        whole_blocks(self, self.axis, self.length, sharding)
        entries = spec_entries(sharding, self.ndim)
        codes, tables = (NamedSharding(sharding.mesh, PartitionSpec(*entries, *[None] * more)) for more in (1, 3))
        scale = None if self.scale is None else ones_replicated(self.scale, sharding)
        data, table = component_shardings(self.data, codes), ones_replicated(self.table, tables)
        return dataclasses.replace(self, data=data, table=table, scale=scale)

    def describe(self) -> str:
        """Such as `2 tables of 256x8 uint8`."""
        *_, count, values, length = self.table.shape
        return f"{count} table{'s' * (count > 1)} of {values}x{length} {describe_leaf(self.data)}"

    def validate(self) -> None:
        """Checks the invariants."""
        in_range = -self.ndim <= self.axis < 0
        require(in_range, f"The axis of runs is negative and in range, got {self.axis} of {self.ndim}.")
        *blocks, count, values, length = self.table.shape
        runs = self.data.shape[self.axis - 1]
        require(runs == -(-self.width // length), f"{self.width} weights are not {runs} runs of {length}.")
        require(self.data.shape[-1] == count, f"Each run has {self.data.shape[-1]} codes for {count} tables.")
        full = list(self.shape)
        full[self.axis] = 1
        for name, sizes in (("Tables", blocks), ("Scales", () if self.scale is None else self.scale.shape)):
            fit = len(sizes) == self.ndim and all(s in (1, n) for s, n in zip(sizes, full, strict=True))
            absent = name == "Scales" and self.scale is None
            require(fit or absent, f"{name} of shape {tuple(sizes)} do not fit an array of shape {self.shape}.")
        require(self.scale is None or is_finite(self.scale), "Scales must be finite.")
        validate_codes(self, values)


@functools.partial(jax.jit, static_argnames=("axis", "width", "dtype"), inline=True)
def _add_entries(
    codes: Integer[Array, "*runs M"],
    table: Float[Array, "*blocks M K d"],
    scale: Float[Array, "..."] | None,
    axis: int,
    width: int,
    dtype: Any,
) -> Float[Array, "..."]:
    *blocks, count, values, length = table.shape
    starts = count * values * jnp.arange(math.prod(blocks), dtype=jnp.int32).reshape(blocks)
    # In float32 before anything is looked up, so that gradients of entries are sums in float32.
    entries = table.reshape(-1, length).astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for m in range(count):
        places = codes[..., m].astype(jnp.int32) + starts + m * values
        total = total + entries[places]
    if scale is not None:
        total = total * scale[..., None].astype(jnp.float32)
    at = total.ndim - 1 + axis
    # The weights of a run go beside the runs, and the two axes become one.
    total = jnp.moveaxis(total, -1, at + 1)
    total = total.reshape(*total.shape[:at], total.shape[at] * length, *total.shape[at + 2 :])
    return jax.lax.slice_in_dim(total, 0, width, axis=at).astype(dtype)
