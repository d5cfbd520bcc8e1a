"""Order statistics by counting."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32


class Threshold(NamedTuple):
    """What `search_threshold` finds.

    Attributes:
        key: t.
        below: keys below t.
        ties: keys equal to t; unless below is the rank, which leaves none of them to be split.
    """

    key: UInt32[Array, " groups"]
    below: Int32[Array, " groups"]
    ties: Int32[Array, " groups"]


class _Bracket(NamedTuple):
    """count(lower) = below <= rank <= above = count(upper), for every group.

    The weight of an end is 2 when it has just moved, and halves with every step that it stays; 2 counts as 1.
    """

    lower: UInt32[Array, " groups"]
    upper: UInt32[Array, " groups"]
    below: Int32[Array, " groups"]
    above: Int32[Array, " groups"]
    lower_weight: Float32[Array, " groups"]
    upper_weight: Float32[Array, " groups"]


def search_threshold(
    count: Callable[[UInt32[Array, " groups"]], Int32[Array, " groups"]],
    rank: Int32[Array, " groups"],
    size: Int32[Array, " groups"],
    probes: tuple[UInt32[Array, " groups"], ...],
    *,
    last: int,
) -> Threshold:
    """Finds keys t with `count(t) <= rank < count(t + 1)`, or with `count(t) == rank` if it comes across one.

    Tries the probes, then interpolates between the ends of the bracket (Illinois rule: an end that stays gets half
    the weight each time, else one end would never move). However bad the guesses, after step j the bracket is at most
    2^(33 - j) wide, so there are never more than 34 steps.

    Args:
        count: number of keys below t, in each group.
        rank: from 0 to the size of the group.
        size: of the groups.
        probes: first guesses.
        last: no key is above this one.

    Returns:
        The keys and counts.
    """
    start = _Bracket(
        lower=jnp.zeros(rank.shape, jnp.uint32),
        upper=jnp.where(rank == 0, 1, jnp.uint32(last + 1)),
        below=jnp.zeros(rank.shape, jnp.int32),
        above=size,
        lower_weight=jnp.full(rank.shape, 2, jnp.float32),
        upper_weight=jnp.full(rank.shape, 2, jnp.float32),
    )

    def narrow(carry: tuple[Array, _Bracket]) -> tuple[Array, _Bracket]:
        step, bracket = carry
        key = _interpolate(bracket, rank)
        for place, probe in enumerate(probes):
            key = jnp.where(step == place, probe, key)
        key = _safeguard(key, bracket, step)
        return step + 1, _update(bracket, key, count(key), rank)

    carry = (jnp.zeros((), jnp.int32), start)
    _, bounds = jax.lax.while_loop(lambda carry: _is_open(carry[1]).any(), narrow, carry)
    return Threshold(bounds.lower, bounds.below, bounds.above - bounds.below)


def _is_open(bracket: _Bracket) -> Bool[Array, " groups"]:
    return bracket.upper - bracket.lower > 1


def _interpolate(bracket: _Bracket, rank: Int32[Array, " groups"]) -> UInt32[Array, " groups"]:
    left = ((rank - bracket.below).astype(jnp.float32) + 0.5) * jnp.minimum(bracket.lower_weight, 1)
    right = jnp.maximum((bracket.above - rank).astype(jnp.float32) - 0.5, 0.5)
    right = right * jnp.minimum(bracket.upper_weight, 1)
    offset = (bracket.upper - bracket.lower).astype(jnp.float32) * (left / (left + right))
    # The largest float32 below 2^32: rounding must not leave the range of uint32.
    return bracket.lower + jnp.minimum(offset, 4294967040.0).astype(jnp.uint32)


def _safeguard(key: UInt32[Array, " groups"], bracket: _Bracket, step: Int32[Array, ""]) -> UInt32[Array, " groups"]:
    """The nearest key inside the bracket that leaves at most 2^(33 - step) on either side."""
    widest = jnp.left_shift(jnp.uint32(1), jnp.clip(33 - step, 0, 31).astype(jnp.uint32))
    widest = jnp.where(step < 2, jnp.uint32(0xFFFFFFFF), widest)
    wide = bracket.upper - bracket.lower > widest
    low = jnp.where(wide, bracket.upper - widest, bracket.lower + 1)
    high = jnp.where(wide, bracket.lower + widest, bracket.upper - 1)
    # A closed bracket has low > high; its key is not used.
    return jnp.clip(key, low, jnp.maximum(low, high))


def _update(
    bracket: _Bracket, key: UInt32[Array, " groups"], counted: Int32[Array, " groups"], rank: Int32[Array, " groups"]
) -> _Bracket:
    still = _is_open(bracket)
    up = still & (counted <= rank)
    down = still & (counted > rank)
    return _Bracket(
        lower=jnp.where(up, key, bracket.lower),
        upper=jnp.where(still & (counted == rank), key + 1, jnp.where(down, key, bracket.upper)),
        below=jnp.where(up, counted, bracket.below),
        above=jnp.where(down, counted, bracket.above),
        lower_weight=jnp.where(down, bracket.lower_weight / 2, 2.0),
        upper_weight=jnp.where(up, bracket.upper_weight / 2, 2.0),
    )
