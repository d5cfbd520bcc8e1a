"""Checks of values, made eagerly only."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    if not all_finite(leaf):
        with jax.ensure_compile_time_eval():
            nans, infs = int(jnp.isnan(leaf).sum()), int(jnp.isinf(leaf).sum())
        raise ValueError(
            f"Leaf {path!r} holds {nans} NaN and {infs} Inf among {leaf.size} values; repair or exclude it first."
        )


def all_finite(array: Any) -> bool:
    """Whether a concrete array holds neither NaN nor Inf; known at once, even while something else is traced.

    Args:
        array: of floats, of JAX or NumPy; also a NumPy scalar.

    Example:
        >>> all_finite(jnp.ones(2)), all_finite(jnp.array([1.0, jnp.inf])), all_finite(np.float32(1.0))
        (True, False, True)
    """
    # NumPy reads what lies on the CPU as it is, and needs no program for each shape.
    if not isinstance(array, jax.Array) or (
        array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())
    ):
        return bool(np.isfinite(np.asarray(array)).all())
    with jax.ensure_compile_time_eval():
        return bool(_all_finite(array))


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()
