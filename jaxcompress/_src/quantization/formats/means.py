"""Formats whose scales are means of |w|: one bit, and ternary."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Num, Shaped

from jaxcompress._src.quantization.arithmetic import limited, mean_magnitude, normal
from jaxcompress._src.quantization.formats.number_format import Convention, NumberFormat, ScaleDtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mean(NumberFormat):
    uses_range = False

    def check_scale_dtype(self, scale_dtype: ScaleDtype) -> None:
        """Raises for powers of two."""
        if scale_dtype == "e8m0":
            raise ValueError("Scales that are means of |w| (one bit, ternary) are no powers of two; got 'e8m0'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneBit(_Mean):
    """The sign (XNOR-Net): codes {0, 1}, zero point 1/2, scale 2 mean|w| over the nonzero weights.

    There is no code for 0. A block of zeros has scale 0.
    """

    bits: Any = 1

    # The mean is already the scale of least squares.
    has_range_search = False
    fixed_zero_point = 0.5

    def configured(self, *, bits: int, symmetric: bool, convention: Convention) -> NumberFormat:
        """`symmetric` and `convention` play no role."""
        del symmetric, convention
        return self.with_bits(bits)

    @property
    def signed(self) -> bool:
        """Codes are 0 and 1."""
        return False

    @property
    def code_range(self) -> tuple[int, int]:
        """Those."""
        return 0, 1

    @property
    def has_zero(self) -> bool:
        """Only the signs."""
        return False

    @property
    def range_share(self) -> float:
        """So that twice the mean is finite."""
        return 0.5

    def scale(self, low: Float[Array, "..."], high: Float[Array, "..."]) -> Float[Array, "..."]:
        """Raises: a range says nothing about the mean."""
        raise ValueError("One bit has the mean of |w| as its scale, and no range: take 2 bits or more.")

    def scale_of_weights(self, blocks: Float[Array, "..."], axes: tuple[int, ...], bound: float) -> Float[Array, "..."]:
        """Twice the mean, so that codes less 1/2 stand for it."""
        return 2 * limited(mean_magnitude(blocks, axes), bound)

    def codes(
        self, blocks: Float[Array, "..."], scale: Shaped[Array, "..."], zero_point: Num[Array, "..."] | None
    ) -> Integer[Array, "..."]:
        """Whether weights are at least 0, whatever the scale."""
        del scale, zero_point
        return (blocks >= 0).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(_Mean):
    """-1, 0 and 1; the scale is the mean of |w| over the weights above 0.7 of the mean of all."""

    bits: Any = 2

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return -1, 1

    def scale_of_weights(self, blocks: Float[Array, "..."], axes: tuple[int, ...], bound: float) -> Float[Array, "..."]:
        """The mean of the large weights."""
        mean = mean_magnitude(blocks, axes)
        above = jnp.abs(blocks) > jnp.float32(0.7) * jnp.broadcast_to(mean, blocks.shape)
        # NaN compares as false: it must not vanish.
        large = jnp.where(jnp.isfinite(mean), mean_magnitude(jnp.where(above, blocks, 0.0), axes), mean)
        return normal(limited(large, bound))
