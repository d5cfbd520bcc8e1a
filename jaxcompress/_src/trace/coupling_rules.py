"""What each primitive joins, pins, reads and writes: the rules of `coupled_axes`."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress._src.trace.axis_rules import ELEMENTWISE, axis_runs, free_axes, is_cast
from jaxcompress._src.trace.contraction import is_by_expert
from jaxcompress._src.trace.coupling import CONSTANT, ENTRY, INNER, Along, Coupling, Regrouping, Value
from jaxcompress._src.trace.index_classes import Indices, Reason

ROWS = Reason("its rows are looked up")
PART = Reason("a part of it is chosen while the model runs")
WINDOW = Reason("a window slides over it, or it is that of the window")
STACKED = Reason("it counts arrays that are stacked")
JOINED = Reason("entries that no unit owns are joined to it")
EXPERTS = Reason("it has one entry for each part of the rows")


def apply_rule(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """The outputs of an equation without a body that is looked into."""
    name = eqn.primitive.name
    rule = _RULES.get(name)
    if rule is None and name in ELEMENTWISE:
        rule = _elementwise
    elif rule is None and values and (runs := axis_runs(eqn)) is not None:
        return [_moved(coupling, eqn, values[0], runs)]
    outputs = None if rule is None else rule(coupling, eqn, values)
    return _opaque(coupling, eqn, values) if outputs is None else outputs


def _opaque(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    reason = Reason(f"it goes into `{eqn.primitive.name}`, which is not followed", expected=False)
    for value in values:
        coupling.pin(value.axes, reason)
    constant = not any(value.data or value.terms for value in values)
    data = any(value.data for value in values)
    return [
        Value(shape, tuple(coupling.fixed(n, CONSTANT if constant else reason) for n in shape), data=data)
        for shape in _shapes(eqn)
    ]


def _elementwise(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value] | None:
    if eqn.primitive.name in ("neg", "name") or is_cast(eqn):
        return list(values)
    (shape,) = _shapes(eqn)
    data = any(value.data for value in values)
    if data:
        for value in values:
            coupling.mark_written(value, range(len(value.shape)))
    fitted = [_fitted(coupling, value, shape) for value in values]
    axes = tuple(coupling.united(along) for along in zip(*(value.axes for value in fitted), strict=True))
    return [Value(shape, axes if fitted else (None,) * len(shape), _terms(eqn, fitted), data)]


def _fitted(coupling: Coupling, value: Value, shape: Sequence[int]) -> Value:
    """An operand of an elementwise equation, whose axes of length 1 are repeated."""
    if value.shape == tuple(shape):
        return value
    repeated = [axis for axis, n in enumerate(value.shape) if n == 1 != shape[axis]]
    coupling.pin((value.axes[axis] for axis in repeated), ENTRY)

    def spread(along: Sequence[Along]) -> tuple[Along, ...]:
        if not along:
            return (None,) * len(shape)
        return tuple(None if axis in repeated else indices for axis, indices in enumerate(along))

    terms = None if value.terms is None else tuple(map(spread, value.terms))
    return Value(tuple(shape), spread(value.axes), terms, value.data)


def _terms(eqn: Any, values: Sequence[Value]) -> Any:
    """Of what parameters the output of an elementwise equation is made."""
    name = eqn.primitive.name
    if any(value.data for value in values):
        return None
    if name in ("add", "sub", "add_any"):
        known = [value.terms for value in values if value.terms is not None]
        return tuple(itertools.chain(*known)) if len(known) == len(values) else None
    if name == "mul":
        return _products(values[0], values[1], [(axis, axis) for axis in range(len(values[0].shape))])
    return values[0].terms if name == "div" else None


def _products(left: Value, right: Value, sources: Sequence[tuple[int | None, int | None]]) -> Any:
    """The terms of a product of two values; for each axis of it the axes of both that run along it."""
    if left.data or right.data or (left.terms is None and right.terms is None):
        return None
    blank = lambda value: ((None,) * len(value.shape),)  # noqa: E731

    def along(one: Sequence[Along], two: Sequence[Along], i: int | None, j: int | None) -> Along:
        first = None if i is None else one[i]
        return first if first is not None or j is None else two[j]

    return tuple(
        tuple(along(one, two, i, j) for i, j in sources)
        for one in (blank(left) if left.terms is None else left.terms)
        for two in (blank(right) if right.terms is None else right.terms)
    )


def _moved(coupling: Coupling, eqn: Any, value: Value, runs: Sequence[tuple[list[int], list[int]]]) -> Value:
    (shape,) = _shapes(eqn)
    axes: list[Along] = [None] * len(shape)
    terms: list[list[Along]] = [[None] * len(shape) for _ in value.terms or ()]
    for number, (old, new) in enumerate(runs):
        before, after = [value.shape[k] for k in old], [shape[k] for k in new]
        if not old:
            continue
        if not new or (len(old) == len(new) == 1 and before != after):
            coupling.pin((value.axes[k] for k in old), ENTRY)
            continue
        if len(old) == len(new) == 1:
            moved, move = [value.axes[old[0]]], Regrouping((before[0],), 0, (after[0],), 0)
        else:
            moved, move = coupling.regroup([value.axes[k] for k in old], before, after, (coupling.step, number))
        _put(axes, new, moved)
        for term, source in zip(terms, value.terms or (), strict=True):
            _put(term, new, [None] * len(new) if move is None else move.moved(source[old[move.source]]))
    return Value(shape, tuple(axes), None if value.terms is None else tuple(map(tuple, terms)), value.data)


def _put(axes: list[Along], places: Sequence[int], moved: Sequence[Along]) -> None:
    for place, along in zip(places, moved, strict=True):
        axes[place] = along


def _dot_general(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (left_summed, right_summed), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = values
    free = [free_axes(eqn, side) for side in (0, 1)]
    sources = [*zip(left_batch, right_batch, strict=True), *((i, None) for i in free[0]), *((None, j) for j in free[1])]
    axes = [
        coupling.united((None if i is None else left.axes[i], None if j is None else right.axes[j])) for i, j in sources
    ]
    if left.data and right.data:
        coupling.mark("heads", axes[: len(left_batch)])
    for value, other, passing in ((left, right, [*left_batch, *free[0]]), (right, left, [*right_batch, *free[1]])):
        if other.data:
            coupling.mark_written(value, passing)
    coupling.contract(left, right, list(zip(left_summed, right_summed, strict=True)))
    (shape,) = _shapes(eqn)
    return [Value(shape, tuple(axes), _products(left, right, sources), left.data or right.data)]


def _ragged_dot(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value] | None:
    if not is_by_expert(eqn):
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (left_summed, right_summed), _ = numbers.dot_dimension_numbers
    left, right, sizes = values
    experts = numbers.rhs_group_dimensions
    coupling.pin([*(right.axes[axis] for axis in experts), *sizes.axes], EXPERTS)
    free = [axis for axis in range(len(right.shape)) if axis not in (*right_summed, *experts)]
    if left.data:
        coupling.mark_written(right, free)
    coupling.contract(left, right, list(zip(left_summed, right_summed, strict=True)))
    passing = [along for axis, along in enumerate(left.axes) if axis not in left_summed]
    (shape,) = _shapes(eqn)
    return [Value(shape, (*passing, *(right.axes[axis] for axis in free)))]


def _conv(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value] | None:
    left, right = values
    (batch, read, *space), (wrote, reads, *window), out = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        return None
    coupling.pin([*(left.axes[axis] for axis in space), *(right.axes[axis] for axis in window)], WINDOW)
    written = right.axes[wrote]
    coupling.mark("channels", [left.axes[read], written])
    if left.data:
        coupling.mark_written(right, [wrote])
    if groups == 1:
        coupling.contract(left, right, [(read, reads)])
    else:
        # The channels that one group reads and those that it writes are one unit: the kernel's axis of inputs serves
        # all groups.
        coupling.pin([right.axes[reads]], INNER)
        written = coupling.united(_whole_groups(coupling, along, groups) for along in (written, left.axes[read]))
        written = None if written is None else np.repeat(written, right.shape[wrote] // groups)
    (shape,) = _shapes(eqn)
    axes: list[Along] = [coupling.fixed(n, WINDOW) for n in shape]
    axes[out[0]], axes[out[1]] = left.axes[batch], written
    return [Value(shape, tuple(axes))]


def _whole_groups(coupling: Coupling, along: Along, groups: int) -> Along:
    if along is None:
        return None
    grid = along.reshape(groups, -1)
    coupling.classes.unite(grid.reshape(-1), np.repeat(grid[:, 0], grid.shape[1]))
    return grid[:, 0]


def _reduce(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (value,), summed = values, [int(axis) for axis in eqn.params["axes"]]
    along = [value.axes[axis] for axis in summed]
    if eqn.primitive.name in ("argmax", "argmin"):
        coupling.pin(along, Reason(f"`{eqn.primitive.name}` counts its entries"))
    coupling.mark("reduced", along)
    if value.data:
        coupling.mark_written(value, [axis for axis in range(len(value.shape)) if axis not in summed])
    (shape,) = _shapes(eqn)
    axes = tuple(along for axis, along in enumerate(value.axes) if axis not in summed)
    return [Value(shape, axes, data=value.data)]


def _ordered(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Equations in which the entries along one axis depend on those beside or before them."""
    place = next(int(eqn.params[name]) for name in ("axis", "dimension") if name in eqn.params)
    reason = Reason(f"`{eqn.primitive.name}` runs along it")
    coupling.pin((value.axes[place] for value in values), reason)
    joined = [coupling.united(along) for along in zip(*(value.axes for value in values), strict=True)]
    outputs = []
    for shape in _shapes(eqn):
        axes = [coupling.fixed(n, reason) if k == place else joined[k] for k, n in enumerate(shape)]
        outputs.append(Value(shape, tuple(axes), data=any(value.data for value in values)))
    return outputs


def _windows(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (shape, *_), value = _shapes(eqn), values[0]
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    still = [
        all(eqn.params[name][axis] == 1 for name in names) and tuple(eqn.params["padding"][axis]) == (0, 0)
        for axis in range(len(shape))
    ]
    coupling.pin((along for axis, along in enumerate(value.axes) if not still[axis]), WINDOW)
    axes = tuple(value.axes[axis] if still[axis] else coupling.fixed(n, WINDOW) for axis, n in enumerate(shape))
    return [Value(shape, axes, data=value.data)]


def _concatenate(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (shape,), place = _shapes(eqn), int(eqn.params["dimension"])
    axes = _joined(coupling, values, skipped=place)
    pieces = [
        coupling.classes.fixed(value.shape[place], JOINED) if (along := value.axes[place]) is None else along
        for value in values
    ]
    axes[place] = np.concatenate(pieces)
    terms, at = [], 0
    for value in values:
        for term in value.terms or ():
            before, after = np.full(at, -1), np.full(shape[place] - at - value.shape[place], -1)
            along = term[place]
            wide = None if along is None else np.concatenate([before, along, after])
            terms.append((*term[:place], wide, *term[place + 1 :]))
        at += value.shape[place]
    return [Value(shape, tuple(axes), _all_terms(values, terms), any(value.data for value in values))]


def _stack(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (shape,), place = _shapes(eqn), int(eqn.params["axis"])
    axes = _joined(coupling, values)
    axes.insert(place, coupling.fixed(shape[place], STACKED))
    terms = [(*term[:place], None, *term[place:]) for value in values for term in value.terms or ()]
    return [Value(shape, tuple(axes), _all_terms(values, terms), any(value.data for value in values))]


def _unstack(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (value,), place = values, int(eqn.params["axis"])
    coupling.pin([value.axes[place]], ENTRY)

    def rest(along: Sequence[Along]) -> tuple[Along, ...]:
        return (*along[:place], *along[place + 1 :])

    terms = None if value.terms is None else tuple(map(rest, value.terms))
    return [Value(shape, rest(value.axes), terms, value.data) for shape in _shapes(eqn)]


def _joined(coupling: Coupling, values: Sequence[Value], skipped: int | None = None) -> list[Along]:
    """The axes of values that differ in length along one axis at most."""
    columns = zip(*(value.axes for value in values), strict=True)
    return [None if axis == skipped else coupling.united(along) for axis, along in enumerate(columns)]


def _all_terms(values: Sequence[Value], terms: Sequence[tuple[Along, ...]]) -> tuple[tuple[Along, ...], ...] | None:
    return tuple(terms) if all(value.terms is not None for value in values) else None


def _selected(coupling: Coupling, value: Value, entries: Mapping[int, Indices]) -> Value:
    """A value of which some entries along some axes are taken, in the order given; -1 for a constant."""

    def moved(axis: int, along: Along, fill: Indices) -> Along:
        if axis not in entries:
            return along
        places = entries[axis]
        if along is None:
            return np.broadcast_to(fill, places.shape) if (places < 0).any() else None
        return np.where(places < 0, fill, along[np.maximum(places, 0)])

    shape = tuple(len(entries[axis]) if axis in entries else n for axis, n in enumerate(value.shape))
    constant = coupling.classes.fixed(1, JOINED)
    axes = tuple(moved(axis, along, constant) for axis, along in enumerate(value.axes))
    terms = tuple(
        tuple(None if along is None else moved(axis, along, np.array([-1])) for axis, along in enumerate(term))
        for term in value.terms or ()
    )
    return Value(shape, axes, None if value.terms is None else terms, value.data)


def _slice(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (value,), params = values, eqn.params
    steps = params["strides"] or (1,) * len(value.shape)
    bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return [_selected(coupling, value, {k: np.arange(*bound) for k, bound in enumerate(bounds)})]


def _rev(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (value,) = values
    return [_selected(coupling, value, {int(k): np.arange(value.shape[k])[::-1] for k in eqn.params["dimensions"]})]


def _split(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (value,), place, sizes = values, int(eqn.params["axis"]), eqn.params["sizes"]
    starts = itertools.accumulate(sizes, initial=0)
    return [_selected(coupling, value, {place: np.arange(at, at + n)}) for at, n in zip(starts, sizes, strict=False)]


def _pad(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    value, filling = values
    entries = {}
    for axis, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        size = value.shape[axis]
        places = np.full(size + max(size - 1, 0) * inner, -1)
        places[:: inner + 1] = np.arange(size)
        places = np.concatenate([np.full(max(low, 0), -1), places, np.full(max(high, 0), -1)])
        if low or high or inner:
            # Negative padding cuts.
            entries[axis] = places[max(-low, 0) : len(places) - max(-high, 0)]
    padded = _selected(coupling, value, entries)
    zero = filling.facts.constant is not None and not filling.facts.constant().any()
    return [padded if zero else dataclasses.replace(padded, terms=None)]


def _tile(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (value,) = values
    entries = {axis: np.tile(np.arange(value.shape[axis]), n) for axis, n in enumerate(eqn.params["reps"]) if n != 1}
    return [_selected(coupling, value, entries)]


def _iota(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (shape,) = _shapes(eqn)
    axes = [coupling.fixed(n, CONSTANT) if axis == eqn.params["dimension"] else None for axis, n in enumerate(shape)]
    return [Value(shape, tuple(axes), data=False)]


def _dynamic_slice(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    value, (shape,) = values[0], _shapes(eqn)
    cut = [axis for axis, n in enumerate(shape) if n != value.shape[axis]]
    coupling.pin((value.axes[axis] for axis in cut), PART)

    def left(along: Sequence[Along], fixed: bool) -> tuple[Along, ...]:
        pinned = [coupling.fixed(n, PART) if fixed else None for n in shape]
        return tuple(pinned[axis] if axis in cut else indices for axis, indices in enumerate(along))

    terms = None if value.terms is None else tuple(left(term, False) for term in value.terms)
    return [Value(shape, left(value.axes, True), terms, any(each.data for each in values))]


def _dynamic_update_slice(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    value, update, *_ = values
    cut = [axis for axis, n in enumerate(update.shape) if n != value.shape[axis]]
    coupling.pin((each.axes[axis] for each in (value, update) for axis in cut), PART)
    for each in (value, update):
        coupling.mark_written(each, range(len(value.shape)))
    axes = tuple(
        coupling.fixed(n, PART) if axis in cut else coupling.united((value.axes[axis], update.axes[axis]))
        for axis, n in enumerate(value.shape)
    )
    return [Value(value.shape, axes, data=any(each.data for each in values))]


def _gather(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    (operand, indices), numbers, (shape,) = values, eqn.params["dimension_numbers"], _shapes(eqn)
    if (order := _known_order(eqn, operand, indices)) is not None:
        return [_reordered(coupling, eqn, operand, order)]
    rows = [int(axis) for axis in numbers.collapsed_slice_dims]
    batched = [int(axis) for axis in numbers.operand_batching_dims]
    coupling.pin((operand.axes[axis] for axis in rows), ROWS)
    axes: list[Along] = [None] * len(shape)
    looped = [k for k in range(len(shape)) if k not in numbers.offset_dims]
    _put(axes, looped, indices.axes[:-1])
    for axis, other in zip(batched, numbers.start_indices_batching_dims, strict=True):
        axes[looped[other]] = coupling.united((operand.axes[axis], axes[looped[other]]))
    kept = [axis for axis in range(len(operand.shape)) if axis not in (*rows, *batched)]
    sources: list[int | None] = [None] * len(shape)
    for place, axis in zip(numbers.offset_dims, kept, strict=True):
        if eqn.params["slice_sizes"][axis] == operand.shape[axis]:
            axes[place], sources[place] = operand.axes[axis], axis
        else:
            coupling.pin([operand.axes[axis]], PART)
            axes[place] = coupling.fixed(shape[place], PART)
    terms = None
    if operand.terms is not None:
        terms = tuple(tuple(None if k is None else term[k] for k in sources) for term in operand.terms)
    return [Value(shape, tuple(axes), terms, operand.data or indices.data)]


def _known_order(eqn: Any, operand: Value, indices: Value) -> Indices | None:
    """The entries along one axis that a gather takes, if they are constants."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rows = tuple(numbers.start_index_map)
    whole = all(n == (1 if axis in rows else operand.shape[axis]) for axis, n in enumerate(sizes))
    if len(rows) != 1 or tuple(numbers.collapsed_slice_dims) != rows or numbers.operand_batching_dims or not whole:
        return None
    if indices.facts.constant is None or len(indices.shape) != 2:
        return None
    order = indices.facts.constant()[:, 0].astype(np.int64)
    return order if order.size and order.min() >= 0 and order.max() < operand.shape[rows[0]] else None


def _reordered(coupling: Coupling, eqn: Any, operand: Value, order: Indices) -> Value:
    """A gather of entries in an order that the program fixes: a re-arrangement."""
    numbers, (shape,) = eqn.params["dimension_numbers"], _shapes(eqn)
    row = numbers.start_index_map[0]
    taken = _selected(coupling, operand, {row: order})
    axes = [axis for axis in range(len(operand.shape)) if axis != row]
    axes.insert(next(k for k in range(len(shape)) if k not in numbers.offset_dims), row)
    terms = None if taken.terms is None else tuple(tuple(term[k] for k in axes) for term in taken.terms)
    return Value(shape, tuple(taken.axes[k] for k in axes), terms, taken.data)


def _unchanged(coupling: Coupling, eqn: Any, values: Sequence[Value]) -> list[Value]:
    return list(values)


def _shapes(eqn: Any) -> list[tuple[int, ...]]:
    return [tuple(getattr(var.aval, "shape", ())) for var in eqn.outvars]


_REDUCTIONS = ("sum", "prod", "max", "min", "or", "and", "xor")
_RULES: dict[str, Callable[[Coupling, Any, Sequence[Value]], list[Value] | None]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    **dict.fromkeys((f"reduce_{name}" for name in _REDUCTIONS), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "top_k"), _ordered),
    **dict.fromkeys(("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"), _windows),
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "slice": _slice,
    "rev": _rev,
    "split": _split,
    "pad": _pad,
    "tile": _tile,
    "iota": _iota,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "optimization_barrier": _unchanged,
}
