"""Gradual pruning as a transform."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.pruning._masks import apply_masks, overlay
from jaxcompress.pruning._patterns import Pattern, unstructured
from jaxcompress.pruning._ranking import Scope, ranked_masks
from jaxcompress.pruning._scores import checked_weight
from jaxcompress.pruning._store import store_masked
from jaxcompress.trace import selected_layouts
from jaxcompress.transforms import identity
from jaxcompress.tree import map_selected
from jaxcompress.types import Params, Schedule, Selector, Transform, TransformState, is_compressed

ScoreFn = Callable[[jax.Array], jax.Array]
"""`weights -> scores`; the lowest are pruned."""


class GradualState(NamedTuple):
    """Fixed state.

    Attributes:
        masks: partial tree of bool, True = kept.
        step: int32, number of updates so far.
    """

    masks: Params
    step: jax.Array


def gradual(
    *,
    schedule: Schedule,
    every: int = 100,
    freeze_at: int | None = None,
    select: Selector | None = None,
    layouts: Params | None = None,
    scope: Scope = "leaf",
    pattern: Pattern = unstructured(),  # noqa: B008 (a frozen dataclass)
    score: ScoreFn = jnp.abs,
    store: Literal["sparse", "dense"] = "sparse",
) -> Transform:
    """Prunes more and more while the model trains: masks by rank of the raw weights, renewed every few steps.

    Raw weights live on underneath their mask, so that a weight may come back at the next ranking; after `freeze_at`
    none does. The sparsity is a traced number: a schedule compiles once. Rankings run in the taken branch of a `cond`.

    Args:
        schedule: step -> sparsity, such as `schedules.cubic`.
        every: updates between rankings; the ranking happens when step % every == 0, the first update being step 0.
        freeze_at: the first update from which the masks stay as they are.
        select: which leaves; see `trace.selected_layouts`.
        layouts: from `trace.layouts`.
        scope: see `masks_from_scores`.
        pattern: see `masks_from_scores`; under `n_of_m` the schedule runs up to 1 - n/m.
        score: magnitude by default.
        store: what `finalize` makes of the leaves: "sparse" arrays, or "dense" ones with zeros.

    Returns:
        The transform; its fixed state is a `GradualState`.

    Raises:
        ValueError: `every` below 1, an unknown `store`; from `init`: nothing selected, or NaN, Inf or no floats in a
            selected leaf.

    Example:
        >>> import jax
        >>> from jaxcompress.schedules import constant
        >>> params = {"kernel": jnp.array([[3.0], [-1.0]])}
        >>> transform = gradual(schedule=constant(0.5), every=1)
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> state, _ = transform.update(params, state, params, key=jax.random.key(1), loss=0.0)
        >>> transform.apply(params, state)["kernel"]
        Array([[3.],
               [0.]], dtype=float32)

    References:
        Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression".
    """
    if every < 1:
        raise ValueError(f"`every` must be at least 1, got {every}.")
    if store not in ("sparse", "dense"):
        raise ValueError(f"`store` must be 'sparse' or 'dense', got {store!r}.")

    def chosen(params: Params) -> Params:
        return selected_layouts(params, select=select, layouts=layouts)

    def init(params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
        del key, statistics
        masks = map_selected(
            lambda path, _, leaf: jnp.ones_like(checked_weight(path, leaf), bool), chosen(params), params
        )
        return TransformState((), GradualState(masks, jnp.zeros((), jnp.int32)))

    def apply(params: Params, state: TransformState, *, key: jax.Array | None = None) -> Params:
        del key
        return apply_masks(params, state.fixed.masks)

    def update(grads: Params, state: TransformState, params: Params, *, key: jax.Array, loss: Any) -> tuple[Any, None]:
        del grads, key, loss
        masks, step = state.fixed
        due = step % every == 0
        if freeze_at is not None:
            due &= step < freeze_at

        def rank(params: Params) -> Params:
            axes = chosen(params)
            weights = map_selected(lambda _, layout, leaf: _plain(leaf), axes, params)
            return ranked_masks(weights, axes, schedule(step), scope=scope, pattern=pattern, score=score)

        masks = jax.lax.cond(due, rank, lambda params: masks, params)
        return TransformState((), GradualState(masks, step + 1)), None

    def finalize(params: Params, state: TransformState) -> Params:
        masks = state.fixed.masks
        if store == "dense":
            return apply_masks(params, masks)
        stored = map_selected(
            lambda _, mask, leaf, layout: store_masked(leaf, mask, layout, pattern), masks, params, chosen(params)
        )
        return overlay(stored, params)

    return identity()._replace(init=init, apply=apply, update=update, finalize=finalize)


def _plain(leaf: Any) -> jax.Array:
    return leaf.materialize() if is_compressed(leaf) else leaf
