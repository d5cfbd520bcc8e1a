"""Moving compressed arrays about without making them plain. Each function returns None where it cannot."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.additive import AdditiveCodebookArray
from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.codebook import CodebookArray
from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.arrays.n_of_m import NMSparseArray
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.execution.additive import (
    can_unstack_additive,
    reshape_additive,
    slice_additive,
    transpose_additive,
)
from jaxcompress._src.execution.blocks import reshape_data, reshaped_blocks
from jaxcompress._src.trace.origin import reshape_runs
from jaxcompress._src.types import is_compressed

_Coded = (QuantizedArray, CodebookArray)


def transpose(leaf: Any, permutation: Sequence[int]) -> Any:
    """The axes of a compressed (or plain) array in another order."""
    if isinstance(leaf, _Coded):
        data = transpose(leaf.data, permutation)
        data = _dense_codes(leaf, lambda codes: codes.transpose(permutation)) if data is None else data
        moved = _with_parts(leaf, data, lambda part: part.transpose(permutation))
        if not isinstance(moved, QuantizedArray) or moved.partial is None:
            return moved
        axis, size = moved.partial
        return dataclasses.replace(moved, partial=(tuple(permutation).index(axis + leaf.ndim) - leaf.ndim, size))
    if isinstance(leaf, AdditiveCodebookArray):
        return transpose_additive(leaf, permutation, transpose)
    if isinstance(leaf, PackedArray | NMSparseArray):
        axis = tuple(permutation).index(leaf.axis + leaf.ndim) - leaf.ndim
        names = ("data",) if isinstance(leaf, PackedArray) else ("values", "index")
        parts = {name: transpose(getattr(leaf, name), permutation) for name in names}
        return dataclasses.replace(leaf, **parts, axis=axis)
    if isinstance(leaf, LowRankArray):
        permutation = tuple(permutation)
        return with_factors(
            leaf,
            lambda factor: transpose(factor, (*permutation, leaf.ndim)),
            lambda residual: transpose(residual, permutation),
        )
    if isinstance(leaf, InputQuantizedArray):
        stacked = range(_stacked_ndim(leaf))
        fixed = tuple(permutation[: len(stacked)]) == tuple(stacked)
        return _with_weight(leaf, transpose(leaf.weight, permutation)) if fixed else None
    return None if is_compressed(leaf) else leaf.transpose(permutation)


def reshape(leaf: Any, shape: Sequence[int]) -> Any:
    """Another shape; scales must stay blocks of it."""
    if isinstance(leaf, _Coded):
        leaf = _whole_blocks(leaf)
        runs = reshape_runs(leaf.shape, shape)
        sizes = [reshaped_blocks(leaf.shape, shape, part.shape, runs) for part in parameters(leaf)]
        if None in sizes:
            return None
        data = reshape_data(leaf.data, shape, runs)
        data = _dense_codes(leaf, lambda codes: codes.reshape(shape)) if data is None else data
        targets = iter(sizes)
        return _with_parts(leaf, data, lambda part: part.reshape(next(targets)))
    if isinstance(leaf, AdditiveCodebookArray):
        return reshape_additive(leaf, shape)
    if isinstance(leaf, LowRankArray):
        return _reshape_low_rank(leaf, shape)
    if isinstance(leaf, InputQuantizedArray):
        stacked = _stacked_ndim(leaf)
        fixed = tuple(shape[:stacked]) == leaf.shape[:stacked]
        return _with_weight(leaf, reshape(leaf.weight, shape)) if fixed else None
    return None if is_compressed(leaf) else leaf.reshape(shape)


def slice_axis(leaf: Any, axis: int, start: Any, size: int) -> Any:
    """`size` entries along one axis (not negative) from `start`, which may be traced and is not clamped."""
    if isinstance(leaf, _Coded):
        leaf = _whole_blocks(leaf) if _partial_axis(leaf) == axis else leaf
        if not all(_sliceable(part.shape[axis], leaf.shape[axis], start, size) for part in parameters(leaf)):
            return None
        data = slice_axis(leaf.data, axis, start, size)
        data = _dense_codes(leaf, lambda codes: slice_axis(codes, axis, start, size)) if data is None else data
        length = leaf.shape[axis]
        return _with_parts(leaf, data, lambda part: _slice_blocks(part, length, axis, start, size))
    if isinstance(leaf, AdditiveCodebookArray):
        return slice_additive(leaf, axis, start, size, slice_axis)
    if isinstance(leaf, PackedArray | NMSparseArray):
        if axis == leaf.axis + leaf.ndim:
            return None
        return jax.tree.map(lambda part: slice_axis(part, axis, start, size), leaf)
    if isinstance(leaf, LowRankArray):

        def of_part(part: Any) -> Any:
            return part if part.shape[axis] != leaf.shape[axis] else slice_axis(part, axis, start, size)

        return with_factors(leaf, of_part, of_part)
    if isinstance(leaf, InputQuantizedArray):
        moved = leaf
        if axis < _stacked_ndim(leaf):
            parts = {"scale": leaf.scale, "zero_point": leaf.zero_point}
            cut = {name: part if part is None else slice_axis(part, axis, start, size) for name, part in parts.items()}
            moved = dataclasses.replace(leaf, **cut)
        return _with_weight(moved, slice_axis(leaf.weight, axis, start, size))
    return None if is_compressed(leaf) else jax.lax.dynamic_slice_in_dim(leaf, start, size, axis)


def cast(leaf: Any, dtype: Any) -> Any:
    """Another logical dtype, where the cast loses nothing that the leaf's own dtype would have rounded away."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    if isinstance(leaf, (*_Coded, AdditiveCodebookArray)):
        # From bfloat16 to float32 the plain route rounds first: only a narrowing cast of float32 is the same.
        same = leaf.dtype == dtype or leaf.dtype == jnp.float32
        return dataclasses.replace(leaf, dtype=jnp.dtype(dtype)) if same else None
    if isinstance(leaf, SparseArray) and not is_compressed(leaf.values):
        return dataclasses.replace(leaf, values=leaf.values.astype(dtype))
    if isinstance(leaf, LowRankArray) and (leaf.dtype == dtype or leaf.dtype == jnp.float32):
        moved = with_factors(leaf, lambda factor: factor, lambda residual: cast(residual, dtype))
        return None if moved is None else dataclasses.replace(moved, dtype=jnp.dtype(dtype))
    if isinstance(leaf, InputQuantizedArray):
        plain = not is_compressed(leaf.weight)
        return _with_weight(leaf, leaf.weight.astype(dtype) if plain else cast(leaf.weight, dtype))
    return None if is_compressed(leaf) else jnp.asarray(leaf).astype(dtype)


def with_factors(leaf: LowRankArray, move: Callable[[Any], Any], move_residual: Callable[[Any], Any]) -> Any:
    """A low-rank array whose factors and residual are moved; None where one of them cannot be."""
    left, right = move(leaf.left), move(leaf.right)
    residual = None if leaf.residual is None else move_residual(leaf.residual)
    if left is None or right is None or (residual is None) != (leaf.residual is None):
        return None
    return dataclasses.replace(leaf, left=left, right=right, residual=residual)


def can_unstack(leaf: Any) -> bool:
    """Whether slicing every part along its first axis slices the leaf along its first axis."""
    if isinstance(leaf, _Coded):
        parts = parameters(leaf)
        return can_unstack(leaf.data) and all(part.shape[0] == leaf.shape[0] and can_unstack(part) for part in parts)
    if isinstance(leaf, AdditiveCodebookArray):
        return can_unstack_additive(leaf)
    if isinstance(leaf, PackedArray | NMSparseArray):
        return leaf.axis != -leaf.ndim
    if isinstance(leaf, BitmaskSparseArray):
        return leaf.starts.ndim > 1
    if isinstance(leaf, LowRankArray):
        parts = [part for part in (leaf.left, leaf.right, leaf.residual) if part is not None]
        return all(part.shape[0] == leaf.shape[0] and can_unstack(part) for part in parts)
    if isinstance(leaf, InputQuantizedArray):
        return can_unstack(leaf.weight) and (leaf.scale is None or leaf.scale.ndim > 0)
    return not is_compressed(leaf)


def parameters(leaf: QuantizedArray | CodebookArray) -> list[Any]:
    """What has one entry per block, as arrays or abstract ones with the axes of the leaf."""
    if isinstance(leaf, CodebookArray):
        return [jax.ShapeDtypeStruct(leaf.table.shape[:-1], leaf.table.dtype)]
    return [leaf.scale] if leaf.zero_point is None else [leaf.scale, leaf.zero_point]


def _partial_axis(leaf: QuantizedArray | CodebookArray) -> int | None:
    """The axis, not negative, whose last block is shorter."""
    partial = leaf.partial if isinstance(leaf, QuantizedArray) else None
    return None if partial is None else partial[0] + leaf.ndim


def _whole_blocks(leaf: QuantizedArray | CodebookArray) -> QuantizedArray | CodebookArray:
    return leaf.with_whole_blocks() if isinstance(leaf, QuantizedArray) else leaf


def _reshape_low_rank(leaf: LowRankArray, shape: Sequence[int]) -> LowRankArray | None:
    """Axes may be merged and split as long as one factor, or each of them, has all axes of a run."""
    runs = reshape_runs(leaf.shape, shape)

    def move(factor: Any) -> Any:
        sizes = [1] * len(shape)
        for before, after in runs:
            size = math.prod(factor.shape[axis] for axis in before)
            if size == math.prod(leaf.shape[axis] for axis in before):
                for axis in after:
                    sizes[axis] = shape[axis]
            elif any(factor.shape[axis] != 1 for axis in before):
                return None
        return reshape(factor, (*sizes, leaf.rank))

    return with_factors(leaf, move, lambda residual: reshape(residual, shape))


def _with_parts(leaf: Any, data: Any, move: Callable[[Any], Any]) -> Any:
    if data is None:
        return None
    if isinstance(leaf, CodebookArray):
        # The table has one axis more than the leaf, which stays the last.
        return dataclasses.replace(leaf, data=data, table=jax.vmap(move, in_axes=-1, out_axes=-1)(leaf.table))
    scale = move(leaf.scale)
    zero_point = None if leaf.zero_point is None else move(leaf.zero_points())
    return dataclasses.replace(leaf, data=data, scale=scale, zero_point=zero_point)


def _with_weight(leaf: InputQuantizedArray, weight: Any) -> InputQuantizedArray | None:
    return None if weight is None else dataclasses.replace(leaf, weight=weight)


def _stacked_ndim(leaf: InputQuantizedArray) -> int:
    return 0 if leaf.scale is None else leaf.scale.ndim


def _dense_codes(leaf: QuantizedArray | CodebookArray, move: Any) -> Any:
    """The codes as plain integers, moved; None where absent codes must stay distinguishable from code 0."""
    shifted = isinstance(leaf, QuantizedArray) and (leaf.zero_point is not None or leaf.levels is not None)
    if isinstance(leaf.data, SparseArray) and shifted:
        return None
    return move(leaf.codes())


def _sliceable(blocks: int, length: int, start: Any, size: int) -> bool:
    if size == length or blocks in (1, length):
        return True
    block = length // blocks
    return isinstance(start, int) and start % block == 0 and size % block == 0


def _slice_blocks(part: Any, length: int, axis: int, start: Any, size: int) -> Any:
    blocks = part.shape[axis]
    if blocks == 1 or size == length:
        return part
    block = length // blocks
    return slice_axis(part, axis, start // block, size // block)
