"""Matmuls of quantized inputs with int8 weights, in whole numbers.

Shape letters: M rows, K inputs, N outputs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray, InputQuantizer
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.export.onnx.graph import Graph, Tensor
from jaxcompress._src.export.onnx.options import LeafOptions
from jaxcompress._src.export.onnx.types import onnx_type
from jaxcompress._src.export.onnx.weight_matmul import as_matrix, in_order, inputs_of, placed


def integer_matmul(
    translator: Any, eqn: Any, leaf: InputQuantizedArray, other: Any, side: int, options: LeafOptions
) -> tuple[Tensor | None, str, str]:
    """The product, its form in words, and a remark; no product where weights or inputs are no whole numbers."""
    graph: Graph = translator.graph
    contracted, batch = eqn.params["dimension_numbers"]
    weight: Any = leaf.weight
    summed, summed_other = in_order(contracted[side], contracted[1 - side])
    if batch[side] or _whole_matrix(weight, summed) is None:
        return None, "", "weights without one scale along their inputs"
    if not _has_8_bits(leaf):
        return None, "", "inputs that are not rounded to 8 bits"
    note = f"{weight.bits} bits in 8" if weight.bits != 8 else ""
    if options.weight_bits == 7 and weight.bits == 8:
        weight, note = _of_7_bits(weight), "weights rounded to 7 bits"
    matrix = _whole_matrix(weight, summed)
    if leaf.scale is None and options.input_ranges == "row":
        try:
            if other.dtype == np.float32 and _are_rounded_plainly(leaf):
                written = _by_rows(translator, eqn, leaf, matrix, other, summed_other, side)
            else:
                # As JAX computes it; the float product that its derivatives need is read by nothing.
                stored = translator.leaves.stored(dataclasses.replace(leaf, weight=weight))
                (written,) = translator.call(lambda leaf, x: leaf.dot(x, side, eqn.params), stored, other)
        except NotImplementedError as err:
            raise NotImplementedError(f'{err} `input_ranges="tensor"` finds ranges without it.') from err
        return written, "MatMulInteger, a range for each row", note
    x, free = inputs_of(graph, other, summed_other)
    x = Tensor(graph.cast(x.name, x.dtype, np.float32), x.held, x.shape, np.dtype(np.float32))
    codes, scale, zero_point, how = _codes(graph, leaf, x)
    name = _product(graph, codes, scale, zero_point, matrix)
    result = np.dtype(eqn.outvars[0].aval.dtype)
    name = graph.rounded(graph.cast(name, np.float32, result), result)
    return placed(graph, name, eqn, free, matrix.shape[1], side), f"MatMulInteger, {how}", note


def _product(graph: Graph, codes: str, scale: str, zero_point: str, matrix: QuantizedArray) -> str:
    """Codes less their zero point times the weights, and times a scale, both of them scalars."""
    table, weight_scale, weight_zero = _weight_codes(graph, matrix)
    name = graph.op("MatMulInteger", codes, table, zero_point, weight_zero)
    # In this order ONNX Runtime makes one kernel of it all.
    name = graph.op("Cast", name, to=onnx_type(np.float32))
    return graph.op("Mul", name, graph.op("Mul", scale, weight_scale))


def _by_rows(
    translator: Any, eqn: Any, leaf: InputQuantizedArray, matrix: QuantizedArray, other: Any, summed: Any, side: int
) -> Tensor:
    """The product of inputs in a range for each row, which the operator does not know.

    With codes q = round(x / s) + z and weights w = v (c - d),

    y[m, n] = s[m] v[n] (Σ_k (q[m, k] - 128) (c[k, n] - d[n]) - (z[m] - 128) Σ_k (c[k, n] - d[n]))

    where codes without zero points are taken as those with z = 128.
    """
    graph: Graph = translator.graph
    x, free = inputs_of(graph, other, summed)
    # Those of no rows are constants.
    parameters = translator.call(functools.partial(_row_parameters, leaf.inputs), x)
    scale, *zero_points = (graph.tensor(part) for part in parameters)
    quotients = graph.op("Div", x.name, scale.name)
    middle, one = graph.scalar(128, np.uint8), graph.scalar(1, np.float32)
    shifts = ""
    if zero_points:
        shifts = graph.op("Sub", zero_points[0].name, graph.scalar(128, np.float32))
        # Rounded before they are shifted, as codes are.
        rounded = graph.op("Add", graph.op("Round", quotients), shifts)
        codes = graph.op("QuantizeLinear", rounded, one, middle)
    else:
        codes = graph.op("QuantizeLinear", quotients, one, middle)
    # 1, whatever the scales are, but not for ONNX Runtime, which makes one kernel only where a scale is computed.
    computed = graph.op("Pow", graph.op("ReduceSum", scale.name, keepdims=0), graph.scalar(0, np.float32))
    name = _product(graph, codes, computed, middle, matrix)
    if shifts:
        # Rounded as the product is, so that rows of zeros remain what they are.
        _, weight_scale, _ = _weight_codes(graph, matrix)
        sums = graph.op("Mul", shifts, graph.constant(_column_sums(matrix)))
        name = graph.op("Sub", name, graph.op("Mul", sums, weight_scale))
    name = graph.op("Mul", name, scale.name)
    return placed(graph, name, eqn, free, matrix.shape[1], side)


def _row_parameters(inputs: InputQuantizer, x: jax.Array) -> list[jax.Array]:
    """Scales of the rows of `x`, and zero points if there are any, as float32."""
    codes = inputs.codes(x, (x.ndim - 1,), None, None)
    parts = [codes.scale] if codes.zero_point is None else [codes.scale, codes.zero_point]
    return [part.astype(jnp.float32) for part in parts]


def _column_sums(matrix: QuantizedArray) -> np.ndarray:
    """Of codes less their zero points, (N,), in float32."""
    codes, zero_points = np.asarray(matrix.codes()).astype(np.int32), matrix.zero_points()
    shifted = codes if zero_points is None else codes - np.asarray(zero_points, np.int32)
    return shifted.sum(0).astype(np.float32)


def _are_rounded_plainly(leaf: InputQuantizedArray) -> bool:
    """Whether all codes of inputs are round(x / scale) and a zero point, none cut but to the ends of int8 or uint8.

    Seen on rows with outliers, of one sign, of one number and of zeros.
    """
    rows = np.random.default_rng(0).standard_cauchy((64, 96)).astype(np.float32)
    rows[:8], rows[8], rows[9] = np.abs(rows[:8]), 3.0, 0.0
    codes = leaf.inputs.codes(jnp.asarray(rows), (1,), None, None)
    if codes.levels is not None or jnp.shape(codes.scale) not in ((64, 1), (1, 1)):
        return False
    shift = 128 if codes.zero_point is None else np.asarray(codes.zero_point).astype(np.float32)
    stored = np.asarray(codes.codes()).astype(np.float32) + (128 if codes.zero_point is None else 0)
    return np.array_equal(np.clip(np.round(rows / np.asarray(codes.scale)) + shift, 0, 255), stored)


def _whole_matrix(weight: Any, contracted: Any) -> Any:
    if not isinstance(weight, QuantizedArray) or weight.levels is not None:
        return None
    if isinstance(weight.data, SparseArray) and not weight.plain_zeros():
        return None
    if weight.zero_point is not None and jnp.issubdtype(weight.zero_point.dtype, jnp.floating):
        return None
    matrix = as_matrix(weight, contracted)
    if matrix is None or matrix.scale.shape[0] != 1 or matrix.scale.shape[1] not in (1, matrix.shape[1]):
        return None
    return matrix


def _of_7_bits(weight: QuantizedArray) -> QuantizedArray:
    """The values that codes and zero points stand for, as codes in [-63, 63]."""
    values, zero_points = np.asarray(weight.codes()).astype(np.float32), weight.zero_points()
    values = values if zero_points is None else values - np.asarray(zero_points, np.float32)
    shared = tuple(axis for axis, blocks in enumerate(weight.scale.shape) if blocks == 1)
    step = np.maximum(np.abs(values).max(axis=shared, keepdims=True, initial=0), 1) / 63
    codes, scale = jnp.asarray(np.round(values / step), jnp.int8), weight.scale.astype(jnp.float32) * step
    return dataclasses.replace(weight, data=codes, scale=scale, zero_point=None)


def _weight_codes(graph: Graph, matrix: QuantizedArray) -> tuple[str, str, str]:
    """Codes as int8 (K, N), scales (N,) or (1,), and zero points."""
    codes, zero_points = np.asarray(matrix.codes()), matrix.zero_points()
    zero = np.zeros((), np.int8)
    if zero_points is not None:
        # 128 less: products of unsigned codes take twice the time.
        codes = (codes.astype(np.int16) - 128).astype(np.int8)
        zero = (np.asarray(zero_points).astype(np.int16).reshape(-1) - 128).astype(np.int8)
    scale = np.asarray(matrix.scale, np.float32).reshape(-1)
    return graph.constant(codes), graph.constant(scale), graph.constant(zero)


def _has_8_bits(leaf: InputQuantizedArray) -> bool:
    """Whether inputs become one of some 256 codes with one scale for a row; seen on a line of numbers."""
    line = jnp.linspace(-1.0, 1.0, 512)[None] * (1.0 if leaf.scale is None else 300 * leaf.scale)
    codes = leaf.inputs.codes(line, (1,), *_parameters(leaf, 2))
    return codes.levels is None and codes.scale.size == 1 and np.ptp(np.asarray(codes.codes()).astype(int)) > 200


def _codes(graph: Graph, leaf: InputQuantizedArray, x: Tensor) -> tuple[str, str, str, str]:
    """Codes of the inputs, their scale, their zero point, and how they were found."""
    if leaf.scale is not None:
        return _static_codes(graph, leaf, x)
    codes, scale, zero_point = graph.ops("DynamicQuantizeLinear", x.name, outputs=3)
    return codes, scale, zero_point, "one range for all rows of an input"


def _static_codes(graph: Graph, leaf: InputQuantizedArray, x: Tensor) -> tuple[str, str, str, str]:
    """`QuantizeLinear` to uint8; signed codes are shifted by 128."""
    scale, zero_point = _parameters(leaf, 1)
    ends = leaf.inputs.codes(jnp.asarray([-1e30, 1e30]), (0,), scale, zero_point)
    shift = 0 if ends.codes().dtype == jnp.uint8 else 128
    least, most = (int(code) + shift for code in np.asarray(ends.codes()))
    zero = shift if zero_point is None else int(np.asarray(zero_point).reshape(())) + shift
    scale_name, zero_name = graph.scalar(np.asarray(scale).reshape(()), np.float32), graph.scalar(zero, np.uint8)
    # Codes that JAX leaves out; not every version has maxima of uint8.
    name = x.name
    if least > 0:
        name = graph.op("Max", name, graph.scalar((least - zero) * np.float32(scale).reshape(()), np.float32))
    if most < 255:
        name = graph.op("Min", name, graph.scalar((most - zero) * np.float32(scale).reshape(()), np.float32))
    codes = graph.op("QuantizeLinear", name, scale_name, zero_name)
    return codes, scale_name, zero_name, "the range that is stored"


def _parameters(leaf: InputQuantizedArray, ndim: int) -> tuple[Any, Any]:
    scale, zero_point = leaf.input_parameters(ndim, ())
    return scale, zero_point
