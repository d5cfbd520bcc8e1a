"""Number formats that are tables: which values their codes stand for, and how values become codes.

Sign-magnitude formats keep the sign in the highest bit and count their magnitudes from 0 in the bits below, which is
the bit pattern of FP4 and FP8.
"""

import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

Format = Literal[
    "int",
    "ternary",
    "fixed_point",
    "power_of_two",
    "nf4",
    "fp4_e2m1",
    "fp8_e4m3",
    "fp8_e5m2",
    "mxfp4",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
]

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution (Dettmers et al., "QLoRA", 2023, appendix E)."""


MINIFLOATS: dict[Format, jnp.dtype] = {
    "fp4_e2m1": jnp.dtype(jnp.float4_e2m1fn),
    "fp8_e4m3": jnp.dtype(jnp.float8_e4m3fn),
    "fp8_e5m2": jnp.dtype(jnp.float8_e5m2),
}
"""Small floats: sign, exponent with subnormals, mantissa."""

BLOCK_SCALED: dict[Format, Format] = {"mxfp4": "fp4_e2m1", "mxfp8_e4m3": "fp8_e4m3", "mxfp8_e5m2": "fp8_e5m2"}
"""OCP Microscaling formats -> the format of their elements."""

BITS: dict[Format, int] = {
    "ternary": 2,
    "nf4": 4,
    **{name: jnp.finfo(dtype).bits for name, dtype in MINIFLOATS.items()},
    **{name: jnp.finfo(MINIFLOATS[element]).bits for name, element in BLOCK_SCALED.items()},
}
"""Of the formats that have a number of bits of their own."""


@functools.cache
def table(format: Format, bits: int) -> tuple[float, ...] | None:
    """What each code of a format stands for, before scaling; None for integers.

    Example:
        >>> table("power_of_two", 3)
        (0.0, 0.25, 0.5, 1.0, -0.0, -0.25, -0.5, -1.0)
    """
    if format == "nf4":
        return NF4
    if format == "power_of_two":
        magnitudes = [0.0, *(2.0**-k for k in reversed(range(2 ** (bits - 1) - 1)))]
    elif (small := minifloat(format)) is not None:
        values = np.arange(2 ** (bits - 1), dtype=np.uint8).view(small).astype(np.float64)
        # The patterns of Inf and NaN are never made.
        magnitudes = np.where(np.isfinite(values), values, 0.0).tolist()
    else:
        return None
    return (*magnitudes, *(-value for value in magnitudes))


def minifloat(format: Format) -> jnp.dtype | None:
    """The dtype of the elements of a format, if those are small floats."""
    return MINIFLOATS.get(BLOCK_SCALED.get(format, format))


def encode(x: Float[Array, "..."], format: Format, bits: int) -> UInt8[Array, "..."]:
    """The codes of the nearest values in the table; beyond its ends, of the ends.

    Small floats round half to even; NF4 rounds half down, powers of two half up in magnitude.

    Args:
        x: float32, scaled.
        format: one that has a table.
        bits: of a code.

    Example:
        >>> encode(jnp.array([0.25, 0.75, -5.0, 9.0]), "fp4_e2m1", 4)
        Array([ 0,  2, 14,  7], dtype=uint8)
    """
    if format == "nf4":
        # Thresholds in float32, as in bitsandbytes.
        values = jnp.asarray(NF4, jnp.float32)
        codes = jnp.zeros(x.shape, jnp.uint8)
        for low, high in itertools.pairwise(values):
            codes = codes + (x > (low + high) / 2).astype(jnp.uint8)
        return codes
    small = minifloat(format)
    size = jnp.abs(x)
    magnitude = _power_of_two_code(size, bits) if small is None else _minifloat_code(size, small)
    sign = (x < 0).astype(jnp.uint8) << jnp.uint8(bits - 1)
    return magnitude.astype(jnp.uint8) | sign


def floor_log2(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """The exponent of positive float32 numbers, exact; -127 for 0 and subnormal ones."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """2^exponent in float32, exact, for exponents in [-126, 127]."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _minifloat_code(size: Float[Array, "..."], small: jnp.dtype) -> Int[Array, "..."]:
    info = jnp.finfo(small)
    largest = int(np.array(info.max, small).view(np.uint8))
    # With e the exponent, or the lowest one for subnormals, the magnitudes from 2^e on are steps of 2^(e - M): the code
    # counts steps, also where rounding reaches the next power of two.
    exponent = jnp.clip(floor_log2(size), info.minexp, 126)
    steps = jnp.round(size * power_of_two(-exponent) * 2.0**info.nmant)
    below = (exponent - info.minexp) * 2**info.nmant
    # In float32, so that infinities saturate.
    return jnp.minimum(steps + below.astype(jnp.float32), largest).astype(jnp.int32)


def _power_of_two_code(size: Float[Array, "..."], bits: int) -> Int[Array, "..."]:
    count = 2 ** (bits - 1) - 1
    # |x| lies in [3/4, 3/2) 2^e when 4/3 |x| lies in [1, 2) 2^e; without the division, which would be rounded.
    exponent = floor_log2(size)
    exponent = exponent + (size * power_of_two(-jnp.clip(exponent, -126, 126)) >= 1.5)
    code = jnp.minimum(exponent, 0) + count
    # Between 0 and the smallest magnitude the half decides.
    return jnp.where(size < 2.0**-count, 0, jnp.maximum(code, 1))
