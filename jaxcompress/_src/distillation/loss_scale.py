"""Loss scaling: gradients of half precision, multiplied so that they do not underflow."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress._src.types import Params, exportable


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicLossScale:
    """A loss scale that follows the gradients: as large as they can bear.

    A step whose gradients are not finite divides it by `factor` (down to `minimum`); `interval` good steps one after
    another multiply it (up to `maximum`).

    Attributes:
        initial: scale of the first step.
        interval: good steps before it grows.
        factor: by which it shrinks and grows, above 1; powers of two lose no bits.
        minimum: the least.
        maximum: the largest.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> DynamicLossScale(initial=1024.0).factor
        2.0

    References:
        Micikevicius et al. 2018, "Mixed precision training", section 3.2.
    """

    initial: float = 2.0**15
    interval: int = 2000
    factor: float = 2.0
    minimum: float = 1.0
    maximum: float = 2.0**24

    def __post_init__(self) -> None:
        """Checks the values."""
        if not 0 < self.minimum <= self.initial <= self.maximum < float("inf"):
            raise ValueError(
                "A loss scale needs 0 < `minimum` <= `initial` <= `maximum`, got "
                f"{self.minimum}, {self.initial} and {self.maximum}."
            )
        if self.interval < 1:
            raise ValueError(f"`interval` must be at least 1, got {self.interval}.")
        if not 1 < self.factor < float("inf"):
            raise ValueError(f"`factor` must be above 1, got {self.factor}.")


@exportable
class LossScale(NamedTuple):
    """State of a dynamic loss scale.

    Attributes:
        scale: float32 scalar, for the next step.
        good_steps: int32 scalar, number of finite steps since it last changed.
    """

    scale: jax.Array
    good_steps: jax.Array


def first_scale(setting: float | DynamicLossScale | None) -> Any:
    """The state at the start; an empty tuple where nothing changes."""
    if not isinstance(setting, DynamicLossScale):
        return ()
    return LossScale(jnp.asarray(setting.initial, jnp.float32), jnp.zeros((), jnp.int32))


def current_scale(setting: float | DynamicLossScale | None, state: Any) -> jax.Array | None:
    """What the loss is multiplied by; None without scaling."""
    if setting is None:
        return None
    return state.scale if isinstance(setting, DynamicLossScale) else jnp.asarray(setting, jnp.float32)


def next_scale(setting: float | DynamicLossScale | None, state: Any, skipped: jax.Array) -> Any:
    """The state after a step."""
    if not isinstance(setting, DynamicLossScale):
        return state
    good_steps = jnp.where(skipped, 0, state.good_steps + 1)
    grows = good_steps >= setting.interval
    smaller = jnp.maximum(state.scale / setting.factor, setting.minimum)
    larger = jnp.where(grows, jnp.minimum(state.scale * setting.factor, setting.maximum), state.scale)
    return LossScale(jnp.where(skipped, smaller, larger), jnp.where(grows, 0, good_steps))


def unscaled(grads: Params, scale: jax.Array) -> Params:
    """Gradients of the scaled loss over the scale, in float32 at least: narrower ones would underflow here."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) / scale, grads)
