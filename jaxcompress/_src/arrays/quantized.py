"""Codes with scales: affine and table quantization."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Integer, Num, Shaped

from jaxcompress._src.arrays.coded import CodedArray, describe_codes, take_code_rows, take_parameter_rows
from jaxcompress._src.arrays.packed import PackedArray, codes_per_block, unpacked
from jaxcompress._src.arrays.protocol import array_kind
from jaxcompress._src.arrays.sharding import component_shardings, ones_replicated, spec_entries, ways
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.arrays.static_fields import DTYPE, FLOATS, INTS, optional
from jaxcompress._src.arrays.symbolic import surely_at_most
from jaxcompress._src.arrays.validate import is_finite, require, validate_array
from jaxcompress._src.meshes import on_auto_axes


@array_kind(dtype=DTYPE, levels=optional(FLOATS), partial=optional(INTS), later={"partial": None})
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedArray(CodedArray):
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

    @on_auto_axes
    def zero_points(self) -> Num[Array, "..."] | None:
        """The zero points as a plain array, or None."""
        return unpacked(self.zero_point)

    @on_auto_axes
    def materialize(self) -> jax.Array:
        """The plain array, of the logical shape and dtype."""
        scale, zero_point = self._spread(self.scale), self._spread(self.zero_points())
        plain = dequantize(self.codes(), scale, zero_point, levels=self.levels, dtype=self.dtype)
        if isinstance(self.data, SparseArray) and not self.plain_zeros():
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
        if isinstance(self.data, SparseArray):
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

    def plain_zeros(self) -> bool:
        """Whether code 0 stands for 0."""
        return self.zero_point is None and self.levels is None

    def block_parts(self) -> list[Any]:
        """Scales and zero points."""
        return [self.scale] if self.zero_point is None else [self.scale, self.zero_point]

    def with_parts(self, data: Any, move: Callable[[Any], Any]) -> "QuantizedArray":
        """The array with other codes, and moved scales and zero points."""
        scale = move(self.scale)
        zero_point = None if self.zero_point is None else move(self.zero_points())
        return dataclasses.replace(self, data=data, scale=scale, zero_point=zero_point)

    def with_plain_parts(self) -> "QuantizedArray":
        """The same array, whose zero points are not packed."""
        return dataclasses.replace(self, zero_point=self.zero_points())

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The axes in another order."""
        moved = super().transpose(permutation)
        if moved is None or self.partial is None:
            return moved
        axis, size = self.partial
        return dataclasses.replace(moved, partial=(tuple(permutation).index(axis + self.ndim) - self.ndim, size))

    def reshape(self, shape: Sequence[int]) -> Any:
        """Another shape, in which blocks are blocks; partial ones get a scale for every entry first."""
        return super(QuantizedArray, self.with_whole_blocks()).reshape(shape)

    def slice_axis(self, axis: int, start: Any, size: int) -> Any:
        """Entries along one axis, in whole blocks; partial ones get a scale for every entry first."""
        cut = self.partial is not None and axis == self.partial[0] + self.ndim
        return super(QuantizedArray, self.with_whole_blocks() if cut else self).slice_axis(axis, start, size)

    def convolve(self, inputs: jax.Array, parameters: Mapping[str, Any]) -> jax.Array | None:
        """Codes go in, and the scales of the output features multiply what comes out.

        None for scales that vary along what is summed over, and for float16, which sums of codes exceed.
        """
        # Whole floats, which float32 and bfloat16 hold exactly.
        output = parameters["dimension_numbers"].rhs_spec[0]
        if inputs.dtype not in (jnp.float32, jnp.bfloat16) or not self._is_scaled_by(output):
            return None

        def bind(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
            return jax.lax.conv_general_dilated_p.bind(inputs, kernel, **parameters)

        def plain(inputs: jax.Array, kernel: QuantizedArray) -> jax.Array:
            return bind(inputs, kernel.materialize().astype(inputs.dtype))

        def scaled(inputs: jax.Array, kernel: QuantizedArray) -> jax.Array:
            total = bind(inputs, kernel._values().astype(inputs.dtype))
            shape = [1] * total.ndim
            shape[parameters["dimension_numbers"].out_spec[1]] = kernel.scale.size
            return (total.astype(jnp.float32) * kernel.scale.astype(jnp.float32).reshape(shape)).astype(total.dtype)

        # XLA on the CPU writes the operands of a convolution out, and its result before the scales: it is to pass over
        # the smaller of the two. Other backends multiply in the epilogue.
        outputs = jax.eval_shape(bind, inputs, jax.ShapeDtypeStruct(self.shape, inputs.dtype))
        if not surely_at_most(outputs.size, self.size):
            return jax.lax.platform_dependent(inputs, self, cpu=plain, default=scaled)
        return scaled(inputs, self)

    def _is_scaled_by(self, output: int) -> bool:
        """Whether all weights of an output feature share a scale, and code 0 of a sparse kernel stands for 0."""
        if self.partial is not None or (isinstance(self.data, SparseArray) and not self.plain_zeros()):
            return False
        counts = list(self.scale.shape)
        return counts.pop(output) in (1, self.shape[output]) and all(count == 1 for count in counts)

    def _values(self) -> Array:
        """What the codes stand for before scaling, in float32; zero points broadcast."""
        values, zero_point = self.codes(), self.zero_points()
        if self.levels is not None:
            values = jnp.asarray(self.levels, jnp.float32)[values.astype(jnp.int32)]
        return values.astype(jnp.float32) if zero_point is None else values - zero_point.astype(jnp.float32)

    def shardings(self, sharding: NamedSharding) -> Any:
        """Whole groups on every device."""
        data = component_shardings(self.data, sharding)
        if self.partial is not None:
            # Shares of an axis with partial blocks do not begin where a block does.
            entries = spec_entries(sharding, self.ndim)
            entries[self.partial[0]] = None
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*entries))
        scale = component_shardings(self.scale, sharding)
        zero_point = None if self.zero_point is None else _cut_zero_points(self.zero_point, sharding)
        return dataclasses.replace(self, data=data, scale=scale, zero_point=zero_point)

    def why_no_share(self) -> str | None:
        """Scales or zero points that are not those of the codes."""
        for axis, (size, count) in enumerate(zip(self.shape, self.scale.shape, strict=True)):
            partial = self.partial if self.partial is not None and axis == self.partial[0] + self.ndim else None
            fits = size % max(count, 1) == 0 if partial is None else -(-size // partial[1]) == count
            if count > 1 and not fits:
                return f"{count} scales along axis {axis} do not belong to {size} codes: scales are cut as codes are"
        if self.zero_point is not None:
            for axis, (zeros, count) in enumerate(zip(self.zero_point.shape, self.scale.shape, strict=True)):
                if zeros not in (1, count):
                    return (
                        f"{zeros} zero points along axis {axis} do not belong to {count} scales: packed ones can be "
                        "cut into whole bytes only; `QuantizedArray.with_plain_parts` unpacks them"
                    )
        return None

    def describe(self) -> str:
        """Codes, how weights share scales, and how zeros are stored: `int4 g32 2:4`."""
        codes, pattern = describe_codes(self.data)
        words = [codes, "levels" if self.levels is not None else "", self._describe_blocks(), pattern]
        return " ".join(word for word in words if word)

    def _describe_blocks(self) -> str:
        counts = tuple(self.scale.shape)
        sizes = [n // max(s, 1) for n, s in zip(self.shape, counts, strict=True)]
        if self.partial is not None:
            sizes[self.partial[0]] = self.partial[1]
        grouped = [size for size, s in zip(sizes, counts, strict=True) if s > 1 and size > 1]
        if not any(s > 1 for s in counts):
            return "per-tensor"
        if not grouped:
            return "per-channel" if any(size > 1 for size in sizes) else "per-weight"
        return f"g{grouped[0]}" if len(grouped) == 1 else f"b{'x'.join(map(str, grouped))}"

    def validate(self) -> None:
        """Checks the invariants."""
        self._validate_scales()
        if self.zero_point is not None:
            sizes = zip(self.zero_point.shape, self.scale.shape, strict=True)
            shapes = f"zero points {self.zero_point.shape}, scales {self.scale.shape}"
            fits = all(z in (1, s) for z, s in sizes)
            require(fits, f"Zero points have the size of the scales or 1: {shapes}.")
            require(self.zero_point.dtype != jnp.int8, "Packed zero points are unsigned.")
            validate_array(self.zero_point)
        require(jnp.issubdtype(self.dtype, jnp.floating), f"The logical dtype is a float, got {self.dtype}.")
        parts = jax.tree.leaves((self.scale, self.zero_point))
        floats = [part for part in parts if jnp.issubdtype(part.dtype, jnp.floating)]
        require(all(is_finite(part) for part in floats), "Scales and zero points must be finite.")
        if self.levels is not None:
            require(self.zero_point is None, "A table of levels has no zero point.")
            largest = int(np.asarray(self.codes()).max(initial=0))
            require(largest < len(self.levels), f"A code exceeds the {len(self.levels)} levels.")
        validate_array(self.data)

    def _validate_scales(self) -> None:
        sizes = list(self.shape)
        if self.partial is not None:
            axis, size = self.partial
            in_range = -self.ndim <= axis < 0 < size
            require(in_range, f"Partial blocks are (negative axis, size), got {self.partial}.")
            count, sizes[axis] = self.scale.shape[axis], -(-sizes[axis] // size)
            needed = f"{self.shape[axis]} entries in blocks of {size} need {sizes[axis]} scales"
            require(count == sizes[axis], f"{needed}, got {count}.")
        divides = len(self.scale.shape) == self.ndim and all(
            n % s == 0 if s else n == 0 for n, s in zip(sizes, self.scale.shape, strict=True)
        )
        require(divides, f"Scales of shape {self.scale.shape} do not divide codes of shape {self.shape}.")


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


def split_blocks(x: Num[Array, "..."], scale_shape: tuple[Any, ...]) -> Num[Array, "..."]:
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
        [part for n, s in zip(x.shape, scale_shape, strict=True) for part in ((s, n // s) if is_split(n, s) else (n,))]
    )


def is_split(size: Any, blocks: Any) -> bool:
    """Whether several blocks share an axis and hold several entries each; asked so that sizes may be symbolic."""
    return blocks != 1 and blocks != size and size != 0


def per_block(parameter: Shaped[Array, "..."], shape: tuple[Any, ...], scale_shape: tuple[Any, ...]) -> Array:
    """A scale or zero point, reshaped so that it broadcasts against `split_blocks(x, scale_shape)`."""
    sizes = zip(parameter.shape, shape, scale_shape, strict=True)
    split = [part for p, n, s in sizes for part in ((p, 1) if is_split(n, s) else (p,))]
    return parameter.astype(jnp.float32).reshape(split)


def _cut_zero_points(part: Any, sharding: NamedSharding) -> Any:
    """Packed ones are small: on an axis where shares would not be whole bytes, every device holds them all."""
    if not isinstance(part, PackedArray):
        return ones_replicated(part, sharding)
    entries = spec_entries(sharding, part.ndim)
    if part.width % (ways(sharding, entries[part.axis]) * codes_per_block(part.bits)):
        entries[part.axis] = None
    cut = ones_replicated(part, NamedSharding(sharding.mesh, PartitionSpec(*entries)))
    return dataclasses.replace(part, data=cut)
