"""Slices, read or written, that begin at an index which is known when the graph runs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcompress._src.export.onnx.dimensions import is_static
from jaxcompress._src.export.onnx.graph import Graph, Tensor, same_shape


def _dynamic_slice(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    tensor, sizes = graph.full(values[0]), eqn.params["slice_sizes"]
    cut = [axis for axis, size in enumerate(sizes) if not same_shape((size,), (tensor.shape[axis],))]
    if not cut:
        return [tensor]
    starts = [_start(graph, values[1 + axis], tensor.shape[axis], sizes[axis]) for axis in cut]
    begin = starts[0] if len(starts) == 1 else graph.op("Concat", *starts, axis=0)
    end = graph.op("Add", begin, graph.shape([sizes[axis] for axis in cut]))
    return [graph.new(graph.op("Slice", tensor.name, begin, end, graph.ints(*cut)), eqn.outvars[0].aval)]


def _start(graph: Graph, value: Any, size: Any, window: Any) -> str:
    """A list of one index, where the window fits."""
    if isinstance(value, np.ndarray) and is_static(size) and is_static(window):
        return graph.ints(int(np.clip(value, 0, size - window)))
    index = graph.reshape(value, (1,))
    name = graph.cast(index.name, index.dtype, np.int64)
    most = graph.op("Sub", graph.dimensions.size(size), graph.dimensions.size(window))
    return graph.op("Max", graph.op("Min", name, most), graph.ints(0))


def _dynamic_update_slice(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    whole, part = graph.full(values[0]), graph.full(values[1])
    cut = [axis for axis in range(whole.ndim) if not same_shape((whole.shape[axis],), (part.shape[axis],))]
    if not cut:
        return [part]
    starts = {axis: _start(graph, values[2 + axis], whole.shape[axis], part.shape[axis]) for axis in cut}
    return [graph.new(_replaced(graph, whole.name, part, starts, cut), eqn.outvars[0].aval)]


def _replaced(graph: Graph, whole: str, part: Tensor, starts: dict[int, str], axes: Sequence[int]) -> str:
    """The entries before, the new ones and those behind, along one axis after another."""
    axis, *rest = axes
    begin, at = starts[axis], graph.ints(axis)
    end = graph.op("Add", begin, graph.dimensions.size(part.shape[axis]))
    new = part.name
    if rest:
        new = _replaced(graph, graph.op("Slice", whole, begin, end, at), part, starts, rest)
    before = graph.op("Slice", whole, graph.ints(0), begin, at)
    behind = graph.op("Slice", whole, end, graph.ints(np.iinfo(np.int64).max), at)
    return graph.op("Concat", before, new, behind, axis=axis)


RULES: dict[str, Callable[[Graph, Any, list[Any]], Sequence[Any]]] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
