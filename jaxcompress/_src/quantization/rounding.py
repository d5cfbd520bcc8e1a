"""From weights and scales to codes."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num, Shaped

from jaxcompress._src.arrays.quantized import dequantize, per_block, split_blocks
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.arithmetic import divide
from jaxcompress._src.quantization.formats import encode
from jaxcompress._src.quantization.spec import QuantSpec


@on_auto_axes
def round_to_codes(
    w: Float[Array, "..."],
    scale: Shaped[Array, "..."],
    zero_point: Num[Array, "..."] | None,
    spec: QuantSpec,
    *,
    bits: Any = None,
) -> Integer[Array, "..."]:
    """clip(round(w / scale) + zero_point), halves to even, in float32; w >= 0 at one bit; the nearest of a table.

    Args:
        w: the weights.
        scale: one entry per block, as stored.
        zero_point: as `block_scales` gives it.
        spec: gives the range of the codes.
        bits: of integers, where they are traced; whole numbers in [2, 8].

    Returns:
        int8 codes, uint8 unless `spec.signed`, of the shape of `w`.
    """
    if spec.bits == 1:
        return (w >= 0).astype(jnp.uint8)
    scaled = divide(split_blocks(w, scale.shape), per_block(scale, w.shape, scale.shape))
    if spec.levels is not None:
        return encode(scaled, spec.format, spec.bits).reshape(w.shape)
    codes = jnp.round(scaled)
    if zero_point is not None:
        codes = codes + per_block(zero_point, w.shape, scale.shape)
    codes = jnp.clip(codes, *(spec.code_range if bits is None else _code_range(spec, bits)))
    return codes.astype(jnp.int8 if spec.signed else jnp.uint8).reshape(w.shape)


def rounded(
    w: Float[Array, "..."], scale: Shaped[Array, "..."], zero_point: Num[Array, "..."] | None, spec: QuantSpec
) -> Float[Array, "..."]:
    """The nearest weights that can be stored, in float32."""
    return dequantize(round_to_codes(w, scale, zero_point, spec), scale, zero_point, levels=spec.levels)


def values_of(
    w: Float[Array, "..."], scale: Shaped[Array, "..."], zero_point: Num[Array, "..."] | None, spec: QuantSpec
) -> Float[Array, "..."]:
    """What the codes of the nearest weights stand for before scaling."""
    codes = round_to_codes(w, scale, zero_point, spec)
    return dequantize(codes, jnp.ones(scale.shape), zero_point, levels=spec.levels)


def _code_range(spec: QuantSpec, bits: Any) -> tuple[Any, Any]:
    if not spec.signed:
        return 0, 2.0**bits - 1
    highest = 2.0 ** (bits - 1) - 1
    return (-highest if spec.convention == "narrow" else -highest - 1), highest
