"""Primitives that move entries about, or repeat them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcompress._src.export.onnx.dimensions import is_static
from jaxcompress._src.export.onnx.graph import Graph, Tensor, same_shape
from jaxcompress._src.export.onnx.types import arithmetic, carrier

_TO_THE_END = np.iinfo(np.int64).max


def _reshape(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    value = values[0]
    if eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None:
        value = graph.transpose(value, eqn.params["dimensions"])
    return [graph.reshape(value, tuple(eqn.outvars[0].aval.shape))]


def _transpose(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    return [graph.transpose(values[0], eqn.params["permutation"])]


def _broadcast(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    """Only the axes are written down; what needs the entries has them expanded."""
    shape, axes = tuple(eqn.outvars[0].aval.shape), eqn.params["broadcast_dimensions"]
    tensor = graph.tensor(values[0])
    held: list[Any] = [1] * len(shape)
    for axis, size in zip(axes, tensor.held, strict=True):
        held[axis] = size
    moved = graph.reshape(dataclasses.replace(tensor, shape=tensor.held), tuple(held))
    return [dataclasses.replace(moved, shape=shape)]


def _concatenate(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    axis = eqn.params["dimension"]
    full = [value for value, var in zip(values, eqn.invars, strict=True) if not _empty(var.aval.shape[axis])]
    names = [graph.full(value).name for value in full or values[:1]]
    name = names[0] if len(names) == 1 else graph.op("Concat", *names, axis=axis)
    return [graph.new(name, eqn.outvars[0].aval)]


def _stack(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    result, axis = eqn.outvars[0].aval, eqn.params["axis"]
    parts = [graph.full(value) for value in values]
    names = [graph.reshape(part, (*part.shape[:axis], 1, *part.shape[axis:])).name for part in parts]
    return [graph.new(names[0] if len(names) == 1 else graph.op("Concat", *names, axis=axis), result)]


def _unstack(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    tensor, axis = graph.full(values[0]), eqn.params["axis"]
    names = [graph.op("Gather", tensor.name, graph.scalar(i, np.int64), axis=axis) for i in range(len(eqn.outvars))]
    return [graph.new(name, var.aval) for name, var in zip(names, eqn.outvars, strict=True)]


def _tile(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    name = graph.op("Tile", graph.full(values[0]).name, graph.shape(eqn.params["reps"]))
    return [graph.new(name, eqn.outvars[0].aval)]


def _empty(size: Any) -> bool:
    return is_static(size) and size == 0


def _split(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    tensor, axis = graph.full(values[0]), eqn.params["axis"]
    sizes = graph.shape(eqn.params["sizes"])
    names = graph.ops("Split", tensor.name, sizes, outputs=len(eqn.outvars), axis=axis)
    return [graph.new(name, var.aval) for name, var in zip(names, eqn.outvars, strict=True)]


def _slice(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    tensor = graph.tensor(values[0])
    cut, held = [], list(tensor.held)
    result = tuple(eqn.outvars[0].aval.shape)
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        whole = is_static(start) and start == 0 and same_shape((limit,), (tensor.shape[axis],)) and stride == 1
        if whole or not same_shape((tensor.held[axis],), (tensor.shape[axis],)):
            continue  # what is broadcast stays so
        cut.append((axis, start, limit, stride))
        held[axis] = result[axis]
    if not cut:
        return [Tensor(tensor.name, tensor.held, result, tensor.dtype)]
    axes, starts, limits, strides = zip(*cut, strict=True)
    name = graph.op(
        "Slice", tensor.name, graph.shape(starts), graph.shape(limits), graph.ints(*axes), graph.ints(*strides)
    )
    return [Tensor(name, tuple(held), result, tensor.dtype)]


def _rev(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    axes = eqn.params["dimensions"]
    tensor = graph.full(values[0])
    count = len(axes)
    first = graph.ints(*[-1] * count)
    name = graph.op("Slice", tensor.name, first, graph.ints(*[-_TO_THE_END] * count), graph.ints(*axes), first)
    return [graph.new(name, eqn.outvars[0].aval)]


def _pad(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    tensor, fill = graph.full(values[0]), graph.tensor(values[1])
    config = eqn.params["padding_config"]
    dilated = spread(graph, tensor, [interior for _, _, interior in config], fill)
    return [pad(graph, dilated, [low for low, _, _ in config], [high for _, high, _ in config], fill)]


def pad(graph: Graph, tensor: Tensor, low: Sequence[Any], high: Sequence[Any], fill: Any) -> Tensor:
    """Entries added at the ends of axes; negative numbers take some away."""
    shape = list(tensor.shape)
    sizes = [size for size in (*low, *high) if is_static(size)]
    if all(size == 0 for size in sizes) and len(sizes) == 2 * len(shape):
        return tensor
    # What is taken away goes last: an axis may be shorter than that before.
    added = [[max(size, 0) if is_static(size) else size for size in side] for side in (low, high)]
    taken = [[max(-size, 0) if is_static(size) else 0 for size in side] for side in (low, high)]
    # `Pad` has no kernels for the other types.
    computed = (
        arithmetic(tensor.dtype)
        if carrier(tensor.dtype).name not in ("int8", "uint8", "bool")
        else carrier(tensor.dtype)
    )
    name = graph.cast(tensor.name, tensor.dtype, computed)
    value = graph.cast(graph.reshape(fill, ()).name, tensor.dtype, computed)
    name = graph.op("Pad", name, graph.shape([*added[0], *added[1]]), value, mode="constant")
    name = graph.cast(name, computed, tensor.dtype)
    shape = [n + a + b for n, a, b in zip(shape, *added, strict=True)]
    axes = [axis for axis in range(len(shape)) if taken[0][axis] or taken[1][axis]]
    if axes:
        begin = graph.ints(*(taken[0][axis] for axis in axes))
        end = graph.ints(*(-taken[1][axis] if taken[1][axis] else _TO_THE_END for axis in axes))
        name = graph.op("Slice", name, begin, end, graph.ints(*axes))
        shape = [n - a - b for n, a, b in zip(shape, *taken, strict=True)]
    return Tensor(name, tuple(shape), tuple(shape), tensor.dtype)


def spread(graph: Graph, tensor: Tensor, interior: Sequence[int], fill: Any) -> Tensor:
    """`interior` entries put between neighbours of each axis."""
    for axis, count in enumerate(interior):
        size = tensor.shape[axis]
        if count == 0 or (is_static(size) and size < 2):
            continue
        before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
        split = graph.reshape(tensor, (*before, size, 1, *after))
        high = [0] * split.ndim
        high[axis + 1] = count
        padded = pad(graph, split, [0] * split.ndim, high, fill)
        merged = graph.reshape(padded, (*before, size * (count + 1), *after))
        low, high = [0] * merged.ndim, [0] * merged.ndim
        high[axis] = -count
        tensor = pad(graph, merged, low, high, fill)
    return tensor


def _iota(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    del values
    result, axis = eqn.outvars[0].aval, eqn.params["dimension"]
    size = result.shape[axis]
    count = graph.op("Squeeze", graph.shape((size,)))
    name = graph.op("Range", graph.scalar(0, np.int64), count, graph.scalar(1, np.int64))
    name = graph.rounded(graph.cast(name, np.int64, result.dtype), result.dtype)
    line = Tensor(name, (size,), (size,), np.dtype(result.dtype))
    held = tuple(n if i == axis else 1 for i, n in enumerate(result.shape))
    return [Tensor(graph.reshape(line, held).name, held, tuple(result.shape), line.dtype)]


def _dim_as_value(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    del values
    result = eqn.outvars[0].aval
    name = graph.op("Squeeze", graph.dimensions.size(eqn.params["dim"]))
    return [graph.new(graph.cast(name, np.int64, result.dtype), result)]


def _bitcast(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    """Between signed and unsigned integers of the same size, which casts wrap around."""
    tensor, target = graph.tensor(values[0]), np.dtype(eqn.params["new_dtype"])
    if tensor.dtype.kind not in "iu" or target.kind not in "iu" or tensor.dtype.itemsize != target.itemsize:
        raise NotImplementedError(f"ONNX has no bit cast from {tensor.dtype} to {target}.")
    return [Tensor(graph.cast(tensor.name, tensor.dtype, target), tensor.held, tensor.shape, target)]


def _empty_array(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    del values
    result = eqn.outvars[0].aval
    held = (1,) * len(result.shape)
    return [Tensor(graph.constant(np.zeros(held, result.dtype)), held, tuple(result.shape), np.dtype(result.dtype))]


RULES: dict[str, Callable[[Graph, Any, list[Any]], Sequence[Any]]] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "split": _split,
    "slice": _slice,
    "rev": _rev,
    "pad": _pad,
    "iota": _iota,
    "dim_as_value": _dim_as_value,
    "bitcast_convert_type": _bitcast,
    "empty": _empty_array,
}
