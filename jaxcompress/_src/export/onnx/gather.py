"""Look-ups at indices that are known when the graph runs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.export.onnx.dimensions import is_static
from jaxcompress._src.export.onnx.graph import Graph, Tensor, same_shape
from jaxcompress._src.export.onnx.index_windows import windows
from jaxcompress._src.export.onnx.types import is_float


def _gather(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    numbers, sizes, mode = (eqn.params[name] for name in ("dimension_numbers", "slice_sizes", "mode"))
    table, result = graph.full(values[0]), eqn.outvars[0].aval
    fast = _gather_along_one_axis(graph, eqn, table, values[1])
    if fast is not None:
        return [fast]
    batching = tuple(numbers.operand_batching_dims)
    where = windows(
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
    if eqn.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
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
    held = (1,) * found.ndim
    value = Tensor(graph.scalar(fill, found.dtype), held, found.shape, found.dtype)
    return graph.chosen(inside, found, value)


RULES: dict[str, Callable[[Graph, Any, list[Any]], Sequence[Any]]] = {"gather": _gather}
