"""Sorting, and the largest entries. ONNX breaks ties by the lower index, as stable sorts do."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcompress._src.export.onnx.graph import Graph, Tensor
from jaxcompress._src.export.onnx.types import arithmetic, carrier


def _sort(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    """By the last key first, and stably: that is by all of them."""
    axis, keys = eqn.params["dimension"], eqn.params["num_keys"]
    tensors = [graph.full(value) for value in values]
    size = graph.dimensions.size(tensors[0].shape[axis])
    for number in reversed(range(keys)):
        key = tensors[number]
        computed = arithmetic(key.dtype)
        name = graph.cast(key.name, key.dtype, computed)
        _, order = graph.ops("TopK", name, size, outputs=2, axis=axis, largest=0, sorted=1)
        tensors = [_taken(graph, tensor, order, axis) for tensor in tensors]
    return tensors


def _taken(graph: Graph, tensor: Tensor, order: str, axis: int) -> Tensor:
    name = graph.op("GatherElements", tensor.name, order, axis=axis)
    return Tensor(name, tensor.shape, tensor.shape, tensor.dtype)


def _top_k(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    tensor = graph.full(values[0])
    largest, places = (var.aval for var in eqn.outvars)
    axis = eqn.params.get("axis", tensor.ndim - 1)
    computed = arithmetic(tensor.dtype)
    name = graph.cast(tensor.name, tensor.dtype, computed)
    found, order = graph.ops(
        "TopK", name, graph.shape((eqn.params["k"],)), outputs=2, axis=axis % tensor.ndim, largest=1, sorted=1
    )
    found = graph.cast(found, computed, carrier(largest.dtype))
    return [graph.new(found, largest), graph.new(graph.cast(order, np.int64, places.dtype), places)]


RULES: dict[str, Callable[[Graph, Any, list[Any]], Sequence[Any]]] = {"sort": _sort, "top_k": _top_k}
