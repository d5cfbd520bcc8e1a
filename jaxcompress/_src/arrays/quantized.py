"""Codes with scales: affine and table quantization."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num, Shaped

from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.n_of_m import NMSparseArray
from jaxcompress._src.arrays.packed import PackedArray, unpacked
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale", "zero_point"],
    meta_fields=["dtype", "levels", "partial"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedArray:
    """Integer codes that share scales block by block.

    Invariant: `original ≈ (codes - zero_point) * scale`, or `levels[codes] * scale`, and exactly 0 where `data` is
    sparse and stores nothing. `scale` has as many axes as the array; its size on every axis divides the array's, and
    each of its entries scales one block: size 1 on all axes is per tensor, size 1 on the input axes per channel, n / g
    on one input axis groups of g. `zero_point` has, on every axis, the size of `scale` or 1. The arithmetic is float32.

    Attributes:
        data: the codes: int8 / uint8, a `PackedArray`, or a sparse array of either. Signed unless there is a
            `zero_point` or `levels`.
        scale: float32, bfloat16 or float8_e8m0fnu (powers of two), in logical layout.
        zero_point: unsigned integers (perhaps a `PackedArray` of them) or floats, in logical layout, or None.
        dtype: logical dtype.
        levels: the table of a format such as NF4, or None.
        partial: None, or `(axis, size)`: on this axis, negative, blocks hold `size` entries and the last one fewer, so
            that there are ceil(n / size) of them.
    """

    data: Any
    scale: Any
    dtype: jnp.dtype
    zero_point: Any = None
    levels: tuple[float, ...] | None = None
    partial: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.data.shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.data.shape)

    @property
    def size(self) -> int:
        """Number of logical entries."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Bits per stored code, without scales and indices."""
        codes = self.data.values if isinstance(self.data, SparseArray) else self.data
        return codes.bits if isinstance(codes, PackedArray) else 8

    @property
    def nbits(self) -> int:
        """Stored bits: codes, scales, zero points, indices."""
        return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.nbits // 8

    @on_auto_axes
    def codes(self) -> Integer[Array, "..."]:
        """The codes as int8 or uint8, of the logical shape; 0 where nothing is stored."""
        return self.data.materialize() if is_compressed(self.data) else self.data

    @on_auto_axes
    def zero_points(self) -> Num[Array, "..."] | None:
        """The zero points as a plain array, or None."""
        return unpacked(self.zero_point)

    @on_auto_axes
    def materialize(self) -> jax.Array:
        """The plain array, of the logical shape and dtype."""
        scale, zero_point = self._spread(self.scale), self._spread(self.zero_points())
        plain = dequantize(self.codes(), scale, zero_point, levels=self.levels, dtype=self.dtype)
        if isinstance(self.data, SparseArray) and not _zero_is_zero(self):
            plain = jnp.where(self.data.mask(), plain, jnp.zeros((), plain.dtype))
        return plain

    @on_auto_axes
    def with_whole_blocks(self) -> "QuantizedArray":
        """The same array; where there are partial blocks, with a scale for every entry of their axis instead."""
        scale, zero_point = self._spread(self.scale), self._spread(self.zero_points())
        return dataclasses.replace(self, scale=scale, zero_point=zero_point, partial=None) if self.partial else self

    def _spread(self, parameter: Any) -> Any:
        if self.partial is None or parameter is None or parameter.shape[self.partial[0]] == 1:
            return parameter
        axis, size = self.partial
        at = axis + parameter.ndim
        return jax.lax.slice_in_dim(jnp.repeat(parameter, size, axis=at), 0, self.shape[axis], axis=at)

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> jax.Array:
        """`materialize()[rows]`, dequantizing those rows only; `rows` index the first axis and must be in range."""
        if self.partial is not None and self.partial[0] == -self.ndim:
            return self.with_whole_blocks().take_rows(rows)
        if isinstance(self.data, BitmaskSparseArray | NMSparseArray):
            codes, mask = self.data.take_rows(rows), self.data.take_mask_rows(rows)
        else:
            codes, mask = take_code_rows(self.data, rows), None
        plain = dequantize(
            codes.reshape(-1, *self.shape[1:]),
            self._spread(take_parameter_rows(self.scale, rows, self.shape[0])),
            self._spread(take_parameter_rows(self.zero_point, rows, self.shape[0])),
            levels=self.levels,
            dtype=self.dtype,
        ).reshape(*rows.shape, *self.shape[1:])
        return plain if mask is None else jnp.where(mask, plain, jnp.zeros((), plain.dtype))


# Compiled as one, so that a call outside `jit` writes no float32 temporaries.
@on_auto_axes
@functools.partial(jax.jit, static_argnames=("levels", "dtype"), inline=True)
def dequantize(
    codes: Integer[Array, "..."],
    scale: Shaped[Array, "..."],
    zero_point: Num[Array, "..."] | None = None,
    *,
    levels: tuple[float, ...] | None = None,
    dtype: Any = jnp.float32,
) -> Float[Array, "..."]:
    """(codes - zero_point) * scale, or levels[codes] * scale, block by block.

    Args:
        codes: integers of any shape.
        scale: one entry per block; see `QuantizedArray`.
        zero_point: one entry per block, or 1 on an axis.
        levels: table of the values that the codes stand for.
        dtype: of the result; the arithmetic is float32.

    Returns:
        The dequantized array, of the shape of `codes`.

    Example:
        >>> import jax.numpy as jnp
        >>> dequantize(jnp.array([[1, -2, 3, 4]], "int8"), jnp.array([[0.5, 10.0]]))
        Array([[ 0.5, -1. , 30. , 40. ]], dtype=float32)
    """
    values = codes if levels is None else jnp.asarray(levels, jnp.float32)[codes.astype(jnp.int32)]
    values = split_blocks(values.astype(jnp.float32), scale.shape)
    if zero_point is not None:
        values = values - per_block(zero_point, codes.shape, scale.shape)
    return (values * per_block(scale, codes.shape, scale.shape)).reshape(codes.shape).astype(dtype)


def split_blocks(x: Num[Array, "..."], scale_shape: tuple[int, ...]) -> Num[Array, "..."]:
    """`x` with every axis that several blocks share split in two: (blocks, block size).

    Axes with one block, or with blocks of one element, stay whole: they broadcast as they are.

    Raises:
        ValueError: the blocks do not divide the shape.
    """
    if len(scale_shape) != x.ndim or any(
        (s < 1 and n > 0) or (s and n % s) for n, s in zip(x.shape, scale_shape, strict=True)
    ):
        raise ValueError(f"Scales of shape {tuple(scale_shape)} do not divide an array of shape {x.shape}.")
    return x.reshape(
        [part for n, s in zip(x.shape, scale_shape, strict=True) for part in ((s, n // s) if 1 < s < n else (n,))]
    )


def per_block(parameter: Shaped[Array, "..."], shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> Array:
    """A scale or zero point, reshaped so that it broadcasts against `split_blocks(x, scale_shape)`."""
    sizes = zip(parameter.shape, shape, scale_shape, strict=True)
    split = [part for p, n, s in sizes for part in ((p, 1) if 1 < s < n else (p,))]
    return parameter.astype(jnp.float32).reshape(split)


def take_code_rows(data: Any, rows: Integer[Array, "..."]) -> Shaped[Array, "..."]:
    """`codes[rows]`, unpacking those rows only; of a plain array its rows."""
    if isinstance(data, PackedArray) and data.axis != -data.ndim:
        return dataclasses.replace(data, data=data.data[rows]).materialize()
    return unpacked(data)[rows]


def take_parameter_rows(parameter: Any, rows: Integer[Array, "..."], length: int) -> Any:
    """What belongs to `rows`, flattened, of an array of `length` rows: one entry per block of rows, or one for all."""
    if parameter is None or parameter.shape[0] == 1:
        return unpacked(parameter)
    rows_per_block = length // parameter.shape[0]
    return take_code_rows(parameter, (rows // rows_per_block).reshape(-1))


def _zero_is_zero(array: QuantizedArray) -> bool:
    return array.zero_point is None and array.levels is None
