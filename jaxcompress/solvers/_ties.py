"""Splitting ties by place: the lowest indices are kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, UInt32

from jaxcompress.solvers._counting import count_true
from jaxcompress.solvers._groups import Axes, Groups, Keys
from jaxcompress.solvers._search import search_threshold

NO_END = 0xFFFFFFFF


def split_ties(
    keys: list[Keys],
    groups: Groups,
    limits: list[UInt32[Array, "..."]],
    ties: Int32[Array, " groups"],
    dropped: Int32[Array, " groups"],
) -> list[Bool[Array, "..."]]:
    """Which places lie before the last `dropped` keys that equal the limit of their group.

    The end of each group is found by counting, like the limit. Where nothing is dropped the leaves are not read.

    Args:
        keys: of each leaf.
        groups: of the keys.
        limits: per leaf, of the shape of its groups.
        ties: number of keys that equal the limit.
        dropped: less than that.

    Returns:
        A mask for each leaf.
    """
    places = [_places(shape, axes) for shape, axes in zip(groups.shapes, groups.axes, strict=True)]

    def count(ends: UInt32[Array, " groups"]) -> Int32[Array, " groups"]:
        leaves = zip(keys, limits, places, _local_ends(groups, ends), groups.axes, strict=True)
        return groups.join([count_true((key(end) == limit) & (at < end), axes) for key, limit, at, end, axes in leaves])

    kept = jnp.where(dropped > 0, ties - dropped, 0)
    # Ties lie anywhere: the first guess gives every tie the same share of the places.
    share = kept.astype(jnp.float32) / jnp.maximum(ties, 1).astype(jnp.float32)
    guess = (share * groups.repeat(jnp.array(groups.sizes, jnp.float32))).astype(jnp.uint32)
    ends = search_threshold(count, kept, ties, (guess,), last=max(groups.sizes)).key
    ends = _local_ends(groups, jnp.where(dropped > 0, ends, jnp.uint32(NO_END)))
    return [at < end for at, end in zip(places, ends, strict=True)]


def _local_ends(groups: Groups, ends: UInt32[Array, " groups"]) -> list[UInt32[Array, "..."]]:
    """The ends, counted from the first entry of each leaf.

    Offsets belong to the ends, not to the places: leaves of one shape then share their compiled code.
    """
    pairs = zip(groups.split(ends), groups.offsets, strict=True)
    return [jnp.where(end > offset, end - jnp.uint32(offset), jnp.uint32(0)) for end, offset in pairs]


def _places(shape: tuple[int, ...], axes: Axes) -> UInt32[Array, "..."]:
    """The flat index of each entry within its group."""
    place = jnp.zeros((1,) * len(shape), jnp.uint32)
    for axis in axes:
        place = place * shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place
