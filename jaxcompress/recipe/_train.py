"""Training loops over tokenized texts: fine-tuning, and distillation with a transform inside."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from jaxcompress.distillation import LossFn, hard_labels, hidden_states, make_train_step, soft_targets
from jaxcompress.recipe._progress import Progress, Silent
from jaxcompress.recipe._steps import Training
from jaxcompress.recipe._text import Tokens, training_batches
from jaxcompress.transforms import identity
from jaxcompress.types import Params, Selector, Transform

Apply = Callable[..., Mapping[str, Any]]


def model_apply(module: nn.Module, *, dropout: bool = False, hidden: bool = False) -> Apply:
    """`(params, batch, *, key, train) -> outputs`, as `distillation.make_train_step` wants it.

    Args:
        module: takes `input_ids` and `attention_mask`.
        dropout: whether dropout is on while training.
        hidden: whether `hidden_states` are among the outputs.
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
        return outputs

    return apply


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
        progress: where to show loss and time left.
        name: of the task shown.

    Returns:
        The params and the transform's state.

    Raises:
        ValueError: fewer rows than one batch; labels needed and absent; the loss became NaN or Inf.
    """
    _check_rows(tokens, training)
    total = steps_of(training, tokens)
    hidden = training.hidden > 0
    init_state, step = make_train_step(
        model_apply(module, dropout=training.dropout, hidden=hidden),
        None if teacher is None else model_apply(teacher_module or module, hidden=hidden),
        _optimizer(training, total),
        losses=_losses(training, module),
        transform=identity() if transform is None else transform,
        transform_optimizer=transform_optimizer or _optimizer(dataclasses.replace(training, weight_decay=0.0), total),
        trainable=trainable,
    )
    state = init_state(params, key=jax.random.key(training.seed))
    with (progress or Silent()).task(name, total) as task:
        for batch in itertools.islice(_batches(tokens, training), total):
            state, metrics = step(state, teacher, _with_teacher(batch, cached))
            loss = float(metrics["loss"][0])
            if not np.isfinite(loss):
                raise ValueError(f"{name}: the loss became {loss} at step {int(state.step)}; lower `learning_rate`.")
            task.advance(loss=loss)
    return state.params, state.transform_state


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
    layers = range(module.config.num_hidden_layers + 1)  # pyright: ignore[reportAttributeAccessIssue]
    every: dict[str, tuple[float, LossFn]] = {
        "soft_targets": (training.soft_targets, soft_targets(temperature=training.temperature)),
        "pooled": (training.pooled, hidden_states(pairs=None, output="pooler_output", mask=None)),
        "hidden": (training.hidden, hidden_states(pairs=[(i, i) for i in layers])),
        "hard_labels": (training.hard_labels, hard_labels()),
    }
    return {name: entry for name, entry in every.items() if entry[0]}


def _check_rows(tokens: Tokens, training: Training) -> None:
    if len(tokens) < training.batch_size:
        raise ValueError(f"`batch_size` is {training.batch_size}, and there are only {len(tokens)} rows to train on.")
    if training.hard_labels and not (tokens.labels >= 0).all():
        raise ValueError("`hard_labels` needs a label on every row; give a column `label` or set its weight to 0.")
