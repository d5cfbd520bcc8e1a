"""Functions of the step, thin over `optax.schedules`."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress._src.types import Schedule

_FAR = (2**30 - 12345, 2**30 - 1, 2**30)
_TOLERANCE = 1e-6


class UnfinishedScheduleWarning(UserWarning):
    """Training ended before a schedule did, so that a part of what was asked for was never trained."""


def cubic(initial: float, final: float, *, begin: int, end: int) -> Schedule:
    """The gradual pruning schedule s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3.

    Constant at `initial` up to step `begin` and at `final` from step `end` on.

    Args:
        initial: sparsity s_i at `begin`, in [0, 1].
        final: sparsity s_f at `end`, in [0, 1].
        begin: step t_0.
        end: step t_1 > t_0.

    Returns:
        `step -> sparsity`, a float32 scalar; the step may be traced.

    Raises:
        ValueError: a sparsity outside [0, 1], or `end <= begin`.

    Example:
        >>> schedule = cubic(0.0, 0.8, begin=10, end=30)
        >>> [round(float(schedule(step)), 3) for step in (0, 10, 20, 30, 99)]
        [0.0, 0.0, 0.7, 0.8, 0.8]

    References:
        Zhu and Gupta 2017, "To prune, or not to prune", equation 1.
    """
    for name, value in (("initial", initial), ("final", final)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"`{name}` is a sparsity and must be in [0, 1], got {value}.")
    if end <= begin:
        raise ValueError(f"`end` must be greater than `begin`, got begin={begin}, end={end}.")
    schedule = optax.schedules.polynomial_schedule(
        init_value=initial, end_value=final, power=3, transition_steps=end - begin, transition_begin=begin
    )
    return lambda step: jnp.asarray(schedule(step), jnp.float32)


def constant(value: float) -> Schedule:
    """The same value at every step.

    Example:
        >>> float(constant(0.5)(100))
        0.5
    """
    return lambda step: jnp.asarray(value, jnp.float32)


def final_value(schedule: Schedule, *, name: str = "schedule") -> float:
    """The value at which a schedule stands still in the end: what a transform that follows it is asked for.

    Args:
        schedule: step -> scalar; evaluated far beyond any training.
        name: of the option, for the message.

    Raises:
        ValueError: it never stands still, so that nothing in particular is asked for.

    Example:
        >>> round(final_value(cubic(0.0, 0.8, begin=10, end=30)), 6)
        0.8
    """
    with jax.ensure_compile_time_eval():
        values = [float(np.asarray(schedule(jnp.int32(step)))) for step in _FAR]
    if not max(values) - min(values) <= _TOLERANCE * max(1.0, abs(values[-1])):
        listed = ", ".join(f"{value:g} at step {step}" for step, value in zip(_FAR, values, strict=True))
        raise ValueError(f"`{name}` must stand still in the end, for what it ends at is what is stored; got {listed}.")
    return values[-1]


def is_at(value: Any, goal: float) -> Any:
    """Whether a value of a schedule, which may be traced, is that of its end.

    Example:
        >>> bool(is_at(jnp.float32(0.8), 0.8))
        True
    """
    return abs(value - goal) <= _TOLERANCE * max(1.0, abs(goal))


def warn_unfinished(message: str) -> None:
    """Warns that training ended before a schedule did."""
    warnings.warn(message, UnfinishedScheduleWarning, stacklevel=4)
