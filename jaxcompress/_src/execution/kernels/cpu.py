"""Products of whole numbers on the CPU, in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.protocol import Multiply
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
