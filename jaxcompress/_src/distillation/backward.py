"""The backward pass of one step: from a batch to all gradients, in one piece or in micro-batches."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxcompress._src.distillation.collections import (
    Collections,
    ReadOutputs,
    check_all_read,
    new_collections,
    with_collections,
)
from jaxcompress._src.distillation.loss_scale import DynamicLossScale, current_scale, unscaled
from jaxcompress._src.distillation.micro_batches import accumulate, added, scaled, split_batch
from jaxcompress._src.distillation.objective import (
    Apply,
    Metrics,
    WeightedLosses,
    gradients,
    reported,
    task_loss,
    teacher_outputs,
)
from jaxcompress._src.distillation.outputs import LossFn
from jaxcompress._src.distillation.remat import rematerialized
from jaxcompress._src.distillation.train_state import TrainState
from jaxcompress._src.execution.execute import execute
from jaxcompress._src.transforms import pullback
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.partition import partition_trainable
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Selector, Transform, TransformState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What `make_train_step` was given."""

    student_apply: Apply
    teacher_apply: Apply | None
    optimizer: optax.GradientTransformation
    losses: WeightedLosses
    transform: Transform
    transform_optimizer: optax.GradientTransformation | None
    trainable: Selector | None
    mutable: tuple[str, ...]
    micro_batches: int
    metrics: Mapping[str, LossFn] | None
    master_dtype: DTypeLike | None
    ema: float | None
    loss_scale: float | DynamicLossScale | None
    remat: Callable[..., Any] | None


class Backward(NamedTuple):
    """What comes out of the backward pass.

    Attributes:
        loss: of the task, without penalty.
        figures: by name.
        stage_grads: what `update` takes; with a loss scale, in float32 at least.
        grads: of the parameters, and of the transform's trainable state; with a loss scale, in float32 at least.
        collections: new values of mutable leaves.
    """

    loss: jax.Array
    figures: Metrics
    stage_grads: Any
    grads: tuple[Params, Any]
    collections: Collections


def backward_pass(
    setup: Setup,
    state: TrainState,
    teacher_params: Params,
    batch: Mapping[str, Any],
    apply_key: jax.Array,
    student_key: jax.Array,
) -> Backward:
    """The loss at what the transform makes of the parameters, with the penalty, and all gradients from one pass."""
    trainable, fixed = state.transform_state
    effective, pull = pullback(setup.transform, state.params, state.transform_state, key=apply_key)
    scale = current_scale(setup.loss_scale, state.loss_scale)
    (loss, figures, of_effective), collections = _of_task(
        setup, state, effective, teacher_params, batch, student_key, scale
    )

    def penalty(loss: jax.Array, params: Params, trainable: Any) -> tuple[jax.Array, jax.Array]:
        value = setup.transform.penalty(TransformState(trainable, fixed), params, loss=loss)
        value = jnp.asarray(value, loss.dtype)
        return _times(value, scale), value

    # The penalty may look at raw parameters and trainable state directly, beside the loss at the effective ones.
    price, (of_loss, *direct) = gradients(penalty, loss, state.params, trainable)
    stage_grads, *pulled = pull(scaled(of_effective, 1.0 + (of_loss if scale is None else of_loss / scale)))
    grads = added(tuple(pulled), tuple(direct))
    if scale is not None:
        stage_grads, grads = unscaled((stage_grads, grads), scale)
    once = jnp.ones((), jnp.float32)
    return Backward(
        loss=loss,
        figures=figures | {"loss": (loss + price, once), "penalty": (price, once)},
        stage_grads=stage_grads,
        grads=grads,
        collections=collections,
    )


def _of_task(
    setup: Setup,
    state: TrainState,
    effective: Params,
    teacher_params: Params,
    batch: Mapping[str, Any],
    key: jax.Array,
    scale: jax.Array | None,
) -> tuple[tuple[jax.Array, Metrics, Params], Collections]:
    """The loss of the whole batch, the figures and the (scaled) gradient by effective parameters; the collections."""
    student_apply = setup.student_apply if setup.remat is None else rematerialized(setup.student_apply, setup.remat)

    def objective(
        effective: Params, batch: Mapping[str, Any], key: jax.Array, counts: Mapping[str, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics, Metrics, Collections]]:
        teacher = teacher_outputs(setup.teacher_apply, teacher_params, batch)
        student = execute(student_apply)(effective, batch, key=key, train=True)
        outputs = ReadOutputs(student)
        loss, figures = task_loss(setup.losses, state.step, outputs, teacher, batch, counts)
        others = reported(setup.metrics, outputs.constant(), teacher, batch)
        check_all_read(outputs, setup.mutable)
        collections = new_collections(effective, student, setup.mutable) if setup.mutable else {}
        return _times(loss, scale), (loss, figures, others, collections)

    def one(batch: Mapping[str, Any], key: jax.Array, collections: Collections, counts: Any = None) -> tuple[Any, Any]:
        (loss, figures, others, collections), (grads,) = gradients(
            lambda effective: objective(effective, batch, key, counts), with_collections(effective, collections)
        )
        return (loss, figures | others, grads), collections

    if setup.micro_batches == 1:
        return one(batch, key, {})
    parts, whole = split_batch(batch, setup.micro_batches)
    keys = jax.random.split(key, setup.micro_batches)
    start = {path: leaf for path, leaf in leaves_with_paths(effective) if path.split("/")[0] in setup.mutable}

    def figures_of(part: Any, key: jax.Array, collections: Collections) -> tuple[tuple[Metrics, Metrics], Collections]:
        _, (_, figures, others, _) = objective(effective, whole(part), key, None)
        return (figures, others), collections

    first = jax.tree.map(lambda leaf: leaf[0], (parts, keys))
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(figures_of, *first, start)[0])
    # Nothing but counts is used of this pass, so that the compiler drops the models.
    (counted, _), _ = accumulate(figures_of, blank, parts, keys, start)
    counts = {name: count for name, (_, count) in counted.items()}
    zeros = (
        jnp.zeros((), jnp.float32),
        blank[0] | blank[1],
        jax.tree.map(jnp.zeros_like, partition_trainable(effective)[0]),
    )
    return accumulate(lambda part, key, own: one(whole(part), key, own, counts), zeros, parts, keys, start)


def _times(value: jax.Array, scale: jax.Array | None) -> jax.Array:
    return value if scale is None else value * scale


def trained_gradients(setup: Setup, params: Params, backward: Backward) -> tuple[Any, ...]:
    """The gradients that something is made of: those of frozen leaves may be NaN."""
    marks = partition_trainable(params, select=setup.trainable)[0]
    of_params = _selected(marks, backward.grads[0])
    stages = backward.stage_grads if setup.transform.stages else (backward.stage_grads,)
    return of_params, backward.grads[1], [_selected(marks, grads) for grads in stages]


def _selected(marks: Params, grads: Params) -> dict[str, Any]:
    """Gradients of the leaves that are trained; those of a leaf that a stage has compressed are left out."""
    trained = {path for path, mark in leaves_with_paths(marks) if not is_unselected(mark)}
    return {path: grad for path, grad in leaves_with_paths(grads) if path in trained and not is_unselected(grad)}
