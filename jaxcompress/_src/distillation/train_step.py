"""One step of distillation, with a compression technique inside the loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress._src.distillation.backward import Setup, backward_pass, trained_gradients
from jaxcompress._src.distillation.collections import check_mutable, immutable, with_collections
from jaxcompress._src.distillation.objective import Apply, Metrics
from jaxcompress._src.distillation.outputs import LossFn
from jaxcompress._src.distillation.train_state import (
    TrainState,
    are_finite,
    copy_of,
    matched_to,
    placed,
    reset_moments,
    unless,
)
from jaxcompress._src.transforms import checked_init, checked_project, checked_update, identity
from jaxcompress._src.tree.partition import combine, partition_trainable
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Schedule, Selector, Transform, TransformState

_IDENTITY = identity()


def make_train_step(
    student_apply: Apply,
    teacher_apply: Apply | None,
    optimizer: optax.GradientTransformation,
    *,
    losses: Mapping[str, LossFn | tuple[float | Schedule, LossFn]],
    transform: Transform = _IDENTITY,
    transform_optimizer: optax.GradientTransformation | None = None,
    trainable: Selector | None = None,
    mutable: Sequence[str] = (),
    micro_batches: int = 1,
    metrics: Mapping[str, LossFn] | None = None,
) -> tuple[Callable[..., TrainState], Callable[..., tuple[TrainState, Metrics]]]:
    """Functions that start and continue the training of a student, while a transform compresses it.

    The loss is Σ weight · sum / count + penalty, of the student at `transform.apply(params)`. In this order a step
    differentiates it, lets the optimizers act, then the transform's `update` and `project`, and zeroes the optimizer's
    moments of weights that start anew. Sums and counts span the whole batch, however it is sharded or split.

    A step whose loss or gradients hold NaN or Inf is skipped: parameters, mutable collections, the state of the
    transform and that of the optimizers stay as they are. The metric "skipped" counts these steps.

    Args:
        student_apply: `(params, batch, *, key, train) -> outputs by name`, called with a typed key and `train=True`. It
            may meet compressed leaves: it is then run by `execute`. A collection (a mapping) among its outputs that no
            loss or metric reads is an error, unless it is `mutable`.
        teacher_apply: the same for the teacher; called with `key=None, train=False`, without a gradient. None: the
            teacher's outputs are in `batch["teacher"]` (computed earlier), or not needed.
        optimizer: for the trainable float leaves of the parameters. Of `optax.MultiSteps`, take its
            `gradient_transformation()`; the transform still updates at every call, and all calls weigh alike, whatever
            they count: see `micro_batches`.
        losses: name -> loss, or (weight, loss); a weight is a number or a function of the step.
        transform: the technique; several in a `chain`. The loss that its `penalty` and `update` see is without penalty.
        transform_optimizer: for `transform_state.trainable`.
        trainable: which leaves of the parameters to train; by default all. The others keep their bits (unless the
            transform's `project` changes them), and have no moments.
        mutable: names of collections that the student renews itself, such as `("batch_stats",)` of Flax's `BatchNorm`:
            entries of the parameters (`{"params": ..., "batch_stats": ...}`) that it also returns, as outputs of the
            same names. The step keeps what is returned; no optimizer touches them. Transforms see them as part of the
            tree, so keep them out of `select` (by default, statistics have one axis and are not selected).
        micro_batches: parts of a batch that are run one after another, to need less memory: part i has the rows i,
            i + micro_batches, ... Sums and counts are added up before they are divided, so that the step is that of the
            whole batch, however many tokens each part counts. Each part has a key of its own, and mutable collections
            go from part to part. Counts of losses must not depend on the parameters.
        metrics: name -> a function like a loss, reported only. By default `argmax_agreement` as "agreement", if both
            models have `logits`.

    Returns:
        `(init_state, step)`.

        `init_state(params, *, key, statistics=None) -> TrainState` copies every leaf and keeps its sharding, so that
        the first step deletes nothing that the caller still holds.

        `step(state, teacher_params, batch) -> (state, metrics)` is jitted and donates `state`. `metrics` has a (sum,
        count) for every loss (unweighted) and every metric, and, with count 1, "penalty", "loss" (all that is
        minimised) and "skipped" (1 if the step was; its other figures are as they were found, NaN say).

    Raises:
        ValueError: no losses, or a name twice, or `micro_batches` below 1; from `init_state`: a transform with
            trainable state, but no `transform_optimizer`; a mutable collection that the parameters lack; from `step`:
            collections that are lost or do not fit, a batch that cannot be split.

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
        (3, {'agreement': 2.0, 'loss': 1.0, 'penalty': 1.0, 'skipped': 1.0, 'soft': 2.0})
    """
    setup = Setup(
        student_apply=student_apply,
        teacher_apply=teacher_apply,
        optimizer=optimizer,
        losses={name: entry if isinstance(entry, tuple) else (1.0, entry) for name, entry in losses.items()},
        transform=transform,
        transform_optimizer=transform_optimizer,
        trainable=immutable(tuple(mutable), trainable),
        mutable=tuple(mutable),
        micro_batches=micro_batches,
        metrics=metrics,
    )
    _check_names(setup)
    if micro_batches < 1:
        raise ValueError(f"`micro_batches` must be at least 1, got {micro_batches}.")

    def init_state(params: Params, *, key: jax.Array, statistics: Any = None) -> TrainState:
        return _init(setup, params, key, statistics)

    def step(state: TrainState, teacher_params: Params, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        return _step(setup, state, teacher_params, batch)

    return init_state, jax.jit(step, donate_argnums=0)


def _init(setup: Setup, params: Params, key: jax.Array, statistics: Any) -> TrainState:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"`key` must be typed, as `jax.random.key(seed)` makes it, got {key.dtype}.")
    transform_key, key = jax.random.split(key)
    # Strongly typed before anything is derived from them: moments would inherit the weak type.
    params = copy_of(params)
    check_mutable(params, setup.mutable)
    transform_state = copy_of(checked_init(setup.transform, params, key=transform_key, statistics=statistics))
    inner, _ = partition_trainable(transform_state.trainable)
    if jax.tree.leaves(inner) and setup.transform_optimizer is None:
        raise ValueError("The transform has trainable state: `transform_optimizer` is needed.")
    state = TrainState(
        params=params,
        transform_state=transform_state,
        optimizer_state=copy_of(setup.optimizer.init(partition_trainable(params, select=setup.trainable)[0])),
        transform_optimizer_state=copy_of(_transform_optimizer(setup).init(inner)),
        step=jnp.zeros((), jnp.int32),
        key=key,
    )
    return placed(state)


def _step(
    setup: Setup, state: TrainState, teacher_params: Params, batch: Mapping[str, Any]
) -> tuple[TrainState, Metrics]:
    next_key, apply_key, student_key, update_key = jax.random.split(state.key, 4)
    backward = backward_pass(setup, state, teacher_params, batch, apply_key, student_key)
    transform, figures, grads = setup.transform, backward.figures, backward.grads
    total = figures["loss"][0]

    params, optimizer_state = _optimize(
        setup.optimizer, grads[0], state.params, state.optimizer_state, total, setup.trainable
    )
    params = with_collections(params, backward.collections)
    trainable, transform_optimizer_state = _optimize(
        _transform_optimizer(setup), grads[1], state.transform_state.trainable, state.transform_optimizer_state, total
    )
    transform_state = TransformState(trainable, state.transform_state.fixed)
    transform_state, fresh = checked_update(
        transform, backward.stage_grads, transform_state, params, key=update_key, loss=backward.loss
    )
    params, transform_state = checked_project(transform, params, transform_state)
    optimizer_state = reset_moments(
        setup.optimizer, optimizer_state, fresh, partition_trainable(params, select=setup.trainable)[0]
    )
    new = TrainState(params, transform_state, optimizer_state, transform_optimizer_state, state.step + 1, next_key)
    new = matched_to(new, state)
    skipped = ~are_finite(total, *trained_gradients(setup, state.params, backward))
    after = unless(skipped, new._replace(step=(), key=()), state._replace(step=(), key=()))
    figures |= {"skipped": (skipped.astype(jnp.float32), jnp.ones((), jnp.float32))}
    return after._replace(step=new.step, key=new.key), figures


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


def _transform_optimizer(setup: Setup) -> optax.GradientTransformation:
    return optax.set_to_zero() if setup.transform_optimizer is None else setup.transform_optimizer


def _check_names(setup: Setup) -> None:
    if not setup.losses:
        raise ValueError("`losses` is empty: there is nothing to minimise.")
    taken = {"loss", "penalty", "skipped", *(setup.metrics or {})}
    if len(taken) < 3 + len(setup.metrics or {}) or taken & set(setup.losses):
        raise ValueError(
            f"Losses {list(setup.losses)} and metrics {list(setup.metrics or {})} need names of their own, "
            "other than 'loss', 'penalty' and 'skipped'."
        )
