"""Writes at indices that are known when the graph runs.

Shape letters are those of `index_windows.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcompress._src.export.onnx.graph import Graph, Tensor, same_shape
from jaxcompress._src.export.onnx.index_windows import Windows, windows
from jaxcompress._src.export.onnx.types import onnx_type, selectable


def _scatter(reduction: str) -> Callable[[Graph, Any, list[Any]], Sequence[Any]]:
    """A rule that writes windows, or combines them with what is there; ONNX does that tuple by tuple."""

    def rule(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
        numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
        table, indices, updates = graph.full(values[0]), graph.tensor(values[1]), graph.full(values[2])
        batching = tuple(numbers.operand_batching_dims)
        hidden = (*numbers.inserted_window_dims, *batching)
        windowed = [axis for axis in range(table.ndim) if axis not in hidden]
        sizes: list[Any] = [1] * table.ndim
        for axis, at in zip(windowed, numbers.update_window_dims, strict=True):
            sizes[axis] = updates.shape[at]
        index_map = tuple(numbers.scatter_dims_to_operand_dims)
        # An axis whose windows are shorter than it, without an index: they begin at 0.
        short = [
            a for a in range(table.ndim)
            if a not in (*index_map, *batching) and not same_shape((sizes[a],), (table.shape[a],))
        ]  # fmt: skip
        if short:
            indices = _with_zeros(graph, indices, len(short))
            index_map = (*index_map, *short)
        where = windows(
            graph, indices, table.shape, index_map=index_map, batching=batching,
            indices_batching=numbers.scatter_indices_batching_dims, dropped=numbers.inserted_window_dims, sizes=sizes,
            mode=mode,
        )  # fmt: skip
        rest = [axis for axis in range(table.ndim) if axis not in where.axes]
        order = (*where.axes, *rest)
        rows = graph.transpose(table, order)
        moved = _updates_in_order(graph, updates, where, rest, windowed, numbers)
        computed = selectable(table.dtype)
        if not where.axes:
            rows, moved = graph.reshape(rows, (1, *rows.shape)), moved
        whole, part = (graph.cast(x.name, x.dtype, computed) for x in (rows, moved))
        places = where.places.name
        if where.inside is not None and where.axes:
            whole, places = _with_a_spare_row(graph, whole, places, rows, where, computed)
        if reduction == "sub":
            part = graph.op("Neg", part)
        kind = {"none": {}, "sub": {"reduction": "add"}}.get(reduction, {"reduction": reduction})
        name = graph.op("ScatterND", whole, places, part, **kind)
        if where.inside is not None and where.axes:
            size = graph.dimensions.size(rows.shape[0])
            name = graph.op("Slice", name, graph.ints(0), size, graph.ints(0))
        name = graph.rounded(graph.cast(name, computed, table.dtype), table.dtype)
        written = graph.reshape(Tensor(name, rows.shape, rows.shape, table.dtype), tuple(table.shape[a] for a in order))
        return [graph.transpose(written, [order.index(axis) for axis in range(table.ndim)])]

    return rule


def _with_zeros(graph: Graph, indices: Tensor, count: int) -> Tensor:
    full = graph.full(indices)
    zeros = graph.op("Expand", graph.scalar(0, full.dtype), graph.shape((*full.shape[:-1], count)))
    shape = (*full.shape[:-1], full.shape[-1] + count)
    return Tensor(graph.op("Concat", full.name, zeros, axis=full.ndim - 1), shape, shape, full.dtype)


def _updates_in_order(
    graph: Graph, updates: Tensor, where: Windows, rest: Sequence[int], windowed: Sequence[int], numbers: Any
) -> Tensor:
    """The updates as (*B, *W, *R)."""
    window_dims = list(numbers.update_window_dims)
    batch_axes = [axis for axis in range(updates.ndim) if axis not in window_dims]
    place = dict(zip(windowed, window_dims, strict=True))
    indexed = [place[axis] for axis in where.axes if axis in place]
    moved = graph.transpose(updates, [*batch_axes, *indexed, *(place[axis] for axis in rest)])
    rest_shape = tuple(updates.shape[place[axis]] for axis in rest)
    return graph.reshape(moved, (*where.batch, *where.sizes, *rest_shape))


def _with_a_spare_row(
    graph: Graph, whole: str, places: str, rows: Tensor, where: Windows, dtype: np.dtype
) -> tuple[str, str]:
    """Windows that are not inside are written to a row behind the last one, which is then cut off."""
    assert where.inside is not None
    spare = graph.op("Expand", graph.scalar(0, dtype), graph.shape((1, *rows.shape[1:])))
    whole = graph.op("Concat", whole, spare, axis=0)
    inside = graph.op("Cast", where.inside.name, to=onnx_type(np.int64))
    kept = graph.op("Unsqueeze", inside, graph.ints(where.inside.ndim))
    first = np.zeros(len(where.axes), np.int64)
    first[0] = 1
    outside = graph.op("Mul", graph.op("Sub", graph.ints(1), kept), graph.constant(first))
    size = graph.dimensions.size(rows.shape[0])
    # The other indices of such a window are in range, because all of them were clipped.
    keep = graph.op("Sub", graph.ints(1), outside)
    return whole, graph.op("Add", graph.op("Mul", places, keep), graph.op("Mul", outside, size))


RULES: dict[str, Callable[[Graph, Any, list[Any]], Sequence[Any]]] = {
    "scatter": _scatter("none"),
    "scatter-add": _scatter("add"),
    "scatter-mul": _scatter("mul"),
    "scatter-sub": _scatter("sub"),
    "scatter-min": _scatter("min"),
    "scatter-max": _scatter("max"),
}
