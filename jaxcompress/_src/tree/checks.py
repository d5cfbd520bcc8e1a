"""Checks of values, made eagerly only."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcompress._src.types import is_compressed


def is_traced(value: Any) -> bool:
    """Whether `value` is known only when the traced function runs; such values are never checked.

    Example:
        >>> is_traced(0.5), is_traced(jnp.ones(2))
        (False, False)
    """
    return isinstance(value, Tracer)


def check_finite(path: str, leaf: Any) -> None:
    """Raises when a concrete array holds NaN or Inf; traced values are never checked.

    Args:
        path: the leaf's path, for the message.
        leaf: an array; compressed arrays and non-floats pass.

    Raises:
        ValueError: naming the leaf and how many values are not finite.

    Example:
        >>> check_finite("dense/kernel", jnp.array([1.0, jnp.nan]))
        Traceback (most recent call last):
        ValueError: Leaf 'dense/kernel' holds 1 NaN and 0 Inf among 2 values; ...
    """
    if is_traced(leaf) or is_compressed(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return
    # Inside `jit` a concrete array may still be at hand: it is checked there and then.
    with jax.ensure_compile_time_eval():
        nans, infs = map(int, _count_faults(leaf))
    if nans or infs:
        raise ValueError(
            f"Leaf {path!r} holds {nans} NaN and {infs} Inf among {leaf.size} values; repair or exclude it first."
        )


@jax.jit
def _count_faults(leaf: Any) -> tuple[jax.Array, jax.Array]:
    return jnp.isnan(leaf).sum(), jnp.isinf(leaf).sum()
