"""Matmuls and convolutions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcompress._src.export.onnx.dimensions import broadcast, is_static, product
from jaxcompress._src.export.onnx.graph import Graph, Tensor, same_shape
from jaxcompress._src.export.onnx.movement import pad, spread
from jaxcompress._src.export.onnx.types import arithmetic, carrier, is_float, onnx_type


def _dot_general(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    left, right = values
    numbers, result = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    (contracted_left, contracted_right), (batch_left, batch_right) = numbers
    swapped = isinstance(left, np.ndarray) and not isinstance(right, np.ndarray) and not batch_left
    if swapped:
        # A constant on the left, as `einsum` puts it, goes to the right, where runtimes prepare it.
        left, right = right, left
        contracted_left, contracted_right = contracted_right, contracted_left
    a, free_a = operand(graph, left, batch_left, contracted_left, last=True, merge=bool(batch_left))
    b, free_b = operand(graph, right, batch_right, contracted_right, last=False, merge=True)
    name = matmul(graph, a, b, result.dtype)
    # Of batch axes that both operands only broadcast there is one entry.
    batch = broadcast(*(part.shape[: len(batch_left)] for part in (a, b)))
    before = (*batch, product(free_a), product(free_b)) if batch_left else (*a.shape[:-1], product(free_b))
    held = (*batch, *free_a, *free_b)
    tensor = graph.reshape(Tensor(name, before, before, np.dtype(result.dtype)), held)
    tensor = dataclasses.replace(tensor, shape=(*result.shape[: len(batch_left)], *free_a, *free_b))
    if swapped:
        count = len(free_a)
        tensor = graph.transpose(tensor, [*range(count, tensor.ndim), *range(count)])
    return [tensor]


def operand(
    graph: Graph, value: Any, batch: Sequence[int], contracted: Sequence[int], *, last: bool, merge: bool
) -> tuple[Tensor, tuple[Any, ...]]:
    """An operand as `MatMul` takes it, and the sizes of its free axes.

    Args:
        graph: where its nodes go.
        value: a tensor or a constant.
        batch: its batch axes, which come first.
        contracted: the axes that are summed over, which become one.
        last: whether that one is the last one, or the last but one.
        merge: whether the free axes become one, too; without batch axes, those of the left operand need not.
    """
    tensor = graph.tensor(value)
    free = [axis for axis in range(tensor.ndim) if axis not in batch and axis not in contracted]
    if not all(same_shape((tensor.held[a],), (tensor.shape[a],)) for a in (*free, *contracted)):
        tensor = graph.full(tensor)
    order = [*batch, *free, *contracted] if last else [*batch, *contracted, *free]
    moved = graph.transpose(tensor, order)
    sizes = tuple(tensor.shape[axis] for axis in free)
    inner = product([tensor.shape[axis] for axis in contracted])
    outer: tuple[Any, ...] = (product(sizes),) if merge else sizes
    # Batch axes that are only broadcast stay so: `MatMul` broadcasts them.
    leading = moved.held[: len(batch)]
    shaped = graph.reshape(
        dataclasses.replace(moved, shape=moved.held), (*leading, *outer, inner) if last else (*leading, inner, *outer)
    )
    return shaped, sizes


def matmul(graph: Graph, a: Tensor, b: Tensor, dtype: Any) -> str:
    """The product as the carrier of `dtype`."""
    small = [np.dtype(x.dtype).name in ("int8", "uint8") for x in (a, b)]
    if all(small) and np.dtype(dtype) == np.int32:
        left, zero = unsigned(graph, a)
        return graph.op("MatMulInteger", left, b.name, zero)
    kind = carrier(dtype) if is_float(dtype) else arithmetic(dtype)
    if is_float(dtype):
        kind = max((carrier(x.dtype) for x in (a, b) if is_float(x.dtype)), key=lambda d: d.itemsize, default=kind)
        kind = kind if kind.itemsize >= carrier(dtype).itemsize else carrier(dtype)
    name = graph.op("MatMul", graph.cast(a.name, a.dtype, kind), graph.cast(b.name, b.dtype, kind))
    return graph.rounded(graph.cast(name, kind, dtype), dtype)


def unsigned(graph: Graph, codes: Tensor) -> tuple[str, str]:
    """int8 as uint8 with the zero point 128: ONNX Runtime multiplies u8 x s8 twenty times as fast as s8 x s8."""
    if codes.dtype == np.uint8:
        return codes.name, graph.scalar(0, np.uint8)
    pattern = graph.op("Cast", codes.name, to=onnx_type(np.uint8))
    middle = graph.scalar(128, np.uint8)
    return graph.op("BitwiseXor", pattern, middle), middle


def _conv(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    params, result = eqn.params, eqn.outvars[0].aval
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise NotImplementedError("ONNX has no convolutions with `batch_group_count`.")
    if not is_float(result.dtype):
        raise NotImplementedError(f"ONNX export has no convolutions of {result.dtype}.")
    x = graph.transpose(graph.full(values[0]), numbers.lhs_spec)
    kernel = graph.transpose(graph.full(values[1]), numbers.rhs_spec)
    zero = np.zeros((), x.dtype)
    x = spread(graph, x, [0, 0, *(dilation - 1 for dilation in params["lhs_dilation"])], zero)
    padding = list(params["padding"])
    if any(min(pair) < 0 for pair in padding) or not all(is_static(size) for pair in padding for size in pair):
        x = pad(graph, x, [0, 0, *(low for low, _ in padding)], [0, 0, *(high for _, high in padding)], zero)
        padding = [(0, 0)] * len(padding)
    spatial = x.ndim - 2
    if spatial == 0:
        x, kernel = (graph.reshape(part, (*part.shape, 1)) for part in (x, kernel))
    kind = max(carrier(x.dtype), carrier(kernel.dtype), key=lambda dtype: dtype.itemsize)
    kind = kind if kind.itemsize >= carrier(result.dtype).itemsize else carrier(result.dtype)
    name = graph.op(
        "Conv",
        graph.cast(x.name, x.dtype, kind),
        graph.cast(kernel.name, kernel.dtype, kind),
        group=int(params["feature_group_count"]),
        strides=list(params["window_strides"]) or [1],
        dilations=list(params["rhs_dilation"]) or [1],
        pads=[*(low for low, _ in padding), *(high for _, high in padding)] or [0, 0],
        kernel_shape=[int(size) for size in kernel.shape[2:]],
    )
    name = graph.rounded(graph.cast(name, kind, result.dtype), result.dtype)
    moved = tuple(result.shape[axis] for axis in numbers.out_spec)
    if spatial == 0:
        name = graph.op("Squeeze", name, graph.ints(2))
    tensor = Tensor(name, moved, moved, np.dtype(result.dtype))
    return [graph.transpose(tensor, [numbers.out_spec.index(axis) for axis in range(len(moved))])]


RULES: dict[str, Callable[[Graph, Any, list[Any]], Sequence[Any]]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
}
