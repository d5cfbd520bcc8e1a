"""Errors of arrays that found no room."""

import jax


def is_out_of_memory(err: Exception) -> bool:
    """Whether NumPy or JAX found no room for an array, which says nothing about a model or a file."""
    return isinstance(err, MemoryError) or (
        isinstance(err, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(err)
    )
