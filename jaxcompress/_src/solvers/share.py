"""A share of a count, without the rounding of float32 products."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, UInt32


def share_of(
    size: Int[Array, "*sizes"], share: Float[Array, "*sizes"], *, rounding: Literal["nearest", "down"] = "nearest"
) -> Int32[Array, "*sizes"]:
    """Size · share as an integer, exact for the float32 value of `share`.

    The product of a count and a float32 has up to 55 bits; float32 keeps 24 of them, so that `round(share * size)` is
    off from 2^24 entries on. Here the significand is multiplied in integers.

    Args:
        size: from 0 to 2^31 - 1.
        share: in [0, 1]; NaN counts as 1. May be traced.
        rounding: "nearest" (halves to even) or "down".

    Returns:
        From 0 to size.

    Example:
        >>> share_of(jnp.array([5, 2**30 + 1]), jnp.array([0.5, 0.75]))
        Array([        2, 805306369], dtype=int32)
    """
    bits = jax.lax.bitcast_convert_type(share.astype(jnp.float32), jnp.uint32)
    exponent = (bits >> 23) & jnp.uint32(0xFF)
    # Denormal shares are below 2^-126: of any size they are nothing.
    significand = jnp.where(exponent > 0, (bits & jnp.uint32(0x7FFFFF)) | jnp.uint32(1 << 23), jnp.uint32(0))
    high, low = _product(significand, size.astype(jnp.uint32))
    # share = significand · 2^(exponent - 150). The first 23 places go at once, which leaves 32 bits.
    shifted = (high << 9) | (low >> 23)
    lost = (low & jnp.uint32(0x7FFFFF)) != 0
    places = jnp.clip(127 - exponent.astype(jnp.int32), 0, 33).astype(jnp.uint32)
    whole = jnp.where(places < 32, shifted >> jnp.minimum(places, 31), 0)
    if rounding == "nearest":
        whole = whole + _rounds_up(shifted, lost, places, whole)
    return jnp.where(exponent >= 127, size, whole.astype(jnp.int32)).astype(jnp.int32)


def _product(a: UInt32[Array, "*n"], b: UInt32[Array, "*n"]) -> tuple[UInt32[Array, "*n"], UInt32[Array, "*n"]]:
    """A (24 bits) · b (31 bits) as two words."""
    a1, a0, b1, b0 = a >> 12, a & jnp.uint32(0xFFF), b >> 16, b & jnp.uint32(0xFFFF)
    high, low = jnp.zeros_like(a), a0 * b0
    for part, shift in ((a1 * b0, 12), (a0 * b1, 16), (a1 * b1, 28)):
        total = low + (part << shift)
        high = high + (part >> (32 - shift)) + (total < low)
        low = total
    return high, low


def _rounds_up(
    shifted: UInt32[Array, "*n"], lost: Array, places: UInt32[Array, "*n"], whole: UInt32[Array, "*n"]
) -> UInt32[Array, "*n"]:
    half = jnp.uint32(1) << jnp.clip(places, 1, 32) - 1
    rest = jnp.where(places < 32, shifted & (half * 2 - 1), shifted)
    up = (rest > half) | ((rest == half) & (lost | (whole % 2 == 1)))
    return (up & (places >= 1) & (places <= 32)).astype(jnp.uint32)
