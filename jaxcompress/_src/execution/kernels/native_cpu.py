"""Products by the compiled kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.protocol import Multiply
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.execution.kernels.kernel import Kernel, unless
from jaxcompress._src.execution.kernels.matmul import Matmul
from jaxcompress._src.execution.kernels.native import library
from jaxcompress._src.execution.kernels.native.matmul import (
    WeightOnlyFormat,
    integer_matmul,
    weight_only_matmul,
    why_not_integer,
    why_not_weight_only,
)

_FEW_ROWS = 16
"""With more, a product of float32 numbers is bound by arithmetic, and widening the weights once costs less."""


def _why_not_float(matmul: Matmul) -> str | None:
    leaf = matmul.leaf
    reason = unless(
        (not isinstance(leaf, QuantizedArray), "weights are no codes with scales, or inputs are quantized"),
        (matmul.rows > _FEW_ROWS, f"{matmul.rows} rows: for up to {_FEW_ROWS}"),
        (matmul.order is None, "the axes of the weight are stacked or mixed"),
    )
    if reason is not None:
        return reason
    flat = jax.eval_shape(matmul.flat_leaf)
    if flat is None:
        return "the stored codes are no matrix"
    arguments = _arguments(flat, matmul)
    if isinstance(arguments, str):
        return arguments
    x = jax.eval_shape(matmul.flat_other)
    return why_not_weight_only(x, *arguments, storage=_storage(flat, matmul))


def _arguments(flat: QuantizedArray, matmul: Matmul) -> tuple[Any, ...] | str:
    """Codes, scales and zero points as the kernel takes them, or why it does not."""
    codes = flat.data
    if isinstance(codes, PackedArray):
        axis = -2 if matmul.order == "inputs first" else -1
        if codes.bits != 4:
            return f"codes of {codes.bits} bits are not of 4 or 8"
        if codes.axis != axis:
            return "codes are not packed along the summed axis"
        codes = codes.data
    reason = unless(
        (not hasattr(codes, "dtype") or hasattr(codes, "materialize"), "codes are stored sparsely"),
        (flat.partial is not None, "the last group is shorter"),
        (flat.levels is not None and not isinstance(flat.data, PackedArray), "a table of levels of 8 bits"),
    )
    return reason or (codes, flat.scale, flat.zero_points())


def _storage(flat: QuantizedArray, matmul: Matmul) -> WeightOnlyFormat:
    packed = isinstance(flat.data, PackedArray)
    return WeightOnlyFormat(
        bits=4 if packed else 8,
        signed=flat.data.signed if packed else flat.data.dtype == jnp.int8,
        out_major=matmul.order == "outputs first",
        levels=flat.levels,
    )


def _float(matmul: Matmul, multiply: Multiply) -> jax.Array:
    del multiply
    flat = matmul.flat_leaf()
    arguments = _arguments(flat, matmul)
    y = weight_only_matmul(matmul.flat_other(), *arguments, storage=_storage(flat, matmul))
    return matmul.unflattened(y)


def _why_not_int8(matmul: Matmul) -> str | None:
    leaf = matmul.leaf
    reason = unless(
        (not isinstance(leaf, InputQuantizedArray), "inputs are not quantized"),
        (matmul.order is None, "the axes of the weight are stacked or mixed"),
    )
    if reason is not None:
        return reason
    if not leaf.is_whole_product(matmul.other, matmul.side, matmul.parameters):
        return "scales vary along the sums, or sums exceed int32"
    x, codes = (matmul.rows, matmul.inputs), (matmul.inputs, matmul.outputs)
    out_major = matmul.order == "outputs first"
    shapes = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in (x, codes[::-1] if out_major else codes)]
    return why_not_integer(*shapes, out_major=out_major)


def _int8(matmul: Matmul, multiply: Multiply) -> jax.Array:
    def integer_product(left: jax.Array, right: jax.Array, numbers: Any) -> jax.Array:
        del numbers
        codes = matmul.with_operands(left, right)
        y = integer_matmul(codes.flat_other(), codes.flat_leaf(), out_major=matmul.order == "outputs first")
        return codes.unflattened(y)

    return matmul.leaf.dot(
        matmul.other, matmul.side, matmul.parameters, multiply=multiply, integer_product=integer_product
    )


FLOAT = Kernel(
    name="native_float",
    platform="cpu",
    multiply=_float,
    why_not=_why_not_float,
    error="the order of float32 sums",
    missing=library.why_missing,
)
INT8 = Kernel(
    name="native_int8",
    platform="cpu",
    multiply=_int8,
    why_not=_why_not_int8,
    error="none: sums of whole numbers",
    missing=library.why_missing,
)
