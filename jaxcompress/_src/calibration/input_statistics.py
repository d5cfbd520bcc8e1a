"""Sums over the inputs of every leaf, streamed over batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress._src.calibration.program import Program, RowMask, build
from jaxcompress._src.calibration.statistics import STATISTICS, Statistic
from jaxcompress._src.calibration.values import Totals
from jaxcompress._src.trace.left_out import large_left_out, listed, warn_left_out
from jaxcompress._src.tree.checks import all_finite
from jaxcompress._src.tree.unselected import Unselected
from jaxcompress._src.types import Params, Selector


def input_statistics(
    apply: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    select: Selector | None = None,
    statistics: Sequence[Statistic] = STATISTICS,
    row_mask: RowMask | None = None,
    memory_limit: int | None = None,
    strict: bool | None = None,
) -> Params:
    """What each leaf multiplies: Σ x xᵀ, Σ x², Σ |x|, max |x| and the number of rows x.

    The model runs once over each batch, forward only, compiled once for each shape of a batch; sums stay on the
    device, in float32. A leaf that is used several times (tied, a constant of a scan) adds its uses up; leaves that
    multiply the same rows (query, key, value) in one branch or loop share one object. A stack that a scan runs over,
    or the experts of a ragged matmul, has one statistic for each entry; an entry that no row reached (an expert
    without tokens, a layer whose branch was never taken) counts 0. Of a convolution the rows are its patches; the
    groups of a grouped or depthwise one (`LeafLayout.groups`) have one statistic each, as one more stack axis behind
    the others. Of a table that is looked up, the rows are counted (`LookupCounts`). With sharded batches or params the
    sums are those of the whole batch.

    Some leaves have no such sums: they are contracted over other axes elsewhere (`x @ w` and `y @ w.T`, as gradients
    inside `apply` do), or inside `shard_map`, a kernel or the condition of a loop, or they get no rows at all. Where
    `select` asks for such leaves, one error names all of them; a default selection leaves them out, and one
    `trace.LeftOutWarning` names them, together with large leaves that are used in a way that is not followed.

    Args:
        apply: `(params, *inputs) -> outputs`, pure.
        params: plain or compressed leaves.
        batches: tuples of inputs; each is used once. Inputs that are no arrays are static.
        select: which leaves; by default every one that is contracted or looked up.
        statistics: what to gather of contracted leaves; leave "gram" out where memory is short. "histogram" is there
            on request.
        row_mask: `(*inputs) -> weights` of shape (B, L), say, so that padding does not count. It weights rows of shape
            (B, L), (B, L, ...) and (B * L,); rows of shape (B,) count where any token does. Leaves whose rows it does
            not fit have no statistics; nor do experts of ragged matmuls, whose rows are in an order of their own.
        memory_limit: bytes that all statistics together may take; see `statistics_nbytes`.
        strict: True: a leaf without statistics is an error. False: it is left out, with the warning. None: an error
            with `select`, the warning without.

    Returns:
        A partial tree with `InputStatistics` or `LookupCounts`.

    Raises:
        ValueError: no batches; nothing selected, or nothing that has statistics; selected leaves without statistics
            (see `strict`); NaN or Inf; statistics beyond `memory_limit`. Names the leaves, or what to lower.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((2, 3))}
        >>> kernel = input_statistics(lambda p, x: x @ p["kernel"], params, [(jnp.array([[1.0, -2.0]]),)])["kernel"]
        >>> kernel.gram.tolist(), kernel.absolute_max.tolist(), kernel.count.item()
        ([[1.0, -2.0], [-2.0, 4.0]], [1.0, 2.0], 1.0)
    """
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError("`batches` is empty: statistics need at least one batch.")
    _check_batch(first)
    program = build(apply, params, first, select=select, statistics=statistics, row_mask=row_mask)
    strict = select is not None if strict is None else strict
    check_refused(program.refused, strict=strict or not program.taps)
    check_memory(program, memory_limit)
    totals = program.zeros()
    for batch in itertools.chain([first], remaining):
        _check_batch(batch)
        totals = program.step(totals, (params,), batch)
    unreached = without_rows(program, totals)
    check_refused(unreached, strict=strict or len(unreached) == len(program.taps))
    check_finite_totals(program, totals)
    warn_refused(program, params, unreached, select=select, stacklevel=2)
    return _tree(program, totals, unreached)


def batch_statistics(
    apply: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    *,
    select: Selector | None = None,
    statistics: Sequence[Statistic] = STATISTICS,
    row_mask: RowMask | None = None,
    strict: bool | None = None,
) -> Iterator[Params]:
    """`input_statistics` of each batch alone, one after another; compiled once.

    A leaf that a batch does not reach has a count of 0 there.

    Args:
        apply: `(params, *inputs) -> outputs`, pure.
        params: plain or compressed leaves.
        batches: tuples of inputs.
        select: which leaves; by default every one that is contracted or looked up.
        statistics: what to gather of contracted leaves.
        row_mask: `(*inputs) -> weights` of rows; see `input_statistics`.
        strict: what to do with leaves whose inputs cannot be gathered; see `input_statistics`.

    Yields:
        A partial tree for each batch.

    Raises:
        ValueError: as for `input_statistics`, except for leaves without rows.

    Example:
        >>> import jax.numpy as jnp
        >>> batches = [(jnp.array([[1.0, -2.0]]),), (jnp.array([[3.0, 0.0]]),)]
        >>> statistics = batch_statistics(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((2, 3))}, batches)
        >>> [entry["kernel"].absolute_max.tolist() for entry in statistics]
        [[1.0, 2.0], [3.0, 0.0]]
    """
    program = None
    for batch in batches:
        _check_batch(batch)
        if program is None:
            program = build(apply, params, batch, select=select, statistics=statistics, row_mask=row_mask)
            strict = select is not None if strict is None else strict
            check_refused(program.refused, strict=strict or not program.taps)
            warn_refused(program, params, {}, select=select, stacklevel=2)
        totals = program.step(program.zeros(), (params,), batch)
        check_finite_totals(program, totals)
        yield _tree(program, totals, {})
    if program is None:
        raise ValueError("`batches` is empty: statistics need at least one batch.")


def statistics_nbytes(
    apply: Callable[..., Any],
    params: Params,
    inputs: tuple[Any, ...],
    *,
    select: Selector | None = None,
    statistics: Sequence[Statistic] = STATISTICS,
    strict: bool | None = None,
) -> dict[str, int]:
    """The bytes that `input_statistics` will hold, by the first leaf of each group that shares them.

    Args:
        apply: `(params, *inputs) -> outputs`, pure.
        params: arrays or `jax.ShapeDtypeStruct`.
        inputs: one batch, of arrays or `jax.ShapeDtypeStruct`.
        select: which leaves; by default every one that is contracted or looked up.
        statistics: what to gather of contracted leaves.
        strict: what to do with leaves whose inputs cannot be gathered; see `input_statistics`.

    Raises:
        ValueError: as for `input_statistics`, before any batch is run.

    Example:
        >>> import jax
        >>> shapes = {"kernel": jax.ShapeDtypeStruct((768, 3072), "float32")}
        >>> x = jax.ShapeDtypeStruct((1, 768), "float32")
        >>> statistics_nbytes(lambda p, x: x @ p["kernel"], shapes, (x,), statistics=("gram",))
        {'kernel': 2359300}
    """
    program = build(apply, params, inputs, select=select, statistics=statistics, row_mask=None)
    strict = select is not None if strict is None else strict
    check_refused(program.refused, strict=strict or not program.taps)
    warn_refused(program, params, {}, select=select, stacklevel=2)
    return _nbytes(program)


def check_refused(refused: Mapping[str, str], *, strict: bool) -> None:
    """Raises one error for all leaves that cannot have statistics."""
    if refused and strict:
        raise ValueError(
            f"No input statistics can be gathered of {listed(refused)}\n"
            "Exclude them by `select`, or go on without them by `strict=False`."
        )


def warn_refused(
    program: Program, params: Params, unreached: Mapping[str, str], *, select: Selector | None, stacklevel: int
) -> None:
    """One warning for all leaves that are left out: refused, without rows, or of an unknown use."""
    unknown = large_left_out(params, program.treedef.unflatten(program.layouts)) if select is None else {}
    warn_left_out(
        {**program.refused, **unreached, **unknown},
        "No input statistics are gathered of",
        advice="Name the leaves to gather by `select`; `trace.coverage` lists what the model does with each.",
        stacklevel=stacklevel + 1,
    )


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


def without_rows(program: Program, totals: Totals, *, only: int | None = None) -> dict[str, str]:
    """The leaves that got no rows at all, and what that may mean; single entries of a stack may go without.

    Args:
        program: the model with its taps.
        totals: its sums.
        only: a group to look at; None: all of them.
    """
    reasons = {}
    for place, group in enumerate(program.groups):
        if only in (None, place) and not (np.asarray(jax.device_get(totals[place].count)) > 0).any():
            reason = "it got no rows of inputs: the batches never reach it, or `row_mask` masks them all"
            reasons |= {program.leaves[number][0]: reason for number in group.leaves}
    return reasons


def check_finite_totals(program: Program, totals: Totals, *, only: int | None = None) -> None:
    """Raises when sums are not finite: names the first leaf in execution order, which tells where it begins."""
    for place, group in enumerate(program.groups):
        parts = jax.tree.leaves(totals[place]) if only in (None, place) else []
        if not all(map(all_finite, parts)):
            path = program.leaves[group.leaves[0]][0]
            raise ValueError(f"The inputs of leaf {path!r} hold NaN or Inf, or their sums overflow.")


def _tree(program: Program, totals: Totals, left_out: Mapping[str, str]) -> Params:
    statistics = {
        number: totals[place]
        for place, group in enumerate(program.groups)
        for number in group.leaves
        if program.leaves[number][0] not in left_out
    }
    return program.tree(statistics, Unselected)


def _nbytes(program: Program) -> dict[str, int]:
    return {program.leaves[group.leaves[0]][0]: group.nbytes for group in program.groups}


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, tuple):
        raise TypeError(f"Batches are tuples of the model's inputs, got {type(batch).__name__}; write (inputs,).")
