"""Splitting ties by place: the lowest indices are kept."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32

from jaxcompress.solvers._counting import count_true
from jaxcompress.solvers._groups import Axes, Groups, Keys
from jaxcompress.solvers._search import search_threshold

NO_END = 0xFFFFFFFF


def split_ties(
    keys: list[Keys], groups: Groups, limits: list[UInt32[Array, "..."]], dropped: Int32[Array, " groups"]
) -> list[UInt32[Array, "..."]]:
    """Ends such that, of the keys equal to the limit, all but the last `dropped` of each group lie before its end.

    The ends are found by counting, like the limits, and only where ties must be split: the leaves are not read when
    there is nothing to drop.

    Args:
        keys: of each leaf.
        groups: of the keys.
        limits: per leaf, of the shape of its groups.
        dropped: at most the number of ties of a group.

    Returns:
        Per leaf, of the shape of its groups: ends for `places`, `NO_END` where all ties stay.
    """
    each = dataclasses.replace(groups, together=False)
    shapes = each.group_shapes

    def split(dropped: Int32[Array, " groups"]) -> UInt32[Array, " parts"]:
        counts = [_ties(key, limit, axes) for key, limit, axes in zip(keys, limits, groups.axes, strict=True)]
        ties = each.join(counts)
        if groups.together:
            # The last leaves lose theirs first.
            dropped = jnp.clip(dropped - (jax.lax.cumsum(ties, reverse=True) - ties), 0, ties)
        found = _search_ends(keys, each, limits, ties, jnp.where(dropped > 0, ties - dropped, 0))
        return jnp.where(dropped > 0, found, jnp.uint32(NO_END))

    none = jnp.full(sum(math.prod(shape) for shape in shapes), NO_END, jnp.uint32)
    return each.split(jax.lax.cond((dropped > 0).any(), split, lambda _: none, dropped))


def places(shape: tuple[int, ...], axes: Axes) -> UInt32[Array, "..."]:
    """The flat index of each entry within its group."""
    place = jnp.zeros((1,) * len(shape), jnp.uint32)
    for axis in axes:
        place = place * shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def _search_ends(
    keys: list[Keys],
    each: Groups,
    limits: list[UInt32[Array, "..."]],
    ties: Int32[Array, " parts"],
    kept: Int32[Array, " parts"],
) -> UInt32[Array, " parts"]:
    """The ends before which `kept` ties lie; 0 for none."""
    wanted = [(part > 0).any() for part in each.split(kept)]

    def count(end: UInt32[Array, " parts"]) -> Int32[Array, " parts"]:
        leaves = zip(keys, limits, each.split(end), wanted, each.shapes, each.axes, strict=True)
        return each.join([_ties_before(*leaf) for leaf in leaves])

    last = max(each.sizes)
    # Ties lie anywhere: the first guesses are the ends before which a fair share of the places lies.
    share = kept / jnp.maximum(ties, 1)
    guess = (share * each.repeat(jnp.array(each.sizes, jnp.float32))).astype(jnp.uint32)
    return search_threshold(count, kept, ties, (guess, guess + 1), last=last)[0]


def _ties_before(
    key: Keys,
    limit: UInt32[Array, "..."],
    end: UInt32[Array, "..."],
    wanted: Array,
    shape: tuple[int, ...],
    axes: Axes,
) -> Int32[Array, "..."]:
    return jax.lax.cond(
        wanted,
        lambda: count_true((key(end) == limit) & (places(shape, axes) < end), axes),
        lambda: jnp.zeros(limit.shape, jnp.int32),
    )


def _ties(key: Keys, limit: UInt32[Array, "..."], axes: Axes) -> Int32[Array, "..."]:
    return count_true(key(limit) == limit, axes)
