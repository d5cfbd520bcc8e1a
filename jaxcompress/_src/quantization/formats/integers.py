"""Whole numbers, signed or with a zero point."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from jaxcompress._src.quantization.arithmetic import divide
from jaxcompress._src.quantization.formats.means import OneBit
from jaxcompress._src.quantization.formats.number_format import Convention, NumberFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integers(NumberFormat):
    """Whole numbers of b bits; one bit is a format of its own.

    symmetric, narrow:  scale = max(high, -low) / (2^(b-1) - 1)
    symmetric, full:    scale = max(high, -low) / (2^(b-1) - 1/2)
    asymmetric:         scale = (high - low) / (2^b - 1),  zero point = round(-low / scale)

    Attributes:
        symmetric: signed codes and no zero point.
        convention: of symmetric codes; see `QuantSpec`.
    """

    symmetric: bool = True
    convention: Convention = "narrow"

    is_integer = True

    def configured(self, *, bits: int, symmetric: bool, convention: Convention) -> NumberFormat:
        """The integers of a spec."""
        if bits == 1:
            return OneBit(name=self.name)
        return dataclasses.replace(self, bits=bits, symmetric=symmetric, convention=convention)

    @property
    def signed(self) -> bool:
        """Whether there is no zero point."""
        return self.symmetric

    @property
    def code_range(self) -> tuple[Any, Any]:
        """The lowest and the highest code."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        highest = 2 ** (self.bits - 1) - 1
        return (-highest if self.convention == "narrow" else -highest - 1), highest

    @property
    def largest(self) -> Any:
        """Of symmetric codes."""
        return 2.0 ** (self.bits - 1) - (1.0 if self.convention == "narrow" else 0.5)

    @property
    def range_share(self) -> float:
        """Codes of both signs reach as far as the range, others up to 1 / (1 - 2^-b) of it."""
        return 1.0 if self.symmetric and self.convention == "narrow" else 1 - 2.0**-self.bits

    def scale(self, low: Float[Array, "..."], high: Float[Array, "..."]) -> Float[Array, "..."]:
        """The scale of a range."""
        if self.symmetric:
            return super().scale(low, high)
        # Halves, because the range of float32 weights may exceed float32.
        return divide(high / 2 - low / 2, (2.0**self.bits - 1) / 2)

    def zero_point(self, low: Float[Array, "..."], scale: Shaped[Array, "..."]) -> Num[Array, "..."] | None:
        """The code of 0."""
        if self.symmetric:
            return None
        return jnp.clip(jnp.round(divide(-low, scale)), 0, 2.0**self.bits - 1).astype(jnp.uint8)
