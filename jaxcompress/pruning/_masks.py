"""Masks from scores: exact counts, at any scope, in any pattern. True is kept."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcompress.pruning._patterns import Pattern, Unstructured, unstructured
from jaxcompress.solvers import keep_largest
from jaxcompress.trace import LeafLayout, default_layout
from jaxcompress.tree import check_finite, is_unselected, leaves_with_paths, map_selected
from jaxcompress.types import Params, Selector, is_compressed

Scope = Literal["leaf", "global", "row"]

_UNSTRUCTURED = unstructured()


def masks_from_scores(
    scores: Params,
    *,
    sparsity: ArrayLike = 0.5,
    scope: Scope = "leaf",
    pattern: Pattern = _UNSTRUCTURED,
    layouts: Params | None = None,
) -> Params:
    """Keeps exactly n - round(sparsity n) weights (halves to even) of every group of n: those with the highest scores.

    Among equal scores the lowest index is kept (in global scope: the first leaf, then the lowest flat index).

    Args:
        scores: a partial tree, as the score functions return it; any float dtype.
        sparsity: share of pruned weights in [0, 1]; may be traced, so that a schedule does not retrace (n is then
            multiplied in float32).
        scope: what is ranked together: "leaf", "global" (all leaves), or "row" (the inputs of one output unit).
        pattern: `unstructured()`, `n_of_m(2, 4)` or `block(32, 32)`; with blocks, counts are of blocks.
        layouts: from `trace.layouts`; needed for rows and patterns where kernels are not (in..., out).

    Returns:
        A partial tree of bool masks, True = kept.

    Raises:
        ValueError: a concrete sparsity outside [0, 1] or above what the pattern allows; concrete scores with NaN or
            Inf; an unknown scope. Names option or leaf.

    Example:
        >>> scores = {"kernel": jnp.array([[3.0, 1.0], [2.0, 2.0]])}
        >>> masks_from_scores(scores, sparsity=0.5)
        {'kernel': Array([[ True, False],
               [ True, False]], dtype=bool)}
    """
    check_sparsity(sparsity)
    map_selected(lambda path, leaf: check_finite(path, leaf), scores)
    return ranked_masks(scores, _layouts(scores, layouts), sparsity, scope=scope, pattern=pattern, score=_as_it_is)


def threshold_masks(scores: Params, *, threshold: ArrayLike | None = None, quantile: float | None = None) -> Params:
    """Keeps what reaches a threshold: mask = |s| >= threshold.

    On weights this is w = 0 if |w| < tau; on importance scores, "weights whose importance is below a threshold go".

    Args:
        scores: a tree, or partial tree, of weights or scores; leaves that are no floats stay unmasked.
        threshold: the same for all leaves; may be traced.
        quantile: instead: in each leaf, the given quantile of |s|, in [0, 1].

    Returns:
        A partial tree of bool masks.

    Raises:
        ValueError: both or neither of `threshold` and `quantile`; a quantile outside [0, 1].

    Example:
        >>> threshold_masks({"kernel": jnp.array([[0.001, -0.5]])}, threshold=0.01)
        {'kernel': Array([[False,  True]], dtype=bool)}
    """
    if (threshold is None) == (quantile is None):
        raise ValueError("Give either `threshold` or `quantile`.")
    if quantile is not None and not 0 <= quantile <= 1:
        raise ValueError(f"`quantile` must be in [0, 1], got {quantile}.")

    def mask(path: str, leaf: Any) -> jax.Array:
        magnitude = jnp.abs(leaf.materialize() if is_compressed(leaf) else leaf)
        check_finite(path, magnitude)
        # In float32: a threshold rounded to bfloat16 would be another one.
        magnitude = magnitude.astype(jnp.float32)
        least = jnp.quantile(magnitude, quantile) if threshold is None else jnp.asarray(threshold, jnp.float32)
        return magnitude >= least

    return map_selected(mask, scores)


def apply_masks(params: Params, masks: Params) -> Params:
    """Zeros where a mask is False (by `where`: -0.0, NaN and Inf do not survive); other leaves as they are.

    Raises:
        ValueError: a mask does not have its leaf's shape; names the leaf.

    Example:
        >>> apply_masks({"kernel": jnp.array([1.0, -2.0])}, {"kernel": jnp.array([True, False])})
        {'kernel': Array([1., 0.], dtype=float32)}
    """

    def apply(_: str, mask: Any, leaf: Any) -> jax.Array:
        plain = leaf.materialize() if is_compressed(leaf) else leaf
        if mask.shape != plain.shape:
            raise ValueError(f"The mask has shape {mask.shape}, the leaf {plain.shape}.")
        return jnp.where(mask, plain, jnp.zeros((), plain.dtype))

    return overlay(map_selected(apply, masks, params), params)


def clip_weights(params: Params, limit: ArrayLike, *, select: Selector | None = None) -> Params:
    """clamp(w, -limit, limit) on every plain float leaf, or on those that `select` marks.

    Raises:
        ValueError: a concrete negative limit.

    Example:
        >>> clip_weights({"kernel": jnp.array([-3.0, 0.5])}, 1.0)
        {'kernel': Array([-1. ,  0.5], dtype=float32)}
    """
    if not isinstance(limit, jax.core.Tracer) and not limit >= 0:
        raise ValueError(f"`limit` must not be negative, got {limit}.")

    def clip(leaf: Any, mark: bool) -> Any:
        is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        if not mark or not is_float or is_compressed(leaf):
            return leaf
        bound = jnp.asarray(limit, leaf.dtype)
        return jnp.clip(leaf, -bound, bound)

    marks = jax.tree.map(lambda _: True, params, is_leaf=is_compressed) if select is None else select(params)
    return jax.tree.map(clip, params, marks, is_leaf=is_compressed)


def ranked_masks(
    leaves: Params,
    layouts: Params,
    sparsity: ArrayLike,
    *,
    scope: Scope,
    pattern: Pattern,
    score: Callable[[Any], jax.Array],
) -> Params:
    """`masks_from_scores` of `score(leaf)`, computed where it is compared, without checks.

    Args:
        leaves: a partial tree.
        layouts: the partial tree of their layouts.
        sparsity: as there.
        scope: as there.
        pattern: as there.
        score: array -> scores.
    """
    chosen = [leaf for _, leaf in leaves_with_paths(map_selected(lambda _, leaf: leaf, leaves))]
    found = [layout for _, layout in leaves_with_paths(layouts)]
    if isinstance(pattern, Unstructured):
        # Scores are then computed inside the counts, and never stored.
        units, inside = chosen, score
    else:
        units, inside = (
            [pattern.units(score(leaf), layout) for leaf, layout in zip(chosen, found, strict=True)],
            _as_it_is,
        )
    axes = _group_axes(units, found, scope)
    limits = [pattern.droppable(leaf.shape, layout) for leaf, layout in zip(chosen, found, strict=True)]
    dropped = _dropped(units, axes, limits, sparsity, allowed=pattern.allowed)
    kept = iter(keep_largest(units, dropped, axes=axes, score=inside))

    def spread(_: str, leaf: Any, layout: LeafLayout) -> jax.Array:
        return pattern.spread(next(kept), leaf.shape, layout)

    return map_selected(spread, leaves, layouts)


def check_sparsity(sparsity: ArrayLike) -> None:
    """Raises when a concrete sparsity is outside [0, 1]."""
    if not isinstance(sparsity, jax.core.Tracer) and not 0.0 <= float(np.asarray(sparsity)) <= 1.0:
        raise ValueError(f"`sparsity` must be in [0, 1], got {sparsity}.")


def overlay(partial: Params, params: Params) -> Params:
    """`params` with the leaves that `partial` has."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_compressed)
    entries = jax.tree.leaves(partial, is_leaf=lambda leaf: is_unselected(leaf) or is_compressed(leaf))
    pairs = zip(entries, leaves, strict=True)
    return treedef.unflatten([leaf if is_unselected(entry) else entry for entry, leaf in pairs])


def _layouts(scores: Params, layouts: Params | None) -> Params:
    """The layout of every score; kernels are (in..., out) where nothing is known."""

    def known(path: str, score: Any, *found: LeafLayout) -> LeafLayout:
        return found[0] if found and found[0].is_weight else default_layout(path, score)

    return map_selected(known, scores, *(() if layouts is None else (layouts,)))


def _group_axes(units: list[Any], layouts: list[LeafLayout], scope: Scope) -> tuple[tuple[int, ...], ...] | None:
    if scope == "global":
        return None
    if scope == "leaf":
        return tuple(tuple(range(unit.ndim)) for unit in units)
    if scope == "row":
        return tuple(layout.input_axes for layout in layouts)
    raise ValueError(f"`scope` must be 'leaf', 'global' or 'row', got {scope!r}.")


def _dropped(
    units: list[Any],
    axes: tuple[tuple[int, ...], ...] | None,
    limits: list[float],
    sparsity: ArrayLike,
    *,
    allowed: float,
) -> jax.Array:
    """How many units of each group go: round(s n), and not more than the pattern allows."""
    if axes is None:
        sizes = [sum(unit.size for unit in units)]
        most = [round(sum(limit * unit.size for limit, unit in zip(limits, units, strict=True)))]
    else:
        sizes = [_group_size(unit.shape, group) for unit, group in zip(units, axes, strict=True)]
        most = [round(limit * size) for limit, size in zip(limits, sizes, strict=True)]
    if isinstance(sparsity, jax.core.Tracer):
        wanted = jnp.round(jnp.asarray(sizes, jnp.float32) * sparsity).astype(jnp.int32)
    else:
        share = float(np.asarray(sparsity))
        if share > allowed + 1e-6:
            raise ValueError(f"The pattern allows a `sparsity` of at most {allowed:g}, got {share:g}.")
        wanted = jnp.asarray([round(share * size) for size in sizes], jnp.int32)
    dropped = jnp.minimum(wanted, jnp.asarray(most, jnp.int32))
    return dropped[0] if axes is None else dropped


def _group_size(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    size = 1
    for axis in axes:
        size *= shape[axis]
    return size


def _as_it_is(score: jax.Array) -> jax.Array:
    return score
