"""Matmuls of float inputs with quantized weights: ONNX Runtime's `MatMulNBits`.

Shape letters: K inputs, N outputs, G groups of inputs that share a scale, B blocks of the operator.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.protocol import reshape, transpose
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.export.onnx.graph import MICROSOFT, Graph, Tensor
from jaxcompress._src.export.onnx.options import LeafOptions
from jaxcompress._src.export.onnx.products import operand

_LEAST, _MOST = 16, 256
_USUAL = 128
"""The block where all inputs of an output share a scale."""


def weight_matmul(
    graph: Graph, eqn: Any, leaf: QuantizedArray, other: Any, side: int, options: LeafOptions
) -> tuple[Tensor | None, str, str]:
    """The product, the form in words, and what there is to say of it; no product where the operator cannot do it."""
    contracted, batch = eqn.params["dimension_numbers"]
    if batch[side]:
        return None, "", "a matmul for each entry of a batch"
    summed, summed_other = in_order(contracted[side], contracted[1 - side])
    matrix = as_matrix(leaf, summed)
    if matrix is None:
        return None, "", "groups that are none of a matrix"
    if matrix.levels is not None:
        return None, "", "codes that point into a table"
    if isinstance(matrix.data, SparseArray) and not matrix.plain_zeros():
        return None, "", "entries that are left out"
    group, block = _block(matrix)
    if block < _LEAST:
        return None, "", f"groups of {group}, which no power of two from 16 on divides"
    used = _bits(matrix)
    bits = 4 if used <= 4 else 8
    if bits == 8 and options.accuracy_level < 4:
        return None, "", "8 bits, for which `MatMulNBits` is slow in float arithmetic: see `accuracy_level`"
    names = _weights(graph, matrix, bits, block)
    x, free = inputs_of(graph, other, summed_other)
    k, n = matrix.shape
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": options.accuracy_level}
    name = graph.cast(x.name, x.dtype, np.float32)
    name = graph.op("MatMulNBits", name, *names, domain=MICROSOFT, **attributes)
    result = np.dtype(eqn.outvars[0].aval.dtype)
    name = graph.rounded(graph.cast(name, np.float32, result), result)
    form = f"MatMulNBits, {bits} bits, blocks of {block}"
    reason = f"{used} bits in {bits}" if used != bits else ""
    return placed(graph, name, eqn, free, n, side), form, reason


def in_order(contracted: Sequence[int], others: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Contracted axes of a leaf in its own order, in which its groups lie, and those of the other operand."""
    pairs = sorted(zip(contracted, others, strict=True))
    return tuple(axis for axis, _ in pairs), tuple(axis for _, axis in pairs)


def as_matrix(leaf: QuantizedArray, contracted: Sequence[int]) -> Any:
    """The leaf as (K, N), in its stored form; None where that cannot be moved so."""
    free = [axis for axis in range(leaf.ndim) if axis not in contracted]
    moved = transpose(leaf, [*contracted, *free])
    if moved is None or (len(contracted) == 1 and len(free) == 1):
        return moved
    sizes = [[leaf.shape[axis] for axis in axes] for axes in (contracted, free)]
    return reshape(moved, tuple(int(np.prod(part, dtype=np.int64)) for part in sizes))


def inputs_of(graph: Graph, other: Any, contracted: Sequence[int]) -> tuple[Tensor, tuple[Any, ...]]:
    """The other operand as (..., K), and the sizes of its free axes."""
    return operand(graph, other, (), contracted, last=True, merge=False)


def placed(graph: Graph, name: str, eqn: Any, free: tuple[Any, ...], n: int, side: int) -> Tensor:
    """The product (*free, N) in the shape and order that the equation has."""
    result = eqn.outvars[0].aval
    count = len(free)
    outputs = tuple(result.shape[count:]) if side == 1 else tuple(result.shape[: len(result.shape) - count])
    flat = Tensor(name, (*free, n), (*free, n), np.dtype(result.dtype))
    tensor = graph.reshape(flat, (*free, *outputs))
    return tensor if side == 1 else graph.transpose(tensor, [*range(count, tensor.ndim), *range(count)])


def _bits(matrix: QuantizedArray) -> int:
    """Bits of a code; where a re-arrangement has unpacked them, those that the codes need."""
    if matrix.bits < 8:
        return matrix.bits
    parts = [np.asarray(part) for part in (matrix.codes(), matrix.zero_points()) if part is not None]
    whole = [part.astype(np.int16) for part in parts if part.dtype in (np.int8, np.uint8)]
    low, high = min(part.min(initial=0) for part in whole), max(part.max(initial=0) for part in whole)
    return 4 if (low >= -8 and high <= 7) or (matrix.zero_point is not None and high <= 15) else 8


def _block(matrix: QuantizedArray) -> tuple[int, int]:
    """How many inputs share a scale, and the largest block that such a group is made of."""
    k, groups = matrix.shape[0], matrix.scale.shape[0]
    if groups == 1:
        return k, min(_USUAL, max(_LEAST, 1 << (k - 1).bit_length()))
    group = matrix.partial[1] if matrix.partial is not None else k // groups
    return group, min(group & -group, _MOST)


def _weights(graph: Graph, matrix: QuantizedArray, bits: int, block: int) -> list[str]:
    """Codes (N, B, block bytes), scales and zero points (N, B)."""
    k, n = matrix.shape
    blocks = -(-k // block)
    codes = np.asarray(matrix.codes()).T.astype(np.int16)
    middle = 1 << (bits - 1)
    zero_points = matrix.zero_points()
    unsigned = codes + middle if zero_points is None else codes
    padded = np.zeros((n, blocks * block), np.uint8)
    padded[:, :k] = unsigned
    padded = padded.reshape(n, blocks, block)
    packed = padded if bits == 8 else padded[..., ::2] | padded[..., 1::2] << 4
    group, _ = _block(matrix)
    scale = _by_block(np.asarray(matrix.scale.astype(jnp.float32)), n, blocks, block, group)
    names = [graph.constant(packed), graph.constant(scale.reshape(-1))]
    if zero_points is None:
        return names
    points = np.asarray(zero_points)
    if points.dtype.kind == "f" or jnp.issubdtype(points.dtype, jnp.floating):
        points = _by_block(points.astype(np.float32), n, blocks, block, group)
        return [*names, graph.constant(points.reshape(-1))]
    points = _by_block(points, n, blocks, block, group).astype(np.uint8)
    if bits == 4:
        even = np.pad(points, ((0, 0), (0, blocks % 2)))
        points = even[:, ::2] | even[:, 1::2] << 4
    return [*names, graph.constant(points.reshape(-1))]


def _by_block(parameter: np.ndarray, n: int, blocks: int, block: int, group: int) -> np.ndarray:
    """What belongs to groups of inputs and outputs, (G or 1, divisor of N), for each output and block: (N, B)."""
    columns = np.repeat(parameter, n // parameter.shape[1], axis=1)
    if parameter.shape[0] == 1:
        return np.ascontiguousarray(np.broadcast_to(columns.T, (n, blocks)))
    return np.ascontiguousarray(np.repeat(columns, group // block, axis=0)[:blocks].T)
