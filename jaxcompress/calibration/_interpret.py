"""The interpreter: a model's jaxpr, evaluated forward, with the statistics of tapped leaves summed up on the way.

Sums travel through loops as part of their carry, so that `scan` and `while` need no derivative, no activation is stored
for a backward pass, and maxima are as easy as sums.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.calibration._control_flow import CONTROL
from jaxcompress.calibration._rows import Rows, row_weights, rows_of_conv, rows_of_dot
from jaxcompress.calibration._statistics import (
    InputStatistics,
    LookupCounts,
    add_at,
    add_statistics,
    statistics_of,
)
from jaxcompress.calibration._values import ALL, NONE, Tap, Totals, Use, Value, as_value, bind
from jaxcompress.meshes import on_auto_axes_as
from jaxcompress.trace import Body, LeafLayout, called_body, rearrange, walk


@dataclasses.dataclass
class Interpreter:
    """Evaluates equations; holds the sums.

    Attributes:
        taps: leaf number -> tap.
        totals: the sums so far.
        mask: weights of rows, or None.
        active: None: every group is gathered. Otherwise, for each group, the stack entry to gather, `ALL` or `NONE`.
        count: number of streams, 1 or 2.
        note: told about every use.
        refuse: told the number of a leaf whose inputs cannot be gathered, and why; None: that is an error.
    """

    taps: Mapping[int, Tap]
    totals: Totals
    mask: Any = None
    active: Any = None
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
        if not any(value.origin for value in values):
            return bind(eqn, values)
        name = eqn.primitive.name
        if name in _HANDLERS:
            return _HANDLERS[name](self, eqn, values)
        if name in _INLINED and (body := called_body(eqn)) is not None:
            return walk(body, values, self.visit)
        if values[0].origin is not None and (moved := _rearranged(eqn, values)) is not None:
            return [moved]
        self.lose(values, f"it goes into `{name}`, beyond which its inputs are not followed")
        return bind(eqn, values)

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

    def lose(self, values: Sequence[Value], reason: str) -> None:
        """Refuses contracted leaves that go where they are not followed: rows would be missing from their sums."""
        for value in values:
            if value.origin is None or self.refuse is None:
                continue
            if self.taps[value.origin.leaf].layout.kind != "lookup":
                self.refuse(value.origin.leaf, reason)

    def gather(self, leaf: Value, rows: Rows, matrices: Callable[[], list[jax.Array]]) -> None:
        """Adds the rows that a leaf multiplies to its sums."""
        assert leaf.origin is not None  # callers look first
        tap = self.taps[leaf.origin.leaf]
        starts, sizes = _box(leaf, rows, tap.layout)
        self.note(Use(leaf.origin.leaf, self.place, (rows, tap.layout.stack_axes, tuple(map(_static, starts)))))
        if tap.group is None:
            return

        def add(total: InputStatistics, mask: Any, starts: list[Any], streams: list[jax.Array]) -> InputStatistics:
            weights = row_weights(mask, rows.row_shape)
            found = [rows.matrix(x) for x in streams]
            more = statistics_of(found[-1], weights, total, dense=found[0])
            boxed = jax.tree.map(lambda part: part.reshape(*sizes, *part.shape[len(rows.stack_shape) :]), more)
            return add_at(total, boxed, starts, sizes)

        self._add(tap.group, starts, lambda total: on_auto_axes_as([], add, total, self.mask, starts, matrices()))

    def look_up(self, leaf: Value, ids: jax.Array) -> None:
        """Counts the rows of a table that are looked up."""
        assert leaf.origin is not None  # callers look first
        tap = self.taps[leaf.origin.leaf]
        self.note(Use(leaf.origin.leaf, self.place, None))
        if tap.group is None:
            return

        def add(total: LookupCounts, mask: Any, ids: jax.Array) -> LookupCounts:
            weights = row_weights(mask, ids.shape)
            weights = jnp.ones(ids.size, jnp.float32) if weights is None else weights
            rows = jnp.zeros_like(total.rows).at[ids.reshape(-1)].add(weights, mode="drop")
            return add_statistics(total, LookupCounts(count=weights.sum(), rows=rows))

        self._add(tap.group, (), lambda total: on_auto_axes_as([], add, total, self.mask, ids))

    def _add(self, group: int, starts: Sequence[Any], add: Callable[[Any], Any]) -> None:
        if self.active is None:
            self.totals[group] = add(self.totals[group])
            return
        entry = self.active[group]
        due = entry != NONE
        if len(starts) == 1:
            due &= (entry == ALL) | (starts[0] == entry)
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
    return Value(bind(eqn, values)[0].streams, origin, tuple(at.items()))


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
            with run.tapping(leaf.origin.leaf):
                shape = eqn.invars[1 - side].aval.shape
                rows = rows_of_dot(eqn.params, side, shape, leaf.origin, tap.layout, tap.width)
                run.gather(leaf, rows, lambda other=other: list(other.streams))
    return bind(eqn, values)


def _conv(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    leaf, kernel = values[1], eqn.invars[1].aval.shape
    if leaf.origin is not None:
        tap, origin = run.taps[leaf.origin.leaf], leaf.origin
        with run.tapping(leaf.origin.leaf):
            found = [rows_of_conv(eqn.params, x, kernel, origin, tap.layout, tap.width) for x in values[0].streams]
            run.gather(leaf, found[0][1], lambda: [patches for patches, _ in found])
    run.lose(values[:1], "a convolution slides over it")
    return bind(eqn, values)


def _gather(run: Interpreter, eqn: Any, values: list[Value]) -> list[Value]:
    leaf, numbers = values[0], eqn.params["dimension_numbers"]
    if leaf.origin is None or run.taps[leaf.origin.leaf].layout.kind != "lookup":
        if leaf.origin is not None and run.taps[leaf.origin.leaf].layout.kind != "tied":
            run.lose([leaf], "entries of it are gathered, beyond which its inputs are not followed")
        return bind(eqn, values)
    rows = [axis for axis in numbers.collapsed_slice_dims if axis in numbers.start_index_map]
    with run.tapping(leaf.origin.leaf):
        if len(rows) != 1 or tuple(numbers.start_index_map) != tuple(rows) or leaf.at:
            raise ValueError(f"Look-ups are counted along one axis of a whole table, found {numbers}; exclude it.")
        run.look_up(leaf, values[1].last[..., 0])
    return bind(eqn, values)


_HANDLERS: dict[str, Callable[[Interpreter, Any, list[Value]], list[Value]]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    **CONTROL,
}

# Nothing is differentiated here: functions with derivatives of their own are evaluated like any other.
_INLINED = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
)
