"""Matmuls with a compressed side: block by block for few tokens, whole for many."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.codebook import CodebookArray
from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.execution.low_rank import dot_low_rank
from jaxcompress._src.execution.rearrange import parameters, slice_axis
from jaxcompress._src.types import is_compressed

# XLA on the CPU writes a widened weight to a temporary at every call. With few tokens that write dominates (12x at one
# token, 4096 x 4096), and blocks that stay in the cache avoid it; with many tokens the matmul dominates, and runs best
# whole. Other backends fuse the widening, and run whole.
_FEW_TOKENS = 16
_BLOCKS = 16
_LARGE = 2**18


def dot_general(left: Any, right: Any, parameters: Mapping[str, Any]) -> jax.Array:
    """`lax.dot_general` where one operand, or both, are compressed."""
    side = 0 if is_compressed(left) else 1
    leaf, other = (left, right) if side == 0 else (right, left)
    other: Any = other.materialize() if is_compressed(other) else other
    if isinstance(leaf, LowRankArray):
        found = dot_low_rank(leaf, other, side, parameters, _dot_of_any)
        return _dot(leaf.materialize(), other, side, parameters) if found is None else found
    axis = _block_axis(leaf, side, other, parameters)
    if axis is None:
        return _dot(leaf.materialize(), other, side, parameters)

    def by_blocks(leaf: Any, other: Any) -> jax.Array:
        return _dot_by_blocks(leaf, axis, other, side, parameters)

    def whole(leaf: Any, other: Any) -> jax.Array:
        return _dot(leaf.materialize(), other, side, parameters)

    return jax.lax.platform_dependent(leaf, other, cpu=by_blocks, default=whole)


def _dot_of_any(left: Any, right: Any, parameters: Mapping[str, Any]) -> jax.Array:
    if is_compressed(left) or is_compressed(right):
        return dot_general(left, right, parameters)
    return jax.lax.dot_general_p.bind(left, right, **parameters)


def _dot(leaf: jax.Array, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> jax.Array:
    left, right = (leaf, other) if side == 0 else (other, leaf)
    return jax.lax.dot_general_p.bind(left, right, **parameters)


def _block_axis(leaf: Any, side: int, other: Any, parameters: Mapping[str, Any]) -> int | None:
    """The output axis of `leaf` to cut into blocks, or None to run whole."""
    contracted, batch = parameters["dimension_numbers"]
    if not isinstance(leaf, QuantizedArray | CodebookArray) or batch[side] or math.prod(leaf.shape) < _LARGE:
        return None
    tokens = other.size // max(math.prod(other.shape[axis] for axis in contracted[1 - side]), 1)
    if tokens > _FEW_TOKENS:
        return None
    free = [axis for axis in range(leaf.ndim) if axis not in contracted[side]]
    fit = [axis for axis in free if leaf.shape[axis] % _BLOCKS == 0 and _can_cut(leaf, axis)]
    return max(fit, key=lambda axis: leaf.shape[axis], default=None)


def _can_cut(leaf: QuantizedArray | CodebookArray, axis: int) -> bool:
    codes = jax.eval_shape(lambda leaf: slice_axis(leaf.data, axis, 0, leaf.shape[axis] // _BLOCKS), leaf)
    return codes is not None and all(part.shape[axis] in (1, leaf.shape[axis]) for part in parameters(leaf))


def _dot_by_blocks(
    leaf: QuantizedArray | CodebookArray, axis: int, other: jax.Array, side: int, parameters: Mapping[str, Any]
) -> jax.Array:
    contracted, _ = parameters["dimension_numbers"]
    size = leaf.shape[axis] // _BLOCKS
    if isinstance(leaf, QuantizedArray):
        # Packed zero points would be unpacked anew, as a whole, for every block.
        leaf = dataclasses.replace(leaf, zero_point=leaf.zero_points())

    def block(start: jax.Array) -> jax.Array:
        return _dot(slice_axis(leaf, axis, start, size).materialize(), other, side, parameters)

    results = jax.lax.map(block, size * jnp.arange(_BLOCKS))
    # The output's axes are the left operand's free axes, then the right one's.
    place = [i for i in range(leaf.ndim) if i not in contracted[side]].index(axis)
    at = place if side == 0 else other.ndim - len(contracted[1 - side]) + place
    results = jnp.moveaxis(results, 0, at)
    return results.reshape(*results.shape[:at], _BLOCKS * size, *results.shape[at + 2 :])
