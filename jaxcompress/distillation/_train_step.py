"""One step of distillation, with a compression technique inside the loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distillation._objective import (
    Apply,
    Metrics,
    WeightedLosses,
    gradients,
    reported,
    task_loss,
    teacher_outputs,
)
from jaxcompress.distillation._outputs import LossFn, Outputs
from jaxcompress.distillation._train_state import TrainState, forget_fresh, like_before, on_one_mesh, own
from jaxcompress.execution import execute
from jaxcompress.transforms import identity, pullback
from jaxcompress.tree import combine, is_unselected, partition_trainable
from jaxcompress.types import Params, Schedule, Selector, Transform, TransformState

_IDENTITY = identity()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setup:
    student_apply: Apply
    teacher_apply: Apply | None
    optimizer: optax.GradientTransformation
    losses: WeightedLosses
    transform: Transform
    transform_optimizer: optax.GradientTransformation | None
    trainable: Selector | None
    metrics: Mapping[str, LossFn] | None


def make_train_step(
    student_apply: Apply,
    teacher_apply: Apply | None,
    optimizer: optax.GradientTransformation,
    *,
    losses: Mapping[str, LossFn | tuple[float | Schedule, LossFn]],
    transform: Transform = _IDENTITY,
    transform_optimizer: optax.GradientTransformation | None = None,
    trainable: Selector | None = None,
    metrics: Mapping[str, LossFn] | None = None,
) -> tuple[Callable[..., TrainState], Callable[..., tuple[TrainState, Metrics]]]:
    """Functions that start and continue the training of a student, while a transform compresses it.

    The loss is Σ weight · sum / count + penalty, of the student at `transform.apply(params)`. In this order a step
    differentiates it, lets the optimizers act, then the transform's `update` and `project`, and zeroes the optimizer's
    moments of weights that start anew. Sums and counts span the whole batch, however it is sharded.

    Args:
        student_apply: `(params, batch, *, key, train) -> outputs by name`, called with a typed key and `train=True`. It
            may meet compressed leaves: it is then run by `execute`.
        teacher_apply: the same for the teacher; called with `key=None, train=False`, without a gradient. None: the
            teacher's outputs are in `batch["teacher"]` (computed earlier), or not needed.
        optimizer: for the trainable float leaves of the parameters. Of `optax.MultiSteps`, take its
            `gradient_transformation()`; the transform still updates at every call.
        losses: name -> loss, or (weight, loss); a weight is a number or a function of the step.
        transform: the technique; several in a `chain`. The loss that its `penalty` and `update` see is without penalty.
        transform_optimizer: for `transform_state.trainable`.
        trainable: which leaves of the parameters to train; by default all. The others keep their bits (unless the
            transform's `project` changes them), and have no moments.
        metrics: name -> a function like a loss, reported only. By default `agreement` if both models have `logits`.

    Returns:
        `(init_state, step)`.

        `init_state(params, *, key, statistics=None) -> TrainState` copies every leaf and keeps its sharding, so that
        the first step deletes nothing that the caller still holds.

        `step(state, teacher_params, batch) -> (state, metrics)` is jitted and donates `state`. `metrics` has a (sum,
        count) for every loss (unweighted) and every metric, and, with count 1, "penalty" and "loss": all that is
        minimised.

    Raises:
        ValueError: no losses, or a name twice; from `init_state`: a transform with trainable state, but no
            `transform_optimizer`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxcompress.distillation import make_train_step, soft_targets
        >>> def apply(params, batch, *, key, train):
        ...     return {"logits": batch["x"] @ params["kernel"]}
        >>> init_state, step = make_train_step(apply, apply, optax.sgd(0.5), losses={"soft": soft_targets()})
        >>> teacher = {"kernel": jnp.eye(2)}
        >>> state = init_state({"kernel": jnp.zeros((2, 2))}, key=jax.random.key(0))
        >>> for _ in range(3):
        ...     state, metrics = step(state, teacher, {"x": jnp.eye(2)})
        >>> int(state.step), {name: float(count) for name, (_, count) in metrics.items()}
        (3, {'agreement': 2.0, 'loss': 1.0, 'penalty': 1.0, 'soft': 2.0})
    """
    setup = _Setup(
        student_apply=student_apply,
        teacher_apply=teacher_apply,
        optimizer=optimizer,
        losses={name: entry if isinstance(entry, tuple) else (1.0, entry) for name, entry in losses.items()},
        transform=transform,
        transform_optimizer=transform_optimizer,
        trainable=trainable,
        metrics=metrics,
    )
    _check_names(setup)

    def init_state(params: Params, *, key: jax.Array, statistics: Any = None) -> TrainState:
        return _init(setup, params, key, statistics)

    def step(state: TrainState, teacher_params: Params, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        return _step(setup, state, teacher_params, batch)

    return init_state, jax.jit(step, donate_argnums=0)


def _init(setup: _Setup, params: Params, key: jax.Array, statistics: Any) -> TrainState:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"`key` must be typed, as `jax.random.key(seed)` makes it, got {key.dtype}.")
    transform_key, key = jax.random.split(key)
    # Strongly typed before anything is derived from them: moments would inherit the weak type.
    params = own(params)
    transform_state = own(setup.transform.init(params, key=transform_key, statistics=statistics))
    inner, _ = partition_trainable(transform_state.trainable)
    if jax.tree.leaves(inner) and setup.transform_optimizer is None:
        raise ValueError("The transform has trainable state: `transform_optimizer` is needed.")
    state = TrainState(
        params=params,
        transform_state=transform_state,
        optimizer_state=own(setup.optimizer.init(partition_trainable(params, select=setup.trainable)[0])),
        transform_optimizer_state=own(_transform_optimizer(setup).init(inner)),
        step=jnp.zeros((), jnp.int32),
        key=key,
    )
    return on_one_mesh(state)


def _step(
    setup: _Setup, state: TrainState, teacher_params: Params, batch: Mapping[str, Any]
) -> tuple[TrainState, Metrics]:
    next_key, apply_key, student_key, update_key = jax.random.split(state.key, 4)
    teacher = teacher_outputs(setup.teacher_apply, teacher_params, batch)
    loss, figures, stage_grads, grads = _backward(setup, state, teacher, batch, apply_key, student_key)
    transform, total = setup.transform, figures["loss"][0]

    params, optimizer_state = _optimize(
        setup.optimizer, grads[0], state.params, state.optimizer_state, total, setup.trainable
    )
    trainable, transform_optimizer_state = _optimize(
        _transform_optimizer(setup), grads[1], state.transform_state.trainable, state.transform_optimizer_state, total
    )
    transform_state = TransformState(trainable, state.transform_state.fixed)
    transform_state, fresh = transform.update(stage_grads, transform_state, params, key=update_key, loss=loss)
    params, transform_state = transform.project(params, transform_state)
    optimizer_state = forget_fresh(
        setup.optimizer, optimizer_state, fresh, partition_trainable(params, select=setup.trainable)[0]
    )
    new = TrainState(params, transform_state, optimizer_state, transform_optimizer_state, state.step + 1, next_key)
    return like_before(new, state), figures


def _backward(
    setup: _Setup,
    state: TrainState,
    teacher: Outputs,
    batch: Mapping[str, Any],
    apply_key: jax.Array,
    student_key: jax.Array,
) -> tuple[jax.Array, Metrics, Any, tuple[Params, Any]]:
    """`(loss, figures, gradients for update, (those of params, those of the transform's trainable state))`."""
    trainable, fixed = state.transform_state
    effective, pull = pullback(setup.transform, state.params, state.transform_state, key=apply_key)

    def objective(effective: Params, params: Params, trainable: Any) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        student = execute(setup.student_apply)(effective, batch, key=student_key, train=True)
        loss, figures = task_loss(setup.losses, state.step, student, teacher, batch)
        figures |= reported(setup.metrics, student, teacher, batch)
        penalty = jnp.asarray(setup.transform.penalty(TransformState(trainable, fixed), params, loss=loss), loss.dtype)
        once = jnp.ones((), jnp.float32)
        return loss + penalty, (loss, figures | {"loss": (loss + penalty, once), "penalty": (penalty, once)})

    (loss, figures), (of_effective, *direct) = gradients(objective, effective, state.params, trainable)
    # The penalty may look at raw parameters and trainable state directly, beside the loss at the effective ones.
    stage_grads, *pulled = pull(of_effective)
    of_params, of_trainable = jax.tree.map(jnp.add, pulled, direct)
    return loss, figures, stage_grads, (of_params, of_trainable)


def _optimize(
    optimizer: optax.GradientTransformation,
    grads: Params,
    params: Params,
    state: Any,
    loss: jax.Array,
    select: Selector | None = None,
) -> tuple[Params, Any]:
    trainable, rest = partition_trainable(params, select=select)
    grads = jax.tree.map(lambda x, g: x if is_unselected(x) else g, trainable, grads, is_leaf=is_unselected)
    # Some optimizers (line searches, reduce-on-plateau) want the loss; the wrapper hides it from the others.
    updates, state = optax.with_extra_args_support(optimizer).update(grads, state, trainable, value=loss)
    return combine(optax.apply_updates(trainable, updates), rest), state


def _transform_optimizer(setup: _Setup) -> optax.GradientTransformation:
    return optax.set_to_zero() if setup.transform_optimizer is None else setup.transform_optimizer


def _check_names(setup: _Setup) -> None:
    if not setup.losses:
        raise ValueError("`losses` is empty: there is nothing to minimise.")
    taken = {"loss", "penalty", *(setup.metrics or {})}
    if len(taken) < 2 + len(setup.metrics or {}) or taken & set(setup.losses):
        raise ValueError(
            f"Losses {list(setup.losses)} and metrics {list(setup.metrics or {})} need names of their own, "
            "other than 'loss' and 'penalty'."
        )
