"""Training loops over tokenized texts: fine-tuning, and distillation with a transform inside."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jaxcompress._src.distillation.averages import averaged
from jaxcompress._src.distillation.loss_scale import DynamicLossScale
from jaxcompress._src.distillation.losses import hard_labels, soft_targets
from jaxcompress._src.distillation.outputs import LossFn
from jaxcompress._src.distillation.state_losses import hidden_states
from jaxcompress._src.distillation.train_step import make_train_step
from jaxcompress._src.models.families import config_of, head_of, max_tokens
from jaxcompress._src.models.hf.companions import SentencePooling
from jaxcompress._src.recipe.heads import (
    compared_outputs,
    possible_losses,
    with_sentence_vector,
)
from jaxcompress._src.recipe.progress import Progress, Silent
from jaxcompress._src.recipe.steps import Training
from jaxcompress._src.recipe.tokens import Tokens, row_widths, training_batches
from jaxcompress._src.training.fit import fit
from jaxcompress._src.transforms import identity
from jaxcompress._src.types import Params, Selector, Transform

Apply = Callable[..., Mapping[str, Any]]


def model_apply(
    module: nn.Module, *, dropout: bool = False, hidden: bool = False, pooling: SentencePooling = "mean"
) -> Apply:
    """`(params, batch, *, key, train) -> outputs`, as `distillation.make_train_step` wants it.

    Args:
        module: takes `input_ids` and `attention_mask`.
        dropout: whether dropout is on while training.
        hidden: whether `hidden_states` are among the outputs.
        pooling: of the `sentence_vector` that a plain encoder gives beside its outputs.
    """

    def apply(params: Params, batch: Mapping[str, Any], *, key: jax.Array | None, train: bool) -> Mapping[str, Any]:
        noisy = dropout and train
        rngs: Any = {"dropout": key} if noisy else None
        outputs: Any = module.apply(
            {"params": params},
            batch["input_ids"],
            batch["attention_mask"],
            deterministic=not noisy,
            output_hidden_states=hidden,
            rngs=rngs,
        )
        return with_sentence_vector(module, outputs, batch["attention_mask"], pooling)

    return apply


def prepared(
    training: Training, module: nn.Module, tokens: Tokens, *, note: Callable[[str], None] = lambda _: None
) -> Training:
    """The options of a training with what they leave to the rows and the model; says what will be cut or left out.

    Args:
        training: the options.
        module: what is trained.
        tokens: the rows.
        note: told in one line each which losses the model has no outputs for, and how many rows `widths` cut.

    Returns:
        `training` with its widths, and without impossible losses.

    Raises:
        ValueError: too few rows, or all of them empty; labels that are absent or that the model does not have; widths
            above its positions; or no loss is left.
    """
    training, left_out = possible_losses(training, head_of(module))
    _check_rows(module, tokens, training)
    most = max_tokens(module)
    widths = training.widths or row_widths(tokens, most=most)
    if widths[-1] > most:
        raise ValueError(f"`widths` may go up to the {most} positions of the model, got {widths[-1]}.")
    for loss in left_out:
        note(f"`{loss}` is left out: {head_of(module).description} has no output for it.")
    if cut := sum(len(row) > widths[-1] for row in tokens.ids):
        note(f"{cut} of {len(tokens)} rows are cut to {widths[-1]} tokens, the last of `widths`.")
    return dataclasses.replace(training, widths=widths)


def steps_of(training: Training, tokens: Tokens) -> int:
    """Number of optimizer steps."""
    return training.epochs * (len(tokens) // training.batch_size)


def train(
    module: nn.Module,
    params: Params,
    tokens: Tokens,
    training: Training,
    *,
    teacher: Params | None = None,
    teacher_module: nn.Module | None = None,
    cached: Mapping[str, np.ndarray] | None = None,
    transform: Transform | None = None,
    transform_optimizer: optax.GradientTransformation | None = None,
    trainable: Selector | None = None,
    pooling: SentencePooling = "mean",
    progress: Progress | None = None,
    name: str = "Training",
) -> tuple[Params, Any]:
    """Trains `params`, by the labels or after a teacher.

    Args:
        module: of the student.
        params: where to begin; copied.
        tokens: the rows.
        training: the options.
        teacher: the teacher's params, run at every step; needed for hidden states.
        teacher_module: of the teacher; by default the student's.
        cached: the teacher's outputs for every row, instead.
        transform: compression inside the loss; none by default.
        transform_optimizer: for what the transform learns, such as gates; by default the weights' without weight decay.
        trainable: leaves to train; by default all.
        pooling: of the sentence vectors of a plain encoder.
        progress: where to show loss and time left.
        name: of the task shown.

    Returns:
        The params and the transform's state.

    Raises:
        ValueError: as `prepared`; `cached` is of another number of rows; `float32_masters` of weights of which none is
            narrower; or the loss became NaN or Inf, with a dynamic loss scale in every step, or in as many as it takes
            to have none.
    """
    training = prepared(training, module, tokens)
    for output, values in (cached or {}).items():
        if len(values) != len(tokens):
            raise ValueError(f"`cached` has {output!r} of {len(values)} rows, and there are {len(tokens)} to train on.")
    total = steps_of(training, tokens)
    hidden = training.hidden > 0
    init_state, step = make_train_step(
        model_apply(module, dropout=training.dropout, hidden=hidden, pooling=pooling),
        None if teacher is None else model_apply(teacher_module or module, hidden=hidden, pooling=pooling),
        _optimizer(training, total),
        losses=_losses(training, module),
        transform=identity() if transform is None else transform,
        transform_optimizer=transform_optimizer or _optimizer(dataclasses.replace(training, weight_decay=0.0), total),
        trainable=trainable,
        micro_batches=training.micro_batches,
        master_dtype=jnp.float32 if training.float32_masters else None,
        ema=training.ema or None,
        loss_scale=_loss_scale(training),
        remat=None if training.remat is None else getattr(jax.checkpoint_policies, training.remat),
    )
    try:
        state = init_state(params, key=jax.random.key(training.seed))
    except ValueError as err:
        if training.float32_masters and "master_dtype" in str(err):
            raise ValueError(f"{name}: `float32_masters` has nothing to do: {err}") from err
        raise
    batches = (_with_teacher(batch, cached) for batch in _batches(tokens, training))
    with (progress or Silent()).task(name, total) as task:
        skips = _Skips(training)
        try:
            state, _ = fit(
                state,
                lambda state, batch: step(state, teacher, batch),
                batches,
                steps=total,
                log_every=1,
                sinks=[lambda _, figures: task.advance(loss=figures["loss"]), skips],
                non_finite="skip" if training.dynamic_loss_scale else "raise",
            )
            skips.check_any_step_was_taken()
        except FloatingPointError as err:
            raise ValueError(f"{name}: {err}; lower `learning_rate`.") from err
    return averaged(state) if training.ema else (state.params, state.transform_state)


def _loss_scale(training: Training) -> float | DynamicLossScale | None:
    if training.dynamic_loss_scale:
        return DynamicLossScale(initial=training.loss_scale) if training.loss_scale else DynamicLossScale()
    return training.loss_scale or None


class _Skips:
    """A sink that raises when steps are skipped for more than the loss scale."""

    def __init__(self, training: Training) -> None:
        scale = _loss_scale(training)
        # As many as it takes to bring it down to its minimum, and two.
        self._most = (
            2 + math.log(scale.initial / scale.minimum, scale.factor) if isinstance(scale, DynamicLossScale) else 0
        )
        self._skipped = self._taken = 0

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        was_skipped = figures["skipped"] > 0
        self._skipped = self._skipped + 1 if was_skipped else 0
        self._taken += not was_skipped
        if self._skipped > self._most:
            raise FloatingPointError(f"the loss or a gradient is NaN or Inf at any loss scale, at step {step}")

    def check_any_step_was_taken(self) -> None:
        """Raises if none was."""
        if not self._taken:
            raise FloatingPointError("the loss or a gradient was NaN or Inf in every step")


def _optimizer(training: Training, steps: int) -> optax.GradientTransformation:
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0, training.learning_rate, max(1, round(training.warmup * steps)), max(steps, 2)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=training.weight_decay))


def _batches(tokens: Tokens, training: Training) -> Iterator[dict[str, Any]]:
    """Pass after pass over the rows, without end."""
    rng = np.random.default_rng(training.seed)
    while True:
        yield from training_batches(tokens, batch_size=training.batch_size, widths=training.widths, rng=rng)


def _with_teacher(batch: dict[str, Any], cached: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    rows = batch.pop("row")
    return batch if cached is None else batch | {"teacher": {name: values[rows] for name, values in cached.items()}}


def _losses(training: Training, module: nn.Module) -> dict[str, tuple[float, LossFn]]:
    layers = range(config_of(module).num_hidden_layers + 1)
    every: dict[str, Callable[[str], LossFn]] = {
        "soft_targets": lambda output: soft_targets(temperature=training.temperature, output=output),
        "pooled": lambda output: hidden_states(pairs=None, output=output, mask=None),
        "hidden": lambda output: hidden_states(pairs=[(i, i) for i in layers], output=output),
        "hard_labels": lambda output: hard_labels(output=output),
    }
    weights = {name: getattr(training, name) for name in every}
    outputs = compared_outputs(head_of(module))
    return {name: (weight, every[name](outputs[name])) for name, weight in weights.items() if weight}


def _check_rows(module: nn.Module, tokens: Tokens, training: Training) -> None:
    if len(tokens) < training.batch_size:
        raise ValueError(f"`batch_size` is {training.batch_size}, and there are only {len(tokens)} rows to train on.")
    if not any(tokens.ids):
        raise ValueError(f"None of the {len(tokens)} rows to train on has a token: their texts are empty.")
    if training.hard_labels:
        if not (tokens.labels >= 0).all():
            raise ValueError("`hard_labels` needs a label on every row; give a column `label` or set its weight to 0.")
        check_labels(module, tokens.labels)


def check_labels(module: nn.Module, labels: np.ndarray) -> None:
    """Checks that a classifier has the classes of the rows.

    Raises:
        ValueError: a label is none of its classes; names the first such row.
    """
    classes = config_of(module).num_labels
    unknown = np.flatnonzero(labels >= classes)
    if len(unknown):
        raise ValueError(
            f"Row {unknown[0] + 1} has the label {labels[unknown[0]]}, and the model has {classes} classes: its labels "
            f"go from 0 to {classes - 1} ({len(unknown)} of {len(labels)} rows are beyond)."
        )
