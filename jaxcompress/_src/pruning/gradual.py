"""Gradual pruning as a transform."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.pruning.masks import apply_masks
from jaxcompress._src.pruning.patterns import Pattern, unstructured
from jaxcompress._src.pruning.ranked_leaves import RankedLeaves, ScoreFn, Store
from jaxcompress._src.pruning.ranking import Scope
from jaxcompress._src.pruning.scheduled_masks import ScheduledMasks
from jaxcompress._src.transforms import identity
from jaxcompress._src.types import Params, Schedule, Selector, Transform, TransformState


@transform_on_auto_axes
def gradual(
    *,
    schedule: Schedule,
    every: int = 100,
    freeze_at: int | None = None,
    rerank: bool = False,
    scope: Scope = "leaf",
    pattern: Pattern = unstructured(),  # noqa: B008 (a frozen dataclass)
    score: ScoreFn = jnp.abs,
    sparsities: Params | None = None,
    store: Store = "sparse",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Prunes more and more while the model trains: masks by rank of the raw weights, renewed every few steps.

    Raw weights live on underneath their mask, so that a weight may come back at the next ranking. Where the schedule
    stands still, as at its end, the masks do too. The sparsity is a traced number: a schedule compiles once.

    What the schedule ends at is what `finalize` gives, whatever the number of updates. If training ended before the
    schedule did, `finalize` ranks once more, which `apply` has not seen, and warns (`UnfinishedScheduleWarning`).

    Args:
        schedule: step -> sparsity, such as `schedules.cubic`; it must stand still in the end.
        every: updates between rankings; the ranking happens when step % every == 0, the first update being step 0, and
            in any case at the last update before the schedule stands at its end: with `end=9`, at the ninth.
        freeze_at: the first update from which the masks stay as they are; not before the end of the schedule.
        rerank: also rank where the sparsity has not changed since the last time, so that weights go on swapping places
            (a ranking costs 20 to 45 reads of the weights).
        scope: what is ranked together: "leaf", "global" (all leaves), or "row" (the inputs of one output unit).
        pattern: `unstructured()`, `n_of_m(2, 4)` or `block(32, 32)`; under `n_of_m` the schedule runs up to 1 - n/m.
        score: magnitude by default.
        sparsities: a partial tree, such as `erdos_renyi` returns it: the sparsity of a leaf is the schedule times its
            entry, so let the schedule end at 1. Not in global scope.
        store: what `finalize` makes of the leaves: "sparse" arrays, or "dense" ones with zeros.
        select: which leaves; by default every weight. Those that are compressed when the training begins stay as
            they are, in every function of the transform.
        layouts: from `trace.layouts`.

    Returns:
        The transform; its fixed state is a `MaskState`.

    Raises:
        ValueError: `every` below 1, an unknown `store`, a schedule that never stands still or ends at what the pattern
            does not allow, `freeze_at` before its end; from `init`: nothing selected, or NaN, Inf or no floats in a
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
    leaves = RankedLeaves(
        select=select, layouts=layouts, scope=scope, pattern=pattern, sparsities=sparsities, store=store
    )
    masks = ScheduledMasks(leaves=leaves, schedule=schedule, every=every, freeze_at=freeze_at, rerank=rerank)
    return identity()._replace(
        init=functools.partial(_init, masks),
        apply=apply_state_masks,
        update=functools.partial(_update, masks, score),
        finalize=functools.partial(_finalize, masks, score),
    )


def apply_state_masks(params: Params, state: TransformState, *, key: jax.Array | None = None) -> Params:
    """`apply_masks` with `state.fixed.masks`."""
    del key
    return apply_masks(params, state.fixed.masks)


def _init(masks: ScheduledMasks, params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
    del key, statistics
    return TransformState((), masks.start(params))


def _update(
    masks: ScheduledMasks,
    score: ScoreFn,
    grads: Params,
    state: TransformState,
    params: Params,
    *,
    key: jax.Array,
    loss: Any,
) -> tuple[TransformState, None]:
    del grads, key, loss
    weights = masks.leaves.weights_at(state.fixed.masks, params)
    return TransformState((), masks.advance(state.fixed, weights, params, score=score)), None


def _finalize(masks: ScheduledMasks, score: ScoreFn, params: Params, state: TransformState) -> Params:
    weights = masks.leaves.weights_at(state.fixed.masks, params)
    return masks.leaves.finalize(params, masks.finish(state.fixed, weights, params, score=score))
