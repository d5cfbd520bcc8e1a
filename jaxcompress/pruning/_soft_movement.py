"""Soft movement pruning: a threshold on learned scores, and a penalty that drives them below it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.meshes import transform_on_auto_axes
from jaxcompress.pruning._movement import apply_with_scores, blank_scores
from jaxcompress.pruning._ranked_leaves import RankedLeaves, Store
from jaxcompress.schedules import constant
from jaxcompress.transforms import identity
from jaxcompress.tree import leaves_with_paths, map_selected
from jaxcompress.types import Params, Schedule, Selector, Transform, TransformState, exportable


@exportable
class SoftMovementState(NamedTuple):
    """Fixed state.

    Attributes:
        masks: partial tree of bool, True = kept.
        step: int32, number of updates so far.
    """

    masks: Params
    step: jax.Array


@transform_on_auto_axes
@transform_on_auto_axes
@transform_on_auto_axes
def soft_movement(
    *,
    threshold: Schedule | float,
    strength: Schedule | float,
    select: Selector | None = None,
    layouts: Params | None = None,
    store: Store = "sparse",
) -> Transform:
    """Keeps the weights whose learned score passes a threshold: w' = [σ(S) > τ] w, and adds λ mean σ(S) to the loss.

    The scores learn as in `movement`. How much is pruned is found, not given: each layer ends as sparse as the loss
    lets the penalty make it. The mean is taken in every leaf, then over leaves.

    Args:
        threshold: τ, or step -> τ, in [0, 1). With scores that begin at 0, all weights are kept below τ = 1/2.
        strength: λ, or step -> λ. In the paper it rises with the threshold: λ_final τ / τ_final.
        select: which leaves; see `trace.selected_layouts`.
        layouts: from `trace.layouts`.
        store: see `gradual`.

    Returns:
        The transform. Its trainable state is the partial tree of scores, float32, at first zero; it needs a
        `transform_optimizer`. The fixed state is a `SoftMovementState`.

    Raises:
        ValueError: a constant threshold outside [0, 1), or a negative constant strength; from `init` as `gradual`.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, -1.0]])}
        >>> transform = soft_movement(threshold=0.1, strength=2.0)
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> float(transform.penalty(state, params, loss=0.0))
        1.0

    References:
        Sanh et al. 2020, "Movement pruning: adaptive sparsity by fine-tuning", sections 4 and 5 (soft movement).
    """
    if not callable(threshold) and not 0 <= threshold < 1:
        raise ValueError(f"`threshold` must be in [0, 1), got {threshold}.")
    if not callable(strength) and not strength >= 0:
        raise ValueError(f"`strength` must not be negative, got {strength}.")
    leaves = RankedLeaves(select=select, layouts=layouts, store=store)
    return identity()._replace(
        init=functools.partial(_init, leaves),
        apply=apply_with_scores,
        penalty=functools.partial(_penalty, _schedule(strength)),
        update=functools.partial(_update, _schedule(threshold)),
        finalize=functools.partial(_finalize, leaves),
    )


def _init(leaves: RankedLeaves, params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
    del key, statistics
    state = SoftMovementState(leaves.whole(params), jnp.zeros((), jnp.int32))
    return TransformState(blank_scores(leaves, params), state)


def _penalty(strength: Schedule, state: TransformState, params: Params, *, loss: Any) -> jax.Array:
    del params, loss
    means = [jax.nn.sigmoid(score).mean() for _, score in leaves_with_paths(state.trainable) if score.size]
    mean = sum(means) / len(means) if means else jnp.zeros(())
    return jnp.asarray(strength(state.fixed.step), jnp.float32) * mean


def _update(
    threshold: Schedule, grads: Params, state: TransformState, params: Params, *, key: jax.Array, loss: Any
) -> tuple[TransformState, None]:
    del grads, params, key, loss
    least = jnp.asarray(threshold(state.fixed.step), jnp.float32)
    masks = map_selected(lambda _, score: jax.nn.sigmoid(score) > least, state.trainable)
    return TransformState(state.trainable, SoftMovementState(masks, state.fixed.step + 1)), None


def _finalize(leaves: RankedLeaves, params: Params, state: TransformState) -> Params:
    return leaves.finalize(params, state.fixed.masks)


def _schedule(value: Schedule | float) -> Schedule:
    return value if callable(value) else constant(value)
