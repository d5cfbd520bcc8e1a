"""Soft movement pruning: a threshold on learned scores, and a penalty that drives them below it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.pruning.movement import apply_with_scores, blank_scores
from jaxcompress._src.pruning.ranked_leaves import RankedLeaves, Store
from jaxcompress._src.schedules import constant, final_value, is_at, warn_unfinished
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params, Schedule, Selector, Transform, TransformState, exportable


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
def soft_movement(
    *,
    threshold: Schedule | float,
    strength: Schedule | float,
    store: Store = "sparse",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Keeps the weights whose learned score passes a threshold: w' = [σ(S) > τ] w, and adds λ mean σ(S) to the loss.

    The scores learn as in `movement`. How much is pruned is found, not given: each layer ends as sparse as the loss
    lets the penalty make it. The mean is taken in every leaf, then over leaves.

    Args:
        threshold: τ, or step -> τ, in [0, 1), which must stand still in the end: `finalize` keeps what passes that
            last one, and warns if training ended before it was reached. With scores that begin at 0, all weights are
            kept below τ = 1/2.
        strength: λ, or step -> λ. In the paper it rises with the threshold: λ_final τ / τ_final.
        store: what `finalize` makes of the leaves: "sparse" arrays, or "dense" ones with zeros.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        The transform. Its trainable state is the partial tree of scores, float32, at first zero; it needs a
        `transform_optimizer`. The fixed state is a `SoftMovementState`.

    Raises:
        ValueError: a threshold that does not end in [0, 1), or a negative constant strength; from `init` as `gradual`.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, -1.0]])}
        >>> transform = soft_movement(threshold=0.1, strength=2.0)
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> float(transform.penalty(state, params, loss=0.0))
        1.0

    References:
        Sanh et al. 2020, "Movement pruning: adaptive sparsity by fine-tuning", sections 4 and 5 (soft movement).
    """
    if not callable(strength) and not strength >= 0:
        raise ValueError(f"`strength` must not be negative, got {strength}.")
    leaves = RankedLeaves(select=select, layouts=layouts, store=store)
    least = _Threshold(_schedule(threshold))
    return identity()._replace(
        init=functools.partial(_init, leaves),
        apply=apply_with_scores,
        penalty=functools.partial(_penalty, _schedule(strength)),
        update=functools.partial(_update, least),
        finalize=functools.partial(_finalize, leaves, least),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Threshold:
    schedule: Schedule
    goal: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        goal = final_value(self.schedule, name="threshold")
        if not 0 <= goal < 1:
            raise ValueError(f"`threshold` must be in [0, 1), got {goal:g} at its end.")
        object.__setattr__(self, "goal", goal)

    def after(self, step: jax.Array) -> jax.Array:
        """The threshold of update `step`; that of the end is there for the step at which the schedule reaches it."""
        return jnp.where(self.has_ended(step + 1), self.goal, self.schedule(step)).astype(jnp.float32)

    def has_ended(self, step: Any) -> Any:
        return is_at(self.schedule(step), self.goal)


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
    threshold: _Threshold, grads: Params, state: TransformState, params: Params, *, key: jax.Array, loss: Any
) -> tuple[TransformState, None]:
    del grads, params, key, loss
    masks = _masks(state.trainable, threshold.after(state.fixed.step))
    return TransformState(state.trainable, SoftMovementState(masks, state.fixed.step + 1)), None


def _finalize(leaves: RankedLeaves, threshold: _Threshold, params: Params, state: TransformState) -> Params:
    step = state.fixed.step
    if not is_traced(step) and not threshold.has_ended(int(step)):
        warn_unfinished(
            f"Training ended after {int(step)} updates, at a threshold of {float(threshold.schedule(int(step))):.4g}; "
            f"it goes on to {threshold.goal:.4g}, which `finalize` applies now, without training after it."
        )
    return leaves.finalize(params, _masks(state.trainable, jnp.float32(threshold.goal)))


def _masks(scores: Params, least: jax.Array) -> Params:
    return map_selected(lambda _, score: jax.nn.sigmoid(score) > least, scores)


def _schedule(value: Schedule | float) -> Schedule:
    return value if callable(value) else constant(value)
