"""Compressing leaf by leaf, in execution order: later leaves see what earlier ones became.

The whole model runs for each group of leaves, with its loops as they are: so leaves of any use that has statistics
(experts, convolutions, tables, inside of `while`) take part, and nothing but batches is held. `layer_by_layer` runs a
model once, and holds what lives between its kernels, which must be in plain matmuls.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.calibration.input_statistics import (
    check_finite_totals,
    check_memory,
    check_refused,
    warn_refused,
    without_rows,
)
from jaxcompress._src.calibration.leaf_part import entry_of, with_entry
from jaxcompress._src.calibration.program import Group, Program, RowMask, build
from jaxcompress._src.calibration.statistics import STATISTICS, Statistic, uninformed
from jaxcompress._src.calibration.values import ALL, NONE
from jaxcompress._src.meshes import on_auto_axes, sharded_like
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.paths import entry_name
from jaxcompress._src.tree.unselected import Unselected, is_unselected
from jaxcompress._src.types import Params, Selector, is_compressed, plain

GroupFn = Callable[[Params, Params, Params], tuple[Params, Mapping[str, Any]]]
"""`(params, statistics, layouts) -> (params, info)`, on partial trees that hold one group of leaves."""


def sequential(
    apply: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    fn: GroupFn,
    *,
    select: Selector | None = None,
    statistics: Sequence[Statistic] = STATISTICS,
    row_mask: RowMask | None = None,
    together: Callable[[str], Any] | None = None,
    dense_inputs: bool = False,
    memory_limit: int | None = None,
    strict: bool | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Compresses group after group of leaves that share their inputs; each sees the inputs that it will really get.

    For each group (or for those `together`) the batches run once more, through what has been compressed so far; the
    model is compiled once for each shape of a batch, not once for each group. The entries of a stack that a scan runs
    over are leaves of their own here: layer 0 is done before layer 1 is looked at. An entry that no row reached is
    compressed as if its rows were the unit vectors, where every input counts the same, and a `trace.LeftOutWarning`
    names it.

    On a mesh the statistics lie as those of `input_statistics`, and stacks come back with the sharding that they had.

    Args:
        apply: as for `input_statistics`.
        params: plain leaves, where selected.
        batches: kept in memory, used once for each group.
        fn: called as `fn(params, statistics, layouts)` with partial trees that hold one group, such as
            `lambda p, s, layouts: pruning.sparsegpt(p, s, layouts=layouts, sparsity=0.5)`. It returns a tree of the
            structure of its `params`, and what happened by path. Stack entries come without their stack axes, and
            may go back compressed if the stack axis is the first one.
        select: which leaves; by default every one that is contracted or looked up.
        statistics: what to gather of contracted leaves.
        row_mask: `(*inputs) -> weights` of rows; see `input_statistics`.
        together: path of a group's first leaf -> key. Neighbouring groups of equal keys are gathered in one run of
            the batches, before any of them is compressed: fewer runs, and inputs that are a little out of date.
        dense_inputs: also gather `InputStatistics.cross`, between the inputs in the dense model and those in the
            compressed one; both then run.
        memory_limit: bytes that all statistics together may take.
        strict: what to do with leaves whose inputs cannot be gathered; see `input_statistics`. What is left out stays
            as it is.

    Returns:
        `(params, info)`: `info` has the entries of every call, those of stack entries under `path[i]`.

    Raises:
        ValueError: as for `input_statistics`; `fn` returned another structure, shape or dtype, or compressed stack
            entries that cannot be stacked.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(params, x):
        ...     return x @ params["first"] @ params["second"]
        >>> params = {"first": jnp.ones((2, 2)), "second": jnp.ones((2, 1))}
        >>> seen = []
        >>> def halve(params, statistics, layouts):
        ...     seen.append([float(s.squared_sum.sum()) for s in statistics.values() if s is not jc.tree.Unselected])
        ...     return jax.tree.map(lambda w: w / 2, params), {}
        >>> import jaxcompress as jc
        >>> halved, _ = sequential(apply, params, [(jnp.ones((1, 2)),)], halve)
        >>> seen, halved["second"].tolist()
        ([[2.0], [2.0]], [[0.5], [0.5]])
    """
    all_batches = list(batches)
    if not all_batches:
        raise ValueError("`batches` is empty: statistics need at least one batch.")
    program = build(
        apply, params, all_batches[0], select=select, statistics=statistics, row_mask=row_mask, cross=dense_inputs
    )
    strict = select is not None if strict is None else strict
    check_refused(program.refused, strict=strict or not program.taps)
    check_memory(program, memory_limit)
    progress = _Progress(program, params)
    totals = program.zeros()
    for turns in _runs(program, together):
        active = np.full(len(program.groups), NONE, np.int32)
        for turn in turns:
            active[turn.group] = ALL if turn.entry is None else turn.entry
        trees = (params, progress.running()) if dense_inputs else (progress.running(),)
        for batch in all_batches:
            totals = program.step(totals, trees, batch, active)
        for turn in turns:
            check_finite_totals(program, totals, only=turn.group)
            if turn.entry is not None:
                progress.compress(turn, totals[turn.group], fn)
                continue
            unreached = without_rows(program, totals, only=turn.group)
            check_refused(unreached, strict=strict)
            progress.unreached |= unreached
            if not unreached:
                progress.compress(turn, totals[turn.group], fn)
            # `fn` may have kept the sums, and the next step would donate them.
            totals[turn.group] = program.zero(turn.group)
    check_refused(progress.never_reached(), strict=strict)
    warn_refused(program, params, progress.unreached, select=select, stacklevel=2)
    return progress.result(), progress.info


@dataclasses.dataclass(frozen=True)
class _Turn:
    """One group, or one stack entry of it."""

    group: int
    entry: int | None


def _runs(program: Program, together: Callable[[str], Any] | None) -> Iterator[list[_Turn]]:
    """What each run of the batches gathers."""
    turns = _turns(program)
    if together is None:
        return ([turn] for turn in turns)

    def key(turn: _Turn) -> Any:
        # Entry after entry even where the key is the same: a group has one entry active at a time.
        return turn.entry, together(program.leaves[program.groups[turn.group].leaves[0]][0])

    return (list(run) for _, run in itertools.groupby(turns, key))


def _turns(program: Program) -> list[_Turn]:
    """Groups in execution order; those inside one loop take turns, entry by entry."""
    turns = []
    for number, group in enumerate(program.groups):
        layout, leaf = program.layouts[group.leaves[0]], program.leaves[group.leaves[0]][1]
        if None not in group.place or len(layout.stack_axes) != 1 or layout.groups > 1:
            turns.append((_filled(group, None), number, _Turn(number, None)))
            continue
        for entry in range(leaf.shape[layout.stack_axes[0]]):
            turns.append((_filled(group, entry), number, _Turn(number, entry)))
    return [turn for _, _, turn in sorted(turns, key=lambda item: item[:2])]


def _filled(group: Group, entry: int | None) -> tuple[int, ...]:
    """The place of the first use of a stack entry, with the iterations in which it comes."""
    loops = group.place.count(None)
    first = (0 if entry is None else entry,) * loops
    if entry is not None and group.visits is not None and group.visits.ndim == loops:
        visits = np.argwhere(group.visits == entry)
        # One that no iteration gets comes last.
        first = tuple(visits[0].tolist()) if len(visits) else group.visits.shape
    iterations = iter(first)
    return tuple(next(iterations) if part is None else part for part in group.place)


class _Progress:
    """The params on their way, and what has been said about them."""

    def __init__(self, program: Program, params: Params) -> None:
        self.program = program
        self.info: dict[str, Any] = {}
        self.unreached: dict[str, str] = {}
        # What the model runs on, as plain arrays, and what will be returned.
        self._plain = [leaf for _, leaf in program.leaves]
        self._kept = list(self._plain)
        self._entries: dict[int, dict[int, Any]] = {}
        for number in program.taps:
            if is_compressed(self._plain[number]):
                raise ValueError(f"Leaf {program.leaves[number][0]!r} is compressed already; exclude it.")

    def running(self) -> Params:
        return self.program.treedef.unflatten(self._plain)

    def result(self) -> Params:
        for number, entries in self._entries.items():
            leaf = _stacked(self.program.leaves[number][0], entries, len(self._plain[number]))
            self._kept[number] = sharded_like(leaf, self._plain[number])
        return self.program.treedef.unflatten(self._kept)

    def never_reached(self) -> dict[str, str]:
        """The stacks of which no row reached any entry."""
        axes = {n: layout.stack_axes for n, layout in enumerate(self.program.layouts) if n in self.program.taps}
        return {
            path: "no row reached any entry of it"
            for number, (path, leaf) in enumerate(self.program.leaves)
            if number in axes
            and len(axes[number]) == 1
            and all(entry_name(path, entry) in self.unreached for entry in range(leaf.shape[axes[number][0]]))
        }

    def compress(self, turn: _Turn, statistics: Any, fn: GroupFn) -> None:
        program, leaves = self.program, self.program.groups[turn.group].leaves
        layouts = {number: program.layouts[number] for number in leaves}
        params = {number: self._plain[number] for number in leaves}
        if turn.entry is not None:
            statistics = jax.tree.map(lambda part: part[turn.entry], statistics)
            if not float(statistics.count) > 0:
                statistics = uninformed(statistics)
                names = [entry_name(program.leaves[number][0], turn.entry) for number in leaves]
                self.unreached |= dict.fromkeys(names, "no row reached it; its inputs are taken as equal")
            params = {n: entry_of(leaf, ((layouts[n].stack_axes[0], turn.entry),)) for n, leaf in params.items()}
            layouts = {number: layout.entry for number, layout in layouts.items()}
        group = program.tree(params, Unselected)
        sums = program.tree(dict.fromkeys(leaves, statistics), Unselected)
        compressed, info = fn(group, sums, program.tree(layouts, Unselected))
        entries = leaves_with_paths(compressed, is_leaf=lambda leaf: is_unselected(leaf) or is_compressed(leaf))
        for number in leaves:
            path, leaf = entries[number] if len(entries) == len(program.leaves) else (None, None)
            self._put(number, turn.entry, _checked(program.leaves[number][0], path, leaf, params[number]))
        index = () if turn.entry is None else (turn.entry,)
        self.info |= {entry_name(path, *index): entry for path, entry in info.items()}

    def _put(self, number: int, entry: int | None, leaf: Any) -> None:
        if entry is None:
            self._kept[number] = leaf
            self._plain[number] = plain(leaf)
            return
        axis = self.program.layouts[number].stack_axes[0]
        if is_compressed(leaf):
            if axis:
                raise ValueError(
                    f"Entry {entry} of the stack {self.program.leaves[number][0]!r} came back as "
                    f"{type(leaf).__name__}, but its entries lie along axis {axis}: only along axis 0 can they be "
                    "stacked; return plain arrays."
                )
            self._entries.setdefault(number, {})[entry] = leaf
            leaf = leaf.materialize()
        stack = with_entry(self._plain[number], ((axis, entry),), leaf)
        self._plain[number] = self._kept[number] = sharded_like(stack, self._plain[number])


@on_auto_axes
def _stacked(path: str, entries: Mapping[int, Any], length: int) -> Any:
    """Compressed entries as one leaf; their metadata counts axes from the last, and holds for the stack too."""
    parts = [entries[i] for i in sorted(entries)]
    forms = {(jax.tree.structure(part), tuple(x.shape for x in jax.tree.leaves(part))) for part in parts}
    if len(parts) != length or len(forms) > 1:
        raise ValueError(
            f"{len(parts)} of the {length} entries of the stack {path!r} came back compressed, in {len(forms)} "
            "different forms: all must have the same one (type, bits, shapes) to be stacked."
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def _checked(path: str, found_path: str | None, leaf: Any, like: Any) -> Any:
    if found_path != path or is_unselected(leaf):
        raise ValueError(f"`fn` must return a tree of the structure of its params; leaf {path!r} is missing.")
    if leaf.shape != like.shape or leaf.dtype != like.dtype:
        raise ValueError(
            f"`fn` returned leaf {path!r} as {leaf.dtype}{tuple(leaf.shape)}, expected {like.dtype}{tuple(like.shape)}."
        )
    return leaf
