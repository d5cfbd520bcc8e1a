"""The interpreter: a model's jaxpr, evaluated forward, with the statistics of tapped leaves summed up on the way.

Sums travel through loops as part of their carry, so that `scan` and `while` need no derivative, no activation is stored
for a backward pass, and maxima are as easy as sums.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress._src.calibration.control_flow import CONTROL
from jaxcompress._src.calibration.rows import (
    Rows,
    check_mask,
    members,
    row_weights,
    rows_of_conv,
    rows_of_dot,
    rows_of_ragged,
)
from jaxcompress._src.calibration.statistics import (
    InputStatistics,
    LookupCounts,
    add_at,
    add_statistics,
    only_products,
    statistics_of,
    weigh,
)
from jaxcompress._src.calibration.values import ALL, NONE, Tap, Totals, Use, Value, as_value, bind_streams
from jaxcompress._src.meshes import on_auto_axes_as
from jaxcompress._src.trace.axis_rules import is_cast
from jaxcompress._src.trace.contraction import entries, is_by_expert
from jaxcompress._src.trace.facts import Facts, follow
from jaxcompress._src.trace.origin import Origin
from jaxcompress._src.trace.walk import VALUES, Body, called_body, walk


@dataclasses.dataclass
class Interpreter:
    """Evaluates equations; holds the sums.

    Attributes:
        taps: leaf number -> tap.
        totals: the sums so far.
        mask: weights of rows, or None.
        active: None: every group is gathered. Otherwise, for each group, the stack entry to gather, `ALL` or `NONE`.
        shardings: of the sums on a mesh, for each group.
        count: number of streams, 1 or 2.
        note: told about every use.
        refuse: told the number of a leaf whose inputs cannot be gathered, and why; None: that is an error.
    """

    taps: Mapping[int, Tap]
    totals: Totals
    mask: Any = None
    active: Any = None
    shardings: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    count: int = 1
    note: Callable[[Use], None] = lambda use: None
    refuse: Callable[[int, str], None] | None = None
    place: tuple[int | None, ...] = (0,)

    def run(self, body: Body, values: Sequence[Value]) -> list[Value]:
        """Evaluates a body."""
        return [as_value(value) for value in walk(body, values, self.visit)]

    def visit(self, eqn: Any, values: list[Any]) -> Sequence[Value]:
        """Evaluates one equation."""
        self.place = (*self.place[:-1], _next(self.place[-1]))
        values = [as_value(value) for value in values]
        name = eqn.primitive.name
        if name in _HANDLERS and any(value.origins for value in values):
            outputs = _HANDLERS[name](self, eqn, values)
            if outputs is not None:
                return outputs
        if values and all(value.facts.data for value in values) and not is_cast(eqn):
            return bind_streams(eqn, values)
        if name in VALUES and (body := called_body(eqn)) is not None:
            return walk(body, values, self.visit)
        facts = follow(eqn, [value.facts for value in values], [value.streams for value in values])
        followed = {origin.leaf for each in facts for origin in each.origins}.union(*(each.absent for each in facts))
        self.lose(values, f"it goes into `{name}`, beyond which its inputs are not followed", followed)
        source = values[0].identity if is_cast(eqn) else None
        return [
            dataclasses.replace(v, facts=f, source=source)
            for v, f in zip(bind_streams(eqn, values), facts, strict=True)
        ]

    @contextlib.contextmanager
    def tapping(self, leaf: int) -> Iterator[None]:
        """Errors inside are refusals of the leaf, or carry its path."""
        try:
            yield
        except ValueError as err:
            if self.refuse is None:
                err.add_note(f"at leaf {self.taps[leaf].path!r}")
                raise
            self.refuse(leaf, str(err))

    def lose(self, values: Sequence[Value], reason: str, followed: Collection[int] = ()) -> None:
        """Refuses contracted leaves that go where they are not followed: rows would be missing from their sums."""
        for origin in (origin for value in values for origin in value.origins):
            contracted = self.taps[origin.leaf].layout.kind != "lookup"
            if self.refuse is not None and contracted and origin.leaf not in followed:
                self.refuse(origin.leaf, reason)

    def gather(self, origin: Origin, rows: Rows, other: Value, matrices: Callable[[], list[jax.Array]]) -> None:
        """Adds the rows that a leaf multiplies to its sums."""
        tap = self.taps[origin.leaf]
        if self.mask is not None and rows.sizes is not None:
            raise ValueError("its rows are in the order of the experts: which of them `row_mask` means is not known")
        check_mask(self.mask, rows.row_shape)
        signature = rows.signature and (rows.signature, tap.layout.stack_axes)
        self.note(Use(origin.leaf, self.place, signature, rows, other.identity))
        share, first = tap.shares.get(self.place, (1.0, True))
        group = tap.group
        if group is None or not share:
            return

        def summed(like: Any, mask: Any, factors: Any, streams: Any, sizes: Any, multiples: Any) -> InputStatistics:
            weights = row_weights(mask, rows.row_shape)
            streamed = [rows.matrix(jnp.asarray(x), factors, stream) for stream, x in enumerate(streams)]
            if sizes is None:
                more, stacked = statistics_of(streamed[-1], weights, like, dense=streamed[0]), len(rows.stack_shape)
            else:
                # One after another: a copy of the rows for each expert would take that many times their memory.
                runs = members(sizes, math.prod(rows.row_shape))
                more, stacked = jax.lax.map(lambda w: statistics_of(streamed[-1], w, like, dense=streamed[0]), runs), 1
            flat = jax.tree.map(lambda part: part.reshape(len(rows.entries), *part.shape[stacked:]), more)
            if rows.multiples is not None:
                often = [share * rows.multiples.mean_square(multiples, stream) for stream in (0, len(streamed) - 1)]
                flat = weigh(flat, often)
            elif share != 1:
                flat = weigh(flat, (share,))
            return flat if first else only_products(flat)

        def added(total: InputStatistics, only: Any) -> InputStatistics:
            factors = [scale.arrays for scale in rows.scales]
            multiples = () if rows.multiples is None else rows.multiples.arrays
            traced = self.mask, factors, matrices(), rows.sizes, multiples
            shardings = self._shardings(group)
            # Whole, before it is cut like the sums: otherwise devices would be given all rows of a cut of the inputs.
            whole = [NamedSharding(each.mesh, PartitionSpec()) for each in shardings]
            more = on_auto_axes_as(whole, summed, total, *traced)
            return on_auto_axes_as(shardings, add_at, total, more, rows.entries, rows.offset, only)

        self._add(group, rows, added)

    def look_up(self, origin: Origin, table: np.ndarray, ids: jax.Array) -> None:
        """Counts the rows of a table that are looked up; `table` has the leaf's row for each entry of the axis."""
        tap = self.taps[origin.leaf]
        check_mask(self.mask, ids.shape)
        self.note(Use(origin.leaf, self.place, None))
        if tap.group is None:
            return

        def add(total: LookupCounts, mask: Any, ids: jax.Array) -> LookupCounts:
            weights = row_weights(mask, ids.shape)
            weights = jnp.ones(ids.size, jnp.float32) if weights is None else weights
            places = ids.reshape(-1)
            if not np.array_equal(table, np.arange(len(table))):
                places = jnp.asarray(np.where(table < 0, len(total.rows), table))[places]
            rows = jnp.zeros_like(total.rows).at[places].add(weights, mode="drop")
            return add_statistics(total, LookupCounts(count=weights.sum(), rows=rows))

        shardings = self._shardings(tap.group)
        self._add(tap.group, None, lambda total, only: on_auto_axes_as(shardings, add, total, self.mask, ids))

    def _shardings(self, group: int) -> list[NamedSharding]:
        return jax.tree.leaves(self.shardings.get(group))

    def _add(self, group: int, rows: Rows | None, add: Callable[[Any, Any], Any]) -> None:
        due, only = None, None
        if self.active is not None:
            entry = self.active[group]
            due, only = entry != NONE, entry
            if rows is not None and len(rows.entries) == 1 and self.totals[group].count.ndim:
                due &= (entry == ALL) | (rows.entries[0] + rows.offset == entry)
        for condition in () if rows is None else rows.when:
            due = condition if due is None else due & condition
        if due is None:
            self.totals[group] = add(self.totals[group], None)
        else:
            self.totals[group] = jax.lax.cond(due, lambda t: add(t, only), lambda t: t, self.totals[group])


def _next(position: int | None) -> int:
    return 0 if position is None else position + 1


def _dot_general(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    for side in (0, 1):
        other = values[1 - side]
        for origin in values[side].origins:
            tap = run.taps[origin.leaf]
            if origin.gathered and not other.facts.data:
                continue
            with run.tapping(origin.leaf):
                rows = rows_of_dot(eqn.params, side, eqn.invars[1 - side].aval.shape, origin, tap.layout)
                run.gather(origin, rows, other, lambda other=other: list(other.streams))
    return _made(eqn, values)


def _conv(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    kernel = eqn.invars[1].aval.shape
    for origin in values[1].origins:
        tap = run.taps[origin.leaf]
        with run.tapping(origin.leaf):
            windows = [rows_of_conv(eqn.params, x, kernel, origin, tap.layout) for x in values[0].streams]
            run.gather(origin, windows[0][1], values[0], lambda windows=windows: [patches for patches, _ in windows])
    run.lose(values[:1], "a convolution slides over it")
    return _made(eqn, values)


def _ragged_dot(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    x, leaf, sizes = values[:3]
    for origin in leaf.origins if is_by_expert(eqn) else ():
        with run.tapping(origin.leaf):
            layout = run.taps[origin.leaf].layout
            rows = rows_of_ragged(eqn.params, eqn.invars[0].aval.shape, origin, layout, sizes.last)
            run.gather(origin, rows, x, lambda: list(x.streams))
    run.lose([x] if is_by_expert(eqn) else values, "it goes into a ragged matmul, but not as a stack of experts")
    return _made(eqn, values)


def _made(eqn: Any, values: list[Value]) -> list[Value]:
    facts = Facts(data=any(value.facts.data for value in values))
    return [dataclasses.replace(value, facts=facts) for value in bind_streams(eqn, values)]


def _gather(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value] | None:
    numbers = eqn.params["dimension_numbers"]
    if all(run.taps[origin.leaf].layout.kind != "lookup" for origin in values[0].origins):
        (facts,) = follow(eqn, [value.facts for value in values])
        lost = [origin for origin in values[0].origins if run.taps[origin.leaf].layout.kind != "tied"]
        if not facts.origins:
            reason = "entries of it are gathered, beyond which its inputs are not followed"
            run.lose([Value((), Facts(tuple(lost)))], reason)
            return bind_streams(eqn, values)
        return None
    rows = [axis for axis in numbers.collapsed_slice_dims if axis in numbers.start_index_map]
    for origin in values[0].origins:
        with run.tapping(origin.leaf):
            if len(rows) != 1 or tuple(numbers.start_index_map) != tuple(rows) or origin.moving:
                raise ValueError(f"Look-ups are counted along one axis of a whole table, found {numbers}; exclude it.")
            table = entries(origin, rows, run.taps[origin.leaf].layout.output_axes)
            run.look_up(origin, table, values[1].last[..., 0])
    return bind_streams(eqn, values)


_HANDLERS: dict[str, Callable[[Interpreter, Any, list[Value]], list[Value] | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
    "gather": _gather,
    **CONTROL,
}
