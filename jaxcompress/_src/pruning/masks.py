"""Masks from scores: exact counts, at any scope, in any pattern. True is kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.pruning.counting_rules import CountingRule, break_ties, check_rule, drops
from jaxcompress._src.pruning.patterns import Pattern, unstructured
from jaxcompress._src.pruning.ranking import Scope, as_it_is, check_sparsity, implied_sparsity, is_tree, ranked_masks
from jaxcompress._src.trace.layout import LeafLayout, default_layout
from jaxcompress._src.tree.checks import check_finite, is_traced
from jaxcompress._src.tree.maps import leaves_by_path, with_leaves
from jaxcompress._src.tree.unselected import Unselected, map_selected
from jaxcompress._src.types import Params, Selector, is_compressed, plain
from jaxcompress._src.weights.matrices import checked_weight
from jaxcompress._src.weights.selection import selected_layouts

_UNSTRUCTURED = unstructured()


@on_auto_axes
def masks_from_scores(
    scores: Params,
    *,
    sparsity: ArrayLike | Params | None = None,
    scope: Scope = "leaf",
    pattern: Pattern = _UNSTRUCTURED,
    counting: CountingRule = "exact",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Params:
    """Keeps exactly n - round(sparsity n) weights (halves to even) of every group of n: those with the highest scores.

    Among equal scores the lowest index is kept (in global scope: the first leaf, then the lowest flat index).

    Args:
        scores: a partial tree, as the score functions return it; any float dtype.
        sparsity: share of pruned weights in [0, 1]; may be traced, so that a schedule does not retrace (its float32
            value is then what counts, exactly). Or a partial tree of them, one for each leaf that has scores, as the
            allocations (`erdos_renyi` and others) return it; not in global scope. A pattern n of m implies it.
        scope: what is ranked together: "leaf", "global" (all leaves), or "row" (the inputs of one output unit).
        pattern: `unstructured()`, `n_of_m(2, 4)` or `block(32, 32)`; with blocks, counts are of blocks.
        counting: "exact", or the rule of a reference implementation, for comparisons with it (unstructured only, a
            concrete sparsity): "jaxpruner" keeps max(1, round((1 - sparsity) n)); "sparsegpt" drops all that is not
            above the int(sparsity n)-th smallest score, counted from 0, as the magnitude pruning of the SparseGPT and
            Wanda repositories does: one more than asked, and all ties; "tfmot" keeps all that reaches the
            max(1, round((1 - sparsity) n))-th largest: all ties stay.
        select: which of the leaves that have scores; by default all.
        layouts: from `trace.layouts`; needed for rows and patterns where kernels are not (in..., out).

    Returns:
        A partial tree of bool masks, True = kept.

    Raises:
        ValueError: no sparsity, and a pattern that implies none; a concrete one outside [0, 1] or above what the
            pattern allows; nothing is selected; concrete scores with NaN or Inf; an unknown scope or counting rule; a
            tree of sparsities without an entry for a leaf, with one for a leaf without scores, or in global scope.
            Names option or leaf.

    Example:
        >>> scores = {"kernel": jnp.array([[3.0, 1.0], [2.0, 2.0]])}
        >>> masks_from_scores(scores, sparsity=0.5)
        {'kernel': Array([[ True, False],
               [ True, False]], dtype=bool)}
        >>> masks_from_scores(scores, sparsity={"kernel": 0.25})["kernel"].sum()
        Array(3, dtype=int32)
    """
    sparsity = implied_sparsity(sparsity, pattern)
    check_sparsity(sparsity)
    if select is not None:
        scores, sparsity = _selected(scores, sparsity, select)
    map_selected(lambda path, leaf: check_finite(path, leaf), scores)
    known = _layouts(scores, layouts)
    check_rule(counting, sparsity, pattern)
    masks = ranked_masks(scores, known, sparsity, scope=scope, pattern=pattern, score=as_it_is, dropped=drops(counting))
    return break_ties(scores, masks, known, counting=counting, scope=scope)


@on_auto_axes
def magnitude_masks(
    params: Params,
    *,
    sparsity: ArrayLike | Params | None = None,
    scope: Scope = "leaf",
    pattern: Pattern = _UNSTRUCTURED,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Params:
    """`masks_from_scores(magnitude_scores(params))` without storing the scores: no more memory than the masks need.

    Args:
        params: the tree; a compressed leaf counts as the array it stands for.
        sparsity: share of pruned weights in [0, 1]; may be traced. Or a partial tree of them, one for each leaf.
        scope: what is ranked together: "leaf", "global" (all leaves), or "row" (the inputs of one output unit).
        pattern: `unstructured()`, `n_of_m(2, 4)` (two of every four consecutive inputs are kept) or `block(32, 32)`.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        A partial tree of bool masks, True = kept.

    Raises:
        ValueError: as `masks_from_scores` and `magnitude_scores`.

    Example:
        >>> magnitude_masks({"kernel": jnp.array([[-3.0, 1.0]]), "bias": jnp.ones(2)}, sparsity=0.5)
        {'bias': Unselected, 'kernel': Array([[ True, False]], dtype=bool)}
    """
    sparsity = implied_sparsity(sparsity, pattern)
    check_sparsity(sparsity)
    selected = selected_layouts(params, select=select, layouts=layouts)
    weights = map_selected(lambda path, _, leaf: checked_weight(path, leaf), selected, params)
    return ranked_masks(weights, selected, sparsity, scope=scope, pattern=pattern, score=jnp.abs)


@on_auto_axes
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
        magnitude = jnp.abs(plain(leaf))
        check_finite(path, magnitude)
        # In float32: a threshold rounded to bfloat16 would be another one.
        magnitude = magnitude.astype(jnp.float32)
        least = jnp.quantile(magnitude, quantile) if quantile is not None else jnp.asarray(threshold, jnp.float32)
        return magnitude >= least

    return map_selected(mask, scores)


@on_auto_axes
def apply_masks(params: Params, masks: Params) -> Params:
    """Zeros where a mask is False (by `where`: -0.0, NaN and Inf do not survive); other leaves as they are.

    Raises:
        ValueError: a mask does not have its leaf's shape; names the leaf.

    Example:
        >>> apply_masks({"kernel": jnp.array([1.0, -2.0])}, {"kernel": jnp.array([True, False])})
        {'kernel': Array([1., 0.], dtype=float32)}
    """

    def apply(_: str, mask: Any, leaf: Any) -> jax.Array:
        dense = plain(leaf)
        if mask.shape != dense.shape:
            raise ValueError(f"The mask has shape {mask.shape}, the leaf {dense.shape}.")
        return jnp.where(mask, dense, jnp.zeros((), dense.dtype))

    return with_leaves(params, leaves_by_path(map_selected(apply, masks, params)))


def clip_weights(params: Params, limit: ArrayLike, *, select: Selector | None = None) -> Params:
    """clamp(w, -limit, limit) on every plain float leaf, or on those that `select` marks.

    Raises:
        ValueError: a concrete negative limit.

    Example:
        >>> clip_weights({"kernel": jnp.array([-3.0, 0.5])}, 1.0)
        {'kernel': Array([-1. ,  0.5], dtype=float32)}
    """
    if not is_traced(limit) and not np.asarray(limit) >= 0:
        raise ValueError(f"`limit` must not be negative, got {limit}.")

    def clip(leaf: Any, mark: bool) -> Any:
        is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        if not mark or not is_float or is_compressed(leaf):
            return leaf
        bound = jnp.asarray(limit, leaf.dtype)
        return jnp.clip(leaf, -bound, bound)

    marks = jax.tree.map(lambda _: True, params, is_leaf=is_compressed) if select is None else select(params)
    return jax.tree.map(clip, params, marks, is_leaf=is_compressed)


def _selected(scores: Params, sparsity: Any, select: Selector) -> tuple[Params, Any]:
    """Scores and sparsities of the leaves that are selected."""
    marks = select(scores)

    def marked(_: str, entry: Any, mark: bool) -> Any:
        return entry if mark else Unselected

    marked_scores = map_selected(marked, scores, marks)
    if not leaves_by_path(marked_scores):
        raise ValueError("`select` marks no leaf that has scores: nothing is selected.")
    return marked_scores, map_selected(marked, sparsity, marks) if is_tree(sparsity) else sparsity


def _layouts(scores: Params, layouts: Params | None) -> Params:
    """The layout of every score; kernels are (in..., out) where nothing is known."""

    def known(path: str, score: Any, *given: LeafLayout) -> LeafLayout:
        return given[0] if given and given[0].is_weight else default_layout(path, score)

    return map_selected(known, scores, *(() if layouts is None else (layouts,)))
