"""Eager constants without compilation: NumPy arrays and scalars that become JAX arrays, and `jnp.zeros`, `jnp.full`.

JAX compiles a program for each new shape of `jnp.asarray(numpy_array, dtype)` and `jnp.zeros(shape)`: a third of all
programs of these tests. What NumPy gives here is the same, value for value; everything else goes JAX's own way.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src.lax.lax import stage_p  # pyright: ignore[reportPrivateImportUsage]
from jax.lax import broadcast_in_dim_p, convert_element_type_p

_EXACT = ("float32", "int32", "uint32", "int8", "uint8", "bool", "bfloat16", "float16")


def install() -> None:
    """Replaces how three primitives are evaluated outside of `jit`; should JAX rename one of them, this raises."""
    for primitive, on_host in (
        (stage_p, _staged),
        (convert_element_type_p, _converted),
        (broadcast_in_dim_p, _filled),
    ):
        primitive.def_impl(_host_first(primitive.impl, on_host))


def _host_first(compiled: Callable[..., Any], on_host: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate(*operands: Any, **parameters: Any) -> Any:
        # Under `jax.set_mesh` a constant lies on the mesh.
        array = on_host(*operands, **parameters) if jax.sharding.get_abstract_mesh().empty else None
        # A copy: JAX would share the memory of an array that the test may write to.
        return compiled(*operands, **parameters) if array is None else jax.device_put(np.array(array))

    return evaluate


def _staged(operand: Any) -> Any:
    return operand if isinstance(operand, np.ndarray) and operand.dtype in _EXACT else None


def _converted(operand: Any, *, new_dtype: Any, weak_type: bool, sharding: Any) -> Any:
    is_number = isinstance(operand, (bool, int, float, np.ndarray, np.generic)) and not isinstance(operand, jax.Array)
    if not is_number or weak_type or sharding is not None or np.dtype(new_dtype) not in _EXACT:
        return None
    array = np.asarray(operand)
    # As JAX does without 64 bits: first to 32, then to what is asked for.
    narrow = {"float64": "float32", "int64": "int32", "uint64": "uint32"}.get(array.dtype.name)
    if narrow is not None:
        array = array.astype(narrow)
    # From floats to integers NumPy wraps around where JAX stops at the ends.
    return array.astype(new_dtype) if np.can_cast(array.dtype, new_dtype, "same_kind") else None


def _filled(operand: Any, *dynamic: Any, shape: Any, broadcast_dimensions: Any, sharding: Any) -> Any:
    # Committed arrays belong to a device of their own.
    is_constant = isinstance(operand, jax.Array) and not operand.shape and not getattr(operand, "_committed", True)
    if not is_constant or dynamic or sharding is not None or operand.weak_type or operand.dtype not in _EXACT:
        return None
    return np.broadcast_to(np.asarray(operand), shape)
