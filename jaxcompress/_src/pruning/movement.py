"""Movement pruning: masks by rank of learned scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.pruning.patterns import Pattern, unstructured
from jaxcompress._src.pruning.ranked_leaves import RankedLeaves, Store
from jaxcompress._src.pruning.ranking import Scope, as_it_is
from jaxcompress._src.pruning.scheduled_masks import ScheduledMasks
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.maps import leaves_by_path, with_leaves
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params, Schedule, Selector, Transform, TransformState, plain


@transform_on_auto_axes
def movement(
    *,
    schedule: Schedule,
    every: int = 1,
    freeze_at: int | None = None,
    scope: Scope = "leaf",
    pattern: Pattern = unstructured(),  # noqa: B008 (a frozen dataclass)
    sparsities: Params | None = None,
    store: Store = "sparse",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Keeps the weights with the highest learned scores S: w' = top(S) w, with dL/dS = dL/dw' w, as if S were the mask.

    Under plain gradient descent S becomes -Σ w dL/dw: high where weights move away from zero. Pruned weights go on
    collecting score; they get no gradient themselves.

    Args:
        schedule: step -> sparsity; see `gradual` for what `finalize` makes of it. Begin at 0 and stay there for some
            steps: equal scores keep the lowest index.
        every: updates between rankings; see `gradual`.
        freeze_at: the first update from which the masks stay as they are; not before the end of the schedule.
        scope: what is ranked together: "leaf", "global" (all leaves), or "row" (the inputs of one output unit).
        pattern: `unstructured()`, `n_of_m(2, 4)` (two of every four consecutive inputs are kept) or `block(32, 32)`.
        sparsities: a partial tree of factors on the schedule, one for each leaf, such as `erdos_renyi` returns it.
        store: what `finalize` makes of the leaves: "sparse" arrays, or "dense" ones with zeros.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        The transform. Its trainable state is the partial tree of scores, float32, at first zero; it needs a
        `transform_optimizer` (in the paper: Adam at 1e-2, beside 3e-5 for the weights). The fixed state is a
        `MaskState`.

    Raises:
        ValueError: as `gradual`.

    Example:
        >>> from jaxcompress.schedules import constant
        >>> params = {"kernel": jnp.array([[3.0, -1.0]])}
        >>> transform = movement(schedule=constant(0.5))
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> jax.grad(lambda s: transform.apply(params, state._replace(trainable=s))["kernel"].sum())(state.trainable)
        {'kernel': Array([[ 3., -1.]], dtype=float32)}

    References:
        Sanh et al. 2020, "Movement pruning: adaptive sparsity by fine-tuning", sections 3 and 4.
    """
    leaves = RankedLeaves(
        select=select, layouts=layouts, scope=scope, pattern=pattern, sparsities=sparsities, store=store
    )
    masks = ScheduledMasks(leaves=leaves, schedule=schedule, every=every, freeze_at=freeze_at, rerank=True)
    return identity()._replace(
        init=functools.partial(_init, masks),
        apply=apply_with_scores,
        update=functools.partial(_update, masks),
        finalize=functools.partial(_finalize, masks),
    )


def apply_with_scores(params: Params, state: TransformState, *, key: jax.Array | None = None) -> Params:
    """Masks by `state.fixed.masks`, with gradients for the kept weights and for all scores in `state.trainable`."""
    del key
    masked = map_selected(
        lambda _, mask, leaf, score: keep_by_score(mask, plain(leaf), score),
        state.fixed.masks,
        params,
        state.trainable,
    )
    return with_leaves(params, leaves_by_path(masked))


def blank_scores(leaves: RankedLeaves, params: Params) -> Params:
    """Scores of zero, float32."""
    return map_selected(lambda _, leaf: jnp.zeros_like(leaf, jnp.float32), leaves.weights(params))


@jax.custom_jvp
def keep_by_score(
    mask: Bool[Array, "*shape"], w: Float[Array, "*shape"], score: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`w` where the mask is set, 0 elsewhere; the score gets the gradient of the mask, as if that were a number."""
    del score
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


@keep_by_score.defjvp
def _keep_by_score_jvp(primals: tuple[Any, Any, Any], tangents: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    mask, w, score = primals
    _, w_dot, score_dot = tangents
    masked = jnp.where(mask, w_dot, jnp.zeros((), w.dtype))
    return keep_by_score(mask, w, score), masked + (w.astype(jnp.float32) * score_dot).astype(w.dtype)


def _init(masks: ScheduledMasks, params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
    del key, statistics
    return TransformState(blank_scores(masks.leaves, params), masks.start(params))


def _update(
    masks: ScheduledMasks, grads: Params, state: TransformState, params: Params, *, key: jax.Array, loss: Any
) -> tuple[TransformState, None]:
    del grads, key, loss
    new = masks.advance(state.fixed, state.trainable, params, score=as_it_is)
    return TransformState(state.trainable, new), None


def _finalize(masks: ScheduledMasks, params: Params, state: TransformState) -> Params:
    return masks.leaves.finalize(params, masks.finish(state.fixed, state.trainable, params, score=as_it_is))
