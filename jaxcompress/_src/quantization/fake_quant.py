"""Quantization inside a loss: rounded forward, straight through backward."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxcompress._src.arrays.quantized import dequantize
from jaxcompress._src.arrays.straight_through import straight_through as straight_through
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.blocks import axes_of
from jaxcompress._src.quantization.round_to_nearest import cropped, padded
from jaxcompress._src.quantization.rounding import round_to_codes, zeros_kept
from jaxcompress._src.quantization.scales import block_scales
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.trace.layout import LeafLayout


@on_auto_axes
def fake_quantize_array(
    w: Float[Array, "..."], spec: QuantSpec, layout: LeafLayout, *, bits: Any = None
) -> Float[Array, "..."]:
    """What `quantize_array(w, spec, layout).materialize()` gives, bit for bit, with the gradient of the identity.

    Weights that are 0 stay 0. The arithmetic is float32. Two passes over `w`: its ranges, and the rounding.

    Args:
        w: the weights.
        spec: format, granularity, range.
        layout: gives the axes.
        bits: of integers, where they are traced (a schedule), whole numbers in [2, 8].

    Returns:
        An array of the shape and dtype of `w`.

    Raises:
        ValueError: blocks do not divide the shape; `bits` out of range, or with a format that has no choice of them.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.trace import LeafLayout
        >>> layout = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
        >>> fake_quantize_array(jnp.array([[7.0, 0.5], [-3.2, -3.5]]), QuantSpec(bits=4, convention="narrow"), layout)
        Array([[ 7. ,  0.5],
               [-3. , -3.5]], dtype=float32)
    """
    if bits is not None and not spec.number_format.is_integer:
        raise ValueError(f"`bits` is for integers of 2 bits or more, got {spec}.")
    if isinstance(bits, int) and not 2 <= bits <= 8:
        raise ValueError(f"`bits` must be in [2, 8], got {bits}.")
    return straight_through(_rounded(jax.lax.stop_gradient(w), bits, spec, axes_of(layout)), w)


# Compiled as one also outside `jit`: a chain of transforms applies its stages once when it is initialised.
@functools.partial(jax.jit, static_argnames=("spec", "layout"), inline=True)
def _rounded(w: Float[Array, "..."], bits: Any, spec: QuantSpec, layout: LeafLayout) -> Float[Array, "..."]:
    whole = padded(w, spec, layout)
    scale, zero_point = block_scales(whole, spec, layout, bits=bits)
    codes = round_to_codes(whole, scale, zero_point, spec, bits=bits)
    rounded = cropped(dequantize(codes, scale, zero_point, levels=spec.levels, dtype=w.dtype), w.shape)
    return zeros_kept(rounded, w, spec)
