"""From weights and scales to codes."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num, Shaped

from jaxcompress._src.arrays.quantized import dequantize, per_block, split_blocks
from jaxcompress._src.meshes import on_auto_axes
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
    """The codes of the nearest weights that can be stored: of integers clip(round(w / scale) + zero_point), in float32.

    Args:
        w: the weights.
        scale: one entry per block, as stored.
        zero_point: as `block_scales` gives it.
        spec: gives the format.
        bits: of integers, where they are traced; whole numbers in [2, 8].

    Returns:
        int8 codes, uint8 unless `spec.signed`, of the shape of `w`.
    """
    blocks, shape = split_blocks(w, scale.shape), scale.shape
    zeros = None if zero_point is None else per_block(zero_point, w.shape, shape)
    numbers = spec.number_format.with_traced_bits(bits)
    return numbers.codes(blocks, per_block(scale, w.shape, shape), zeros).reshape(w.shape)


def rounded(
    w: Float[Array, "..."],
    scale: Shaped[Array, "..."],
    zero_point: Num[Array, "..."] | None,
    spec: QuantSpec,
    *,
    bits: Any = None,
) -> Float[Array, "..."]:
    """The nearest weights that can be stored, in float32; arguments as for `round_to_codes`."""
    return dequantize(round_to_codes(w, scale, zero_point, spec, bits=bits), scale, zero_point, levels=spec.levels)


def values_of(
    w: Float[Array, "..."],
    scale: Shaped[Array, "..."],
    zero_point: Num[Array, "..."] | None,
    spec: QuantSpec,
    *,
    bits: Any = None,
) -> Float[Array, "..."]:
    """What the codes of the nearest weights stand for before scaling; arguments as for `round_to_codes`."""
    codes = round_to_codes(w, scale, zero_point, spec, bits=bits)
    return dequantize(codes, jnp.ones(scale.shape), zero_point, levels=spec.levels)


def zeros_kept(values: Float[Array, "..."], w: Float[Array, "..."], spec: QuantSpec) -> Float[Array, "..."]:
    """Rounded weights, with 0 where `w` is 0 also in formats that have no code for it."""
    return values if spec.number_format.has_zero else jnp.where(w == 0, jnp.zeros_like(values), values)
