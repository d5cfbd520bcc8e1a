"""What is known about a value of a program without computing it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from jaxcompress._src.trace.axis import Axis
from jaxcompress._src.trace.axis_rules import ELEMENTWISE, MOVES, even_axes
from jaxcompress._src.trace.origin import Factor, Origin, rearrange
from jaxcompress._src.trace.walk import bind

Arrays = Sequence[tuple[Any, ...]]
"""For each operand of an equation its array in each stream of values; empty where nothing is computed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """About one value.

    Attributes:
        origins: parameters that it is a linear function of, entry by entry; nothing that depends on inputs has one.
        data: whether it depends on the inputs of the model, as far as is known.
        even: axes along which it does not change.
        constant: makes the array, where it is known before anything runs.
        absent: parameters of which the equation that made the value could have taken entries, and took none.
    """

    origins: tuple[Origin, ...] = ()
    data: bool = True
    even: frozenset[int] = frozenset()
    constant: Callable[[], np.ndarray] | None = None
    absent: frozenset[int] = frozenset()

    def origin_of(self, leaf: int) -> Origin | None:
        """Of one parameter; None if it is not there, or there twice."""
        matching = [origin for origin in self.origins if origin.leaf == leaf]
        return matching[0] if len(matching) == 1 else None


UNKNOWN = Facts()
"""About a value that depends on inputs."""


def facts_of(value: Any) -> Facts:
    """About a literal, or a constant of a program.

    Example:
        >>> facts_of(np.arange(3)).constant().tolist(), facts_of(2.0).data
        ([0, 1, 2], False)
    """
    if isinstance(value, core.Tracer):
        return Facts()
    return Facts(data=False, constant=lambda: np.asarray(value))


def follow(eqn: Any, facts: Sequence[Facts], arrays: Arrays = ()) -> list[Facts]:
    """About the outputs of an equation without a body.

    Args:
        eqn: the equation.
        facts: about its inputs.
        arrays: its inputs, if they are computed.
    """
    if any(each.data for each in facts):
        # A start that depends on inputs chooses an entry; everything else mixes parameters with data.
        followed = facts[0].origins and not facts[0].data and eqn.primitive.name == "dynamic_slice"
        return [Facts(_each(eqn, facts[0], arrays), data=False)] if followed else [Facts() for _ in eqn.outvars]
    even, constant = _even(eqn, facts), _constant(eqn, facts)
    blank = [Facts(data=False, even=even, constant=constant) for _ in eqn.outvars]
    if not any(each.origins for each in facts):
        return blank
    rule = _RULES.get(eqn.primitive.name)
    if rule is not None:
        moved = rule(eqn, facts, arrays)
    else:
        moved = [_each(eqn, facts[0], arrays)] if len(blank) == 1 else [() for _ in blank]
    padded = eqn.primitive.name in ("concatenate", "stack")
    return [_with_origins(each, origins, padded) for each, origins in zip(blank, moved, strict=True)]


def _with_origins(facts: Facts, origins: tuple[Origin, ...], padded: bool) -> Facts:
    present = tuple(origin for origin in origins if not origin.is_absent)
    absent = frozenset(origin.leaf for origin in origins if origin.is_absent)
    return dataclasses.replace(facts, origins=_joined(present, padded), absent=absent)


def _each(eqn: Any, facts: Facts, arrays: Arrays) -> tuple[Origin, ...]:
    moved = [rearrange(eqn, origin, arrays) for origin in facts.origins]
    return tuple(origin for origin in moved if origin is not None)


def _joined(origins: tuple[Origin, ...], padded: bool) -> tuple[Origin, ...]:
    """Pieces of one parameter, side by side, as one; `padded`: their factors are 1 outside of the piece."""
    joined: list[Origin] = []
    for origin in origins:
        for place, other in enumerate(joined):
            if (both := _union(other, origin, padded)) is not None:
                joined[place] = both
                break
        else:
            joined.append(origin)
    return tuple(joined)


def _union(one: Origin, two: Origin, padded: bool) -> Origin | None:
    """Two pieces as one; None where they are not parts of one parameter, apart along one axis."""
    if one.leaf != two.leaf or one.when or two.when or len(one.axes) != len(two.axes):
        return None
    apart = [k for k, (a, b) in enumerate(zip(one.axes, two.axes, strict=True)) if not (a.mask & b.mask).any()]
    if not apart or ((one.factors or two.factors) and not padded) or one.moving.keys() != two.moving.keys():
        return None
    if any(one.moving[number] is not two.moving[number] for number in one.moving):
        return None
    place = apart[0]
    if any(not a.equals(b) for k, (a, b) in enumerate(zip(one.axes, two.axes, strict=True)) if k != place):
        return None
    a, b, tables = one.axes[place], two.axes[place], {}
    fixed = {**one.fixed, **two.fixed}
    for number in {*a.tables, *b.tables, *(k for k in fixed if one.fixed.get(k, 0) != two.fixed.get(k, 0))}:
        first, second = (
            axis.tables.get(number, np.zeros(axis.size, np.int64)) + origin.fixed.get(number, 0)
            for axis, origin in ((a, one), (b, two))
        )
        tables[number] = np.where(a.mask, first, np.where(b.mask, second, 0))
        fixed.pop(number, None)
    present = a.mask | b.mask
    axis = Axis(a.size, tables, None if present.all() else present)
    axes = (*one.axes[:place], axis, *one.axes[place + 1 :])
    factors = _joined_factors(one.factors, two.factors, place)
    gathered = one.gathered or two.gathered
    return dataclasses.replace(one, axes=axes, fixed=fixed, factors=factors, gathered=gathered)


def _joined_factors(one: Sequence[Factor], two: Sequence[Factor], place: int) -> tuple[Factor, ...]:
    """Those of two pieces, each 1 where the other piece is: one number for both stays one."""
    joined, left = [], list(two)
    for factor in one:
        same = next((k for k, f in enumerate(left) if f.number is not None and f.number == factor.number), None)
        if same is None:
            joined.append(dataclasses.replace(factor, even=factor.even - {place}, number=None))
            continue
        other = left.pop(same)
        arrays = tuple(a * b for a, b in zip(factor.arrays, other.arrays, strict=True))
        joined.append(dataclasses.replace(factor, arrays=arrays))
    return (*joined, *(dataclasses.replace(factor, even=factor.even - {place}, number=None) for factor in left))


def _add(eqn: Any, facts: Sequence[Facts], arrays: Arrays) -> list[tuple[Origin, ...]]:
    shape, terms = eqn.outvars[0].aval.shape, []
    for place, each in enumerate(facts):
        origins = [_fitted(origin, shape) for origin in each.origins]
        if eqn.primitive.name == "sub" and place == 1:
            origins = [_times(origin, _minus(arrays), shape) for origin in origins]
        terms += origins
    return [tuple(terms)]


def _negate(eqn: Any, facts: Sequence[Facts], arrays: Arrays) -> list[tuple[Origin, ...]]:
    return [tuple(_times(origin, _minus(arrays), eqn.outvars[0].aval.shape) for origin in facts[0].origins)]


def _multiply(eqn: Any, facts: Sequence[Facts], arrays: Arrays) -> list[tuple[Origin, ...]]:
    shape, products = eqn.outvars[0].aval.shape, []
    both = {origin.leaf for origin in facts[0].origins} & {origin.leaf for origin in facts[1].origins}
    for place in (0, 1):
        other, values = facts[1 - place], arrays[1 - place] if arrays else ()
        if eqn.primitive.name == "div":
            if place == 1:
                break
            values = tuple(1 / jnp.asarray(array) for array in values)
        even = _even_in(other, eqn.invars[1 - place].aval.shape, shape)
        number = object() if all(n == 1 or axis in even for axis, n in enumerate(shape)) else None
        factor = Factor(even, arrays=values, number=number)
        # Of its own square a parameter is no linear function.
        products += [_times(_fitted(o, shape), factor, shape) for o in facts[place].origins if o.leaf not in both]
    return [tuple(products)]


def _select(eqn: Any, facts: Sequence[Facts], arrays: Arrays) -> list[tuple[Origin, ...]]:
    shape, cases = eqn.outvars[0].aval.shape, []
    even = _even_in(facts[0], eqn.invars[0].aval.shape, shape)
    for case, each in enumerate(facts[1:]):
        masks = tuple((jnp.asarray(array) == case).astype(jnp.float32) for array in (arrays[0] if arrays else ()))
        cases += [_times(origin, Factor(even, is_mask=True, arrays=masks), shape) for origin in each.origins]
    return [tuple(cases)]


def _concatenate(eqn: Any, facts: Sequence[Facts], arrays: Arrays) -> list[tuple[Origin, ...]]:
    stacked = eqn.primitive.name == "stack"
    place, shape = int(eqn.params["axis" if stacked else "dimension"]), eqn.outvars[0].aval.shape
    pieces, at = [], 0
    for var, each in zip(eqn.invars, facts, strict=True):
        size = 1 if stacked else var.aval.shape[place]
        pieces += [_placed(origin, place, shape, at, stacked) for origin in each.origins]
        at += size
    return [tuple(pieces)]


def _placed(origin: Origin, place: int, shape: Sequence[int], at: int, new: bool) -> Origin:
    """A piece inside a larger value."""
    axes = list(origin.axes)
    if new:
        axes.insert(place, Axis(1))
    size = axes[place].size
    axes[place] = axes[place].within(shape[place], at)
    factors = []
    for factor in origin.factors:
        even = factor.even
        if new:
            even = frozenset(axis + (axis >= place) for axis in even) | {place}
        arrays = []
        for array in factor.arrays:
            wide = jnp.expand_dims(jnp.asarray(array), place) if new else jnp.asarray(array)
            pads = [(at, shape[place] - at - size) if k == place else (0, 0) for k in range(len(shape))]
            arrays.append(jnp.pad(wide, pads, constant_values=1))
        factors.append(dataclasses.replace(factor, even=even, arrays=tuple(arrays)))
    return dataclasses.replace(origin.with_axes(axes), factors=tuple(factors))


def _pad(eqn: Any, facts: Sequence[Facts], arrays: Arrays) -> list[tuple[Origin, ...]]:
    pieces = []
    for origin in facts[0].origins:
        axes = []
        for axis, (low, high, inner) in zip(origin.axes, eqn.params["padding_config"], strict=True):
            # Where each entry of the output comes from; negative padding cuts.
            places = np.full(axis.size + max(axis.size - 1, 0) * inner, -1)
            places[:: inner + 1] = np.arange(axis.size)
            places = np.concatenate([np.full(max(low, 0), -1), places, np.full(max(high, 0), -1)])
            places = places[max(-low, 0) : len(places) - max(-high, 0)]
            moved = axis.take(np.maximum(places, 0))
            present = moved.mask & (places >= 0)
            axes.append(dataclasses.replace(moved, present=None if present.all() else present))
        factors = []
        for factor in origin.factors:
            config = eqn.params["padding_config"]
            padded = tuple(jax.lax.pad(array, jnp.ones((), array.dtype), config) for array in factor.arrays)
            factors.append(dataclasses.replace(factor, arrays=padded))
        pieces.append(dataclasses.replace(origin.with_axes(axes), factors=tuple(factors)))
    return [tuple(pieces)]


def _split(eqn: Any, facts: Sequence[Facts], arrays: Arrays) -> list[tuple[Origin, ...]]:
    place, outputs, at = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        part, pieces = slice(at, at + size), []
        for origin in facts[0].origins:
            axes = [axis.take(part) if k == place else axis for k, axis in enumerate(origin.axes)]
            factors = tuple(
                dataclasses.replace(
                    f, arrays=tuple(jax.lax.slice_in_dim(a, at, at + size, axis=place) for a in f.arrays)
                )
                for f in origin.factors
            )
            pieces.append(dataclasses.replace(origin.with_axes(axes), factors=factors))
        outputs.append(tuple(pieces))
        at += size
    return outputs


def _gather(eqn: Any, facts: Sequence[Facts], arrays: Arrays) -> list[tuple[Origin, ...]]:
    """Entries along one axis in a known order, `w[order]`."""
    numbers, rank, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.ndim, eqn.invars[0].aval.shape
    rows = tuple(numbers.start_index_map)
    whole = tuple(1 if axis in rows else size for axis, size in enumerate(shape)) == tuple(eqn.params["slice_sizes"])
    batched = getattr(numbers, "operand_batching_dims", ())
    if (
        len(rows) != 1
        or tuple(numbers.collapsed_slice_dims) != rows
        or batched
        or not whole
        or facts[1].constant is None
    ):
        return [()]
    order = facts[1].constant()[..., 0]
    if order.ndim != 1 or (order.size and not (order.min() >= 0 and order.max() < shape[rows[0]])):
        return [()]
    out = next(axis for axis in range(rank) if axis not in numbers.offset_dims)
    pieces = []
    for origin in facts[0].origins:
        axes = [axis for k, axis in enumerate(origin.axes) if k != rows[0]]
        axes.insert(out, origin.axes[rows[0]].take(order))
        factors = []
        for factor in origin.factors:
            moved = tuple(jnp.moveaxis(jnp.take(a, order, axis=rows[0]), rows[0], out) for a in factor.arrays)
            places = [k for k in range(rank) if k != rows[0]]
            places.insert(out, rows[0])
            even = frozenset(k for k, axis in enumerate(places) if axis in factor.even)
            factors.append(dataclasses.replace(factor, even=even, arrays=moved))
        pieces.append(dataclasses.replace(origin.with_axes(axes), factors=tuple(factors), gathered=True))
    return [tuple(pieces)]


def _fitted(origin: Origin, shape: Sequence[int]) -> Origin:
    """An operand of an elementwise equation, whose axes of size 1 are repeated."""
    if not origin.axes:
        even = frozenset(range(len(shape)))
        factors = tuple(_times(origin, factor, shape).factors[-1] for factor in origin.factors)
        factors = tuple(dataclasses.replace(factor, even=even) for factor in factors)
        return dataclasses.replace(origin.with_axes([Axis(size) for size in shape]), factors=factors)
    if all(axis.size == size for axis, size in zip(origin.axes, shape, strict=True)):
        return origin
    factors = tuple(
        dataclasses.replace(
            factor,
            even=factor.even | {k for k, axis in enumerate(origin.axes) if axis.size == 1},
            arrays=tuple(jnp.broadcast_to(array, shape) for array in factor.arrays),
        )
        for factor in origin.factors
    )
    axes = [axis.spread(size) for axis, size in zip(origin.axes, shape, strict=True)]
    return dataclasses.replace(origin.with_axes(axes), factors=factors)


def _times(origin: Origin, factor: Factor, shape: Sequence[int]) -> Origin:
    arrays = tuple(jnp.broadcast_to(jnp.asarray(array), shape) for array in factor.arrays)
    return dataclasses.replace(origin, factors=(*origin.factors, dataclasses.replace(factor, arrays=arrays)))


def _minus(arrays: Arrays) -> Factor:
    return Factor(frozenset(range(64)), arrays=(jnp.float32(-1),) if arrays else (), number=-1)


def _even_in(facts: Facts, sizes: Sequence[int], shape: Sequence[int]) -> frozenset[int]:
    """Where an operand, spread to a shape, does not change."""
    if len(sizes) != len(shape):
        return frozenset(range(len(shape)))
    return facts.even | {axis for axis, size in enumerate(sizes) if size == 1}


def _even(eqn: Any, facts: Sequence[Facts]) -> frozenset[int]:
    """Where the output of an equation does not change."""
    shape = eqn.outvars[0].aval.shape
    if eqn.primitive.name not in ELEMENTWISE:
        return even_axes(eqn, facts[0].even) if facts else frozenset()
    operands = [_even_in(each, var.aval.shape, shape) for each, var in zip(facts, eqn.invars, strict=True)]
    return frozenset.intersection(*operands) if operands else frozenset()


def _constant(eqn: Any, facts: Sequence[Facts]) -> Callable[[], np.ndarray] | None:
    """What an equation makes of constants, once somebody wants to know."""
    known = [each.constant for each in facts]
    if eqn.primitive.multiple_results or None in known or eqn.primitive.name not in _COMPUTED:
        return None

    @functools.cache
    def evaluate() -> np.ndarray:
        with jax.ensure_compile_time_eval():
            operands = [jnp.asarray(make()) for make in known if make is not None]
            return np.asarray(bind(eqn, operands)[0])

    return evaluate


_COMPUTED = ELEMENTWISE | MOVES | {"iota", "slice", "rev", "concatenate"}

_RULES: dict[str, Callable[[Any, Sequence[Facts], Arrays], list[tuple[Origin, ...]]]] = {
    "add": _add,
    "add_any": _add,
    "sub": _add,
    "neg": _negate,
    "mul": _multiply,
    "div": _multiply,
    "select_n": _select,
    "concatenate": _concatenate,
    "stack": _concatenate,
    "pad": _pad,
    "split": _split,
    "gather": _gather,
}
