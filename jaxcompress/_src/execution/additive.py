"""Moving arrays of additive codebooks about: see `_rearrange`, whose functions for the codes are arguments here.

None stands for what would cut runs apart.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxcompress._src.arrays.additive import AdditiveCodebookArray
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.execution.blocks import reshape_data, reshaped_blocks
from jaxcompress._src.trace.origin import reshape_runs


def transpose_additive(
    leaf: AdditiveCodebookArray, permutation: Sequence[int], transpose: Callable[[Any, Sequence[int]], Any]
) -> AdditiveCodebookArray:
    """The axes in another order; those of tables, entries and runs stay the last."""
    ndim = leaf.ndim
    data = transpose(leaf.data, (*permutation, ndim))
    table = leaf.table.transpose(*permutation, ndim, ndim + 1, ndim + 2)
    scale = None if leaf.scale is None else leaf.scale.transpose(permutation)
    axis = tuple(permutation).index(leaf.axis + ndim) - ndim
    return dataclasses.replace(leaf, data=data, table=table, scale=scale, axis=axis)


def reshape_additive(leaf: AdditiveCodebookArray, shape: Sequence[int]) -> AdditiveCodebookArray | None:
    """Another shape, in which the axis of the runs is one axis as before."""
    *blocks, count, values, length = leaf.table.shape
    runs, at = reshape_runs(leaf.shape, shape), leaf.axis + leaf.ndim
    before, after = next(run for run in runs if at in run[0])
    sizes = reshaped_blocks(leaf.shape, shape, blocks, runs)
    ones = [1] * leaf.ndim
    of_scale = reshaped_blocks(leaf.shape, shape, ones if leaf.scale is None else leaf.scale.shape, runs)
    if sizes is None or of_scale is None or len(before) != 1 or len(after) != 1:
        return None
    stored = [*shape, count]
    stored[after[0]] = leaf.data.shape[at]
    data = reshape_data(leaf.data, stored, [*runs, ([leaf.ndim], [len(shape)])])
    data = leaf.codes().reshape(stored) if data is None else data
    table = leaf.table.reshape(*sizes, count, values, length)
    scale = None if leaf.scale is None else leaf.scale.reshape(of_scale)
    return dataclasses.replace(leaf, data=data, table=table, scale=scale, axis=after[0] - len(shape))


def slice_additive(
    leaf: AdditiveCodebookArray, axis: int, start: Any, size: int, slice_axis: Callable[[Any, int, Any, int], Any]
) -> AdditiveCodebookArray | None:
    """Entries along an axis other than that of the runs."""
    if axis == leaf.axis + leaf.ndim:
        return None
    data = slice_axis(leaf.data, axis, start, size)
    data = slice_axis(leaf.codes(), axis, start, size) if data is None else data
    table, scale = (
        part if part is None or part.shape[axis] != leaf.shape[axis] else slice_axis(part, axis, start, size)
        for part in (leaf.table, leaf.scale)
    )
    return dataclasses.replace(leaf, data=data, table=table, scale=scale)


def can_unstack_additive(leaf: AdditiveCodebookArray) -> bool:
    """Whether slicing every part along its first axis slices the leaf along its first axis."""
    packed = isinstance(leaf.data, PackedArray) and leaf.data.axis == -leaf.data.ndim
    parts = [part for part in (leaf.table, leaf.scale) if part is not None]
    return not packed and leaf.axis != -leaf.ndim and all(part.shape[0] == leaf.shape[0] for part in parts)
