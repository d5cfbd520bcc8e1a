"""A flat program in compiled segments, and models that run through it segment by segment, on many batches at once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.extend import core

from jaxcompress._src.calibration.flat_program import FlatProgram, View, variables
from jaxcompress._src.calibration.leaf_part import Entry, entry_of, laid_over, overlap_of
from jaxcompress._src.meshes import as_typed, on_auto_axes
from jaxcompress._src.trace.traced import split_arrays
from jaxcompress._src.trace.walk import Body, as_body, bind, walk
from jaxcompress._src.tree.maps import leaves_by_path
from jaxcompress._src.types import Params

T = TypeVar("T")


class Segment(NamedTuple):
    """A part of a program: the values that it writes, of leaves (or their entries), values and constants."""

    views: list[View]
    reads: list[Any]
    consts: list[Any]
    writes: list[Any]
    piece: "Piece"


class Segments(NamedTuple):
    """A program, cut.

    Attributes:
        program: the whole.
        segments: its parts, in order.
        last: the last segment that reads a value, or until which it is looked at.
    """

    program: FlatProgram
    segments: list[Segment]
    last: Mapping[Any, int]


def segments_of(program: FlatProgram, goals: Sequence[tuple[Sequence[Any], int]]) -> Segments:
    """Cuts a program; each segment has what it takes to compute its goals, and is not in those before it.

    Args:
        program: the program.
        goals: for each segment the variables that it must write, and the number of the segment until which they are
            looked at.
    """
    jaxpr = program.body.jaxpr
    places = {var: place for place, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    known = {*program.inputs, *program.views, *jaxpr.constvars}
    cuts: list[tuple[list[Any], list[Any]]] = []
    last: dict[Any, int] = {}
    for number, (wanted, _) in enumerate(goals):
        eqns = [jaxpr.eqns[place] for place in _needed(jaxpr, wanted, known, places)]
        # What is made of leaves alone is made again where it is read: leaves may have changed.
        known |= {var for eqn in eqns for var in eqn.outvars if var in program.data}
        cuts.append((eqns, variables(wanted)))
        last |= dict.fromkeys(variables([var for eqn in eqns for var in eqn.invars]), number)
    for wanted, until in goals:
        last |= {var: max(until, last.get(var, -1)) for var in variables(wanted)}
    segments = [_segment(program, eqns, wanted, number, last) for number, (eqns, wanted) in enumerate(cuts)]
    return Segments(program, segments, last)


def by_shape(batches: Sequence[Any], trace: Callable[[Any], T]) -> list[T]:
    """`trace(batch)` of each batch, called once for all of the same shapes."""
    traced: dict[str, T] = {}
    shapes = []
    for batch in batches:
        arrays, static = split_arrays(batch)
        shapes.append(str((list(map(jax.typeof, arrays)), static)))
        if shapes[-1] not in traced:
            traced[shapes[-1]] = trace(batch)
    return [traced[shape] for shape in shapes]


class Model:
    """A tree of parameters, and the values of all batches where it has come to.

    Args:
        params: the tree, plain or compressed.
        programs: the program of each batch; of the same parts.
        batches: trees of inputs.
    """

    def __init__(self, params: Params, programs: Sequence[Segments], batches: Sequence[Any]) -> None:
        self.leaves = leaves_by_path(params)
        self.programs = programs
        self.values: list[dict[Any, Any]] = [
            dict(zip(each.program.inputs, split_arrays(batch)[0], strict=True))
            for each, batch in zip(programs, batches, strict=True)
        ]
        self._changed: dict[str, dict[Entry, Any]] = {}

    def put(self, path: str, entry: Entry, array: Any) -> None:
        """Sets a leaf, or one entry of it: segments that run from now on see it."""
        self._changed.setdefault(path, {})[entry] = array

    def part(self, path: str, entry: Entry) -> Any:
        """A leaf, or one entry of it, as it is by now."""
        changed = self._changed.get(path, {})
        if entry in changed:
            return changed[entry]
        leaf = self.leaves[path]
        part = entry_of(leaf, entry)
        for other, array in changed.items():
            if (overlap := overlap_of(entry, other, leaf.ndim)) is not None:
                part = laid_over(part, array, overlap)
        return part

    def operands(self, number: int, batch: int, parts: dict[tuple[str, Entry], Any]) -> tuple[list[Any], ...]:
        """What a segment is given of a batch: leaves, values and constants; leaves that are at hand are in `parts`."""
        segment = self.programs[batch].segments[number]
        keys = [(view.path, view.entry) for view in segment.views]
        parts |= {key: self.part(*key) for key in keys if key not in parts}
        values = self.values[batch]
        return [parts[key] for key in keys], [values[var] for var in segment.reads], segment.consts

    def run(self, number: int) -> None:
        """One segment, on all batches; what only earlier ones read is let go first."""
        parts: dict[tuple[str, Entry], Any] = {}
        for batch, (program, values) in enumerate(zip(self.programs, self.values, strict=True)):
            for var in [var for var in values if program.last.get(var, -1) < number]:
                del values[var]
            segment = program.segments[number]
            results = _run(segment.piece, *self.operands(number, batch, parts))
            values.update(zip(segment.writes, results, strict=True))


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a segment computes; equal pieces, of equal layers or of another call, share a compilation."""

    views: tuple[View, ...]
    form: Any
    body: Body = dataclasses.field(compare=False)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.views, self.form))

    def __hash__(self) -> int:
        # Asked for in every call: forms are long.
        return self._hash


def evaluate(piece: Piece, parts: Sequence[Any], values: Sequence[Any], consts: Sequence[Any]) -> list[Any]:
    """What a segment writes; pure, and differentiable in the leaves."""
    leaves = [on_auto_axes(view.of)(part) for view, part in zip(piece.views, parts, strict=True)]
    operands = zip([*leaves, *values, *consts], piece.body.jaxpr.invars, strict=True)
    return walk(piece.body, [as_typed(value, var.aval) for value, var in operands], bind)


COMPILED = {"xla_allow_excess_precision": False}
"""What the model rounds to a narrow type on its way stays rounded, as without compilation."""

_run = jax.jit(evaluate, static_argnames="piece", compiler_options=COMPILED)


def _needed(jaxpr: Any, goals: Sequence[Any], known: set[Any], places: Mapping[Any, int]) -> list[int]:
    """The places of the equations between what is known and the goals."""
    wanted: set[int] = set()
    left = [var for var in variables(goals) if var not in known]
    while left:
        place = places[left.pop()]
        if place not in wanted:
            wanted.add(place)
            left += [var for var in variables(jaxpr.eqns[place].invars) if var not in known]
    return sorted(wanted)


def _segment(
    program: FlatProgram,
    eqns: Sequence[Any],
    goals: Sequence[Any],
    number: int,
    last: Mapping[Any, int],
) -> Segment:
    made = dict.fromkeys(var for eqn in eqns for var in eqn.outvars)
    entering = dict.fromkeys(var for eqn in eqns for var in variables(eqn.invars) if var not in made)
    constants = dict(zip(program.body.jaxpr.constvars, program.body.consts, strict=True))
    viewed = [var for var in entering if var in program.views]
    consts = [var for var in entering if var in constants]
    reads = [var for var in entering if var not in program.views and var not in constants]
    writes = [var for var in made if var in goals or (var in program.data and last.get(var, -1) > number)]
    views, order = [program.views[var] for var in viewed], [*viewed, *reads, *consts]
    # Whatever their leaves are called.
    nameless = tuple(dataclasses.replace(view, path="", entry=()) for view in views)
    body = Body(SimpleNamespace(constvars=(), invars=order, outvars=writes, eqns=eqns), ())
    piece = Piece(nameless, (len(reads), _form(order, eqns, writes)), body)
    return Segment(views, reads, [constants[var] for var in consts], writes, piece)


def _form(order: Sequence[Any], eqns: Sequence[Any], outvars: Sequence[Any]) -> Any:
    """Equal of programs that compute the same of their inputs."""
    numbers = {var: number for number, var in enumerate(order)}

    def of(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return "literal", str(atom.aval), np.asarray(atom.val).tobytes()
        return numbers[atom]

    parts: list[Any] = [tuple(var.aval for var in order)]
    for eqn in eqns:
        numbers |= {var: len(numbers) + k for k, var in enumerate(eqn.outvars)}
        avals = tuple(var.aval for var in eqn.outvars)
        parts.append((eqn.primitive, tuple(map(of, eqn.invars)), _frozen(eqn.params), _frozen(eqn.ctx), avals))
    return (*parts, tuple(map(of, outvars)))


def _frozen(value: Any) -> Any:
    """The parameter of an equation, hashable; what cannot be compared is equal to itself only."""
    if isinstance(value, dict):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value), tuple(map(_frozen, value))
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        jaxpr, consts = as_body(value)
        return _form([*jaxpr.constvars, *jaxpr.invars], jaxpr.eqns, jaxpr.outvars), tuple(map(id, consts))
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
