"""Moving compressed arrays about without making them plain. Each function returns None where it cannot."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays import (
    BitmaskSparseArray,
    CodebookArray,
    NMSparseArray,
    PackedArray,
    QuantizedArray,
    SparseArray,
)
from jaxcompress.trace import reshape_runs
from jaxcompress.types import is_compressed

_Coded = (QuantizedArray, CodebookArray)


def transpose(leaf: Any, permutation: Sequence[int]) -> Any:
    """The axes of a compressed (or plain) array in another order."""
    if isinstance(leaf, _Coded):
        data = transpose(leaf.data, permutation)
        data = _dense_codes(leaf, lambda codes: codes.transpose(permutation)) if data is None else data
        return _with_parts(leaf, data, lambda part: part.transpose(permutation))
    if isinstance(leaf, PackedArray | NMSparseArray):
        axis = tuple(permutation).index(leaf.axis + leaf.ndim) - leaf.ndim
        names = ("data",) if isinstance(leaf, PackedArray) else ("values", "index")
        parts = {name: transpose(getattr(leaf, name), permutation) for name in names}
        return dataclasses.replace(leaf, **parts, axis=axis)
    return None if is_compressed(leaf) else leaf.transpose(permutation)


def reshape(leaf: Any, shape: Sequence[int]) -> Any:
    """Another shape; scales must stay blocks of it."""
    if isinstance(leaf, _Coded):
        runs = reshape_runs(leaf.shape, shape)
        sizes = [_reshaped_blocks(leaf.shape, shape, part.shape, runs) for part in parameters(leaf)]
        if None in sizes:
            return None
        data = _reshape_data(leaf.data, shape, runs)
        data = _dense_codes(leaf, lambda codes: codes.reshape(shape)) if data is None else data
        targets = iter(sizes)
        return _with_parts(leaf, data, lambda part: part.reshape(next(targets)))
    return None if is_compressed(leaf) else leaf.reshape(shape)


def slice_axis(leaf: Any, axis: int, start: Any, size: int) -> Any:
    """`size` entries along one axis (not negative) from `start`, which may be traced and is not clamped."""
    if isinstance(leaf, _Coded):
        if not all(_sliceable(part.shape[axis], leaf.shape[axis], start, size) for part in parameters(leaf)):
            return None
        data = slice_axis(leaf.data, axis, start, size)
        data = _dense_codes(leaf, lambda codes: slice_axis(codes, axis, start, size)) if data is None else data
        length = leaf.shape[axis]
        return _with_parts(leaf, data, lambda part: _slice_blocks(part, length, axis, start, size))
    if isinstance(leaf, PackedArray | NMSparseArray):
        if axis == leaf.axis + leaf.ndim:
            return None
        return jax.tree.map(lambda part: slice_axis(part, axis, start, size), leaf)
    return None if is_compressed(leaf) else jax.lax.dynamic_slice_in_dim(leaf, start, size, axis)


def cast(leaf: Any, dtype: Any) -> Any:
    """Another logical dtype, where the cast loses nothing that the leaf's own dtype would have rounded away."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    if isinstance(leaf, _Coded):
        # From bfloat16 to float32 the plain route rounds first: only a narrowing cast of float32 is the same.
        same = leaf.dtype == dtype or leaf.dtype == jnp.float32
        return dataclasses.replace(leaf, dtype=jnp.dtype(dtype)) if same else None
    if isinstance(leaf, SparseArray) and not is_compressed(leaf.values):
        return dataclasses.replace(leaf, values=leaf.values.astype(dtype))
    return None


def can_unstack(leaf: Any) -> bool:
    """Whether slicing every part along its first axis slices the leaf along its first axis."""
    if isinstance(leaf, _Coded):
        return can_unstack(leaf.data) and all(part.shape[0] == leaf.shape[0] for part in parameters(leaf))
    if isinstance(leaf, PackedArray | NMSparseArray):
        return leaf.axis != -leaf.ndim
    if isinstance(leaf, BitmaskSparseArray):
        return leaf.starts.ndim > 1
    return not is_compressed(leaf)


def parameters(leaf: QuantizedArray | CodebookArray) -> list[Any]:
    """What has one entry per block, as arrays or abstract ones with the axes of the leaf."""
    if isinstance(leaf, CodebookArray):
        return [jax.ShapeDtypeStruct(leaf.table.shape[:-1], leaf.table.dtype)]
    return [leaf.scale] if leaf.zero_point is None else [leaf.scale, leaf.zero_point]


def _with_parts(leaf: Any, data: Any, move: Callable[[Any], Any]) -> Any:
    if data is None:
        return None
    if isinstance(leaf, CodebookArray):
        # The table has one axis more than the leaf, which stays the last.
        return dataclasses.replace(leaf, data=data, table=jax.vmap(move, in_axes=-1, out_axes=-1)(leaf.table))
    scale = move(leaf.scale)
    zero_point = None if leaf.zero_point is None else move(leaf.zero_point)
    return dataclasses.replace(leaf, data=data, scale=scale, zero_point=zero_point)


def _dense_codes(leaf: QuantizedArray | CodebookArray, move: Any) -> Any:
    """The codes as plain integers, moved; None where absent codes must stay distinguishable from code 0."""
    shifted = isinstance(leaf, QuantizedArray) and (leaf.zero_point is not None or leaf.levels is not None)
    if isinstance(leaf.data, SparseArray) and shifted:
        return None
    return move(leaf.codes())


def _reshape_data(data: Any, shape: Sequence[int], runs: list[tuple[list[int], list[int]]]) -> Any:
    """Reshapes codes whose packed axis only changes its place; None if it is split or merged."""
    if not is_compressed(data):
        return data.reshape(shape)
    if not isinstance(data, PackedArray):
        return None
    at = data.axis + data.ndim
    after = next(new for old, new in runs if at in old)
    before = next(old for old, _ in runs if at in old)
    if len(before) != 1 or len(after) != 1:
        return None
    stored = list(shape)
    stored[after[0]] = data.data.shape[at]
    return dataclasses.replace(data, data=data.data.reshape(stored), axis=after[0] - len(shape))


def _reshaped_blocks(
    old: Sequence[int], new: Sequence[int], blocks: Sequence[int], runs: list[tuple[list[int], list[int]]]
) -> list[int] | None:
    """The numbers of blocks per axis after a reshape, or None where blocks would not stay blocks."""
    result = []
    for before, after in runs:
        merged = _merge([(old[axis], blocks[axis]) for axis in before])
        split = None if merged is None else _split(merged[1], [new[axis] for axis in after])
        if split is None:
            return None
        result += split
    return result


def _merge(axes: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Size and blocks of several axes seen as one."""
    size, count = 1, 1
    for n, s in axes:
        # One block of the inner axis lies inside one of the outer ones, or the outer axis is cut into single entries.
        if s != 1 and count != size:
            return None
        size, count = size * n, count * s
    return size, count


def _split(count: int, sizes: list[int]) -> list[int] | None:
    """Blocks per axis when one axis of `count` blocks is split into axes of `sizes`."""
    blocks = []
    for i, size in enumerate(sizes):
        if count % size == 0 and i < len(sizes) - 1:
            blocks.append(size)
            count //= size
        elif size % max(count, 1) == 0:
            blocks.append(count)
            count = 1
        else:
            return None
    return blocks if count == 1 else None


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
