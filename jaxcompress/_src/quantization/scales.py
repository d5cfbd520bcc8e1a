"""From the weights of each block to its scale and zero point."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from jaxcompress._src.arrays.quantized import split_blocks
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.arithmetic import floor_log2, limited, normal, power_of_two
from jaxcompress._src.quantization.blocks import reduced_axes, scale_shape
from jaxcompress._src.quantization.ranges import block_range, least_error_range
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.trace.layout import LeafLayout


@on_auto_axes
def block_scales(
    w: Float[Array, "..."], spec: QuantSpec, layout: LeafLayout, *, bits: Any = None
) -> tuple[Shaped[Array, "..."], Num[Array, "..."] | None]:
    """The scale and the zero point of every block of `w`, by the rule of its format, mostly from its range [low, high].

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
    blocks = split_blocks(w.astype(jnp.float32), shape)
    bound = _largest_magnitude(w.dtype, spec)
    if not spec.number_format.uses_range:
        scale = cast_scale(spec.number_format.scale_of_weights(blocks, axes, bound), spec)
        return scale.reshape(shape), fixed_zero_points(shape, spec, layout)

    def scales(low: Array, high: Array) -> tuple[Array, Array | None]:
        scale, zero_point = range_scales(limited(low, bound), limited(high, bound), spec, bits=bits)
        return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)

    low, high = block_range(blocks, axes, spec)
    if spec.range_rule == "mse":
        low, high = least_error_range(w, low, high, spec, scales, bits=bits)
    return scales(low, high)


def scales_of_shares(
    w: Float[Array, "..."], spec: QuantSpec, layout: LeafLayout, *, bits: Any = None
) -> Callable[[Any, Any], Any]:
    """`(p, q) -> block_scales` of the weights with the negative ones times p and the others times q, both positive.

    Where the range of a block is that of its extreme values, they are looked for once.
    """
    if spec.range_rule != "min-max" or not spec.number_format.uses_range:
        return lambda p, q: block_scales(jnp.where(w < 0, p * w, q * w), spec, layout, bits=bits)
    shape, bound = scale_shape(w.shape, spec, layout), _largest_magnitude(w.dtype, spec)
    low, high = block_range(split_blocks(w.astype(jnp.float32), shape), reduced_axes(w.shape, shape), spec)

    def scales(p: Any, q: Any) -> tuple[Array, Array | None]:
        scale, zero_point = range_scales(limited(p * low, bound), limited(q * high, bound), spec, bits=bits)
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
    numbers = spec.number_format.with_traced_bits(bits)
    scale = (numbers.power_of_two_scale if spec.scale_dtype == "e8m0" else numbers.scale)(low, high)
    scale = cast_scale(normal(scale), spec)
    return scale, numbers.zero_point(low, scale)


def fixed_zero_points(shape: Sequence[Any], spec: QuantSpec, layout: LeafLayout) -> Float[Array, "..."] | None:
    """Zero points that the format fixes, for scales of this shape, of size 1 on all axes but the stacked ones."""
    fixed = spec.number_format.fixed_zero_point
    if fixed is None:
        return None
    sizes = [size if axis in layout.stack_axes else 1 for axis, size in enumerate(shape)]
    return jnp.full(sizes, fixed, dtype_of_scale(spec))


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


def _largest_magnitude(dtype: jnp.dtype, spec: QuantSpec) -> float:
    # The outermost code may stand for more than the end of the range, and bfloat16 scales are rounded up by 2^-9. Codes
    # times a power of two reach up to 3/2.
    largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    slack = 0.5 if spec.scale_dtype == "e8m0" else 1.0
    return largest * (1 - 2.0**-8) * spec.number_format.range_share * slack
