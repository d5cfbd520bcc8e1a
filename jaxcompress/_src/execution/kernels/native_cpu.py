"""Products by the compiled kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.protocol import Multiply
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.execution.kernels.input_codes import of_rows, why_not_codes
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
from jaxcompress._src.execution.kernels.processor import instruction_sets

_FEW_ROWS = {4: 64, 8: 32}
"""By bits. With more rows, a float32 product is bound by arithmetic, and widening the weights once costs less."""

_ROWS_OF_AMX = 8
"""From so many rows on, XLA's integer product takes a third of the float32 one's time on processors with AMX."""

_FLOAT64 = "results are float64, and sums would be float32"


def _is_partly_manual() -> bool:
    """Whether XLA partitions what is traced here along some axes of a mesh; its custom calls do not know the others."""
    kinds = set(jax.sharding.get_abstract_mesh().axis_types)
    return AxisType.Manual in kinds and len(kinds) > 1


def _why_not_float(matmul: Matmul) -> str | None:
    leaf = matmul.leaf
    reason = unless(
        (not isinstance(leaf, QuantizedArray), "weights are no codes with scales, or inputs are quantized"),
        (matmul.order is None, "the axes of the weight are stacked or mixed"),
        (_is_partly_manual(), "in `shard_map` along some axes of the mesh only"),
        (matmul.dtype == jnp.float64, _FLOAT64),
    )
    if reason is not None:
        return reason
    limit = _FEW_ROWS.get(leaf.bits)
    if limit is not None and limit < matmul.rows:
        return f"{matmul.rows} rows: for up to {limit} at {leaf.bits} bits"
    flat = jax.eval_shape(matmul.flat_leaf)
    if flat is None:
        return "the stored codes are no matrix"
    reason = _why_not_stored(flat, matmul)
    if reason is not None:
        return reason
    x, *parts = jax.eval_shape(lambda: (matmul.flat_other(), *_arguments(matmul.flat_leaf())))
    return why_not_weight_only(x, *parts, storage=_storage(flat, matmul))


def _why_not_stored(flat: QuantizedArray, matmul: Matmul) -> str | None:
    packed = flat.data if isinstance(flat.data, PackedArray) else None
    axis = -2 if matmul.order == "inputs first" else -1
    return unless(
        (isinstance(flat.data, SparseArray), "codes are stored sparsely"),
        (packed is not None and packed.bits != 4, f"codes of {flat.bits} bits, not of 4 or 8"),
        (packed is not None and packed.axis != axis, "codes are not packed along the sums"),
        (flat.partial is not None, "the last group is shorter"),
        (flat.levels is not None and packed is None, "a table of levels of 8 bits"),
    )


def _arguments(flat: QuantizedArray) -> tuple[Any, Any, Any]:
    """Codes, scales and zero points as the kernel takes them."""
    codes = flat.data.data if isinstance(flat.data, PackedArray) else flat.data
    return codes, flat.scale, flat.zero_points()


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
    # Sums are float32; they would be rounded to the dtype of `x`, whatever `preferred_element_type` is.
    x = matmul.flat_other().astype(jnp.float32)
    y = weight_only_matmul(x, *_arguments(flat), storage=_storage(flat, matmul))
    return matmul.unflattened(y.astype(matmul.dtype))


def _why_not_int8(matmul: Matmul) -> str | None:
    leaf = matmul.leaf
    reason = unless(
        (not isinstance(leaf, InputQuantizedArray), "inputs are not quantized"),
        (matmul.order is None, "the axes of the weight are stacked or mixed"),
        (_is_partly_manual(), "in `shard_map` along some axes of the mesh only"),
    )
    if reason is not None:
        return reason
    if not leaf.is_whole_product(matmul.other, matmul.side, matmul.parameters):
        return "scales vary along the sums, or sums exceed int32"
    if matmul.rows >= _ROWS_OF_AMX and "amx_int8" in instruction_sets():
        return "XLA multiplies integers by AMX, which these kernels do not use"
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


def _why_not_int8_groups(matmul: Matmul) -> str | None:
    leaf = matmul.leaf
    reason = unless(
        (not isinstance(leaf, InputQuantizedArray), "inputs are not quantized"),
        (matmul.order is None, "the axes of the weight are stacked or mixed"),
        (_is_partly_manual(), "in `shard_map` along some axes of the mesh only"),
        (matmul.dtype == jnp.float64, _FLOAT64),
    )
    if reason is not None:
        return reason
    if leaf.is_whole_product(matmul.other, matmul.side, matmul.parameters):
        return "one scale for all inputs of an output: no groups"
    weight = dataclasses.replace(matmul, leaf=leaf.weight)
    if not isinstance(leaf.weight, QuantizedArray) or leaf.weight.levels is not None:
        return "weights are no integer codes with scales"
    flat = jax.eval_shape(weight.flat_leaf)
    if flat is None:
        return "the stored codes are no matrix"
    reason = _why_not_stored(flat, weight)
    if reason is not None:
        return reason
    if leaf.weight.bits == 8 and matmul.rows > _FEW_ROWS[8] and library.instruction_set() == "avx2":
        return f"8 bits and {matmul.rows} rows by AVX2 alone: the float product is faster"
    codes = jax.eval_shape(lambda x: leaf.input_codes(x, matmul.side, matmul.parameters), matmul.other)
    reason = why_not_codes(codes, matmul)
    if reason is not None:
        return reason
    x = jax.ShapeDtypeStruct((matmul.rows, matmul.inputs), jnp.int8)
    x_zeros = None if codes.zero_point is None else jax.ShapeDtypeStruct((matmul.rows, 1), jnp.int8)
    parts = jax.eval_shape(lambda: _arguments(weight.flat_leaf()))
    return why_not_weight_only(x, *parts, storage=_storage(flat, weight), x_zero_point=x_zeros)


def _int8_groups(matmul: Matmul, multiply: Multiply) -> jax.Array:
    leaf = matmul.leaf

    def coded_product(codes: QuantizedArray) -> jax.Array:
        data, zeros = codes.data, None
        if codes.zero_point is not None:
            # 128 less, so that both are int8.
            data, zeros = ((part ^ jnp.uint8(128)).view(jnp.int8) for part in (data, codes.zero_point))
            zeros = of_rows(zeros, codes, matmul)
        whole = dataclasses.replace(matmul, leaf=leaf.weight, other=data)
        flat = whole.flat_leaf()
        y = weight_only_matmul(whole.flat_other(), *_arguments(flat), storage=_storage(flat, whole), x_zero_point=zeros)
        return matmul.unflattened(y * of_rows(codes.scale.astype(jnp.float32), codes, matmul))

    return leaf.dot(matmul.other, matmul.side, matmul.parameters, multiply=multiply, coded_product=coded_product)


_ERROR = "the order of float32 sums (weights of 16 bits are not rounded to those)"

FLOAT = Kernel(
    name="native_float",
    platform="cpu",
    multiply=_float,
    why_not=_why_not_float,
    error=_ERROR,
    missing=library.why_missing,
)
INT8 = Kernel(
    name="native_int8",
    platform="cpu",
    multiply=_int8,
    why_not=_why_not_int8,
    error="none",
    missing=library.why_missing,
)
INT8_GROUPS = Kernel(
    name="native_int8_groups",
    platform="cpu",
    multiply=_int8_groups,
    why_not=_why_not_int8_groups,
    error=_ERROR,
    missing=library.why_missing,
)
