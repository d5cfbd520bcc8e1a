"""Keeping all but the k smallest scores, exactly, without sorting."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32, UInt32

from jaxcompress._src.solvers.candidates import Axes, Candidates, count_below
from jaxcompress._src.solvers.counting import check_sizes
from jaxcompress._src.solvers.groups import Groups
from jaxcompress._src.solvers.order import LAST_KEY, key_shift
from jaxcompress._src.solvers.sampling import SAMPLE_SIZE, sample_bracket, thin
from jaxcompress._src.solvers.search import search_threshold
from jaxcompress._src.solvers.ties import masks_at


def keep_largest(
    leaves: Sequence[Any],
    dropped: Int[Array, "..."] | int,
    *,
    axes: tuple[Axes, ...] | None = None,
    score: Callable[[Any], Array] = lambda leaf: leaf,
) -> list[Bool[Array, "..."]]:
    """Masks without the `dropped` smallest scores of each group; among equal scores the lowest indices are kept.

    The threshold is found by counting the keys below a guess, about nine times for real-valued weights and never more
    than 34 times; where ties must be split, so is the place of the last one that stays. Nothing of the size of the
    leaves is sorted, concatenated or gathered from its shards, and keys exist inside the counting loops only.

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
    masks = [jnp.zeros(scores.shape, bool) for scores in scored]
    full = [place for place, scores in enumerate(scored) if scores.size]
    if not full:
        return masks
    rank = dropped.reshape(1) if axes is None else dropped.reshape(-1)[jnp.array(full)]
    shapes = [scored[place].shape for place in full]
    group_axes = [None if axes is None else axes[place] for place in full]
    groups = _groups([leaves[place] for place in full], score, shapes, group_axes, rank)
    shift = min(key_shift(scored[place].dtype) for place in full)
    for place, mask in zip(full, _masks(groups, rank, shift), strict=True):
        masks[place] = mask.reshape(scored[place].shape)
    return masks


def _groups(
    leaves: list[Any],
    score: Callable[[Any], Array],
    shapes: list[tuple[int, ...]],
    axes: list[Axes | None],
    rank: Int32[Array, " leaves"],
) -> Groups:
    # Zero, but XLA does not know: the starts must not become constants.
    start = (rank[0] == -1).astype(jnp.int32)
    candidates = []
    for leaf, shape, leaf_axes in zip(leaves, shapes, axes, strict=True):
        everything = tuple(range(max(len(shape), 1)))
        candidate = Candidates(
            values=leaf,
            start=start,
            score=score,
            shape=shape or (1,),
            axes=everything if leaf_axes is None or not shape else leaf_axes,
            together=leaf_axes is None,
        )
        candidates.append(candidate)
        start = start + math.prod(candidate.group_shape)
    return Groups(leaves=tuple(candidates), together=axes[0] is None)


def _masks(groups: Groups, rank: Int32[Array, " leaves"], shift: int) -> list[Bool[Array, "..."]]:
    check_sizes(groups.sizes)

    def count(limits: UInt32[Array, " groups"]) -> Int32[Array, " groups"]:
        return groups.join([count_below(leaf, limits << shift) for leaf in groups.leaves])

    ranks, sizes = groups.repeat(rank), groups.repeat(jnp.array(groups.sizes, jnp.int32))
    probes = tuple(probe >> shift for probe in _probes(groups, rank))
    threshold = search_threshold(count, ranks, sizes, probes, last=LAST_KEY >> shift)
    return masks_at(groups, threshold.key << shift, threshold, ranks)


def _probes(groups: Groups, rank: Int32[Array, " leaves"]) -> tuple[UInt32[Array, " groups"], UInt32[Array, " groups"]]:
    totals = [math.prod(leaf.shape) for leaf in groups.leaves]
    ratio = max(sum(totals) / SAMPLE_SIZE, 32.0)
    samples = [thin(leaf.keys(rank), ratio=ratio) for leaf in groups.leaves]
    weights = [total / len(sample) for total, sample in zip(totals, samples, strict=True)]
    size = jnp.array(groups.sizes, jnp.float32)
    fraction = rank / size
    # A group is itself a sample of its leaf.
    slack = 2.5 * jnp.sqrt(fraction * (1 - fraction) / size)
    low, high = sample_bracket(samples, weights, fraction, slack, together=groups.together)
    return groups.repeat(low), groups.repeat(high) + 1
