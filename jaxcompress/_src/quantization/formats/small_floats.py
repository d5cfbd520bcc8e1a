"""Small floats: sign, exponent with subnormals, mantissa; with powers of two as scales (MX) or any others."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcompress._src.quantization.arithmetic import floor_log2, power_of_two
from jaxcompress._src.quantization.formats.tables import SignMagnitude, both_signs


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallFloat(SignMagnitude):
    """A dtype of at most 8 bits, whose bit patterns are the codes; rounds half to even, and saturates.

    Attributes:
        dtype: of `ml_dtypes`.

    Example:
        >>> FP4_E2M1.nearest(jnp.array([0.25, 0.75, -5.0, 9.0]), None)
        Array([ 0,  2, 14,  7], dtype=uint8)
    """

    dtype: Any

    def __post_init__(self) -> None:
        bits = jnp.finfo(self.dtype).bits
        values = np.arange(2 ** (bits - 1), dtype=np.uint8).view(self.dtype).astype(np.float64)
        # The patterns of Inf and NaN are never made.
        magnitudes = np.where(np.isfinite(values), values, 0.0).tolist()
        object.__setattr__(self, "levels", both_signs(magnitudes))
        super().__post_init__()

    def microscaled(self, name: str) -> "SmallFloat":
        """The OCP Microscaling format with these elements."""
        return dataclasses.replace(self, name=name, default_group_size=32, scale_dtypes=("e8m0",))

    def magnitude_codes(self, size: Float[Array, "..."]) -> Int[Array, "..."]:
        """The bit patterns."""
        info = jnp.finfo(self.dtype)
        largest = int(np.array(info.max, self.dtype).view(np.uint8))
        # With e the exponent, or the lowest one for subnormals, the magnitudes from 2^e on are steps of 2^(e - M): the
        # code counts steps, also where rounding reaches the next power of two.
        exponent = jnp.clip(floor_log2(size), info.minexp, 126)
        steps = jnp.round(size * power_of_two(-exponent) * 2.0**info.nmant)
        below = (exponent - info.minexp) * 2**info.nmant
        # In float32, so that infinities saturate.
        return jnp.minimum(steps + below.astype(jnp.float32), largest).astype(jnp.int32)

    def scale_exponent(self, largest: Float[Array, "..."]) -> Int[Array, "..."]:
        """That of the largest weight less that of the largest level: what lies above it saturates, as in MX."""
        return floor_log2(largest) - (int(self.largest).bit_length() - 1)


FP4_E2M1 = SmallFloat(name="fp4_e2m1", dtype=jnp.dtype(jnp.float4_e2m1fn))
FP8_E4M3 = SmallFloat(name="fp8_e4m3", dtype=jnp.dtype(jnp.float8_e4m3fn))
FP8_E5M2 = SmallFloat(name="fp8_e5m2", dtype=jnp.dtype(jnp.float8_e5m2))
