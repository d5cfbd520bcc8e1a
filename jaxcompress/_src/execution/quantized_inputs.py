"""Matmuls whose inputs are quantized: in whole numbers where both sides are, otherwise on rounded floats."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.arrays.straight_through import straight_through
from jaxcompress._src.execution.matmul import dot_general
from jaxcompress._src.types import is_compressed

_LARGEST_SUM = 2**31 - 1
"""What int32 holds. Sums on the way there may wrap around, because later ones take that back."""


def dot_of_quantized_inputs(left: Any, right: Any, parameters: Mapping[str, Any]) -> jax.Array:
    """`lax.dot_general` where an operand is an `InputQuantizedArray`.

    Integer codes on both sides, with one scale along the summed axes, are multiplied as int8 x int8 -> int32, which is
    exact; the result is scaled once. The derivatives are those of the matmul of rounded floats.
    """
    side = 0 if isinstance(left, InputQuantizedArray) else 1
    leaf, other = (left, right) if side == 0 else (right, left)
    other: Any = other.materialize() if is_compressed(other) else other
    contracted, batch = parameters["dimension_numbers"]
    arguments = (other, contracted[1 - side], *leaf.input_parameters(other.ndim, batch[1 - side]))
    rounded = leaf.inputs.rounded(*arguments)
    weight: Any = leaf.weight
    operands = (weight, rounded) if side == 0 else (rounded, weight)
    if not is_compressed(leaf.weight):
        return jax.lax.dot_general_p.bind(*operands, **parameters)
    result = dot_general(*operands, parameters)
    codes = leaf.inputs.codes(*arguments)
    sides = (weight, contracted[side]), (codes, contracted[1 - side])
    if not (all(_is_whole(*part) for part in sides) and _fits(weight, codes, contracted[side])):
        return result
    # Without differentiation the float matmul has no use, and the compiler drops it.
    return straight_through(_whole_dot(weight, codes, side, parameters).astype(result.dtype), result)


def _is_whole(array: Any, axes: Sequence[int]) -> bool:
    """Whether the codes are integers with one scale and one zero point along the summed axes."""
    if not isinstance(array, QuantizedArray) or array.levels is not None:
        return False
    if isinstance(array.data, SparseArray) and array.zero_point is not None:
        return False
    if array.zero_point is not None and jnp.issubdtype(array.zero_point.dtype, jnp.floating):
        return False
    scales = all(count in (1, size) for count, size in zip(array.scale.shape, array.shape, strict=True))
    return scales and all(array.scale.shape[axis] == 1 for axis in axes)


def _fits(weight: QuantizedArray, codes: QuantizedArray, axes: Sequence[int]) -> bool:
    """Whether int32 holds the sum of the largest products, along these axes of the weight."""
    terms = math.prod(weight.shape[axis] for axis in axes)
    return terms * _largest(weight) * _largest(codes) <= _LARGEST_SUM


def _largest(array: QuantizedArray) -> int:
    """The largest magnitude of a code less its zero point."""
    return 2 ** (array.bits - 1) if array.zero_point is None else 255


def _whole_dot(weight: QuantizedArray, codes: QuantizedArray, side: int, parameters: Mapping[str, Any]) -> jax.Array:
    """Σ (a - z)(b - y) = Σ ab - z Σb - y Σa + n z y, times both scales."""
    first, second = (weight, codes) if side == 0 else (codes, weight)
    numbers = parameters["dimension_numbers"]
    (a, z), (b, y) = _centred(first), _centred(second)
    total = jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.int32)

    def placed(part: jax.Array, side: int) -> jax.Array:
        return _in_output(part, side, numbers, (a.ndim, b.ndim))

    def summed(codes: jax.Array, side: int) -> jax.Array:
        return placed(codes.sum(axis=numbers[0][side], keepdims=True, dtype=jnp.int32), side)

    if z is not None:
        total = total - placed(z, 0) * summed(b, 1)
    if y is not None:
        total = total - placed(y, 1) * summed(a, 0)
    if z is not None and y is not None:
        terms = math.prod(a.shape[axis] for axis in numbers[0][0])
        total = total + terms * placed(z, 0) * placed(y, 1)
    scales = [placed(array.scale.astype(jnp.float32), at) for at, array in enumerate((first, second))]
    return total.astype(jnp.float32) * scales[0] * scales[1]


def _centred(array: QuantizedArray) -> tuple[jax.Array, jax.Array | None]:
    """The codes as int8, and their zero point as int32."""
    codes = array.codes()
    if codes.dtype == jnp.int8:
        return codes, None
    zero_point = array.zero_points()
    assert zero_point is not None  # unsigned codes have one
    # 128 less: u8 x s8 kernels saturate on some processors.
    return (codes ^ jnp.uint8(128)).view(jnp.int8), zero_point.astype(jnp.int32) - 128


def _in_output(part: jax.Array, side: int, numbers: Any, ndims: tuple[int, int]) -> jax.Array:
    """A scale with size 1 on the summed axes, shaped to broadcast against the output: batch, left, right axes."""
    contracted, batch = numbers
    free = [axis for axis in range(ndims[side]) if axis not in contracted[side] and axis not in batch[side]]
    others = (1,) * (ndims[1 - side] - len(contracted[1 - side]) - len(batch[1 - side]))
    part = part.transpose((*batch[side], *free, *contracted[side]))
    leading, own = part.shape[: len(batch[side])], part.shape[len(batch[side]) : len(batch[side]) + len(free)]
    return part.reshape(*leading, *own, *others) if side == 0 else part.reshape(*leading, *others, *own)
