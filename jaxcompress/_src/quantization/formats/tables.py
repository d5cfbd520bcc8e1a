"""Formats that are tables of the values their codes stand for."""

import abc
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxcompress._src.quantization.arithmetic import power_of_two
from jaxcompress._src.quantization.formats.number_format import NumberFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(NumberFormat):
    """Any values, in ascending order: the codes of the nearest ones, halves down.

    The largest magnitude of the table is that of the largest weight of a block.

    Raises:
        ValueError: `levels` are no tuple, do not ascend, or are fewer than 2 or more than 256.

    Example:
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> cubes = Table(name="cubes", levels=(-8.0, -1.0, 0.0, 1.0, 8.0))
        >>> small, _ = quantize({"kernel": jnp.array([[16.0], [-3.0]])}, QuantSpec(format=cubes))
        >>> small["kernel"].materialize()
        Array([[16.], [-2.]], dtype=float32)
    """

    bits: Any = 0
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.levels, tuple):
            raise ValueError(f"The levels of a table are a tuple, which can be hashed, got {self.levels!r}.")
        if not 2 <= len(self.levels) <= 256:
            raise ValueError(f"A table has 2 to 256 levels, got {len(self.levels)}.")
        self._check_order()
        object.__setattr__(self, "bits", math.ceil(math.log2(len(self.levels))))

    def _check_order(self) -> None:
        if any(low >= high for low, high in itertools.pairwise(self.levels)):
            raise ValueError(f"The levels of a table ascend, got {self.levels}.")

    @property
    def signed(self) -> bool:
        """Codes count levels."""
        return False

    @property
    def code_range(self) -> tuple[int, int]:
        """The places of the levels."""
        return 0, len(self.levels) - 1

    @property
    def has_zero(self) -> bool:
        """Whether it is a level."""
        return 0.0 in self.levels

    @property
    def steps_above_zero(self) -> int:
        """Of as many codes of both signs."""
        return max(2 ** (self.bits - 1) - 1, 1)

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(map(abs, self.levels))

    def nearest(self, scaled: Float[Array, "..."], zero_point: Num[Array, "..."] | None) -> Num[Array, "..."]:
        """How many thresholds a value exceeds."""
        del zero_point
        # Thresholds in float32, as in bitsandbytes.
        values = jnp.asarray(self.levels, jnp.float32)
        codes = jnp.zeros(scaled.shape, jnp.uint8)
        for low, high in itertools.pairwise(values):
            codes = codes + (scaled > (low + high) / 2).astype(jnp.uint8)
        return codes

    def is_inside(self, scaled: Float[Array, "..."], zero_point: Num[Array, "..."] | None) -> Bool[Array, "..."]:
        """Which values lie between the outermost levels."""
        del zero_point
        return (min(self.levels) < scaled) & (scaled < max(self.levels))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignMagnitude(Table):
    """The sign in the highest bit, and the magnitudes, counted from 0, in the bits below."""

    def _check_order(self) -> None:
        pass

    @abc.abstractmethod
    def magnitude_codes(self, size: Float[Array, "..."]) -> Int[Array, "..."]:
        """The codes of the nearest magnitudes."""

    @abc.abstractmethod
    def scale_exponent(self, largest: Float[Array, "..."]) -> Int[Array, "..."]:
        """The exponent of the power of two that scales a block with this largest magnitude."""

    def nearest(self, scaled: Float[Array, "..."], zero_point: Num[Array, "..."] | None) -> Num[Array, "..."]:
        """Sign and magnitude."""
        del zero_point
        sign = (scaled < 0).astype(jnp.uint8) << jnp.uint8(self.bits - 1)
        return self.magnitude_codes(jnp.abs(scaled)).astype(jnp.uint8) | sign

    def power_of_two_scale(self, low: Float[Array, "..."], high: Float[Array, "..."]) -> Float[Array, "..."]:
        """2^exponent; what has none that is normal stays, and is seen to later."""
        largest = jnp.maximum(high, -low)
        exponent = self.scale_exponent(largest)
        is_normal = jnp.isfinite(largest) & (exponent >= -126)
        return jnp.where(is_normal, power_of_two(jnp.maximum(exponent, -126)), largest)


def both_signs(magnitudes: Sequence[float]) -> tuple[float, ...]:
    """The levels of sign and magnitude.

    Example:
        >>> both_signs([0.0, 1.0])
        (0.0, 1.0, -0.0, -1.0)
    """
    return (*magnitudes, *(-value for value in magnitudes))


NF4 = Table(
    name="nf4",
    levels=(
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
"""Quantiles of a normal distribution (Dettmers et al., "QLoRA", 2023, appendix E)."""
