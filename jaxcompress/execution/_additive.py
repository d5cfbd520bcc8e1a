"""Moving arrays of additive codebooks about: see `_rearrange`, whose functions for the codes are arguments here.

None stands for what would cut runs apart.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxcompress.arrays import AdditiveCodebookArray, PackedArray
from jaxcompress.execution._blocks import reshape_data, reshaped_blocks
from jaxcompress.trace import reshape_runs


def transpose_additive(
    leaf: AdditiveCodebookArray, permutation: Sequence[int], transpose: Callable[[Any, Sequence[int]], Any]
) -> AdditiveCodebookArray:
    """The axes in another order; those of tables, entries and runs stay the last."""
    ndim = leaf.ndim
    data = transpose(leaf.data, (*permutation, ndim))
    table = leaf.table.transpose(*permutation, ndim, ndim + 1, ndim + 2)
    return dataclasses.replace(leaf, data=data, table=table, axis=tuple(permutation).index(leaf.axis + ndim) - ndim)


def reshape_additive(leaf: AdditiveCodebookArray, shape: Sequence[int]) -> AdditiveCodebookArray | None:
    """Another shape, in which the axis of the runs is one axis as before."""
    *blocks, count, values, length = leaf.table.shape
    runs, at = reshape_runs(leaf.shape, shape), leaf.axis + leaf.ndim
    before, after = next(run for run in runs if at in run[0])
    sizes = reshaped_blocks(leaf.shape, shape, blocks, runs)
    if sizes is None or len(before) != 1 or len(after) != 1:
        return None
    stored = [*shape, count]
    stored[after[0]] = leaf.data.shape[at]
    data = reshape_data(leaf.data, stored, [*runs, ([leaf.ndim], [len(shape)])])
    data = leaf.codes().reshape(stored) if data is None else data
    table = leaf.table.reshape(*sizes, count, values, length)
    return dataclasses.replace(leaf, data=data, table=table, axis=after[0] - len(shape))


def slice_additive(
    leaf: AdditiveCodebookArray, axis: int, start: Any, size: int, slice_axis: Callable[[Any, int, Any, int], Any]
) -> AdditiveCodebookArray | None:
    """Entries along an axis other than that of the runs."""
    if axis == leaf.axis + leaf.ndim:
        return None
    data = slice_axis(leaf.data, axis, start, size)
    data = slice_axis(leaf.codes(), axis, start, size) if data is None else data
    shared = leaf.table.shape[axis] != leaf.shape[axis]
    return dataclasses.replace(
        leaf, data=data, table=leaf.table if shared else slice_axis(leaf.table, axis, start, size)
    )


def can_unstack_additive(leaf: AdditiveCodebookArray) -> bool:
    """Whether slicing every part along its first axis slices the leaf along its first axis."""
    packed = isinstance(leaf.data, PackedArray) and leaf.data.axis == -leaf.data.ndim
    return not packed and leaf.axis != -leaf.ndim and leaf.table.shape[0] == leaf.shape[0]
