"""Blocks of an array, and its packed codes, when it is reshaped."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.types import is_compressed


def reshape_data(data: Any, shape: Sequence[int], runs: list[tuple[list[int], list[int]]]) -> Any:
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


def reshaped_blocks(
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
