"""The loss of one step, and its gradient."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress._src.distillation.losses import argmax_agreement
from jaxcompress._src.distillation.outputs import LossFn, Outputs, mean
from jaxcompress._src.execution.execute import execute
from jaxcompress._src.tree.partition import combine, partition_trainable
from jaxcompress._src.types import Params, Schedule

Apply: TypeAlias = Callable[..., Outputs]
"""`(params, batch, *, key, train) -> outputs by name`."""

Metrics: TypeAlias = dict[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, count), float32 scalars; add them up over steps, then divide."""

WeightedLosses: TypeAlias = Mapping[str, tuple[float | Schedule, LossFn]]
"""name -> (weight, loss)."""


def teacher_outputs(apply: Apply | None, params: Params, batch: Mapping[str, Any]) -> Outputs:
    """What the teacher says, without a gradient; without a teacher, what the batch has under "teacher"."""
    outputs = batch.get("teacher", {}) if apply is None else execute(apply)(params, batch, key=None, train=False)
    return jax.lax.stop_gradient(outputs)


def task_loss(
    losses: WeightedLosses,
    step: jax.Array,
    student: Outputs,
    teacher: Outputs,
    batch: Mapping[str, Any],
    counts: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, Metrics]:
    """`Σ weight · sum / count`, and the sums and counts by name.

    Args:
        losses: by name.
        step: for weights that are schedules.
        student: outputs.
        teacher: outputs.
        batch: a batch, or a micro-batch.
        counts: by name, of the whole batch, if this is a part of it.
    """
    total, figures = jnp.zeros((), jnp.float32), {}
    for name, (weight, loss) in losses.items():
        figures[name] = _figure(name, loss(student, teacher, batch))
        count = figures[name][1] if counts is None else counts[name]
        total = total + (weight(step) if callable(weight) else weight) * mean(figures[name][0], count)
    return total, figures


def reported(
    metrics: Mapping[str, LossFn] | None, student: Outputs, teacher: Outputs, batch: Mapping[str, Any]
) -> Metrics:
    """The figures that are only reported; by default `agreement`, if both models have logits."""
    if metrics is None:
        mask = "attention_mask" if "attention_mask" in batch else None
        metrics = {"agreement": argmax_agreement(mask=mask)} if "logits" in student and "logits" in teacher else {}
    return {name: _figure(name, figure(student, teacher, batch)) for name, figure in metrics.items()}


def gradients(objective: Callable[..., Any], *trees: Params) -> tuple[Any, tuple[Params, ...]]:
    """Further results of an objective, and its gradients with respect to the float leaves of each tree.

    Args:
        objective: `(*trees) -> (scalar, further results)`.
        *trees: what to differentiate for; `Unselected` stands in the gradients for what is no float.
    """
    floats, rests = zip(*map(partition_trainable, trees), strict=True)

    def of_floats(floats: tuple[Params, ...]) -> Any:
        return objective(*map(combine, floats, rests))

    grads, others = jax.grad(of_floats, has_aux=True)(floats)
    return others, grads


def _figure(name: str, counted: tuple[ArrayLike, ArrayLike]) -> tuple[jax.Array, jax.Array]:
    shapes = [jnp.shape(part) for part in counted] if isinstance(counted, tuple | list) else jnp.shape(counted)
    if shapes != [(), ()]:
        raise ValueError(f"The loss or metric {name!r} must return two scalars, (sum, count), got shapes {shapes}.")
    total, count = counted
    return jnp.asarray(total, jnp.float32), jnp.asarray(count, jnp.float32)
