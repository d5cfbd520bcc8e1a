"""The layer-by-layer engine: models that wait at each kernel until it is known what it becomes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxcompress._src.calibration.leaf_part import LeafPart
from jaxcompress._src.calibration.sites import Operand, Program, Repeated, Site, View, program_of
from jaxcompress._src.meshes import as_typed, on_auto_axes
from jaxcompress._src.trace.walk import Body, as_body, bind, walk
from jaxcompress._src.tree.maps import leaves_by_path
from jaxcompress._src.types import Params, plain


def layer_by_layer(
    apply: Callable[..., Any],
    paths: Sequence[str],
    trees: Sequence[Params],
    batches: Iterable[tuple[Any, ...]],
    *,
    repeated: Repeated = "refuse",
) -> "Iterator[Stop]":
    """Runs models of one form on all batches, kernel by kernel, in the order of the model.

    The program of the model is cut into segments at its kernels. Each segment is compiled once: those of equal layers
    share a compilation. A batch holds only the values that later segments read.

    Args:
        apply: `(params, *inputs) -> outputs`.
        paths: of kernels, as for `program_of`.
        trees: the parameters of each model, of the same shapes and dtypes, plain or compressed. The last one waits at
            every kernel; those before it stay as they are, and have written its output by then.
        batches: tuples of inputs; the model is traced once for all of the same shapes.
        repeated: what becomes of a kernel that several matmuls share, as for `program_of`.

    Yields:
        Each kernel. What `Stop.replace` was told by the time that the next one is asked for is what the last model goes
        on with.

    Example:
        >>> params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
        >>> def apply(p, x):
        ...     return x @ p["kernel"] + x[:, :1]
        >>> for stop in layer_by_layer(apply, ["kernel"], [params], [(jnp.ones((3, 2)),)]):
        ...     rows = stop.rows(0, 0)
        ...     print(stop.kernel.name, stop.bias, rows.inputs.shape, rows.residual.shape)
        kernel None (3, 2) (3, 1)
    """
    programs: dict[str, _Segmented] = {}
    used = []
    batches = list(batches)
    for batch in batches:
        shapes = str(jax.tree.map(jax.typeof, batch))
        if shapes not in programs:
            programs[shapes] = _Segmented.of(program_of(apply, trees[0], batch, paths=paths, repeated=repeated))
        used.append(programs[shapes])
    models = [_Model(tree, used, batches) for tree in trees]
    blocks: list[list[int]] = used[0].blocks if used else []
    for number, block in enumerate(blocks):
        for model in models:
            model.run(2 * number)
        for model in models[:-1]:
            model.run(2 * number + 1)
        for place in block:
            yield Stop(place, models)
        models[-1].run(2 * number + 1)


class Rows(NamedTuple):
    """One kernel at work on one batch: it writes `inputs @ W + bias + residual`.

    Attributes:
        inputs: (N, D), one row for each token.
        residual: (N, O), what the output is added to; None if it is added to nothing.
        written: (N, O), the output, of a model that does not wait; None of one that does.
    """

    inputs: jax.Array
    residual: jax.Array | None
    written: jax.Array | None


class Stop:
    """A kernel at which a model waits.

    Attributes:
        kernel: where it is.
        bias: where the bias is that is added to its output, and that nothing else reads; None without one.
    """

    def __init__(self, place: int, models: "Sequence[_Model]") -> None:
        self._place, self._models = place, models
        site = models[-1].programs[0].program.sites[place]
        self.kernel, self.bias = site.kernel, site.bias

    def rows(self, batch: int, model: int) -> Rows:
        """What goes into the kernel, by the numbers of the batch and of the model; -1 is the one that waits."""
        where = self._models[model]
        site, values = where.programs[batch].program.sites[self._place], where.values[batch]
        return Rows(*(_rows(each, values) for each in (site.inputs, site.residual, site.written)))

    def pairs(self) -> list[tuple[Rows, Rows]]:
        """The rows of every batch, in the first model and in the last one."""
        return [(self.rows(batch, 0), self.rows(batch, -1)) for batch in range(len(self._models[-1].values))]

    def weights(self, model: int) -> tuple[jax.Array, jax.Array]:
        """The kernel (D, O) of a model, and its bias (O,): zeros, in the dtype of the kernel, without one."""
        leaves = self._models[model].leaves
        kernel = self.kernel.matrix(jnp.asarray(plain(leaves[self.kernel.path])))
        if self.bias is None:
            return kernel, jnp.zeros(kernel.shape[1], kernel.dtype)
        return kernel, self.bias.matrix(jnp.asarray(plain(leaves[self.bias.path])))[0]

    def replace(self, kernel: Any = None, bias: Any = None) -> None:
        """Sets the kernel (D, O) and the bias (O,) that the last model goes on with; None: it stays."""
        if kernel is not None:
            self._models[-1].put(self.kernel, kernel)
        if bias is not None and self.bias is not None:
            self._models[-1].put(self.bias, bias)


class _Model:
    """A tree of parameters, and the values of all batches where it has come to."""

    def __init__(self, params: Params, programs: "Sequence[_Segmented]", batches: Sequence[Any]) -> None:
        self.leaves = leaves_by_path(params)
        self.programs = programs
        self.values: list[dict[Any, Any]] = [
            dict(zip(each.program.inputs, jax.tree.leaves(batch), strict=True))
            for each, batch in zip(programs, batches, strict=True)
        ]
        self._parts: dict[Any, Any] = {}

    def put(self, part: LeafPart, matrix: Any) -> None:
        leaf = self.leaves[part.path]
        self._parts[part.path, part.entry] = part.array(jnp.asarray(matrix, jnp.result_type(leaf.dtype)), leaf.shape)

    def run(self, number: int) -> None:
        """One segment, on all batches; what only earlier ones read is let go first."""
        parts: dict[Any, Any] = {}
        for program, values in zip(self.programs, self.values, strict=True):
            for var in [var for var in values if program.last.get(var, -1) < number]:
                del values[var]
            segment = program.segments[number]
            for view in segment.views:
                key = view.path, view.entry
                if key not in parts:
                    parts[key] = self._parts[key] if key in self._parts else _entry(self.leaves[view.path], view.entry)
            weights = [parts[view.path, view.entry] for view in segment.views]
            given = [values[var] for var in segment.reads]
            values.update(zip(segment.writes, _run(segment.piece, weights, given, segment.consts), strict=True))


class _Segment(NamedTuple):
    """A part of a program: the values that it writes, of leaves (or their entries), values and constants."""

    views: list[View]
    reads: list[Any]
    consts: list[Any]
    writes: list[Any]
    piece: "_Piece"


class _Segmented(NamedTuple):
    """A program, cut.

    Attributes:
        program: the whole.
        blocks: sites that depend on no other one of their block, by their numbers.
        segments: for each block two: up to the inputs of its kernels, and what they write.
        last: the last segment that reads a value.
    """

    program: Program
    blocks: list[list[int]]
    segments: list[_Segment]
    last: Mapping[Any, int]

    @classmethod
    def of(cls, program: Program) -> "_Segmented":
        jaxpr, sites = program.body.jaxpr, program.sites
        places = {var: place for place, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
        blocks = _blocks(program)
        known = {*program.inputs, *program.views, *jaxpr.constvars}
        cuts: list[tuple[list[Any], list[Any]]] = []
        for block in blocks:
            own = [sites[place] for place in block]
            for goals in ([var for site in own for var in _read(site)], [site.written.var for site in own]):
                eqns = [jaxpr.eqns[place] for place in _needed(jaxpr, goals, known, places)]
                known |= {var for eqn in eqns for var in eqn.outvars}
                cuts.append((eqns, _variables(goals)))
        last: dict[Any, int] = {}
        for number, (eqns, goals) in enumerate(cuts):
            last |= dict.fromkeys(_variables([var for eqn in eqns for var in eqn.invars]), number)
            # What goes into a kernel is looked at until the next block begins.
            last |= dict.fromkeys(goals, number | 1)
        segments = [_segment(program, eqns, goals, number, last) for number, (eqns, goals) in enumerate(cuts)]
        return cls(program, blocks, segments, last)


def _blocks(program: Program) -> list[list[int]]:
    """Runs of sites none of which depends on what another one of them becomes."""
    parts: dict[Any, set[int]] = {}
    for place, site in enumerate(program.sites):
        for part in (site.kernel, site.bias):
            if part is not None:
                parts.setdefault((part.path, part.entry), set()).add(place)
    # Bit i: it depends on site i.
    depends = {
        var: sum(1 << place for place in parts.get((view.path, view.entry), ())) for var, view in program.views.items()
    }
    for eqn in program.body.jaxpr.eqns:
        if any(var not in program.views for var in eqn.outvars):
            own = 0
            for var in _variables(eqn.invars):
                own |= depends.get(var, 0)
            depends |= {var: own for var in eqn.outvars if var not in program.views}
    blocks: list[list[int]] = []
    for place, site in enumerate(program.sites):
        before = 0
        for var in _variables(_read(site)):
            before |= depends.get(var, 0)
        if not blocks or any(before >> other & 1 for other in blocks[-1]):
            blocks.append([])
        blocks[-1].append(place)
    return blocks


def _read(site: Site) -> list[Any]:
    return [site.inputs.var] if site.residual is None else [site.inputs.var, site.residual.var]


def _needed(jaxpr: Any, goals: Sequence[Any], known: set[Any], places: Mapping[Any, int]) -> list[int]:
    """The places of the equations between what is known and the goals."""
    found: set[int] = set()
    left = [var for var in _variables(goals) if var not in known]
    while left:
        place = places[left.pop()]
        if place not in found:
            found.add(place)
            left += [var for var in _variables(jaxpr.eqns[place].invars) if var not in known]
    return sorted(found)


def _segment(
    program: Program,
    eqns: Sequence[Any],
    goals: Sequence[Any],
    number: int,
    last: Mapping[Any, int],
) -> _Segment:
    made = dict.fromkeys(var for eqn in eqns for var in eqn.outvars)
    entering = dict.fromkeys(var for eqn in eqns for var in _variables(eqn.invars) if var not in made)
    constants = dict(zip(program.body.jaxpr.constvars, program.body.consts, strict=True))
    viewed = [var for var in entering if var in program.views]
    consts = [var for var in entering if var in constants]
    reads = [var for var in entering if var not in program.views and var not in constants]
    writes = [var for var in made if var in goals or last.get(var, -1) > number]
    views, order = [program.views[var] for var in viewed], [*viewed, *reads, *consts]
    # Whatever their leaves are called.
    nameless = tuple(dataclasses.replace(view, path="", entry=()) for view in views)
    body = Body(SimpleNamespace(constvars=(), invars=order, outvars=writes, eqns=eqns), ())
    piece = _Piece(nameless, (len(reads), _form(order, eqns, writes)), body)
    return _Segment(views, reads, [constants[var] for var in consts], writes, piece)


@dataclasses.dataclass(frozen=True)
class _Piece:
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


# What the model rounds to a narrow type on its way stays rounded, as without compilation.
@functools.partial(jax.jit, static_argnames="piece", compiler_options={"xla_allow_excess_precision": False})
def _run(piece: _Piece, parts: Sequence[Any], values: Sequence[Any], consts: Sequence[Any]) -> list[Any]:
    leaves = [on_auto_axes(view.of)(part) for view, part in zip(piece.views, parts, strict=True)]
    operands = zip([*leaves, *values, *consts], piece.body.jaxpr.invars, strict=True)
    return walk(piece.body, [as_typed(value, var.aval) for value, var in operands], bind)


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


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


@on_auto_axes
def _entry(leaf: Any, entry: tuple[tuple[int, int], ...]) -> Any:
    index, whole = dict(entry), plain(leaf)
    return jnp.asarray(whole)[tuple(index.get(axis, slice(None)) for axis in range(whole.ndim))] if entry else whole


def _rows(operand: Operand | None, values: Mapping[Any, Any]) -> Any:
    if operand is None or not (isinstance(operand.var, core.Literal) or operand.var in values):
        return None
    value = operand.var.val if isinstance(operand.var, core.Literal) else values[operand.var]
    plain = operand.order == (0, 1)
    return value if plain else _as_rows(value, order=operand.order, width=operand.width)


@on_auto_axes
@functools.partial(jax.jit, static_argnames=("order", "width"))
def _as_rows(value: Any, order: tuple[int, ...], width: int) -> Any:
    return value.transpose(order).reshape(-1, width)
