"""Sums and other reductions along axes, and running ones."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcompress._src.export.onnx.graph import Body, Graph, Tensor, same_shape
from jaxcompress._src.export.onnx.types import arithmetic, is_float


def _reduce(op: str, *, repeats: bool = False) -> Callable[[Graph, Any, list[Any]], Sequence[Any]]:
    """A rule for a reduction; `repeats` says that equal entries give that entry, so that broadcast axes need not be."""

    def rule(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
        result, axes = eqn.outvars[0].aval, tuple(eqn.params["axes"])
        tensor = graph.tensor(values[0])
        if not repeats and not all(same_shape((tensor.held[a],), (tensor.shape[a],)) for a in axes):
            tensor = graph.full(tensor)
        computed = arithmetic(tensor.dtype)
        name = graph.cast(tensor.name, tensor.dtype, computed)
        if axes:
            name = graph.op(op, name, graph.ints(*axes), keepdims=0)
        name = graph.rounded(graph.cast(name, computed, result.dtype), result.dtype)
        held = tuple(size for axis, size in enumerate(tensor.held) if axis not in axes)
        return [Tensor(name, held, tuple(result.shape), np.dtype(result.dtype))]

    return rule


def _arg(op: str) -> Callable[[Graph, Any, list[Any]], Sequence[Any]]:
    def rule(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
        result, (axis,) = eqn.outvars[0].aval, eqn.params["axes"]
        tensor = graph.full(values[0])
        name = graph.cast(tensor.name, tensor.dtype, arithmetic(tensor.dtype))
        name = graph.op(op, name, axis=axis, keepdims=0)
        return [graph.new(graph.cast(name, np.int64, result.dtype), result)]

    return rule


def _cumsum(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    result = eqn.outvars[0].aval
    tensor = graph.full(values[0])
    computed = arithmetic(tensor.dtype)
    name = graph.cast(tensor.name, tensor.dtype, computed)
    name = graph.op("CumSum", name, graph.scalar(eqn.params["axis"], np.int64), reverse=int(eqn.params["reverse"]))
    return [graph.new(graph.rounded(graph.cast(name, computed, result.dtype), result.dtype), result)]


def _running(op: str, first: Callable[[np.dtype], Any]) -> Callable[[Graph, Any, list[Any]], Sequence[Any]]:
    """A rule that carries a result along an axis, for what ONNX has no operator."""

    def rule(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
        result, axis, reverse = eqn.outvars[0].aval, eqn.params["axis"], int(eqn.params["reverse"])
        tensor = graph.full(values[0])
        computed = arithmetic(tensor.dtype)
        name = graph.cast(tensor.name, tensor.dtype, computed)
        rest = tuple(size for at, size in enumerate(tensor.shape) if at != axis)
        start = graph.scalar(first(computed), computed)
        start = graph.op("Expand", start, graph.shape(rest)) if rest else start
        before, entry = graph.fresh(), graph.fresh()
        with graph.scope() as nodes:
            after = graph.rounded(_step(graph, op, before, entry), tensor.dtype)
            written = graph.op("Identity", after)
        kind = (computed, len(rest))
        body = Body(
            inputs=((before, *kind), (entry, *kind)), outputs=((after, *kind), (written, *kind)), nodes=tuple(nodes)
        )
        _, name = graph.ops(
            "Scan",
            start,
            name,
            outputs=2,
            body=body,
            num_scan_inputs=1,
            scan_input_axes=[axis],
            scan_output_axes=[axis],
            scan_input_directions=[reverse],
            scan_output_directions=[reverse],
        )
        return [graph.new(graph.cast(name, computed, result.dtype), result)]

    return rule


def _step(graph: Graph, op: str, before: str, entry: str) -> str:
    if op != "LogAddExp":
        return graph.op(op, before, entry)
    most, least = graph.op("Max", before, entry), graph.op("Min", before, entry)
    gap = graph.op("Exp", graph.op("Sub", least, most))
    return graph.op("Add", most, graph.op("Log", graph.op("Add", gap, graph.scalar(1, np.float32))))


def _least(dtype: np.dtype) -> Any:
    return -np.inf if is_float(dtype) else np.iinfo(dtype).min


def _most(dtype: np.dtype) -> Any:
    return np.inf if is_float(dtype) else np.iinfo(dtype).max


RULES: dict[str, Callable[[Graph, Any, list[Any]], Sequence[Any]]] = {
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax", repeats=True),
    "reduce_min": _reduce("ReduceMin", repeats=True),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_and": _reduce("ReduceMin", repeats=True),
    "reduce_or": _reduce("ReduceMax", repeats=True),
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "cumsum": _cumsum,
    "cumprod": _running("Mul", lambda dtype: 1),
    "cummax": _running("Max", _least),
    "cummin": _running("Min", _most),
    "cumlogsumexp": _running("LogAddExp", lambda dtype: -1e30),
}
