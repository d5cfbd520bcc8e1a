"""Convolutions with quantized kernels: codes go in, and the scales of the output features multiply what comes out."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray, input_rounded
from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.execution.low_rank import convolve_low_rank
from jaxcompress._src.types import is_compressed


def convolve(x: Any, kernel: Any, eqn: Any) -> jax.Array | None:
    """`lax.conv_general_dilated` of plain inputs with a compressed kernel; any grouping.

    Args:
        x: the inputs.
        kernel: the leaf.
        eqn: the equation of the convolution.

    Returns:
        None where the plain kernel is needed: scales that vary along what is summed over, codebooks, sparse floats.
    """
    if is_compressed(x):
        return None
    if isinstance(kernel, LowRankArray):
        return convolve_low_rank(kernel, x, eqn)
    if isinstance(kernel, InputQuantizedArray):
        rounded = input_rounded(kernel, x, (eqn.params["dimension_numbers"].lhs_spec[1],))
        if not is_compressed(kernel.weight):
            return eqn.primitive.bind(rounded, kernel.weight, **eqn.params)
        return convolve(rounded, kernel.weight, eqn)
    return _convolve_codes(x, kernel, eqn) if isinstance(kernel, QuantizedArray) else None


def _convolve_codes(x: jax.Array, kernel: QuantizedArray, eqn: Any) -> jax.Array | None:
    # Whole floats, which float32 and bfloat16 hold exactly; sums of them exceed float16.
    if x.dtype not in (jnp.float32, jnp.bfloat16) or not _scaled_by_output(kernel, eqn):
        return None

    def plain(x: jax.Array, kernel: QuantizedArray) -> jax.Array:
        return eqn.primitive.bind(x, kernel.materialize().astype(x.dtype), **eqn.params)

    def scaled(x: jax.Array, kernel: QuantizedArray) -> jax.Array:
        return _scaled(x, kernel, eqn)

    # XLA on the CPU writes the operands of a convolution out, and its result before the scales: it is to pass over the
    # smaller of the two. Other backends multiply in the epilogue.
    if eqn.outvars[0].aval.size > kernel.size:
        return jax.lax.platform_dependent(x, kernel, cpu=plain, default=scaled)
    return scaled(x, kernel)


def _scaled(x: jax.Array, kernel: QuantizedArray, eqn: Any) -> jax.Array:
    values, zero_point = kernel.codes(), kernel.zero_points()
    if kernel.levels is not None:
        values = jnp.asarray(kernel.levels, jnp.float32)[values.astype(jnp.int32)]
    values = values.astype(jnp.float32) if zero_point is None else values - zero_point.astype(jnp.float32)
    total = eqn.primitive.bind(x, values.astype(x.dtype), **eqn.params)
    shape = [1] * total.ndim
    shape[eqn.params["dimension_numbers"].out_spec[1]] = kernel.scale.size
    return (total.astype(jnp.float32) * kernel.scale.astype(jnp.float32).reshape(shape)).astype(total.dtype)


def _scaled_by_output(kernel: QuantizedArray, eqn: Any) -> bool:
    """Whether all weights of an output feature share a scale, and code 0 of a sparse kernel stands for 0."""
    shifted = kernel.zero_point is not None or kernel.levels is not None
    if kernel.partial is not None or (isinstance(kernel.data, SparseArray) and shifted):
        return False
    counts, output = list(kernel.scale.shape), eqn.params["dimension_numbers"].rhs_spec[0]
    return counts.pop(output) in (1, kernel.shape[output]) and all(count == 1 for count in counts)
