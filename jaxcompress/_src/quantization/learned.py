"""Rounding with learned steps (LSQ): the derivatives by scale and zero point.

With v the value, s the scale, z the zero point, [n, p] the codes and r = v / s + z:

    v' = (clip(round(r), n, p) - z) s

    dv'/dv = 1              where n < r < p, else 0
    dv'/ds = g (v' - v) / s where n < r < p, else g v' / s
    dv'/dz = 0              where n < r < p, else -g s

with g = 1 / sqrt(N p), N values that share the step. Of a table, levels[code] stands for code - z.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress._src.arrays.quantized import dequantize, per_block, split_blocks
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.arithmetic import divide
from jaxcompress._src.quantization.rounding import round_to_codes, zeros_kept
from jaxcompress._src.quantization.scales import stored_scale
from jaxcompress._src.quantization.spec import QuantSpec

Gradient = Literal["lsq", "pact"]
"""How a step learns: by the formula above, or from what it clips alone (its second and third case)."""


@on_auto_axes
def learned_quantize_array(
    v: Float[Array, "..."],
    scale: Float[Array, "..."],
    zero_point: Float[Array, "..."] | None,
    spec: QuantSpec,
    *,
    count: int | None = None,
    gradient: Gradient = "lsq",
) -> Float[Array, "..."]:
    """`v` rounded under learned scales, with the derivatives above.

    Args:
        v: values.
        scale: one entry per block, float32, positive; rounded to `spec.scale_dtype` before use.
        zero_point: None for symmetric formats; otherwise float32, rounded to a code before use, so that 0 stays 0.
        spec: format.
        count: N; by default the size of a block.
        gradient: "pact" lets the step learn only from values that it clips, without the factor g.

    Returns:
        An array of the shape and dtype of `v`.

    Example:
        >>> v, scale = jnp.array([[0.4], [1.3], [9.0]]), jnp.array([[1.0]])
        >>> learned_quantize_array(v, scale, None, QuantSpec(bits=3))[:, 0]
        Array([0., 1., 3.], dtype=float32)
        >>> jax.grad(lambda s: learned_quantize_array(v, s, None, QuantSpec(bits=3)).sum())(scale) * 3  # g = 1/3
        Array([[2.3]], dtype=float32)

    References:
        Esser et al., "Learned step size quantization", 2020, equations 2 to 4; Bhalgat et al., "LSQ+", 2020 (zero
        point); Choi et al., "PACT", 2018.
    """
    size = v.size // max(scale.size, 1) if count is None else count
    factor = gradient_factor(spec, size) if gradient == "lsq" else 1.0
    return _learned(v, scale, zero_point, spec, factor, gradient)


def gradient_factor(spec: QuantSpec, count: int) -> float:
    """G = 1 / sqrt(N p), with p the number of steps above 0."""
    return 1 / math.sqrt(max(count, 1) * spec.number_format.steps_above_zero)


def whole_zero_point(zero_point: Float[Array, "..."] | None, spec: QuantSpec) -> Any:
    """A learned zero point as it is stored; one that the format fixes stays."""
    if zero_point is None or spec.number_format.fixed_zero_point is not None:
        return zero_point
    return jnp.clip(jnp.round(zero_point), *spec.code_range).astype(jnp.uint8)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _learned(v: Any, scale: Any, zero_point: Any, spec: QuantSpec, factor: float, gradient: Gradient) -> Any:
    del factor, gradient
    return _rounded(v, scale, zero_point, spec)


@_learned.defjvp
def _learned_jvp(spec: QuantSpec, factor: float, gradient: Gradient, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (v, scale, zero_point), (v_dot, scale_dot, zero_dot) = primals, tangents
    inside, scaled, values = _parts(v, scale, zero_point, spec)
    shape = scale.shape

    def blocks(parameter: Array) -> Array:
        return per_block(parameter, v.shape, shape)

    slope = jnp.where(inside, values - scaled if gradient == "lsq" else 0.0, values)
    tangent = jnp.where(inside, split_blocks(v_dot.astype(jnp.float32), shape), 0.0)
    tangent = tangent + factor * slope * blocks(scale_dot)
    if zero_point is not None and spec.number_format.fixed_zero_point is None:
        step = blocks(stored_scale(scale, spec))
        tangent = tangent - factor * jnp.where(inside, 0.0, step) * blocks(zero_dot)
    return _learned(v, scale, zero_point, spec, factor, gradient), tangent.reshape(v.shape).astype(v.dtype)


def _parts(v: Array, scale: Array, zero_point: Any, spec: QuantSpec) -> tuple[Array, Array, Array]:
    """Which values lie inside the range, v / s, and v' / s; in blocks."""
    scale = stored_scale(scale, spec)
    whole = whole_zero_point(zero_point, spec)
    scaled = divide(split_blocks(v, scale.shape), per_block(scale, v.shape, scale.shape))
    codes = round_to_codes(v, scale, whole, spec)
    values = split_blocks(dequantize(codes, jnp.ones_like(scale), whole, levels=spec.levels), scale.shape)
    zeros = None if whole is None else per_block(whole, v.shape, scale.shape)
    return spec.number_format.is_inside(scaled, zeros), scaled, values


# Compiled as one also outside `jit`, so that the same bits come out.
@functools.partial(jax.jit, static_argnames="spec", inline=True)
def _rounded(v: Any, scale: Any, zero_point: Any, spec: QuantSpec) -> Any:
    scale, whole = stored_scale(scale, spec), whole_zero_point(zero_point, spec)
    codes = round_to_codes(v, scale, whole, spec)
    rounded = dequantize(codes, scale, whole, levels=spec.levels, dtype=v.dtype)
    return zeros_kept(rounded, v, spec)
