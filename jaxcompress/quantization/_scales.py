"""From the range of each block of weights to its scale and zero point."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxcompress.arrays import split_blocks
from jaxcompress.quantization._arithmetic import divide, mean_magnitude
from jaxcompress.quantization._blocks import reduced_axes, scale_shape
from jaxcompress.quantization._spec import QuantSpec
from jaxcompress.trace import LeafLayout


def block_scales(
    w: Float[Array, "..."], spec: QuantSpec, layout: LeafLayout
) -> tuple[Float[Array, "..."], Num[Array, "..."] | None]:
    """The scale and the zero point of every block of `w`, by its extreme values (b bits).

    symmetric, narrow:  scale = max|w| / (2^(b-1) - 1)
    symmetric, full:    scale = max|w| / (2^(b-1) - 1/2)
    asymmetric:         scale = (max(w, 0) - min(w, 0)) / (2^b - 1),  zero point = round(-min(w, 0) / scale)
    one bit:            scale = 2 mean|w| over the nonzero weights,  zero point = 1/2

    A block of zeros, or one so small that its scale would be subnormal, gets scale 1 (0 at one bit). Ranges that reach
    the largest finite value of `w.dtype` are cut so far that no code stands for an infinity. A block that holds NaN or
    Inf gets a scale that is not finite.

    Args:
        w: the weights.
        spec: bits, granularity, variant.
        layout: gives the axes.

    Returns:
        `(scale, zero_point)` in logical layout (see `scale_shape`). `scale` is of `spec.scale_dtype`; `zero_point` is
        None (symmetric), uint8, or, at one bit, 1/2 of `spec.scale_dtype` with size 1 on all axes but the stacked ones.

    Raises:
        ValueError: the blocks do not divide the shape.

    Example:
        >>> from jaxcompress.trace import LeafLayout
        >>> layout = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
        >>> block_scales(jnp.array([[7.0, 0.5], [-3.0, -3.5]]), QuantSpec(bits=4), layout)
        (Array([[1. , 0.5]], dtype=float32), None)
    """
    shape = scale_shape(w.shape, spec, layout)
    axes = reduced_axes(w.shape, shape)
    blocks = split_blocks(w.astype(jnp.float32), shape)
    bound = _largest_magnitude(w.dtype, spec)
    if spec.bits == 1:
        scale = _stored(2 * _cut(mean_magnitude(blocks, axes), bound), spec)
        kept = [size if axis in layout.stack_axes else 1 for axis, size in enumerate(shape)]
        return scale.reshape(shape), jnp.full(kept, 0.5, spec.scale_dtype)
    highest = _cut(blocks.max(axis=axes, keepdims=True, initial=0), bound)
    lowest = _cut(blocks.min(axis=axes, keepdims=True, initial=0), bound)
    if spec.symmetric:
        top = spec.code_range[1]
        levels = top if spec.convention == "narrow" else top + 0.5
        return _normal(divide(jnp.maximum(highest, -lowest), levels), spec).reshape(shape), None
    # Halves, because the range of float32 weights may exceed float32.
    scale = _normal(divide(highest / 2 - lowest / 2, (2**spec.bits - 1) / 2), spec)
    zero_point = jnp.clip(jnp.round(divide(-lowest, scale)), *spec.code_range).astype(jnp.uint8)
    return scale.reshape(shape), zero_point.reshape(shape)


def _largest_magnitude(dtype: jnp.dtype, spec: QuantSpec) -> float:
    # The outermost code stands for up to 1 / (1 - 2^-b) of the range, and bfloat16 scales are rounded up by 2^-9. At
    # one bit this halves the bound, and the scale is twice the mean.
    narrow = spec.signed and spec.convention == "narrow"
    largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    return largest * (1 - 2.0**-8) * (1.0 if narrow else 1 - 2.0**-spec.bits)


def _cut(extreme: Float[Array, "..."], bound: float) -> Float[Array, "..."]:
    # An infinity stays: the loss must show it, as it does without quantization.
    return jnp.where(jnp.isinf(extreme), extreme, jnp.clip(extreme, -bound, bound))


def _normal(scale: Float[Array, "..."], spec: QuantSpec) -> Float[Array, "..."]:
    # Backends flush subnormal numbers to zero, and the division by such a scale would give Inf. NaN must stay NaN.
    smallest = float(jnp.finfo(jnp.float32).tiny)
    return _stored(jnp.where(scale < smallest, jnp.ones_like(scale), scale), spec)


def _stored(scale: Float[Array, "..."], spec: QuantSpec) -> Float[Array, "..."]:
    if spec.scale_dtype == "bfloat16":
        # Inside `jit`, XLA may drop the rounding of a cast to bfloat16 and back, but never this one.
        scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    return scale.astype(spec.scale_dtype)
