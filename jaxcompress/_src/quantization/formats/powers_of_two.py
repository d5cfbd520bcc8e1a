"""0 and powers of two with both signs."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress._src.quantization.arithmetic import divide, floor_log2, power_of_two
from jaxcompress._src.quantization.formats.number_format import NumberFormat
from jaxcompress._src.quantization.formats.tables import SignMagnitude, both_signs


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowersOfTwo(SignMagnitude):
    """0 and ±2^-k, k < 2^(bits-1) - 1; the nearest, half up in magnitude.

    Example:
        >>> PowersOfTwo(name="power_of_two").with_bits(3).levels
        (0.0, 0.25, 0.5, 1.0, -0.0, -0.25, -0.5, -1.0)
    """

    def __post_init__(self) -> None:
        if self.bits:
            count = 2 ** (self.bits - 1) - 1
            object.__setattr__(self, "levels", both_signs([0.0, *(2.0**-k for k in reversed(range(count)))]))

    def with_bits(self, bits: int) -> NumberFormat:
        """The format with so many bits."""
        if not 2 <= bits <= 6:
            raise ValueError(f"Powers of two have 2 to 6 bits, got `bits` {bits}.")
        return super().with_bits(bits)

    def magnitude_codes(self, size: Float[Array, "..."]) -> Int[Array, "..."]:
        """Code c stands for 2^(c - count)."""
        count = 2 ** (self.bits - 1) - 1
        # |x| lies in [3/4, 3/2) 2^e when 4/3 |x| lies in [1, 2) 2^e; without the division, which would be rounded.
        exponent = floor_log2(size)
        exponent = exponent + (size * power_of_two(-jnp.clip(exponent, -126, 126)) >= 1.5)
        code = jnp.minimum(exponent, 0) + count
        # Between 0 and the smallest magnitude the half decides.
        return jnp.where(size < 2.0**-count, 0, jnp.maximum(code, 1))

    def scale_exponent(self, largest: Float[Array, "..."]) -> Int[Array, "..."]:
        """The nearest power of two."""
        return floor_log2(divide(largest, 0.75))
