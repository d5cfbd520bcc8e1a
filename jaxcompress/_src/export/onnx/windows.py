"""Pooling: reductions over sliding windows."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.export.onnx.dimensions import product
from jaxcompress._src.export.onnx.graph import Graph, Tensor
from jaxcompress._src.export.onnx.movement import pad, spread
from jaxcompress._src.export.onnx.types import arithmetic, carrier, is_float


def _windows(kind: str) -> Callable[[Graph, Any, list[Any]], Sequence[Any]]:
    """A rule for "max", "min" or "sum" over windows."""

    def rule(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
        params, result = eqn.params, eqn.outvars[0].aval
        tensor = graph.full(values[0])
        ends = np.iinfo if not is_float(tensor.dtype) else jnp.finfo
        fill = 0 if kind == "sum" else ends(tensor.dtype).max if kind == "min" else ends(tensor.dtype).min
        if is_float(tensor.dtype) and kind != "sum":
            fill = np.copysign(np.inf, fill)
        padding = list(params["padding"])
        dilation = params.get("base_dilation") or (1,) * tensor.ndim
        constant = np.asarray(fill, carrier(tensor.dtype))
        tensor = spread(graph, tensor, [size - 1 for size in dilation], constant)
        # The pooling operators take no padding that is wider than a window.
        tensor = pad(graph, tensor, [low for low, _ in padding], [high for _, high in padding], constant)
        window, strides = params["window_dimensions"], params["window_strides"]
        steps = params.get("window_dilation") or (1,) * tensor.ndim
        if tensor.dtype.name not in ("float32", "float16", "bfloat16"):
            return [_by_entries(graph, kind, tensor, window, strides, steps, result)]
        return [_pooled(graph, kind, tensor, window, strides, steps, result)]

    return rule


def _pooled(
    graph: Graph, kind: str, tensor: Tensor, window: Sequence[int], strides: Sequence[int], steps: Sequence[int],
    result: Any,
) -> Tensor:  # fmt: skip
    """Axes with windows go last, all others become one."""
    slid = [axis for axis in range(tensor.ndim) if window[axis] != 1 or strides[axis] != 1]
    rest = [axis for axis in range(tensor.ndim) if axis not in slid]
    if len(slid) > 3:
        raise NotImplementedError(f"ONNX export has windows over at most 3 axes, got {tuple(window)}.")
    slid_first = slid or [tensor.ndim - 1] * bool(tensor.ndim)
    rest = [axis for axis in range(tensor.ndim) if axis not in slid_first]
    moved = graph.transpose(tensor, [*rest, *slid_first])
    flat = graph.reshape(moved, (1, product([tensor.shape[a] for a in rest]), *(tensor.shape[a] for a in slid_first)))
    shape, stride, dilations = ([int(sizes[a]) for a in slid_first] for sizes in (window, strides, steps))
    name = flat.name
    kind_of = carrier(tensor.dtype)
    if kind == "sum":
        ones = np.ones((1, 1, *shape), kind_of)
        channels = graph.reshape(flat, (flat.shape[1], 1, *flat.shape[2:]))
        name = graph.op("Conv", channels.name, graph.constant(ones), strides=stride, dilations=dilations)
    else:
        name = graph.op("Neg", name) if kind == "min" else name
        name = graph.op("MaxPool", name, kernel_shape=shape, strides=stride, dilations=dilations)
        name = graph.op("Neg", name) if kind == "min" else name
    name = graph.rounded(graph.cast(name, kind_of, result.dtype), result.dtype)
    order = [*rest, *slid_first]
    sizes = tuple(result.shape[axis] for axis in order)
    lead = (flat.shape[1], 1) if kind == "sum" else (1, flat.shape[1])
    pooled = (*lead, *(result.shape[axis] for axis in slid_first))
    whole = graph.reshape(Tensor(name, pooled, pooled, np.dtype(result.dtype)), sizes)
    return graph.transpose(whole, [order.index(axis) for axis in range(tensor.ndim)])


def _by_entries(
    graph: Graph, kind: str, tensor: Tensor, window: Sequence[int], strides: Sequence[int], steps: Sequence[int],
    result: Any,
) -> Tensor:  # fmt: skip
    """The entries of the windows one after another, for types that the pooling operators do not know."""
    computed = arithmetic(tensor.dtype)
    whole = graph.cast(tensor.name, tensor.dtype, computed)
    axes = range(tensor.ndim)
    total = None
    for entry in np.ndindex(*window):
        begins = [place * step for place, step in zip(entry, steps, strict=True)]
        ends = [begins[a] + (result.shape[a] - 1) * strides[a] + 1 for a in axes]
        part = graph.op("Slice", whole, graph.ints(*begins), graph.shape(ends), graph.ints(*axes), graph.ints(*strides))
        total = part if total is None else graph.op({"sum": "Add", "max": "Max", "min": "Min"}[kind], total, part)
    assert total is not None  # windows have entries
    return graph.new(graph.cast(total, computed, result.dtype), result)


def _generic(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    """`lax.reduce_window` with a function that JAX does not know by a primitive of its own."""
    raise NotImplementedError("ONNX export has windows of maxima, minima and sums alone.")


RULES: dict[str, Callable[[Graph, Any, list[Any]], Sequence[Any]]] = {
    "reduce_window_max": _windows("max"),
    "reduce_window_min": _windows("min"),
    "reduce_window_sum": _windows("sum"),
    "reduce_window": _generic,
}
