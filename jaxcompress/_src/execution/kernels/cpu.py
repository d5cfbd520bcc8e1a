"""Products of whole numbers on the CPU, in plain JAX."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.protocol import Multiply
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.straight_through import straight_through
from jaxcompress._src.execution.kernels.kernel import Kernel, unless
from jaxcompress._src.execution.kernels.matmul import Matmul

_FAST_ROWS = 8
"""XLA's int8 product has a fast path from so many rows on; below it takes ten times as long as a float32 one."""


def _why_not_few_rows(matmul: Matmul) -> str | None:
    return unless(
        (not isinstance(matmul.leaf, InputQuantizedArray), "inputs are not quantized"),
        (matmul.rows >= _FAST_ROWS, f"{matmul.rows} rows are enough for XLA's int8 product"),
    )


def _why_not_padded(matmul: Matmul) -> str | None:
    return _why_not_few_rows(matmul) or unless(
        (not matmul.leaf.is_whole_product(matmul.other, matmul.side, matmul.parameters), "scales vary along the sums"),
        (matmul.order != "outputs first", "weights are not stored with outputs first"),
    )


def _padded(matmul: Matmul, multiply: Multiply) -> jax.Array:
    """More rows of zeros."""

    def integer_product(left: jax.Array, right: jax.Array, numbers: Any) -> jax.Array:
        codes = matmul.with_operands(left, right)
        x = jnp.pad(codes.flat_other(), ((0, _FAST_ROWS - matmul.rows), (0, 0)))
        y = jax.lax.dot_general(x, codes.flat_leaf(), (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return codes.unflattened(y[: matmul.rows])

    return matmul.leaf.dot(
        matmul.other, matmul.side, matmul.parameters, multiply=multiply, integer_product=integer_product
    )


def _rounded_floats(matmul: Matmul, multiply: Multiply) -> jax.Array:
    """Rounded inputs times the weight that is stored, as floats."""
    return matmul.leaf.dot(matmul.other, matmul.side, matmul.parameters, multiply=multiply, integer_product=None)


def _why_not_requantized(matmul: Matmul) -> str | None:
    leaf, arguments = matmul.leaf, (matmul.other, matmul.side, matmul.parameters)
    if not isinstance(leaf, InputQuantizedArray):
        return "inputs are not quantized"
    if not isinstance(leaf.weight, QuantizedArray):
        return "weights are no codes with scales"
    if matmul.rows < _FAST_ROWS:
        return f"{matmul.rows} rows: for {_FAST_ROWS} and more"
    if leaf.is_whole_product(*arguments):
        return "sums are exact"
    requantized = jax.eval_shape(lambda: _requantized_leaf(matmul))
    return None if requantized.is_whole_product(*arguments) else "inputs have no one scale along the sums"


def _requantized_leaf(matmul: Matmul) -> InputQuantizedArray:
    """The weight in codes of 8 bits, with one scale for each output."""
    axes = matmul.leaf_axes
    leaf: InputQuantizedArray = matmul.leaf
    weight = leaf.weight.materialize().astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(weight), axis=axes, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    codes = jnp.round(weight / scale).astype(jnp.int8)
    return dataclasses.replace(leaf, weight=QuantizedArray(data=codes, scale=scale, dtype=leaf.weight.dtype))


def _requantized(matmul: Matmul, multiply: Multiply) -> jax.Array:
    arguments = (matmul.other, matmul.side, matmul.parameters)
    # The derivatives are those of the weight as it is.
    plain = matmul.leaf.dot(*arguments, multiply=multiply, integer_product=None)
    return straight_through(_requantized_leaf(matmul).dot(*arguments, multiply=multiply), plain)


INT8_PADDED = Kernel(
    name="int8_padded",
    platform="cpu",
    multiply=_padded,
    why_not=_why_not_padded,
    error="none",
)
ROUNDED_FLOATS = Kernel(
    name="rounded_floats",
    platform="cpu",
    multiply=_rounded_floats,
    why_not=_why_not_few_rows,
    error="the order of float32 sums",
)
REQUANTIZED_INT8 = Kernel(
    name="requantized_int8",
    platform="cpu",
    multiply=_requantized,
    why_not=_why_not_requantized,
    error="weights that are rounded once more, to 8 bits for each output: at most 1/254 of its largest weight",
    default=False,
)
