"""Quantized inputs of a product, as kernels take them."""

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.execution.kernels.kernel import unless
from jaxcompress._src.execution.kernels.matmul import Matmul


def why_not_codes(codes: QuantizedArray, matmul: Matmul) -> str | None:
    """Why these inputs are not one number of 8 bits each with a scale, and perhaps a zero point, for each row.

    Args:
        codes: of the plain operand, or their shapes and dtypes.
        matmul: the product.
    """
    contracted, _ = matmul.parameters["dimension_numbers"]
    shape = list(codes.shape)
    for axis in contracted[1 - matmul.side]:
        shape[axis] = 1
    zeros = codes.zero_point
    return unless(
        (codes.levels is not None, "inputs are not rounded to integers"),
        (
            getattr(codes.data, "dtype", None) != (jnp.int8 if zeros is None else jnp.uint8),
            "codes of inputs are not int8, or uint8 with zero points",
        ),
        (zeros is not None and zeros.dtype != jnp.uint8, "zero points of inputs are no whole numbers"),
        (
            any(count not in (1, size) for count, size in zip(codes.scale.shape, shape, strict=True)),
            "scales of inputs vary along the sums",
        ),
    )


def of_rows(parameter: jax.Array, codes: QuantizedArray, matmul: Matmul) -> jax.Array:
    """Scales or zero points of inputs as (rows, 1).

    Args:
        parameter: with the axes of the inputs, of size 1 or theirs.
        codes: of the plain operand.
        matmul: the product.
    """
    contracted, _ = matmul.parameters["dimension_numbers"]
    axes = tuple(contracted[1 - matmul.side])
    shape = [1 if axis in axes else size for axis, size in enumerate(codes.shape)]
    return jnp.broadcast_to(parameter, shape).reshape(matmul.rows, 1)
