"""Keeping all but the k smallest scores, exactly, without sorting."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32, UInt32

from jaxcompress.solvers._counting import count_true, total_size
from jaxcompress.solvers._order import LAST_KEY, key_shift, order_keys
from jaxcompress.solvers._sampling import SAMPLE_SIZE, sample_bracket, thin
from jaxcompress.solvers._search import search_threshold
from jaxcompress.solvers._ties import all_kept, last_kept, up_to

Axes = tuple[int, ...]


def keep_largest(
    leaves: Sequence[Any],
    dropped: Int[Array, "..."] | int,
    *,
    axes: tuple[Axes, ...] | None = None,
    score: Callable[[Any], Array] = lambda leaf: leaf,
) -> list[Bool[Array, "..."]]:
    """Masks without the `dropped` smallest scores of each group; among equal scores the lowest indices are kept.

    The threshold is found by counting the keys below a guess, about nine times for real-valued weights and never more
    than 34 times; ties are split by counts along the axes. Nothing of the size of the leaves is sorted, concatenated
    or gathered from its shards, and scores and keys exist inside the counting loops only.

    Args:
        leaves: arrays, or trees of arrays that `score` maps to one array.
        dropped: int32, may be traced: from 0 to the size of a group; a scalar for one group over all leaves, otherwise
            one entry per leaf.
        axes: of one group, for each leaf, ascending; () makes every entry a group. None: all leaves together are one
            group, ordered by leaf, then by flat index.
        score: `leaf -> scores`, floats (or uint32 keys); it runs inside every count. NaN counts as the largest.

    Returns:
        One mask per leaf, True = kept: exactly `dropped` entries of each group are False.

    Raises:
        ValueError: 2^31 or more entries in one group of leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> keep_largest([jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0, 2.0])], 2)
        [Array([ True,  True], dtype=bool), Array([False, False,  True], dtype=bool)]
        >>> keep_largest([jnp.array([[3.0, 1.0], [0.0, 2.0]])], jnp.array([1]), axes=((0,),))
        [Array([[ True, False],
               [False,  True]], dtype=bool)]
    """
    return list(_keep_largest(tuple(leaves), jnp.asarray(dropped, jnp.int32), axes=axes, score=score))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Groups:
    """The groups of all leaves as one vector: a single entry, or those of one leaf after those of another.

    Attributes:
        shapes: of the leaves.
        axes: of a group in each leaf.
        together: all leaves are one group.
    """

    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[Axes, ...]
    together: bool

    @property
    def group_shapes(self) -> list[tuple[int, ...]]:
        """Of the leaves, with 1 on the axes of a group."""
        pairs = zip(self.shapes, self.axes, strict=True)
        return [tuple(1 if i in axes else d for i, d in enumerate(shape)) for shape, axes in pairs]

    @property
    def sizes(self) -> list[int]:
        """Of a group; one per leaf, or a single one."""
        pairs = zip(self.shapes, self.axes, strict=True)
        sizes = [math.prod(shape[axis] for axis in axes) for shape, axes in pairs]
        return [sum(sizes)] if self.together else sizes

    def join(self, parts: list[Array]) -> Array:
        """Counts in every leaf -> counts per group."""
        flat = [part.reshape(-1) for part in parts]
        return functools.reduce(jnp.add, flat) if self.together else jnp.concatenate(flat)

    def repeat(self, numbers: Array) -> Array:
        """One number per leaf, or a single one -> one per group."""
        if self.together:
            return numbers
        counts = [math.prod(shape) for shape in self.group_shapes]
        return jnp.repeat(numbers, jnp.array(counts), total_repeat_length=sum(counts))

    def split(self, vector: Array) -> list[Array]:
        """One number per group -> per leaf, so that it broadcasts against the leaf."""
        if self.together:
            return [vector.reshape(shape) for shape in self.group_shapes]
        ends = itertools.accumulate(math.prod(shape) for shape in self.group_shapes[:-1])
        parts = jnp.split(vector, list(ends))
        return [part.reshape(shape) for part, shape in zip(parts, self.group_shapes, strict=True)]


@functools.partial(jax.jit, static_argnames=("axes", "score"))
def _keep_largest(
    leaves: tuple[Any, ...], dropped: Array, *, axes: tuple[Axes, ...] | None, score: Callable[[Any], Array]
) -> list[Array]:
    scored = [jax.eval_shape(score, leaf) for leaf in leaves]
    full = [place for place, scores in enumerate(scored) if scores.size]
    masks = [jnp.zeros(scores.shape, bool) for scores in scored]
    if not full:
        return masks
    together = axes is None
    groups = _Groups(
        # A scalar is ranked as a vector of one entry.
        shapes=tuple(scored[i].shape or (1,) for i in full),
        axes=tuple(
            tuple(range(len(scored[i].shape) or 1)) if together or not scored[i].shape else axes[i] for i in full
        ),
        together=together,
    )
    keys = [
        functools.partial(lambda leaf, shape: order_keys(score(leaf)).reshape(shape), leaves[i], shape)
        for i, shape in zip(full, groups.shapes, strict=True)
    ]
    rank = dropped.reshape(1) if together else dropped.reshape(-1)[jnp.array(full)]
    shift = min(key_shift(scored[i].dtype) for i in full)
    for place, mask in zip(full, _masks(keys, groups, rank, shift), strict=True):
        masks[place] = mask.reshape(scored[place].shape)
    return masks


def _masks(
    keys: list[Callable[[], UInt32[Array, "..."]]], groups: _Groups, rank: Int32[Array, " n"], shift: int
) -> list[Bool[Array, "..."]]:
    """The masks; `keys` are thunks, so that every use computes them anew inside its own fused read."""
    total_size(groups.sizes)
    ranks = groups.repeat(rank)

    def count(threshold: UInt32[Array, " groups"]) -> Int32[Array, " groups"]:
        limits = groups.split(threshold << shift)
        pairs = zip(keys, limits, groups.axes, strict=True)
        return groups.join([count_true(key() < limit, axes) for key, limit, axes in pairs])

    sizes = groups.repeat(jnp.array(groups.sizes, jnp.int32))
    probes = tuple(probe >> shift for probe in _probes(keys, groups, rank))
    threshold, below = search_threshold(count, ranks, sizes, probes, last=LAST_KEY >> shift)
    limits = groups.split(threshold << shift)
    dropped = _dropped_ties(keys, groups, limits, ranks - below)
    return [
        (key() > limit) | ((key() == limit) & _kept_ties(key, limit, ties, axes))
        for key, limit, ties, axes in zip(keys, limits, dropped, groups.axes, strict=True)
    ]


def _probes(
    keys: list[Callable[[], UInt32[Array, "..."]]], groups: _Groups, rank: Int32[Array, " n"]
) -> tuple[UInt32[Array, " groups"], UInt32[Array, " groups"]]:
    ratio = max(sum(math.prod(shape) for shape in groups.shapes) / SAMPLE_SIZE, 32)
    samples = [thin(key(), ratio=ratio) for key in keys]
    weights = [math.prod(shape) / len(sample) for shape, sample in zip(groups.shapes, samples, strict=True)]
    size = jnp.array(groups.sizes, jnp.float32)
    fraction = rank / size
    # A group is itself a sample of its leaf.
    slack = 2.5 * jnp.sqrt(fraction * (1 - fraction) / size)
    low, high = sample_bracket(samples, weights, fraction, slack, together=groups.together)
    return groups.repeat(low), groups.repeat(high) + 1


def _dropped_ties(
    keys: list[Callable[[], UInt32[Array, "..."]]],
    groups: _Groups,
    limits: list[UInt32[Array, "..."]],
    dropped: Int32[Array, " groups"],
) -> list[Int32[Array, "..."]]:
    """How many of the ties at the limit go, for each group of each leaf."""
    if not groups.together:
        return groups.split(dropped)

    def from_the_last_leaf(dropped: Array) -> Array:
        ties = jnp.stack([count_true(key() == limit).reshape(()) for key, limit in zip(keys, limits, strict=True)])
        after = jax.lax.cumsum(ties, reverse=True) - ties
        return jnp.clip(dropped - after, 0, ties)

    per_leaf = jax.lax.cond(dropped[0] > 0, from_the_last_leaf, lambda _: jnp.zeros(len(keys), jnp.int32), dropped)
    return [part.reshape(shape) for part, shape in zip(per_leaf, groups.group_shapes, strict=True)]


def _kept_ties(
    key: Callable[[], UInt32[Array, "..."]],
    limit: UInt32[Array, "..."],
    dropped: Int32[Array, "..."],
    axes: Axes,
) -> Bool[Array, "..."]:
    shape = jax.eval_shape(key).shape
    indices = jax.lax.cond(
        (dropped > 0).any(),
        lambda: last_kept(key() == limit, dropped, axes),
        lambda: all_kept(shape, dropped.shape, axes),
    )
    return up_to(indices, shape, axes)
