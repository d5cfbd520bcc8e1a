"""Splitting ties by place: the lowest indices are kept."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jaxcompress.solvers._counting import count_true


def last_kept(
    ties: Bool[Array, "..."], dropped: Int32[Array, "..."], axes: tuple[int, ...]
) -> tuple[Int32[Array, "..."], ...]:
    """Where the last entry that stays lies, when the last `dropped` set entries of each group go.

    Finds the index along one axis after the other from counts per slab, so that no array of the size of `ties` is
    sorted, summed up along its flat index, or gathered from its shards.

    Args:
        ties: any shape; an expression that is read once per axis.
        dropped: of that shape, with 1 on `axes`.
        axes: of one group, in the order of their significance.

    Returns:
        One index per axis, of the shape of `dropped`; the first one is -1 when nothing stays.
    """
    indices = []
    for axis in axes:
        counts = count_true(ties, tuple(other for other in axes if other != axis))
        to_the_end = jax.lax.cumsum(counts, axis, reverse=True)
        index = ties.shape[axis] - 1 - (to_the_end <= dropped).sum(axis, dtype=jnp.int32, keepdims=True)
        places = jax.lax.broadcasted_iota(jnp.int32, counts.shape, axis)
        dropped = dropped - jnp.where(places > index, counts, 0).sum(axis, dtype=jnp.int32, keepdims=True)
        ties = ties & (jax.lax.broadcasted_iota(jnp.int32, ties.shape, axis) == index)
        indices.append(index)
    return tuple(indices)


def all_kept(
    shape: tuple[int, ...], group_shape: tuple[int, ...], axes: Sequence[int]
) -> tuple[Int32[Array, "..."], ...]:
    """What `last_kept` returns when nothing is dropped."""
    return tuple(jnp.full(group_shape, shape[axis] - 1, jnp.int32) for axis in axes)


def up_to(
    indices: tuple[Int32[Array, "..."], ...], shape: tuple[int, ...], axes: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Which entries of an array lie, within their group, not after `indices`."""

    def before(later: Bool[Array, "..."], here: tuple[int, Int32[Array, "..."]]) -> Bool[Array, "..."]:
        axis, index = here
        place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        return (place < index) | ((place == index) & later)

    pairs = list(zip(axes, indices, strict=True))
    return functools.reduce(before, reversed(pairs), jnp.ones((1,) * len(shape), bool))
