"""Runs of weights that are sums of entries of several tables."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, UInt8

from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.quantized import take_code_rows, take_parameter_rows
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["data", "table", "scale"], meta_fields=["dtype", "axis", "width"]
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AdditiveCodebookArray:
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
        shape[self.axis] = self.width
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.data.shape) - 1

    @property
    def size(self) -> int:
        """Number of logical entries."""
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """Weights of a run."""
        return self.table.shape[-1]

    @property
    def bits(self) -> int:
        """Bits per stored code, without tables."""
        return self.data.bits if isinstance(self.data, PackedArray) else 8

    @property
    def nbits(self) -> int:
        """Stored bits: codes, with those of the weights beyond the last one, tables, scales."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.nbits // 8

    @on_auto_axes
    def codes(self) -> UInt8[Array, "..."]:
        """The codes as uint8: the logical axes, with runs in place of weights on one of them, then the tables."""
        return self.data.materialize() if is_compressed(self.data) else self.data

    @on_auto_axes
    def materialize(self) -> Float[Array, "..."]:
        """The plain array, of the logical shape and dtype."""
        return _add_entries(self.codes(), self.table, self.scale, self.axis, self.width, self.dtype)

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> Float[Array, "..."]:
        """`materialize()[rows]`, adding up those rows only; `rows` index the first axis and must be in range."""
        if self.axis == -self.ndim:
            return self.materialize()[rows]
        flat = rows.reshape(-1)
        codes = take_code_rows(self.data, flat)
        table, scale = (take_parameter_rows(part, flat, self.shape[0]) for part in (self.table, self.scale))
        plain = _add_entries(codes, table, scale, self.axis, self.width, self.dtype)
        return plain.reshape(*rows.shape, *self.shape[1:])


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
