"""Keeping all but the k smallest scores, exactly, without sorting."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32, UInt32

from jaxcompress.solvers._counting import count_true, total_size
from jaxcompress.solvers._groups import Axes, Groups, Keys
from jaxcompress.solvers._order import LAST_KEY, key_shift, order_keys
from jaxcompress.solvers._sampling import SAMPLE_SIZE, sample_bracket, thin
from jaxcompress.solvers._search import search_threshold
from jaxcompress.solvers._ties import split_ties


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
    groups = Groups(
        # A scalar is ranked as a vector of one entry.
        shapes=tuple(scored[i].shape or (1,) for i in full),
        axes=tuple(
            tuple(range(len(scored[i].shape) or 1)) if together or not scored[i].shape else axes[i] for i in full
        ),
        together=together,
    )
    keys = [_keys(score, leaves[i], shape) for i, shape in zip(full, groups.shapes, strict=True)]
    rank = dropped.reshape(1) if together else dropped.reshape(-1)[jnp.array(full)]
    shift = min(key_shift(scored[i].dtype) for i in full)
    for place, mask in zip(full, _masks(keys, groups, rank, shift), strict=True):
        masks[place] = mask.reshape(scored[place].shape)
    return masks


def _keys(score: Callable[[Any], Array], leaf: Any, shape: tuple[int, ...]) -> Keys:
    def keys(after: Array) -> UInt32[Array, "..."]:
        # No number after which keys are asked for is ever -1, but XLA does not know: otherwise it would compute all
        # keys once, before the loop, which takes 4 bytes per entry. It removes optimization barriers before that.
        never = after.reshape(-1)[0].astype(jnp.int32) == -1
        here = jax.tree.map(lambda part: jnp.where(never, jnp.zeros((), part.dtype), part), leaf)
        return order_keys(score(here)).reshape(shape)

    return keys


def _masks(keys: list[Keys], groups: Groups, rank: Int32[Array, " leaves"], shift: int) -> list[Bool[Array, "..."]]:
    total_size(groups.sizes)
    ranks = groups.repeat(rank)

    def count(threshold: UInt32[Array, " groups"]) -> Int32[Array, " groups"]:
        limits = zip(keys, groups.split(threshold << shift), groups.axes, strict=True)
        return groups.join([count_true(key(limit) < limit, axes) for key, limit, axes in limits])

    sizes = groups.repeat(jnp.array(groups.sizes, jnp.int32))
    probes = tuple(probe >> shift for probe in _probes(keys, groups, rank))
    found = search_threshold(count, ranks, sizes, probes, last=LAST_KEY >> shift)
    limits = groups.split(found.key << shift)
    before = split_ties(keys, groups, limits, found.ties, ranks - found.below)
    return [
        (key(limit) > limit) | ((key(limit) == limit) & kept)
        for key, limit, kept in zip(keys, limits, before, strict=True)
    ]


def _probes(
    keys: list[Keys], groups: Groups, rank: Int32[Array, " leaves"]
) -> tuple[UInt32[Array, " groups"], UInt32[Array, " groups"]]:
    ratio = max(sum(math.prod(shape) for shape in groups.shapes) / SAMPLE_SIZE, 32)
    samples = [thin(key(rank), ratio=ratio) for key in keys]
    weights = [math.prod(shape) / len(sample) for shape, sample in zip(groups.shapes, samples, strict=True)]
    size = jnp.array(groups.sizes, jnp.float32)
    fraction = rank / size
    # A group is itself a sample of its leaf.
    slack = 2.5 * jnp.sqrt(fraction * (1 - fraction) / size)
    low, high = sample_bracket(samples, weights, fraction, slack, together=groups.together)
    return groups.repeat(low), groups.repeat(high) + 1
