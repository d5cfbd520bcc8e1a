"""Histograms of values whose range is not known before: bins that merge when a larger value comes.

Shape letters: S stack entries, B = `BINS` bins, N values.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jaxcompress._src.types import exportable

BINS = 4096
"""Of equal width, over both signs: 2048 to each side, of which the largest value reaches at least half."""

_BIAS = 126


@exportable
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["counts", "exponent", "lowest", "highest"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Histogram:
    """How often values occurred, in equal bins over [-2^e, 2^e).

    Attributes:
        counts: (S, B), float32; weights of rows count as such.
        exponent: (S), int32, e + 126 with the least e that holds all values; 0 of none, so that zeros are no values.
        lowest: (S), the least value, or 0.
        highest: (S), the greatest value, or 0.
    """

    counts: Any
    exponent: Any
    lowest: Any
    highest: Any

    @property
    def limit(self) -> Float32[Array, "*stack"]:
        """2^e."""
        return jnp.ldexp(jnp.ones(self.exponent.shape, jnp.float32), self.exponent - _BIAS)


def empty_histogram(stack: Sequence[int]) -> Histogram:
    """The histogram of no values."""
    blank = jnp.zeros(tuple(stack), jnp.float32)
    return Histogram(
        counts=jnp.zeros((*stack, BINS), jnp.float32),
        exponent=jnp.zeros(tuple(stack), jnp.int32),
        lowest=blank,
        highest=blank,
    )


def histogram_of(x: Float[Array, "*stack N"], weights: Float32[Array, " N"] | None) -> Histogram:
    """The histogram of some values.

    Args:
        x: finite.
        weights: at least 0; values of weight 0 do not count. None counts each once.

    Example:
        >>> histogram = histogram_of(jnp.array([0.0, -0.6, 0.6]), None)
        >>> histogram.limit.item(), jnp.flatnonzero(histogram.counts).tolist()
        (1.0, [819, 2048, 3276])
    """
    x = x.astype(jnp.float32)
    weight = jnp.ones(x.shape[-1:], jnp.float32) if weights is None else weights
    x = jnp.where(jnp.broadcast_to(weight, x.shape) > 0, x, 0.0)
    largest = jnp.abs(x).max(axis=-1, initial=0)
    # The next power of two above the largest value: frexp gives it without rounding.
    exponent = jnp.where(largest > 0, jnp.maximum(jnp.frexp(largest)[1], -_BIAS), -_BIAS)
    place = jnp.floor(jnp.ldexp(x, -exponent[..., None]) * (BINS // 2)).astype(jnp.int32) + BINS // 2
    flat = jnp.clip(place, 0, BINS - 1).reshape(-1, x.shape[-1])
    counts = jax.vmap(lambda row: jnp.zeros(BINS, jnp.float32).at[row].add(weight))(flat)
    return Histogram(
        counts=counts.reshape(*x.shape[:-1], BINS),
        exponent=exponent.astype(jnp.int32) + _BIAS,
        lowest=x.min(axis=-1, initial=0),
        highest=x.max(axis=-1, initial=0),
    )


def add_histograms(first: Histogram, second: Histogram) -> Histogram:
    """The histogram of both sets of values: exactly that of all of them at once."""
    exponent = jnp.maximum(first.exponent, second.exponent)
    return Histogram(
        counts=_widened(first, exponent) + _widened(second, exponent),
        exponent=exponent,
        lowest=jnp.minimum(first.lowest, second.lowest),
        highest=jnp.maximum(first.highest, second.highest),
    )


def _widened(histogram: Histogram, exponent: Int[Array, "*stack"]) -> Float32[Array, "*stack B"]:
    """The counts in bins over a wider range: 2^d bins become one."""
    merged = jnp.clip(exponent - histogram.exponent, 0, 31)
    offsets = jnp.arange(BINS, dtype=jnp.int32) - BINS // 2
    # Shifting rounds down, so that bins merge away from 0 on both sides alike.
    places = (jnp.broadcast_to(offsets, histogram.counts.shape) >> merged[..., None]) + BINS // 2
    flat = jax.vmap(lambda counts, place: jnp.zeros(BINS, jnp.float32).at[place].add(counts))
    return flat(histogram.counts.reshape(-1, BINS), places.reshape(-1, BINS)).reshape(histogram.counts.shape)
