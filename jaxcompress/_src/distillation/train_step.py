"""One step of distillation, with a compression technique inside the loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxcompress._src.distillation.averages import first_averages, next_averages
from jaxcompress._src.distillation.backward import Backward, Setup, backward_pass, trained_gradients
from jaxcompress._src.distillation.collections import check_mutable, immutable, with_collections
from jaxcompress._src.distillation.loss_scale import DynamicLossScale, current_scale, first_scale, next_scale
from jaxcompress._src.distillation.masters import masters_of, narrowed, renewed, widened
from jaxcompress._src.distillation.objective import Apply, Metrics
from jaxcompress._src.distillation.outputs import LossFn
from jaxcompress._src.distillation.train_state import (
    TrainState,
    are_finite,
    copy_of,
    matched_to,
    placed,
    reset_moments,
    shardings_of,
    unflatten_shardings,
)
from jaxcompress._src.transforms import checked_init, checked_project, checked_update, identity, trained_leaves
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.partition import combine, partition_trainable
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Schedule, Selector, Transform, TransformState

_IDENTITY = identity()
_BESIDE: dict[str, Any] = {"step": (), "key": (), "loss_scale": ()}
"""What changes in a skipped step, too."""


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
    master_dtype: DTypeLike | None = None,
    ema: float | None = None,
    loss_scale: float | DynamicLossScale | None = None,
    remat: Callable[..., Any] | None = None,
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
            transform's `project` changes them), and have no moments, as those that the transform freezes (`lora`).
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
        master_dtype: such as `jnp.float32` beside parameters in bfloat16: `state.masters` holds a copy of every trained
            leaf that is narrower. The optimizer and `project` act on those; `state.params`, which models and the rest
            of the transform see, which `finalize` takes and mutable collections are a part of, are their casts.
        ema: decay d in [0, 1) of averages of what is trained, masters and `transform_state.trainable` included, in
            `state.ema`: after n steps that were not skipped, (1 - d) / (1 - dⁿ) Σ dⁿ⁻ⁱ pᵢ, for which `averaged(state)`
            is what `finalize` takes. They lie where their weights do.
        loss_scale: for parameters in float16: the loss is multiplied by it in the backward pass, so that small
            gradients do not become 0, and gradients are divided by it, in float32, before the transform and the
            optimizer see them. A number, or a `DynamicLossScale`, which a step that is not finite makes smaller.
        remat: a policy, such as those of `jax.checkpoint_policies`, of what the student keeps for the backward pass;
            the rest is computed twice. It holds for the bodies of scans over layers or, without any, for the student
            as a whole: there `save_only_these_names("block")` keeps what it has named `checkpoint_name(x, "block")`.
            None: the student is run as it is, with the `jax.checkpoint` or `nn.remat` that it may have inside.

    Returns:
        `(init_state, step)`.

        `init_state(params, *, key, statistics=None) -> TrainState` copies every leaf and keeps its sharding, so that
        the first step deletes nothing that the caller still holds.

        `step(state, teacher_params, batch) -> (state, metrics)` is jitted (with `step.lower`), donates `state` and
        leaves it where it lies. Derivatives of a whole step are forward-mode only (`jax.jvp`). `metrics` has a (sum,
        count) for every loss (unweighted) and every metric, and, with count 1, "penalty", "loss" (all that is
        minimised), "skipped" (1 if the step was; its other figures are as they were found, NaN say) and, with a
        `loss_scale`, "loss_scale".

    Raises:
        ValueError: no losses, or a name twice, or a number out of range; from `init_state`: a transform with trainable
            state, but no `transform_optimizer`; a mutable collection that the parameters lack; a `master_dtype` that no
            trained leaf is narrower than; from `step`: collections that are lost or do not fit, a batch that cannot be
            split.

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
        trainable=immutable(tuple(mutable), trained_leaves(transform, trainable)),
        mutable=tuple(mutable),
        micro_batches=micro_batches,
        metrics=metrics,
        master_dtype=master_dtype,
        ema=ema,
        loss_scale=loss_scale,
        remat=remat,
    )
    _check_names(setup)
    _check_numbers(setup)

    def init_state(params: Params, *, key: jax.Array, statistics: Any = None) -> TrainState:
        return _init(setup, params, key, statistics)

    def step(state: TrainState, teacher_params: Params, batch: Mapping[str, Any], shardings: Any) -> Any:
        return _step(setup, state, teacher_params, batch, shardings)

    return init_state, _Step(step)


_COMPILER_OPTIONS = {"cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False}}
"""By platform. Unless it is told otherwise, XLA orders the work of CPUs for concurrency, not for memory: more arrays
are alive at once, and a step of a decoder takes a fifth longer."""


class _Step:
    """A jitted step that leaves its state where it lies."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step
        self._by_platform: dict[str, Any] = {}

    def __call__(
        self, state: TrainState, teacher_params: Params, batch: Mapping[str, Any]
    ) -> tuple[TrainState, Metrics]:
        arguments = (state, teacher_params, batch)
        return self._jitted(*arguments)(*arguments, shardings_of(state))

    def lower(self, state: TrainState, teacher_params: Params, batch: Mapping[str, Any]) -> Any:
        """As `lower` of functions by `jax.jit`; arguments may be abstract."""
        arguments = (state, teacher_params, batch)
        return self._jitted(*arguments).lower(*arguments, shardings_of(state))

    def _jitted(self, state: TrainState, *others: Any) -> Any:
        platform = _platform(state, *others)
        if platform not in self._by_platform:
            options = _COMPILER_OPTIONS.get(platform)
            jitted = jax.jit(self._step, donate_argnums=0, static_argnums=3, compiler_options=options)
            self._by_platform[platform] = jitted
        return self._by_platform[platform]


def _platform(state: TrainState, *others: Any) -> str:
    """Where a state lies; "traced" within transformations of JAX, because only an outermost `jax.jit` takes options."""
    if any(is_traced(leaf) for leaf in jax.tree.leaves((state, others))):
        return "traced"
    sharding = getattr(state.step, "sharding", None)
    platform = jax.default_backend() if sharding is None else next(iter(sharding.device_set)).platform
    # Within a trace, what is computed of known arrays is traced, too. Nothing is transferred for it.
    is_known = isinstance(state.step, jax.Array) and platform in _COMPILER_OPTIONS
    return "traced" if is_known and is_traced(jnp.negative(state.step)) else platform


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
    masters = () if setup.master_dtype is None else copy_of(masters_of(params, setup.master_dtype, setup.trainable))
    trained, _ = partition_trainable(widened(params, masters), select=setup.trainable)
    state = TrainState(
        params=params,
        transform_state=transform_state,
        optimizer_state=copy_of(setup.optimizer.init(trained)),
        transform_optimizer_state=copy_of(_transform_optimizer(setup).init(inner)),
        step=jnp.zeros((), jnp.int32),
        key=key,
        masters=masters,
        ema=() if setup.ema is None else first_averages(trained, inner),
        loss_scale=first_scale(setup.loss_scale),
    )
    return placed(state)


def _step(
    setup: Setup, state: TrainState, teacher_params: Params, batch: Mapping[str, Any], shardings: Any
) -> tuple[TrainState, Metrics]:
    next_key, apply_key, student_key, update_key = jax.random.split(state.key, 4)
    backward = backward_pass(setup, state, teacher_params, batch, apply_key, student_key)
    skipped = ~are_finite(backward.figures["loss"][0], *trained_gradients(setup, state.params, backward))
    places = unflatten_shardings(state, shardings)

    # A loop of one turn or of none: it renews its state in place. For a choice between the old and the new values, XLA
    # copies the moments and holds the parameters twice; for a `cond`, it copies more.
    def turn(carry: tuple[jax.Array, TrainState]) -> tuple[jax.Array, TrainState]:
        new = _renewed(setup, carry[1], backward, update_key)
        return jnp.zeros((), bool), matched_to(new, carry[1], places._replace(**_BESIDE))

    _, after = jax.lax.while_loop(lambda carry: carry[0], turn, (~skipped, state._replace(**_BESIDE)))
    after = after._replace(
        step=state.step + 1, key=next_key, loss_scale=next_scale(setup.loss_scale, state.loss_scale, skipped)
    )
    once = jnp.ones((), jnp.float32)
    figures = backward.figures | {"skipped": (skipped.astype(jnp.float32), once)}
    scale = current_scale(setup.loss_scale, state.loss_scale)
    figures |= {} if scale is None else {"loss_scale": (scale, once)}
    # Once more: what the loop's body asks for does not bind where the loop's result lies.
    return matched_to(after, state, places), figures


def _renewed(setup: Setup, state: TrainState, backward: Backward, key: jax.Array) -> TrainState:
    """The state after the optimizers, the transform's `update` and its `project`."""
    transform, total, grads = setup.transform, backward.figures["loss"][0], backward.grads
    # Where there are masters, `raw` holds them, and `params` their casts.
    raw = widened(state.params, state.masters)
    raw, optimizer_state = _optimize(setup.optimizer, grads[0], raw, state.optimizer_state, total, setup.trainable)
    raw = with_collections(raw, backward.collections)
    trainable, transform_optimizer_state = _optimize(
        _transform_optimizer(setup), grads[1], state.transform_state.trainable, state.transform_optimizer_state, total
    )
    transform_state = TransformState(trainable, state.transform_state.fixed)
    params = narrowed(raw, state.masters, state.params)
    transform_state, fresh = checked_update(
        transform, backward.stage_grads, transform_state, params, key=key, loss=backward.loss
    )
    raw, transform_state = checked_project(transform, raw, transform_state)
    trained, _ = partition_trainable(raw, select=setup.trainable)
    return state._replace(
        params=narrowed(raw, state.masters, state.params),
        transform_state=transform_state,
        optimizer_state=reset_moments(setup.optimizer, optimizer_state, fresh, trained),
        transform_optimizer_state=transform_optimizer_state,
        masters=renewed(state.masters, raw),
        ema=_averages(setup, state, trained, transform_state),
    )


def _averages(setup: Setup, state: TrainState, trained: Params, transform_state: TransformState) -> Any:
    if setup.ema is None:
        return ()
    return next_averages(state.ema, trained, partition_trainable(transform_state.trainable)[0], setup.ema)


def _optimize(
    optimizer: optax.GradientTransformation,
    grads: Params,
    params: Params,
    state: Any,
    loss: jax.Array,
    select: Selector | None = None,
) -> tuple[Params, Any]:
    trainable, rest = partition_trainable(params, select=select)
    grads = jax.tree.map(
        lambda x, g: x if is_unselected(x) else g.astype(x.dtype), trainable, grads, is_leaf=is_unselected
    )
    # Some optimizers (line searches, reduce-on-plateau) want the loss; the wrapper hides it from the others.
    updates, state = optax.with_extra_args_support(optimizer).update(grads, state, trainable, value=loss)
    return combine(optax.apply_updates(trainable, updates), rest), state


def _transform_optimizer(setup: Setup) -> optax.GradientTransformation:
    return optax.set_to_zero() if setup.transform_optimizer is None else setup.transform_optimizer


def _check_names(setup: Setup) -> None:
    if not setup.losses:
        raise ValueError("`losses` is empty: there is nothing to minimise.")
    taken = {"loss", "penalty", "skipped", "loss_scale"}
    metrics = set(setup.metrics or {})
    if metrics & taken or (metrics | taken) & set(setup.losses):
        raise ValueError(
            f"Losses {list(setup.losses)} and metrics {list(metrics)} need names of their own, other than "
            f"{', '.join(map(repr, sorted(taken)))}."
        )


def _check_numbers(setup: Setup) -> None:
    if setup.micro_batches < 1:
        raise ValueError(f"`micro_batches` must be at least 1, got {setup.micro_batches}.")
    if setup.ema is not None and not 0 <= setup.ema < 1:
        raise ValueError(f"`ema` must be in [0, 1), got {setup.ema}.")
    for name, (weight, _) in setup.losses.items():
        if callable(weight) or is_traced(weight):
            continue
        if not isinstance(weight, SupportsFloat) or not math.isfinite(weight):
            raise ValueError(f"The weight of loss {name!r} must be a finite number or a schedule, got {weight!r}.")
    if isinstance(setup.loss_scale, int | float) and not 0 < setup.loss_scale < float("inf"):
        raise ValueError(f"`loss_scale` must be positive, got {setup.loss_scale}.")
