"""The interpreter: a model's jaxpr, evaluated forward, with the statistics of tapped leaves summed up on the way.

Sums travel through loops as part of their carry, so that `scan` and `while` need no derivative, no activation is stored
for a backward pass, and maxima are as easy as sums.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.calibration._rows import Rows, row_weights, rows_of_conv, rows_of_dot
from jaxcompress.calibration._statistics import (
    InputStatistics,
    LookupCounts,
    Statistics,
    add_at,
    add_statistics,
    statistics_of,
)
from jaxcompress.trace import Body, LeafLayout, Origin, as_body, called_body, rearrange, walk

Totals = dict[int, Statistics]
"""Number of a group of leaves that share their inputs -> what has been summed up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tap:
    """A leaf whose inputs are gathered.

    Attributes:
        path: of the leaf.
        layout: of the leaf.
        width: number of its input features.
        group: where the sums go; None when another leaf of the group gathers them.
    """

    path: str
    layout: LeafLayout
    width: int
    group: int | None


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a tapped leaf meets its input.

    Attributes:
        leaf: number of the leaf.
        place: of the equation: (position,), inside a loop (position, iteration, position, ...). Loops over stack
            entries write None for the iteration.
        signature: two leaves used once each, of the same input and with the same signature, share their rows.
    """

    leaf: int
    place: tuple[int | None, ...]
    signature: Any


@dataclasses.dataclass(frozen=True)
class Value:
    """What the walk carries.

    Attributes:
        streams: the array in the dense model and in the current one; one entry where they are the same.
        origin: set for re-arrangements of a tapped leaf.
        at: (leaf axis, first entry) for axes of the leaf that were sliced.
    """

    streams: tuple[Any, ...]
    origin: Origin | None = None
    at: tuple[tuple[int, Any], ...] = ()

    @property
    def last(self) -> Any:
        """The array in the current model."""
        return self.streams[-1]

    def plain(self) -> "Value":
        """The same array, no leaf any more."""
        return Value(self.streams)


@dataclasses.dataclass
class Interpreter:
    """Evaluates equations; holds the sums.

    Attributes:
        taps: leaf number -> tap.
        totals: the sums so far.
        mask: weights of rows, or None.
        active: None: every group is gathered. Otherwise a traced pair (group, stack entry or -1): that one only.
        count: number of streams, 1 or 2.
        note: told about every use.
    """

    taps: Mapping[int, Tap]
    totals: Totals
    mask: Any = None
    active: tuple[Any, Any] | None = None
    count: int = 1
    note: Callable[[Use], None] = lambda use: None
    place: tuple[int | None, ...] = (0,)

    def run(self, body: Body, values: Sequence[Value]) -> list[Value]:
        """Evaluates a body."""
        return [_value(value) for value in walk(body, values, self.visit)]

    def visit(self, eqn: Any, values: list[Any]) -> Sequence[Value]:
        """Evaluates one equation."""
        self.place = (*self.place[:-1], _next(self.place[-1]))
        values = [_value(value) for value in values]
        if not any(value.origin for value in values):
            return _bind(eqn, values)
        name = eqn.primitive.name
        if name in _HANDLERS:
            return _HANDLERS[name](self, eqn, values)
        if name in _INLINED and (body := called_body(eqn)) is not None:
            return walk(body, values, self.visit)
        if values[0].origin is not None and (moved := _rearranged(eqn, values)) is not None:
            return [moved]
        return _bind(eqn, values)

    def gather(self, leaf: Value, rows: Rows, matrices: Callable[[], list[jax.Array]]) -> None:
        """Adds the rows that a leaf multiplies to its sums."""
        assert leaf.origin is not None  # callers look first
        tap = self.taps[leaf.origin.leaf]
        starts, sizes = _box(leaf, rows, tap.layout)
        weights = row_weights(self.mask, rows.row_shape)
        self.note(Use(leaf.origin.leaf, self.place, (rows, tap.layout.stack_axes, tuple(map(_static, starts)))))
        if tap.group is None:
            return

        def add(total: InputStatistics) -> InputStatistics:
            found = [rows.matrix(x) for x in matrices()]
            more = statistics_of(found[-1], weights, total, dense=found[0])
            boxed = jax.tree.map(lambda part: part.reshape(*sizes, *part.shape[len(rows.stack_shape) :]), more)
            return add_at(total, boxed, starts, sizes)

        self._add(tap.group, starts, add)

    def look_up(self, leaf: Value, ids: jax.Array) -> None:
        """Counts the rows of a table that are looked up."""
        assert leaf.origin is not None  # callers look first
        tap = self.taps[leaf.origin.leaf]
        self.note(Use(leaf.origin.leaf, self.place, None))
        if tap.group is None:
            return
        weights = row_weights(self.mask, ids.shape)
        weights = jnp.ones(ids.size, jnp.float32) if weights is None else weights

        def add(total: LookupCounts) -> LookupCounts:
            rows = jnp.zeros_like(total.rows).at[ids.reshape(-1)].add(weights, mode="drop")
            return add_statistics(total, LookupCounts(count=weights.sum(), rows=rows))

        self._add(tap.group, (), add)

    def _add(self, group: int, starts: Sequence[Any], add: Callable[[Any], Any]) -> None:
        if self.active is None:
            self.totals[group] = add(self.totals[group])
            return
        wanted, entry = self.active
        due = wanted == group
        if len(starts) == 1:
            due &= (entry < 0) | (starts[0] == entry)
        self.totals[group] = jax.lax.cond(due, add, lambda total: total, self.totals[group])


def _next(position: int | None) -> int:
    return 0 if position is None else position + 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Traced:
    """A traced number, equal to itself only."""

    number: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Traced) and other.number is self.number

    def __hash__(self) -> int:
        return id(self.number)


def _static(start: Any) -> Any:
    return start if isinstance(start, int) else _Traced(start)


def _value(value: Any) -> Value:
    return value if isinstance(value, Value) else Value((value,))


def _bind(eqn: Any, values: Sequence[Value]) -> list[Value]:
    """The equation as it stands, once for each stream."""
    count = max((len(value.streams) for value in values), default=1)
    results = []
    for stream in range(count):
        operands = [value.streams[stream % len(value.streams)] for value in values]
        with eqn.ctx.manager:
            found = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        results.append(list(found) if eqn.primitive.multiple_results else [found])
    return [Value(streams) for streams in zip(*results, strict=True)]


def _rearranged(eqn: Any, values: list[Value]) -> Value | None:
    leaf = values[0]
    assert leaf.origin is not None  # the caller looked
    origin = rearrange(eqn, leaf.origin)
    if origin is None:
        return None
    at = dict(leaf.at)
    for axis, start in _slices(eqn, values):
        axes = leaf.origin.axes[axis]
        if start is None or len(axes) > 1:
            return None
        if axes:
            at[axes[0]] = at[axes[0]] + start if axes[0] in at else start
    return Value(_bind(eqn, values)[0].streams, origin, tuple(at.items()))


def _slices(eqn: Any, values: list[Value]) -> list[tuple[int, Any]]:
    """(axis, first entry) of the axes that an equation cuts; the entry is None for cuts that skip."""
    whole, cut = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.primitive.name == "slice":
        strides = eqn.params["strides"] or (1,) * len(whole)
        starts = [s if step == 1 else None for s, step in zip(eqn.params["start_indices"], strides, strict=True)]
    elif eqn.primitive.name == "dynamic_slice":
        starts = [jnp.clip(value.last, 0, n - m) for value, n, m in zip(values[1:], whole, cut, strict=True)]
    else:
        return []
    return [(axis, start) for axis, start in enumerate(starts) if cut[axis] != whole[axis]]


def _box(leaf: Value, rows: Rows, layout: LeafLayout) -> tuple[list[Any], list[int]]:
    """Which stack entries the leaf's operand is: first ones and sizes, for each stack axis."""
    at = dict(leaf.at)
    sizes = dict(zip(rows.stack, rows.stack_shape, strict=True))
    missing = [axis for axis in layout.stack_axes if axis not in sizes and axis not in at]
    if missing:
        raise ValueError(f"A contraction runs over the stack axes {missing} of {layout.stack_axes} as if over outputs.")
    return [at.get(axis, 0) for axis in layout.stack_axes], [sizes.get(axis, 1) for axis in layout.stack_axes]


def _dot_general(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    for side in (0, 1):
        leaf, other = values[side], values[1 - side]
        if leaf.origin is not None:
            tap = run.taps[leaf.origin.leaf]
            with _naming(tap):
                shape = eqn.invars[1 - side].aval.shape
                rows = rows_of_dot(eqn.params, side, shape, leaf.origin, tap.layout, tap.width)
                run.gather(leaf, rows, lambda other=other: list(other.streams))
    return _bind(eqn, values)


def _conv(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    leaf, kernel = values[1], eqn.invars[1].aval.shape
    if leaf.origin is not None:
        tap, origin = run.taps[leaf.origin.leaf], leaf.origin
        with _naming(tap):
            found = [rows_of_conv(eqn.params, x, kernel, origin, tap.layout, tap.width) for x in values[0].streams]
            run.gather(leaf, found[0][1], lambda: [patches for patches, _ in found])
    return _bind(eqn, values)


def _gather(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    leaf, numbers = values[0], eqn.params["dimension_numbers"]
    if leaf.origin is None or run.taps[leaf.origin.leaf].layout.kind != "lookup":
        return _bind(eqn, values)
    tap = run.taps[leaf.origin.leaf]
    rows = [axis for axis in numbers.collapsed_slice_dims if axis in numbers.start_index_map]
    with _naming(tap):
        if len(rows) != 1 or tuple(numbers.start_index_map) != tuple(rows) or leaf.at:
            raise ValueError(f"Look-ups are counted along one axis of a whole table, found {numbers}; exclude it.")
        run.look_up(leaf, values[1].last[..., 0])
    return _bind(eqn, values)


def _scan(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    num_consts, num_carry, length = (eqn.params[name] for name in ("num_consts", "num_carry", "length"))
    consts, first = values[:num_consts], values[num_consts : num_consts + num_carry]
    stacked = values[num_consts + num_carry :]
    over_stack = any(value.origin is not None for value in stacked)
    outer = run.place

    def step(state: Any, sliced: Any) -> Any:
        carry, run.totals, i = state
        at = length - 1 - i if eqn.params["reverse"] else i
        run.place = (*outer, None if over_stack else 0, 0)
        inner = [_unstacked(value, streams, at) for value, streams in zip(stacked, sliced, strict=True)]
        results = run.run(as_body(eqn.params["jaxpr"]), [*consts, *map(Value, carry), *inner])
        wide = [_streams(value, run.count) for value in results]
        return (wide[:num_carry], run.totals, i + 1), wide[num_carry:]

    carry = [_streams(value, run.count) for value in first]
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    state = (carry, run.totals, jnp.zeros((), jnp.int32))
    (carry, totals, _), collected = jax.lax.scan(step, state, [value.streams for value in stacked], **options)
    run.totals, run.place = totals, outer
    return [Value(streams) for streams in (*carry, *collected)]


def _while(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    cond_end = eqn.params["cond_nconsts"]
    body_end = cond_end + eqn.params["body_nconsts"]
    outer, totals = run.place, run.totals

    def condition(state: Any) -> Any:
        # Never gathers: a condition is evaluated once more than the body.
        operands = [*(Value((value.last,)) for value in values[:cond_end]), *(Value(s[-1:]) for s in state[0])]
        body = as_body(eqn.params["cond_jaxpr"])
        return _value(walk(body, operands, lambda eqn, values: _bind(eqn, list(map(_value, values))))[0]).last

    def step(state: Any) -> Any:
        carry, run.totals = state
        run.place = (*outer, 0, 0)
        results = run.run(as_body(eqn.params["body_jaxpr"]), [*values[cond_end:body_end], *map(Value, carry)])
        return [_streams(value, run.count) for value in results], run.totals

    carry = [_streams(value, run.count) for value in values[body_end:]]
    carry, totals = jax.lax.while_loop(condition, step, (carry, totals))
    run.totals, run.place = totals, outer
    return [Value(streams) for streams in carry]


def _cond(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    outer, totals = run.place, run.totals

    def branch(number: int) -> Callable[[Any], Any]:
        def evaluate(state: Any) -> Any:
            run.totals = state
            run.place = (*outer, number, 0)
            results = run.run(as_body(eqn.params["branches"][number]), values[1:])
            return [_streams(value, run.count) for value in results], run.totals

        return evaluate

    branches = [branch(number) for number in range(len(eqn.params["branches"]))]
    # With two streams, both follow the current model.
    results, totals = jax.lax.switch(values[0].last, branches, totals)
    run.totals, run.place = totals, outer
    return [Value(tuple(streams)) for streams in results]


_HANDLERS: dict[str, Callable[[Interpreter, Any, list[Value]], list[Value]]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}

# Nothing is differentiated here: functions with derivatives of their own are evaluated like any other.
_INLINED = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
)


def _streams(value: Value, count: int) -> tuple[Any, ...]:
    return tuple(jnp.asarray(value.streams[stream % len(value.streams)]) for stream in range(count))


def _unstacked(value: Value, streams: tuple[Any, ...], at: Any) -> Value:
    """One iteration's slice of a value that a scan runs over."""
    if value.origin is None or len(value.origin.axes[0]) > 1:
        return Value(streams)
    starts = dict(value.at)
    for axis in value.origin.axes[0]:
        starts[axis] = starts[axis] + at if axis in starts else at
    return Value(streams, value.origin.without(0), tuple(starts.items()))


class _naming:  # noqa: N801 (a context manager)
    """Errors carry the leaf's path."""

    def __init__(self, tap: Tap) -> None:
        self.path = tap.path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, err: Any, trace: Any) -> None:
        if err is not None:
            err.add_note(f"at leaf {self.path!r}")
