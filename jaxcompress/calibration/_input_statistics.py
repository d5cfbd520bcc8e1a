"""Sums over the inputs of every leaf, streamed over batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress.calibration._program import Program, RowMask, build
from jaxcompress.calibration._statistics import STATISTICS, Statistic
from jaxcompress.calibration._values import Totals
from jaxcompress.tree import Unselected
from jaxcompress.types import Params, Selector


def input_statistics(
    apply: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    select: Selector | None = None,
    statistics: Sequence[Statistic] = STATISTICS,
    row_mask: RowMask | None = None,
    memory_limit: int | None = None,
) -> Params:
    """What each leaf multiplies: Σ x xᵀ, Σ x², Σ |x|, max |x| and the number of rows x.

    The model runs once over each batch, forward only, compiled once for each shape of a batch; sums stay on the
    device, in float32. A leaf that is used several times (tied, a constant of a scan) adds its uses up; leaves that
    multiply the same rows (query, key, value) share one object. A stack that a scan runs over has one statistic for
    each entry. Of a convolution the rows are its patches; of a table that is looked up, the rows are counted
    (`LookupCounts`). With sharded batches or params the sums are those of the whole batch.

    Args:
        apply: `(params, *inputs) -> outputs`, pure.
        params: plain or compressed leaves.
        batches: tuples of inputs; each is used once. Inputs that are no arrays are static.
        select: which leaves; by default every one that is contracted or looked up.
        statistics: what to gather of contracted leaves; leave "gram" out where memory is short. "histogram" is there
            on request.
        row_mask: `(*inputs) -> weights` of shape (B, L), say, so that padding does not count. It weights rows of shape
            (B, L), (B, L, ...) and (B * L,); rows of shape (B,) count where any token does.
        memory_limit: bytes that all statistics together may take; see `statistics_nbytes`.

    Returns:
        A partial tree with `InputStatistics` or `LookupCounts`.

    Raises:
        ValueError: no batches; nothing selected; a leaf whose inputs are never reached, or got no rows, or NaN or Inf;
            statistics beyond `memory_limit`. Names the leaf, or what to lower.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((2, 3))}
        >>> found = input_statistics(lambda p, x: x @ p["kernel"], params, [(jnp.array([[1.0, -2.0]]),)])
        >>> found["kernel"].gram.tolist(), found["kernel"].absolute_max.tolist(), found["kernel"].count.item()
        ([[1.0, -2.0], [-2.0, 4.0]], [1.0, 2.0], 1.0)
    """
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError("`batches` is empty: statistics need at least one batch.")
    _check_batch(first)
    program = build(apply, params, first, select=select, statistics=statistics, row_mask=row_mask)
    check_memory(program, memory_limit)
    totals = program.zeros()
    for batch in itertools.chain([first], remaining):
        _check_batch(batch)
        totals = program.step(totals, (params,), batch)
    check_totals(program, totals)
    return _tree(program, totals)


def batch_statistics(
    apply: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    select: Selector | None = None,
    statistics: Sequence[Statistic] = STATISTICS,
    row_mask: RowMask | None = None,
) -> Iterator[Params]:
    """`input_statistics` of each batch alone, one after another; compiled once.

    Args:
        apply: as there.
        params: as there.
        batches: as there.
        select: as there.
        statistics: as there.
        row_mask: as there.

    Yields:
        A partial tree for each batch.

    Example:
        >>> import jax.numpy as jnp
        >>> batches = [(jnp.array([[1.0, -2.0]]),), (jnp.array([[3.0, 0.0]]),)]
        >>> found = batch_statistics(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((2, 3))}, batches)
        >>> [entry["kernel"].absolute_max.tolist() for entry in found]
        [[1.0, 2.0], [3.0, 0.0]]
    """
    program = None
    for batch in batches:
        _check_batch(batch)
        if program is None:
            program = build(apply, params, batch, select=select, statistics=statistics, row_mask=row_mask)
        totals = program.step(program.zeros(), (params,), batch)
        check_totals(program, totals)
        yield _tree(program, totals)
    if program is None:
        raise ValueError("`batches` is empty: statistics need at least one batch.")


def statistics_nbytes(
    apply: Callable[..., Any],
    params: Params,
    inputs: tuple[Any, ...],
    *,
    select: Selector | None = None,
    statistics: Sequence[Statistic] = STATISTICS,
) -> dict[str, int]:
    """The bytes that `input_statistics` will hold, by the first leaf of each group that shares them.

    Args:
        apply: as there.
        params: arrays or `jax.ShapeDtypeStruct`.
        inputs: one batch, likewise.
        select: as there.
        statistics: as there.

    Example:
        >>> import jax
        >>> shapes = {"kernel": jax.ShapeDtypeStruct((768, 3072), "float32")}
        >>> x = jax.ShapeDtypeStruct((1, 768), "float32")
        >>> statistics_nbytes(lambda p, x: x @ p["kernel"], shapes, (x,), statistics=("gram",))
        {'kernel': 2359300}
    """
    program = build(apply, params, inputs, select=select, statistics=statistics, row_mask=None)
    return _nbytes(program)


def check_memory(program: Program, limit: int | None) -> None:
    """Raises when the statistics are larger than `limit` bytes."""
    sizes = _nbytes(program)
    total = sum(sizes.values())
    if limit is None or total <= limit:
        return
    largest = max(sizes, key=lambda path: sizes[path])
    raise ValueError(
        f"The statistics would take {total} bytes, `memory_limit` is {limit}; the largest are those of {largest!r}, "
        f"{sizes[largest]} bytes. Give fewer leaves by `select`, or `statistics` without 'gram' (D x D floats)."
    )


def check_totals(program: Program, totals: Totals, *, only: int | None = None) -> None:
    """Raises when a group got no rows, or rows that are not finite."""
    for place, group in enumerate(program.groups):
        if only is not None and place != only:
            continue
        path = program.leaves[group.leaves[0]][0]
        count = np.asarray(jax.device_get(totals[place].count))
        # An expert that no row reached keeps a count of 0: only a leaf without any rows says nothing.
        if not (count > 0).any():
            raise ValueError(
                f"Leaf {path!r} got no rows of inputs: the batches never reach it, or `row_mask` masks them all."
            )
        for part in jax.tree.leaves(totals[place]):
            if not np.isfinite(jax.device_get(part.sum())):
                raise ValueError(f"The inputs of leaf {path!r} hold NaN or Inf, or their sums overflow.")


def _tree(program: Program, totals: Totals) -> Params:
    found = {number: totals[place] for place, group in enumerate(program.groups) for number in group.leaves}
    return program.tree(found, Unselected)


def _nbytes(program: Program) -> dict[str, int]:
    return {program.leaves[group.leaves[0]][0]: group.nbytes for group in program.groups}


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, tuple):
        raise TypeError(f"Batches are tuples of the model's inputs, got {type(batch).__name__}; write (inputs,).")
