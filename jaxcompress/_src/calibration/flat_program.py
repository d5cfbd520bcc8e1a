"""A model as one flat list of equations: calls inlined, the scans over some leaves unrolled, every leaf in view."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcompress._src.calibration.leaf_part import Entry
from jaxcompress._src.meshes import abstract, as_typed, on_auto_axes
from jaxcompress._src.trace.axis_rules import axis_runs, is_cast
from jaxcompress._src.trace.traced import Traced, traced
from jaxcompress._src.trace.walk import WRAPPERS, Body, as_body, bind, called_body, walk
from jaxcompress._src.types import Params, is_compressed


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf, or one entry of a stack, as an equation of the program reads it.

    Attributes:
        path: of the leaf.
        entry: of the leaf.
        axes: which of the leaf's axes are left, in order; -1 for new ones.
        dtypes: to which it is cast, one after another.
        shape: as the equation reads it.
    """

    path: str
    entry: Entry
    axes: tuple[int, ...]
    dtypes: tuple[Any, ...]
    shape: tuple[int, ...]

    def of(self, part: Any) -> Any:
        """The view of another array of the leaf's (or the entry's) shape."""
        axes = [axis for axis in self.axes if axis >= 0]
        value = jnp.asarray(part).transpose([sorted(axes).index(axis) for axis in axes])
        value = jnp.expand_dims(value, [place for place, axis in enumerate(self.axes) if axis < 0])
        for dtype in self.dtypes:
            value = value.astype(dtype)
        return jnp.broadcast_to(value, self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FlatProgram:
    """The program.

    Attributes:
        body: the equations; constants are `body.consts`.
        inputs: the variables of the model's inputs.
        outputs: the variables (or literals) of the model's outputs.
        views: variable -> the leaf that it is. How the program makes it of the leaf is of no interest.
    """

    body: Body
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    views: Mapping[Any, View]

    @functools.cached_property
    def data(self) -> frozenset[Any]:
        """The variables that depend on inputs."""
        data = set(self.inputs)
        for eqn in self.body.jaxpr.eqns:
            if not data.isdisjoint(variables(eqn.invars)):
                data |= set(eqn.outvars)
        return frozenset(data)


def flat_program(
    apply: Callable[..., Any], params: Params, inputs: Sequence[Any], *, stacks: Collection[str]
) -> FlatProgram:
    """The program of a model; functions with derivatives of their own are single equations.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: as for `traced`.
        inputs: as for `traced`.
        stacks: paths of leaves; scans that run over them are unrolled.

    Example:
        >>> def apply(params, x):
        ...     return jax.lax.scan(lambda x, w: (x * w, None), x, params["w"])[0]
        >>> program = flat_program(apply, {"w": jnp.ones(2)}, (jnp.ones(()),), stacks=["w"])
        >>> [view.entry for view in program.views.values()]
        [((0, 0),), ((0, 1),)]
    """
    return Flattening(stacks, derivatives=True).trace(traced(apply, params, inputs))[0]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A leaf while the program is traced, with its value there."""

    view: View
    value: Any

    def moved(self, value: Any, axes: tuple[int, ...], dtype: Any = None) -> "Weight":
        dtypes = self.view.dtypes if dtype is None else (*self.view.dtypes, dtype)
        return Weight(dataclasses.replace(self.view, axes=axes, dtypes=dtypes, shape=value.shape), value)

    def cut(self, value: Any, axes: tuple[int, ...], entry: Mapping[int, int]) -> "Weight":
        entries = tuple(sorted((dict(self.view.entry) | dict(entry)).items()))
        return Weight(dataclasses.replace(self.view, axes=axes, entry=entries, shape=value.shape), value)


@dataclasses.dataclass(frozen=True, eq=False)
class Reordered:
    """Entries of leaves along a first axis, in another order than in the leaves, or of several of them.

    Attributes:
        value: the whole.
        entries: each is made when it is asked for.
    """

    value: Any
    entries: Sequence[Callable[[], Weight]]


class Flattening:
    """Traces a flat program; follows the leaves on the way.

    Args:
        stacks: paths of leaves; scans that run over them are unrolled.
        derivatives: whether functions with derivatives of their own keep them: their bodies are not looked into.
    """

    def __init__(self, stacks: Collection[str], *, derivatives: bool) -> None:
        self.stacks = frozenset(stacks)
        self.derivatives = derivatives
        self.views: dict[View, Any] = {}

    def trace(self, model: Traced, more: Callable[[], Any] = lambda: None) -> tuple[FlatProgram, Any]:
        """The program of a model.

        Args:
            model: the model.
            more: a tree of values of interest, asked for when the whole model has been followed.

        Returns:
            The program, and the variables of these values.
        """
        leaves = [abstract(leaf) if is_compressed(leaf) else leaf for leaf in model.leaves]

        def flat(leaves: Sequence[Any], values: Sequence[Any]) -> Any:
            weights = [
                Weight(View(path, (), tuple(range(leaf.ndim)), (), leaf.shape), leaf)
                for path, leaf in zip(model.paths, leaves, strict=True)
            ]
            outputs = [self.plain(value) for value in self.body(as_body(model.closed), [*weights, *values])]
            # What is of interest is an output, for its variable.
            marked = more()
            return outputs, list(self.views.values()), marked

        program, shapes = jax.make_jaxpr(flat, return_shape=True)(leaves, model.values)
        outputs, views, marked = jax.tree.structure(shapes).unflatten(program.jaxpr.outvars)
        flattened = FlatProgram(
            body=Body(program.jaxpr, program.consts),
            inputs=program.jaxpr.invars[len(leaves) :],
            outputs=outputs,
            views=dict(zip(views, self.views, strict=True)),
        )
        return flattened, marked

    def body(self, body: Body, values: Sequence[Any]) -> list[Any]:
        """Traces a body."""
        return walk(body, values, self.equation)

    def equation(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        """Traces one equation."""
        name = eqn.primitive.name
        if name == "scan" and eqn.params["length"] and any(self.is_stack(value) for value in _scanned(eqn, values)):
            return self.scan(eqn, values)
        if name in _WHOLE:
            self.pass_whole(name, values)
        elif (name in WRAPPERS or not self.derivatives) and (body := called_body(eqn)) is not None:
            return self.body(body, values)
        if any(map(is_leaf, values)) and (moved := self.moved(eqn, values)) is not None:
            return [moved]
        return bind(eqn, [self.plain(value) for value in values])

    def moved(self, eqn: Any, values: list[Any]) -> Weight | Reordered | None:
        """What an equation that moves the entries of leaves makes of them; None if it does something else."""
        name, first = eqn.primitive.name, values[0]
        dtype = eqn.params["new_dtype"] if name == "convert_element_type" else None
        if isinstance(first, Weight):
            if name == "slice" and (entry := _cut(eqn, first.view)) is not None:
                return first.cut(bind(eqn, [first.value])[0], *entry)
            if (axes := _moved(eqn, first.view.axes)) is not None:
                return first.moved(bind(eqn, [first.value])[0], axes, dtype)
        if not any(self.is_stack(value) for value in values):
            return None
        if (entries := self.reordered(eqn, values)) is not None:
            return Reordered(bind(eqn, [self.plain(value) for value in values])[0], entries)
        if name == "squeeze" and eqn.params["dimensions"] == (0,) and isinstance(first, Reordered):
            return first.entries[0]()
        return None

    def reordered(self, eqn: Any, values: list[Any]) -> Sequence[Callable[[], Any]] | None:
        """The entries of an output along its first axis, where they are those of the operands."""
        name, params = eqn.primitive.name, eqn.params
        if name == "concatenate" and params["dimension"] == 0 and all(map(is_leaf, values)):
            return [entry for value in values for entry in _entries(value)]
        if name == "rev" and tuple(params["dimensions"]) == (0,):
            return _entries(values[0])[::-1]
        if name == "convert_element_type" and is_cast(eqn):
            return [lambda entry=entry: self.equation(eqn, [entry()])[0] for entry in _entries(values[0])]
        if name == "slice" and params["strides"] is None:
            (begin, *begins), (end, *ends) = params["start_indices"], params["limit_indices"]
            whole = not any(begins) and tuple(ends) == eqn.invars[0].aval.shape[1:]
            return _entries(values[0])[begin:end] if whole and begin < end else None
        return None

    def scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Iteration after iteration: the entries of its stacks are leaves of their own."""
        length, consts, carried = (eqn.params[name] for name in ("length", "num_consts", "num_carry"))
        self.pass_whole("scan", values[: consts + carried])
        given, carry = values[:consts], values[consts : consts + carried]
        # A leaf that all iterations read is none of theirs.
        given, carry = ([self.plain(v) if is_leaf(v) else v for v in part] for part in (given, carry))
        stacks = [v if is_leaf(v) else self.plain(v) for v in _scanned(eqn, values)]
        body = as_body(eqn.params["jaxpr"])
        avals = [var.aval for var in body.jaxpr.invars[consts + carried :]]
        written: dict[int, list[Any]] = {}
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            entries = [_entry(stack, i, aval) for stack, aval in zip(stacks, avals, strict=True)]
            results = self.body(body, [*given, *carry, *entries])
            carry, written[i] = results[:carried], [self.plain(value) for value in results[carried:]]
        columns = zip(*(written[i] for i in range(length)), strict=True)
        avals = [var.aval for var in eqn.outvars[carried:]]
        return [*carry, *(as_typed(_stacked(list(c)), aval) for c, aval in zip(columns, avals, strict=True))]

    def plain(self, value: Any) -> Any:
        """The value itself: something reads it."""
        if isinstance(value, Weight):
            return self.views.setdefault(value.view, value.value)
        return value.value if isinstance(value, Reordered) else value

    def pass_whole(self, name: str, values: Sequence[Any]) -> None:
        """Told what goes into a loop, a branch or a `shard_map`, where it is not followed."""

    def is_stack(self, value: Any) -> bool:
        """Whether scans over a value are unrolled."""
        if isinstance(value, Reordered):
            return True
        return isinstance(value, Weight) and value.view.path in self.stacks


def variables(atoms: Sequence[Any]) -> list[Any]:
    """Those that are no literals."""
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def is_leaf(value: Any) -> bool:
    """Whether a value is made of entries of leaves."""
    return isinstance(value, Weight | Reordered)


def _scanned(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    """The operands that a scan runs over."""
    return values[eqn.params["num_consts"] + eqn.params["num_carry"] :]


def _entries(value: Weight | Reordered) -> Sequence[Callable[[], Any]]:
    if isinstance(value, Reordered):
        return value.entries
    return [functools.partial(_entry, value, index) for index in range(value.view.shape[0])]


def _entry(stack: Any, index: int, aval: Any = None) -> Any:
    """What a scan reads in one iteration."""
    if isinstance(stack, Reordered):
        entry = stack.entries[index]()
        return dataclasses.replace(entry, value=as_typed(entry.value, aval))
    if not isinstance(stack, Weight):
        return as_typed(on_auto_axes(operator.getitem)(stack, index), aval)
    value = as_typed(on_auto_axes(operator.getitem)(stack.value, index), aval)
    axis, *axes = stack.view.axes
    # Of a new axis every entry is the same.
    return stack.cut(value, tuple(axes), {axis: index} if axis >= 0 else {})


@on_auto_axes
def _stacked(parts: list[Any]) -> Any:
    return jnp.stack(parts)


def _cut(eqn: Any, view: View) -> tuple[tuple[int, ...], dict[int, int]] | None:
    """Entries along some axes, such as `w[i]` in a loop of Python; None where more than one is left of an axis."""
    whole, left = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    strides = eqn.params["strides"] or (1,) * len(whole)
    axes, entry = list(view.axes), {}
    for axis, (start, step) in enumerate(zip(eqn.params["start_indices"], strides, strict=True)):
        if left[axis] == whole[axis]:
            continue
        if left[axis] != 1 or step != 1 or view.axes[axis] < 0:
            return None
        entry[view.axes[axis]], axes[axis] = start, -1
    return tuple(axes), entry


def _moved(eqn: Any, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes after an equation that only moves them; None after any other."""
    # A view knows to which types it is cast, not to which precision it is rounded.
    runs = None if eqn.primitive.name == "reduce_precision" else axis_runs(eqn)
    if runs is None:
        return None
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    moved = [-1] * len(after)
    for old, new in runs:
        leaf_axes = [axes[axis] for axis in old if axes[axis] >= 0]
        # Axes of the leaf that are merged, split, repeated or dropped are none of its axes.
        if leaf_axes and (len(old) != 1 or [before[old[0]]] != [after[axis] for axis in new]):
            return None
        for axis in new:
            moved[axis] = leaf_axes[0] if leaf_axes else -1
    return tuple(moved)


_WHOLE = frozenset({"scan", "while", "cond", "shard_map"})
