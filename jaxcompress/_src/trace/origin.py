"""Which entries of a parameter a re-arranged value has, and where: exactly, or not at all."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.trace.axis import LONGEST, Axis, merged, split
from jaxcompress._src.trace.axis_rules import axis_runs, even_axes, is_cast
from jaxcompress._src.trace.walk import bind

# An index that no parameter has, whatever is added to it.
_NOWHERE = -(2**60)


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """What the entries of a parameter are multiplied by.

    Attributes:
        even: axes of the value along which it does not change.
        is_mask: of zeros and ones.
        arrays: it, in the shape of the value, for each stream of values; none where nothing is computed.
        number: where it is one number for the whole value, what says which: equal objects for one number. None: it
            may differ from entry to entry.
    """

    even: frozenset[int]
    is_mask: bool = False
    arrays: tuple[Any, ...] = ()
    number: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """A value whose entries are those of one parameter, re-arranged, and perhaps multiplied and added to.

    Attributes:
        leaf: number of the parameter in the flattened tree.
        shape: of the parameter.
        axes: of the value.
        fixed: axis of the parameter -> what is added to the index along it.
        moving: axis of the parameter -> what a loop or a traced index adds to the index along it: the number, or None
            where nothing is computed.
        when: traced conditions under which the value is there at all (one iteration of several); None as above.
        factors: what it is multiplied by.
        gathered: whether indices have chosen the entries of some axis.
        visits: axis of the parameter -> what each iteration of the loops over it adds to the index along it, with one
            axis for each loop, the outer one first; below 0 where the value is not of the parameter.
    """

    leaf: int
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    fixed: Mapping[int, int] = dataclasses.field(default_factory=dict)
    moving: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    when: tuple[Any, ...] = ()
    factors: tuple[Factor, ...] = ()
    gathered: bool = False
    visits: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(leaf: int, shape: Sequence[int]) -> "Origin":
        """The parameter itself."""
        return Origin(leaf, tuple(shape), tuple(Axis(n, {k: np.arange(n)}) for k, n in enumerate(shape)))

    @property
    def is_absent(self) -> bool:
        """Whether no entry is the parameter's, as in a piece of several parameters that another one has filled."""
        return any(axis.present is not None and not axis.present.any() for axis in self.axes)

    def with_axes(self, axes: Sequence[Axis], fixed: Mapping[int, int] | None = None) -> "Origin":
        """The same parameter in other places; `fixed` is added to the index."""
        total = dict(self.fixed)
        for axis, place in (fixed or {}).items():
            total[axis] = total.get(axis, 0) + place
        return dataclasses.replace(self, axes=tuple(axes), fixed=total)

    def whole(self, axes: Sequence[int]) -> tuple[int, ...] | None:
        """The parameter's axes behind some axes of the value, one behind each, in full and in order; None otherwise."""
        numbers = []
        for axis in (self.axes[place] for place in axes):
            if len(axis.tables) != 1 or axis.present is not None:
                return None
            ((number, table),) = axis.tables.items()
            if not np.array_equal(table, np.arange(self.shape[number])):
                return None
            numbers.append(number)
        return None if self.factors or set(numbers) & {*self.fixed, *self.moving} else tuple(numbers)

    def scanned(self, index: Any, *, reverse: bool = False) -> "Origin":
        """What an iteration of a loop over the first axis gets; `index` is None where nothing is computed."""
        axis = self.axes[0]
        moving, visits = dict(self.moving), dict(self.visits)
        for number, table in axis.tables.items():
            _move(moving, number, _looked_up(table, index))
            steps = np.where(axis.mask, table, _NOWHERE)[:: -1 if reverse else 1]
            visits[number] = np.add.outer(visits.get(number, np.zeros((), np.int64)), steps)
        when = self.when if axis.present is None else (*self.when, _looked_up(axis.present, index))
        factors = tuple(
            dataclasses.replace(
                factor, even=_less(factor.even, (0,)), arrays=tuple(_at(array, index) for array in factor.arrays)
            )
            for factor in self.factors
        )
        return dataclasses.replace(self, axes=self.axes[1:], moving=moving, when=when, factors=factors, visits=visits)


def rearrange(eqn: Any, origin: Origin, operands: Sequence[tuple[Any, ...]] = ()) -> Origin | None:
    """The origin of the output of an equation that re-arranges its first input; None if it does something else.

    Args:
        eqn: the equation.
        origin: of its first input.
        operands: for each input, its arrays (one for each stream); empty where nothing is computed.

    Example:
        >>> import jax
        >>> (eqn,) = jax.make_jaxpr(lambda w: w.T)(jnp.ones((2, 3))).eqns
        >>> rearrange(eqn, Origin.of(0, (2, 3))).whole((0, 1))
        (1, 0)
    """
    if is_cast(eqn):
        return origin
    rule = _RULES.get(eqn.primitive.name, _move_axes)
    moved = rule(eqn, origin, operands)
    if moved is None or not origin.factors:
        return moved
    factors = tuple(
        dataclasses.replace(
            factor,
            even=even_axes(eqn, factor.even),
            arrays=tuple(_bound(eqn, array, operands, stream) for stream, array in enumerate(factor.arrays)),
        )
        for factor in origin.factors
    )
    return dataclasses.replace(moved, factors=factors)


def _bound(eqn: Any, array: Any, operands: Sequence[tuple[Any, ...]], stream: int) -> Any:
    """The equation on a factor in the place of its first input."""
    rest = [arrays[stream % len(arrays)] for arrays in operands[1:]]
    return bind(eqn, [array, *rest])[0]


def _move_axes(eqn: Any, origin: Origin, operands: Any) -> Origin | None:
    runs = axis_runs(eqn)
    if runs is None:
        return None
    sizes = eqn.outvars[0].aval.shape
    axes = [Axis(size) for size in sizes]
    fixed: dict[int, int] = {}
    for old, new in runs:
        before = [origin.axes[axis] for axis in old]
        if len(old) == len(new) == 1:
            axes[new[0]] = before[0].spread(sizes[new[0]])
        elif not new:
            for number, place in _fixed(before).items():
                fixed[number] = fixed.get(number, 0) + place
        elif old:
            if math.prod(axis.size for axis in before) > LONGEST:
                return None
            parts = split(merged(before), [sizes[axis] for axis in new])
            if parts is None:
                return None
            for axis, part in zip(new, parts[0], strict=True):
                axes[axis] = part
            fixed |= {number: fixed.get(number, 0) + place for number, place in parts[1].items()}
    return origin.with_axes(axes, fixed)


def _reverse(eqn: Any, origin: Origin, operands: Any) -> Origin:
    turned = eqn.params["dimensions"]
    return origin.with_axes([a.take(slice(None, None, -1)) if k in turned else a for k, a in enumerate(origin.axes)])


def _slice(eqn: Any, origin: Origin, operands: Any) -> Origin:
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    parts = [slice(*part) for part in zip(starts, stops, strides, strict=True)]
    return origin.with_axes([a if _is_all(p, a) else a.take(p) for p, a in zip(parts, origin.axes, strict=True)])


def _dynamic_slice(eqn: Any, origin: Origin, operands: Sequence[tuple[Any, ...]]) -> Origin | None:
    axes, moving, when = [], dict(origin.moving), list(origin.when)
    for place, (axis, size) in enumerate(zip(origin.axes, eqn.params["slice_sizes"], strict=True)):
        if size == axis.size or not (axis.tables or axis.present is not None):
            axes.append(axis if size == axis.size else Axis(size))
            continue
        index = jnp.clip(operands[1 + place][-1], 0, axis.size - size) if operands else None
        steps = {number: _step(table) for number, table in axis.tables.items()}
        if size > 1 and (None in steps.values() or axis.present is not None):
            return None
        if axis.present is not None:
            when.append(_looked_up(axis.present, index))
        for number, table in axis.tables.items():
            _move(moving, number, _looked_up(table - table[0], index))
        # table[start + i] = table[i] + (table - table[0])[start] for one entry, and for even steps.
        axes.append(Axis(size, {number: table[:size] for number, table in axis.tables.items()}))
    return dataclasses.replace(origin.with_axes(axes), moving=moving, when=tuple(when))


def _fixed(axes: Sequence[Axis]) -> dict[int, int]:
    """What axes of size 1 leave behind when they go."""
    fixed: dict[int, int] = {}
    for axis in axes:
        for number, table in axis.tables.items():
            fixed[number] = fixed.get(number, 0) + int(table[0])
    return fixed


def _is_all(part: slice, axis: Axis) -> bool:
    return part.start == 0 and part.stop == axis.size and part.step == 1


def _step(table: np.ndarray) -> int | None:
    """The step of an index that grows evenly, else None."""
    steps = np.diff(table)
    return int(steps[0]) if len(steps) and (steps == steps[0]).all() else 0 if not len(steps) else None


def _looked_up(table: np.ndarray, index: Any) -> Any:
    """`table[index]`; the index itself where that is the same, so that equal places are the same object."""
    if index is None:
        return None
    if table.dtype != bool and np.array_equal(table, np.arange(len(table))):
        return index
    return jnp.asarray(table if table.dtype == bool else table.astype(np.int32))[index]


def _move(moving: dict[int, Any], number: int, place: Any) -> None:
    if number not in moving:
        moving[number] = place
    else:
        moving[number] = None if place is None else moving[number] + place


def _at(array: Any, index: Any) -> Any:
    return jnp.asarray(array)[index]


def _less(even: frozenset[int], dropped: Sequence[int]) -> frozenset[int]:
    return frozenset(axis - sum(d < axis for d in dropped) for axis in even if axis not in dropped)


_RULES: dict[str, Callable[[Any, Origin, Sequence[tuple[Any, ...]]], Origin | None]] = {
    "rev": _reverse,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
}
