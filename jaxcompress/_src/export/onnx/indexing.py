"""Look-ups and writes at indices that are known when the graph runs.

Shape letters: B batch axes of the indices, W sizes of the windows on indexed axes, R the other axes of the operand.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.export.onnx.dimensions import is_static
from jaxcompress._src.export.onnx.graph import Graph, Tensor, same_shape
from jaxcompress._src.export.onnx.types import arithmetic, carrier, is_float, onnx_type

_Mode = jax.lax.GatherScatterMode


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


class _Windows(NamedTuple):
    """Where the windows of a gather or scatter lie.

    Attributes:
        axes: the indexed axes of the operand, batching ones among them.
        sizes: W, of the windows on them; 1 on batching axes.
        dropped: those of these axes that the windows do not have.
        places: int64, (*B, *W, len(axes)): index tuples, within the operand.
        inside: bool, (*B, 1..., 1): whether the whole window lay inside; None where that is certain.
        batch: B.
    """

    axes: tuple[int, ...]
    sizes: tuple[Any, ...]
    dropped: frozenset[int]
    places: Tensor
    inside: Tensor | None
    batch: tuple[Any, ...]


def _windows(
    graph: Graph,
    indices: Any,
    shape: Sequence[Any],
    *,
    index_map: Sequence[int],
    batching: Sequence[int],
    indices_batching: Sequence[int],
    dropped: Sequence[int],
    sizes: Sequence[Any],
    mode: Any,
) -> _Windows:
    batch = tuple(indices.shape[:-1])
    axes = (*batching, *index_map)
    window = tuple(1 if axis in batching else sizes[axis] for axis in axes)
    rank = len(batch) + len(axes)
    parts, inside = [], None
    for at in indices_batching:
        parts.append(_line(graph, batch[at], rank, at))
    index = graph.full(indices)
    for number, axis in enumerate(index_map):
        name = graph.op("Slice", index.name, graph.ints(number), graph.ints(number + 1), graph.ints(index.ndim - 1))
        column = graph.reshape(Tensor(name, (*batch, 1), (*batch, 1), index.dtype), (*batch, *(1,) * len(axes)))
        start = graph.cast(column.name, index.dtype, np.int64)
        most = graph.op("Sub", graph.dimensions.size(shape[axis]), graph.dimensions.size(sizes[axis]))
        clipped = graph.op("Max", graph.op("Min", start, most), graph.ints(0))
        if mode == _Mode.FILL_OR_DROP:
            fits = graph.op("Equal", clipped, start)
            inside = fits if inside is None else graph.op("And", inside, fits)
        if not (is_static(sizes[axis]) and sizes[axis] == 1):
            clipped = graph.op("Add", clipped, _line(graph, sizes[axis], rank, len(batch) + len(batching) + number))
        parts.append(clipped)
    full = graph.shape((*batch, *window, 1))
    spread = [graph.op("Expand", graph.op("Unsqueeze", part, graph.ints(rank)), full) for part in parts]
    name = (
        graph.op("Concat", *spread, axis=rank)
        if spread
        else graph.op("Expand", graph.ints(0), graph.shape((*batch, *window, 0)))
    )
    places_shape = (*batch, *window, len(axes))
    places = Tensor(name, places_shape, places_shape, np.dtype(np.int64))
    held = (*batch, *(1,) * len(axes))
    flag = None if inside is None else Tensor(inside, held, held, np.dtype(bool))
    return _Windows(axes, window, frozenset((*dropped, *batching)), places, flag, batch)


def _line(graph: Graph, size: Any, rank: int, axis: int) -> str:
    """0, 1, ... along one of `rank` axes."""
    count = graph.op("Squeeze", graph.dimensions.size(size))
    line = graph.op("Range", graph.scalar(0, np.int64), count, graph.scalar(1, np.int64))
    return graph.op("Reshape", line, graph.ints(*(-1 if at == axis else 1 for at in range(rank))))


def _gather(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    numbers, sizes, mode = (eqn.params[name] for name in ("dimension_numbers", "slice_sizes", "mode"))
    table, result = graph.full(values[0]), eqn.outvars[0].aval
    fast = _gather_along_one_axis(graph, eqn, table, values[1])
    if fast is not None:
        return [fast]
    batching = tuple(numbers.operand_batching_dims)
    where = _windows(
        graph, graph.tensor(values[1]), table.shape,
        index_map=numbers.start_index_map, batching=batching, indices_batching=numbers.start_indices_batching_dims,
        dropped=numbers.collapsed_slice_dims, sizes=sizes, mode=mode,
    )  # fmt: skip
    rest = [axis for axis in range(table.ndim) if axis not in where.axes]
    cut = [axis for axis in rest if not same_shape((sizes[axis],), (table.shape[axis],))]
    name = table.name
    if cut:
        name = graph.op(
            "Slice", name, graph.ints(*[0] * len(cut)), graph.shape([sizes[a] for a in cut]), graph.ints(*cut)
        )
    shape = tuple(sizes[axis] if axis in cut else size for axis, size in enumerate(table.shape))
    moved = graph.transpose(Tensor(name, shape, shape, table.dtype), (*where.axes, *rest))
    picked = graph.op("GatherND", moved.name, where.places.name) if where.axes else moved.name
    rest_shape = tuple(shape[axis] for axis in rest)
    found_shape = (*where.batch, *where.sizes, *rest_shape)
    if not where.axes:
        picked = graph.op("Expand", picked, graph.shape(found_shape))
    found = Tensor(picked, found_shape, found_shape, table.dtype)
    if where.inside is not None:
        found = _filled(graph, found, graph.reshape(where.inside, (*where.inside.shape, *(1,) * len(rest))), eqn)
    # Axes of the window in the order of the operand, without those that are dropped.
    count = len(where.batch)
    place = {axis: count + i for i, axis in enumerate((*where.axes, *rest))}
    windowed = [axis for axis in range(table.ndim) if axis not in where.dropped]
    offsets = list(numbers.offset_dims)
    batch_axes = iter(range(count))
    order = [place[windowed[offsets.index(i)]] if i in offsets else next(batch_axes) for i in range(len(result.shape))]
    order += [place[axis] for axis in where.dropped]
    return [graph.reshape(graph.transpose(found, order), tuple(result.shape))]


def _gather_along_one_axis(graph: Graph, eqn: Any, table: Tensor, indices: Any) -> Tensor | None:
    """Whole slices at indices of one axis: `table[ids]`, `jnp.take(table, ids, axis)`."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    result = eqn.outvars[0].aval
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.start_index_map
    batch = tuple(eqn.invars[1].aval.shape[:-1])
    whole = all(same_shape((size,), (1 if at == axis else table.shape[at],)) for at, size in enumerate(sizes))
    if tuple(numbers.collapsed_slice_dims) != (axis,) or not whole:
        return None
    offsets = tuple(i for i in range(len(result.shape)) if not axis <= i < axis + len(batch))
    if tuple(numbers.offset_dims) != offsets:
        return None
    index = graph.reshape(graph.full(indices), batch)
    start = graph.cast(index.name, index.dtype, np.int64)
    most = graph.op("Sub", graph.op("Squeeze", graph.dimensions.size(table.shape[axis])), graph.scalar(1, np.int64))
    if is_static(table.shape[axis]):
        most = graph.scalar(table.shape[axis] - 1, np.int64)
    clipped = graph.op("Max", graph.op("Min", start, most), graph.scalar(0, np.int64))
    found = graph.new(graph.op("Gather", table.name, clipped, axis=axis), result)
    if eqn.params["mode"] != _Mode.FILL_OR_DROP:
        return found
    spread = (*(1,) * axis, *batch, *(1,) * (table.ndim - axis - 1))
    inside = Tensor(graph.op("Equal", clipped, start), batch, batch, np.dtype(bool))
    return _filled(graph, found, graph.reshape(inside, spread), eqn)


def _filled(graph: Graph, found: Tensor, inside: Tensor, eqn: Any) -> Tensor:
    """Rows outside are the fill value: NaN, or the least signed and the largest unsigned integer."""
    fill = eqn.params["fill_value"]
    if fill is None:
        if is_float(found.dtype):
            fill = jnp.nan
        elif found.dtype == bool:
            fill = True
        else:
            fill = np.iinfo(found.dtype).min if found.dtype.kind == "i" else np.iinfo(found.dtype).max
    computed = _selectable(found.dtype)
    name = graph.cast(found.name, found.dtype, computed)
    name = graph.op("Where", inside.name, name, graph.scalar(fill, computed))
    return Tensor(graph.cast(name, computed, found.dtype), found.held, found.shape, found.dtype)


def _selectable(dtype: Any) -> np.dtype:
    """A type that `Where` has kernels for."""
    own = carrier(dtype)
    return own if own.name in ("float32", "float64", "int32", "int64", "uint8") else arithmetic(own)


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
        where = _windows(
            graph, indices, table.shape, index_map=index_map, batching=batching,
            indices_batching=numbers.scatter_indices_batching_dims, dropped=numbers.inserted_window_dims, sizes=sizes,
            mode=mode,
        )  # fmt: skip
        rest = [axis for axis in range(table.ndim) if axis not in where.axes]
        order = (*where.axes, *rest)
        rows = graph.transpose(table, order)
        moved = _updates_in_order(graph, updates, where, rest, windowed, numbers)
        computed = _selectable(table.dtype)
        if not where.axes:
            rows, moved = graph.reshape(rows, (1, *rows.shape)), moved
        whole, part = (graph.cast(x.name, x.dtype, computed) for x in (rows, moved))
        places = where.places.name
        if where.inside is not None and where.axes:
            whole, places = _with_a_spare_row(graph, whole, places, rows, where, computed)
        attributes = {} if reduction == "none" else {"reduction": reduction}
        name = graph.op("ScatterND", whole, places, part, **attributes)
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
    graph: Graph, updates: Tensor, where: _Windows, rest: Sequence[int], windowed: Sequence[int], numbers: Any
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
    graph: Graph, whole: str, places: str, rows: Tensor, where: _Windows, dtype: np.dtype
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
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter": _scatter("none"),
    "scatter-add": _scatter("add"),
    "scatter-mul": _scatter("mul"),
    "scatter_mul": _scatter("mul"),
    "scatter-min": _scatter("min"),
    "scatter-max": _scatter("max"),
}
