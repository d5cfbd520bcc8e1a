"""Comparing sizes of which some are symbolic, as `jax.export.symbolic_shape` makes them."""

from typing import Any

import jax


def surely_at_most(size: Any, bound: Any) -> bool:
    """Whether `size <= bound` for every value of symbolic sizes; False where that depends on the value.

    Example:
        >>> (batch,) = jax.export.symbolic_shape("batch")
        >>> surely_at_most(3, 16), surely_at_most(batch, 16), surely_at_most(batch, 2 * batch)
        (True, False, True)
    """
    try:
        return bool(size <= bound)
    except jax.errors.InconclusiveDimensionOperation:
        return False
