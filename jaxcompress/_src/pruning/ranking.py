"""Masks by rank, without checks of values: what runs inside a train step."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcompress._src.pruning.patterns import NOfM, Pattern, Unstructured
from jaxcompress._src.solvers.rank import keep_largest
from jaxcompress._src.solvers.share import share_of
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.tree.unselected import is_unselected, map_selected
from jaxcompress._src.types import Params

Scope = Literal["leaf", "global", "row"]

Drops: TypeAlias = Callable[[int, float], int]
"""`(size of a group, concrete sparsity) -> how many of it go`."""

Axes: TypeAlias = tuple[tuple[int, ...], ...] | None
"""Of one group, for each leaf; None: all leaves are one group."""


def round_half_even(size: int, share: float) -> int:
    """round(share size), halves to even."""
    return round(share * size)


def ranked_masks(
    leaves: Params,
    layouts: Params,
    sparsity: ArrayLike | Params,
    *,
    scope: Scope,
    pattern: Pattern,
    score: Callable[[Any], jax.Array],
    dropped: Drops = round_half_even,
) -> Params:
    """`masks_from_scores` of `score(leaf)`, computed where it is compared.

    Args:
        leaves: a partial tree.
        layouts: the partial tree of their layouts.
        sparsity: share of pruned weights, one number or a partial tree.
        scope: what is ranked together.
        pattern: where zeros may lie.
        score: array -> scores.
        dropped: how a concrete sparsity becomes a count.
    """
    weights = [leaf for _, leaf in leaves_with_paths(leaves)]
    flat_layouts = [
        layout for _, layout in leaves_with_paths(map_selected(lambda _, leaf, layout: layout, leaves, layouts))
    ]
    shares = _shares(leaves, sparsity, scope)
    for share in shares:
        _check_allowed(share, pattern.allowed)
    if isinstance(pattern, NOfM) and all(_is_full(share, pattern.allowed) for share in shares):
        # What the pattern keeps is all there is to keep: nothing is left to rank.
        flat_masks = [
            jnp.isinf(pattern.units(_zero_infinities(score(x)), y)) for x, y in zip(weights, flat_layouts, strict=True)
        ]
    else:
        units, inside = _units(weights, flat_layouts, pattern, score)
        axes = group_axes([unit.shape for unit in units], flat_layouts, scope)
        limits = [pattern.droppable(leaf.shape, layout) for leaf, layout in zip(weights, flat_layouts, strict=True)]
        flat_masks = keep_largest(units, _dropped(units, axes, limits, shares, dropped), axes=axes, score=inside)
    masks = iter(flat_masks)

    def spread(_: str, leaf: Any, layout: LeafLayout) -> jax.Array:
        return pattern.spread(next(masks), leaf.shape, layout)

    return map_selected(spread, leaves, layouts)


def is_tree(sparsity: ArrayLike | Params) -> bool:
    """Whether sparsities are given leaf by leaf."""
    return not isinstance(sparsity, bool | int | float | np.generic | np.ndarray | jax.Array)


def check_sparsity(sparsity: ArrayLike | Params) -> None:
    """Raises when a concrete sparsity is outside [0, 1]; in a tree, names the leaf."""

    def check(_: str, share: Any) -> None:
        if not is_traced(share) and not 0.0 <= float(np.asarray(share)) <= 1.0:
            raise ValueError(f"`sparsity` must be in [0, 1], got {share}.")

    if is_tree(sparsity):
        map_selected(check, sparsity)
    else:
        check("", sparsity)


def implied_sparsity(sparsity: ArrayLike | Params | None, pattern: Pattern) -> ArrayLike | Params:
    """The sparsity; without one, that of the pattern n of m."""
    if sparsity is not None:
        return sparsity
    if not isinstance(pattern, NOfM):
        raise ValueError("`sparsity` is needed: only patterns n of m imply one.")
    return pattern.allowed


def group_axes(shapes: list[tuple[int, ...]], layouts: list[LeafLayout], scope: Scope) -> Axes:
    """The axes that are ranked together."""
    if scope == "global":
        return None
    if scope == "leaf":
        return tuple(tuple(range(len(shape))) for shape in shapes)
    if scope == "row":
        return tuple(layout.input_axes for layout in layouts)
    raise ValueError(f"`scope` must be 'leaf', 'global' or 'row', got {scope!r}.")


def as_it_is(score: jax.Array) -> jax.Array:
    """The scores are the leaf itself."""
    return score


def _shares(leaves: Params, sparsity: ArrayLike | Params, scope: Scope) -> list[Any]:
    """One sparsity per leaf, or a single one in global scope."""
    if not is_tree(sparsity):
        return [sparsity] * (1 if scope == "global" else len(leaves_with_paths(leaves)))
    if scope == "global":
        raise ValueError('With `scope="global"` one `sparsity` is for all leaves: a tree of them fits "leaf" or "row".')
    flat_shares: list[Any] = []

    def visit(_: str, leaf: Any, share: Any) -> None:
        if is_unselected(leaf) != is_unselected(share):
            which = "has an entry where there is nothing to prune" if is_unselected(leaf) else "has no entry"
            raise ValueError(f"The tree of sparsities {which}.")
        if not is_unselected(leaf):
            flat_shares.append(share)

    map_with_path(visit, leaves, sparsity, is_leaf=is_unselected)
    return flat_shares


def _units(
    leaves: list[Any], layouts: list[LeafLayout], pattern: Pattern, score: Callable[[Any], jax.Array]
) -> tuple[list[Any], Callable[[Any], jax.Array]]:
    if isinstance(pattern, Unstructured):
        # Scores are then computed inside the counts, and never stored.
        return leaves, score
    return [pattern.units(score(leaf), layout) for leaf, layout in zip(leaves, layouts, strict=True)], as_it_is


def _dropped(units: list[Any], axes: Axes, limits: list[float], shares: list[Any], rule: Drops) -> jax.Array:
    """How many units of each group go, and not more than the pattern allows."""
    if axes is None:
        sizes = [sum(unit.size for unit in units)]
        most = [round(sum(limit * unit.size for limit, unit in zip(limits, units, strict=True)))]
    else:
        sizes = [math.prod(unit.shape[axis] for axis in group) for unit, group in zip(units, axes, strict=True)]
        most = [round(limit * size) for limit, size in zip(limits, sizes, strict=True)]
    if any(is_traced(share) for share in shares):
        traced = jnp.stack([jnp.asarray(share, jnp.float32) for share in shares])
        wanted = share_of(jnp.asarray(sizes, jnp.int32), traced)
    else:
        counts = [rule(size, float(np.asarray(share))) for size, share in zip(sizes, shares, strict=True)]
        wanted = jnp.asarray(counts, jnp.int32)
    wanted = jnp.minimum(wanted, jnp.asarray(most, jnp.int32))
    return wanted[0] if axes is None else wanted


def _check_allowed(share: Any, allowed: float) -> None:
    if not is_traced(share) and float(np.asarray(share)) > allowed + 1e-6:
        raise ValueError(f"The pattern allows a `sparsity` of at most {allowed:g}, got {float(np.asarray(share)):g}.")


def _is_full(share: Any, allowed: float) -> bool:
    return not is_traced(share) and float(np.asarray(share)) >= allowed - 1e-6


def _zero_infinities(scores: jax.Array) -> jax.Array:
    """Scores that keep their order, none of them infinite: infinity marks what the pattern keeps."""
    return jnp.clip(scores, jnp.finfo(scores.dtype).min, jnp.finfo(scores.dtype).max)
