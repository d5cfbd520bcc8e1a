"""Equations whose operands are all known, computed while the graph is written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.export.onnx.dimensions import known_shape
from jaxcompress._src.trace.walk import bind

_LARGE = 1 << 16
"""Bytes; larger arrays are not widened: the graph does that, and the file stays small."""


def is_known(value: Any) -> bool:
    """Whether a value is there while the graph is written."""
    return isinstance(value, np.ndarray | jax.Array)


def folded(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
    """The outputs; None where they are left to the graph: sizes that are not known, or far larger ones.

    Re-arrangements are views of the same memory, so that a weight that is used in several of them is stored once.
    """
    name = eqn.primitive.name
    if eqn.effects or not all(known_shape(var.aval.shape) for var in eqn.outvars):
        return None
    if name in _VIEWS and isinstance(values[0], np.ndarray) and not (name == "reshape" and eqn.params["dimensions"]):
        return [_VIEWS[name](values[0], eqn.params, eqn.outvars[0].aval)]
    if name == "convert_element_type" and isinstance(values[0], np.ndarray) and values[0].nbytes > _LARGE:
        dtype = eqn.params["new_dtype"]
        if dtype == values[0].dtype:
            return [values[0]]
        if np.dtype(dtype).itemsize > values[0].dtype.itemsize:
            return None
    if name in _NEVER:
        return None
    # Under an abstract mesh, or inside of a trace, this is still an eager evaluation: all values are arrays.
    with jax.ensure_compile_time_eval():
        results = bind(eqn, [jax.numpy.asarray(v) if isinstance(v, np.ndarray) else v for v in values])
    return [_concrete(result) for result in results]


def _concrete(value: Any) -> Any:
    return value if jnp.issubdtype(value.dtype, jax.dtypes.extended) else np.asarray(value)


def _broadcast(array: np.ndarray, params: Mapping[str, Any], aval: Any) -> np.ndarray:
    middle = [1] * len(aval.shape)
    for axis, size in zip(params["broadcast_dimensions"], array.shape, strict=True):
        middle[axis] = size
    return np.broadcast_to(array.reshape(middle), aval.shape)


def _reshape(array: np.ndarray, params: Mapping[str, Any], aval: Any) -> np.ndarray:
    del params
    return array.reshape(aval.shape)


def _slice(array: np.ndarray, params: Mapping[str, Any], aval: Any) -> np.ndarray:
    del aval
    strides = params["strides"] or (1,) * array.ndim
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return array[tuple(slice(*cut) for cut in cuts)]


_VIEWS: Mapping[str, Callable[[np.ndarray, Mapping[str, Any], Any], np.ndarray]] = {
    "transpose": lambda array, params, aval: array.transpose(params["permutation"]),
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "stop_gradient": lambda array, params, aval: array,
    "copy": lambda array, params, aval: array,
    "copy_p": lambda array, params, aval: array,
    "sharding_constraint": lambda array, params, aval: array,
}
_NEVER = frozenset({"dim_as_value", "pure_callback", "io_callback", "debug_callback", "pallas_call", "shard_map"})
