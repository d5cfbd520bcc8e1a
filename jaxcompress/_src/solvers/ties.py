"""Splitting ties by place: the lowest indices are kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, UInt32

from jaxcompress._src.solvers.candidates import above, at_least, count_ties
from jaxcompress._src.solvers.groups import Groups
from jaxcompress._src.solvers.search import Threshold, search_threshold


def masks_at(
    groups: Groups, limits: UInt32[Array, " groups"], threshold: Threshold, rank: Int32[Array, " groups"]
) -> list[Bool[Array, "..."]]:
    """Masks without the `rank` first keys of each group, given the limits that `threshold` names.

    Where ties at the limit must be split, the place before which they stay is found by counting, like the limit.

    Args:
        groups: of the keys.
        limits: the keys `threshold.key`.
        threshold: for `rank`.
        rank: how many go.

    Returns:
        One mask per leaf.
    """
    dropped = rank - threshold.below

    each = groups.apart()
    if groups.together:
        limits = jnp.broadcast_to(limits, (len(each.leaves),))

    # The masks are made inside `cond`: outside, XLA would merge the starts of the leaves, as numbers, into the kernels.
    def split() -> list[Array]:
        ends = _ends(groups, each, limits, threshold.ties - dropped, threshold.ties)
        return [above(leaf, limits, ends) for leaf in each.leaves]

    def whole() -> list[Array]:
        return [at_least(leaf, limits) for leaf in each.leaves]

    return jax.lax.cond((dropped > 0).any(), split, whole)


def _ends(
    groups: Groups,
    each: Groups,
    limits: UInt32[Array, " parts"],
    counts: Int32[Array, " groups"],
    ties: Int32[Array, " groups"],
) -> Int32[Array, " parts"]:
    """The ends before which `kept` of the `ties` keys of each group lie that equal the limit."""

    def count(ends: Array) -> Int32[Array, " parts"]:
        return each.join([count_ties(leaf, limits, ends.astype(jnp.int32)) for leaf in each.leaves])

    sizes = each.repeat(jnp.array(each.sizes, jnp.int32))
    if groups.together:
        ties = count(sizes.astype(jnp.uint32))
        # The first leaves keep theirs first.
        counts = jnp.clip(counts - (jnp.cumsum(ties) - ties), 0, ties)
    # Ties lie anywhere: the first guess gives every tie the same share of the places.
    share = counts.astype(jnp.float32) / jnp.maximum(ties, 1).astype(jnp.float32)
    guess = (share * sizes.astype(jnp.float32)).astype(jnp.uint32)
    is_split = counts < ties
    border = search_threshold(count, jnp.where(is_split, counts, 0), ties, (guess,), last=max(each.sizes))
    return jnp.where(is_split, border.key.astype(jnp.int32), sizes)
