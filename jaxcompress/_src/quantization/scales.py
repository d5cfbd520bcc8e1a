"""From the weights of each block to its scale and zero point."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from jaxcompress._src.arrays.quantized import split_blocks
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.arithmetic import divide, mean_magnitude
from jaxcompress._src.quantization.blocks import reduced_axes, scale_shape
from jaxcompress._src.quantization.formats import floor_log2, minifloat, power_of_two
from jaxcompress._src.quantization.ranges import block_range, least_error_range
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.trace.layout import LeafLayout


@on_auto_axes
def block_scales(
    w: Float[Array, "..."], spec: QuantSpec, layout: LeafLayout, *, bits: Any = None
) -> tuple[Shaped[Array, "..."], Num[Array, "..."] | None]:
    """The scale and the zero point of every block of `w` (b bits), from its range [low, high].

    symmetric, narrow:  scale = max(high, -low) / (2^(b-1) - 1)
    symmetric, full:    scale = max(high, -low) / (2^(b-1) - 1/2)
    asymmetric:         scale = (high - low) / (2^b - 1),  zero point = round(-low / scale)
    tables:             scale = max(high, -low) / largest level
    one bit:            scale = 2 mean|w| over the nonzero weights,  zero point = 1/2
    ternary:            scale = mean|w| over the weights above 0.7 of that mean
    fixed point:        scale = 2^-b

    The range is that of `spec.range_rule`, widened to contain 0. Scales of dtype e8m0 are the power of two at or above
    these; under small floats 2^(⌊log2 max|w|⌋ - ⌊log2 largest level⌋), as MX has it; under powers of two the nearest.

    A block of zeros, or one so small that its scale would be subnormal, gets scale 1 (0 at one bit). Ranges
    that reach the largest finite value of `w.dtype` are cut so far that no code stands for an infinity. A block that
    holds NaN or Inf gets a scale that is not finite.

    Args:
        w: the weights.
        spec: format, granularity, range.
        layout: gives the axes.
        bits: of integers, where they are traced; whole numbers in [2, 8].

    Returns:
        `(scale, zero_point)` in logical layout (see `scale_shape`). `scale` is of `spec.scale_dtype`; `zero_point` is
        None (symmetric), uint8, or, at one bit, 1/2 of `spec.scale_dtype` with size 1 on all axes but the stacked ones.

    Raises:
        ValueError: the blocks do not divide the shape; a range rule that needs a histogram.

    Example:
        >>> from jaxcompress.trace import LeafLayout
        >>> layout = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
        >>> block_scales(jnp.array([[7.0, 0.5], [-3.0, -3.5]]), QuantSpec(bits=4, convention="narrow"), layout)
        (Array([[1. , 0.5]], dtype=float32), None)
    """
    shape = scale_shape(w.shape, spec, layout)
    axes = reduced_axes(w.shape, shape)
    if spec.format == "fixed_point":
        return jnp.full(shape, 2.0**-spec.bits, jnp.float32), None
    blocks = split_blocks(w.astype(jnp.float32), shape)
    bound = _largest_magnitude(w.dtype, spec)
    if spec.bits == 1 or spec.format == "ternary":
        mean = mean_magnitude(blocks, axes)
        if spec.format == "ternary":
            return _stored_normal(_cut(_mean_above(blocks, mean, axes), bound), spec).reshape(shape), None
        kept = [size if axis in layout.stack_axes else 1 for axis, size in enumerate(shape)]
        return cast_scale(2 * _cut(mean, bound), spec).reshape(shape), jnp.full(kept, 0.5, dtype_of_scale(spec))

    def scales(low: Array, high: Array) -> tuple[Array, Array | None]:
        scale, zero_point = range_scales(_cut(low, bound), _cut(high, bound), spec, bits=bits)
        return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)

    low, high = block_range(blocks, axes, spec)
    if spec.range_rule == "mse":
        low, high = least_error_range(w, low, high, spec, scales)
    return scales(low, high)


def scales_of_shares(w: Float[Array, "..."], spec: QuantSpec, layout: LeafLayout) -> Callable[[Any, Any], Any]:
    """`(p, q) -> block_scales` of the weights with the negative ones times p and the others times q, both positive.

    Where the range of a block is that of its extreme values, they are looked for once.
    """
    if spec.range_rule != "min-max" or spec.bits == 1 or spec.format in ("ternary", "fixed_point"):
        return lambda p, q: block_scales(jnp.where(w < 0, p * w, q * w), spec, layout)
    shape, bound = scale_shape(w.shape, spec, layout), _largest_magnitude(w.dtype, spec)
    low, high = block_range(split_blocks(w.astype(jnp.float32), shape), reduced_axes(w.shape, shape), spec)

    def scales(p: Any, q: Any) -> tuple[Array, Array | None]:
        scale, zero_point = range_scales(_cut(p * low, bound), _cut(q * high, bound), spec)
        return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)

    return scales


def range_scales(
    low: Float[Array, "..."], high: Float[Array, "..."], spec: QuantSpec, *, bits: Any = None
) -> tuple[Shaped[Array, "..."], Num[Array, "..."] | None]:
    """`(scale, zero_point)` of the range [low, high], which contains 0; see `block_scales`.

    Args:
        low: at most 0.
        high: at least 0.
        spec: gives format and rounding.
        bits: of the codes.
    """
    bits = spec.bits if bits is None else bits
    largest = jnp.maximum(high, -low)
    if spec.levels is not None:
        return _stored_normal(_table_scale(largest, spec), spec), None
    if spec.symmetric:
        top = 2.0 ** (bits - 1) - (1.0 if spec.convention == "narrow" else 0.5)
        return _stored_normal(divide(largest, top), spec), None
    # Halves, because the range of float32 weights may exceed float32.
    steps = 2.0**bits - 1
    scale = _stored_normal(divide(high / 2 - low / 2, steps / 2), spec)
    zero_point = jnp.clip(jnp.round(divide(-low, scale)), 0, steps).astype(jnp.uint8)
    return scale, zero_point


def stored_scale(scale: Float[Array, "..."], spec: QuantSpec) -> Float[Array, "..."]:
    """A scale rounded to `spec.scale_dtype`, still float32."""
    return cast_scale(scale, spec).astype(jnp.float32)


def cast_scale(scale: Float[Array, "..."], spec: QuantSpec) -> Shaped[Array, "..."]:
    """A float32 scale in `spec.scale_dtype`."""
    if spec.scale_dtype == "bfloat16":
        # Inside `jit`, XLA may drop the rounding of a cast to bfloat16 and back, but never this one.
        scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    elif spec.scale_dtype == "e8m0":
        # Upwards, so that the range is not cut. E8M0 has NaN, but no Inf.
        floor = power_of_two(jnp.clip(floor_log2(scale), -126, 126))
        scale = jnp.where(jnp.isfinite(scale), jnp.where(scale > floor, 2 * floor, floor), jnp.nan)
    return scale.astype(dtype_of_scale(spec))


def dtype_of_scale(spec: QuantSpec) -> Any:
    """The dtype that `spec.scale_dtype` names."""
    return jnp.float8_e8m0fnu if spec.scale_dtype == "e8m0" else jnp.dtype(spec.scale_dtype)


def _mean_above(blocks: Float[Array, "..."], mean: Float[Array, "..."], axes: tuple[int, ...]) -> Array:
    above = jnp.abs(blocks) > jnp.float32(0.7) * jnp.broadcast_to(mean, blocks.shape)
    # NaN compares as false: it must not vanish.
    return jnp.where(jnp.isfinite(mean), mean_magnitude(jnp.where(above, blocks, 0.0), axes), mean)


def _table_scale(largest: Float[Array, "..."], spec: QuantSpec) -> Float[Array, "..."]:
    assert spec.levels is not None  # callers look
    top = max(spec.levels)
    if spec.scale_dtype != "e8m0" or spec.format == "nf4":
        return divide(largest, top)
    if minifloat(spec.format) is not None:
        # What lies above the largest level saturates, as the MX specification has it.
        exponent = floor_log2(largest) - (int(top).bit_length() - 1)
    else:
        exponent = floor_log2(divide(largest, 0.75))
    return jnp.where(jnp.isfinite(largest) & (exponent >= -126), power_of_two(jnp.maximum(exponent, -126)), largest)


def _largest_magnitude(dtype: jnp.dtype, spec: QuantSpec) -> float:
    # The outermost code stands for up to 1 / (1 - 2^-b) of the range, and bfloat16 scales are rounded up by 2^-9. At
    # one bit this halves the bound, and the scale is twice the mean. Codes times a power of two reach up to 3/2.
    narrow = spec.bits > 1 and (not spec.signed or spec.convention == "narrow") and spec.symmetric
    largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    slack = 0.5 if spec.scale_dtype == "e8m0" else 1.0
    return largest * (1 - 2.0**-8) * (1.0 if narrow else 1 - 2.0**-spec.bits) * slack


def _cut(extreme: Float[Array, "..."], bound: float) -> Float[Array, "..."]:
    # An infinity stays: the loss must show it, as it does without quantization.
    return jnp.where(jnp.isinf(extreme), extreme, jnp.clip(extreme, -bound, bound))


def _stored_normal(scale: Float[Array, "..."], spec: QuantSpec) -> Shaped[Array, "..."]:
    # Backends flush subnormal numbers to zero, and the division by such a scale would give Inf. NaN must stay NaN.
    smallest = float(jnp.finfo(jnp.float32).tiny)
    return cast_scale(jnp.where(scale < smallest, jnp.ones_like(scale), scale), spec)
