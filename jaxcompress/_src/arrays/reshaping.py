"""Axes, and blocks along them, when an array is reshaped."""

import math
from collections.abc import Sequence


def reshape_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cuts a reshape into the shortest runs of axes with equal products.

    Args:
        old: shape before.
        new: shape after, of the same size.

    Returns:
        Pairs (axes of `old`, axes of `new`); one side is empty for axes of size 1 that come or go.

    Example:
        >>> reshape_runs((2, 6, 5), (12, 1, 5))
        [([0, 1], [0]), ([], [1]), ([2], [2])]
    """
    if math.prod(old) == 0:
        return [(list(range(len(old))), list(range(len(new))))]
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [i][: len(old) - i], [j][: len(new) - j]
        a = old[i] if left else 1
        b = new[j] if right else 1
        if a != b and 1 in (a, b):
            left, right = (left, []) if a == 1 and left else ([], right)
            a = b = 1
        while a != b:
            if a < b:
                left.append(left[-1] + 1)
                a *= old[left[-1]]
            else:
                right.append(right[-1] + 1)
                b *= new[right[-1]]
        runs.append((left, right))
        i, j = i + len(left), j + len(right)
    return runs


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
