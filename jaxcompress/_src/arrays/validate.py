"""The invariants of compressed arrays, checked on concrete values."""

from typing import Any

import jax
import numpy as np

from jaxcompress._src.arrays.protocol import call
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed


@on_auto_axes
def validate_array(leaf: Any) -> None:
    """Checks the invariants that the docstrings of the compressed arrays state; plain arrays pass.

    Args:
        leaf: concrete.

    Raises:
        ValueError: an invariant is broken; says which.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.arrays import QuantizedArray
        >>> codes, scale = jnp.ones((4, 2), "int8"), jnp.ones((3, 2))
        >>> validate_array(QuantizedArray(data=codes, scale=scale, dtype=jnp.dtype("float32")))
        Traceback (most recent call last):
        ValueError: Scales of shape (3, 2) do not divide codes of shape (4, 2).
    """
    if is_compressed(leaf):
        call(leaf, "validate")


def require(holds: Any, message: str) -> None:
    """Raises `ValueError` unless an invariant holds."""
    if not bool(holds):
        raise ValueError(message)


def is_finite(part: jax.Array) -> bool:
    """Whether all numbers of a concrete array are finite."""
    # On the host: nothing is compiled for the shape of each leaf.
    return bool(np.isfinite(np.asarray(part)).all())
