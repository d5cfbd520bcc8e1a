"""Types of JAX and of ONNX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ONNX = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "uint16": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "uint32": 12,
    "uint64": 13,
    "bfloat16": 16,
}
"""`onnx.TensorProto.DataType`, by dtype."""


def onnx_type(dtype: Any) -> int:
    """The number that ONNX has for a dtype.

    Raises:
        NotImplementedError: values of that dtype cannot be in the graph.
    """
    if jnp.issubdtype(dtype, jax.dtypes.extended) or np.dtype(dtype).name not in _ONNX:
        raise NotImplementedError(f"ONNX export has no values of dtype {dtype}.")
    return _ONNX[np.dtype(dtype).name]


def is_exportable(dtype: Any) -> bool:
    """Whether values of a dtype can be in the graph."""
    return not jnp.issubdtype(dtype, jax.dtypes.extended) and np.dtype(dtype).name in _ONNX


def carrier(dtype: Any) -> np.dtype:
    """What values of a dtype are inside the graph: float32 for bfloat16, any other dtype itself."""
    return np.dtype(np.float32 if np.dtype(dtype) == jnp.bfloat16 else dtype)


def arithmetic(dtype: Any) -> np.dtype:
    """The type that ONNX Runtime computes with: small integers in int32 and unsigned ones in int64."""
    name = carrier(dtype).name
    return np.dtype({"uint32": "int64", "uint64": "int64"}.get(name, name if name in _COMPUTED else "int32"))


def selectable(dtype: Any) -> np.dtype:
    """The type in which ONNX Runtime chooses between values, or writes them at indices."""
    own = carrier(dtype)
    return own if own.name in ("float32", "float64", "int32", "int64", "uint8") else arithmetic(own)


_COMPUTED = {"float16", "float32", "float64", "int32", "int64"}


def is_float(dtype: Any) -> bool:
    """Whether a dtype is of floats."""
    return jnp.issubdtype(dtype, jnp.floating)
