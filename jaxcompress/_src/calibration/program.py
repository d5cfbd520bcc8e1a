"""What is gathered of a model, and the compiled step that gathers it."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from jaxcompress._src.calibration.interpret import Interpreter
from jaxcompress._src.calibration.parts import repeated_uses
from jaxcompress._src.calibration.statistics import (
    LookupCounts,
    Statistic,
    Statistics,
    empty_statistics,
    statistics_shardings,
)
from jaxcompress._src.calibration.values import Tap, Totals, Use, Value
from jaxcompress._src.meshes import shared_mesh
from jaxcompress._src.trace.facts import Facts
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.trace.layouts import layouts
from jaxcompress._src.trace.origin import Origin
from jaxcompress._src.trace.traced import Static, split_arrays, traced
from jaxcompress._src.trace.walk import Body
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params, Selector, is_compressed, plain

RowMask = Callable[..., Any]
"""`(*inputs) -> weights of rows`, such as `lambda ids, mask: mask`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Leaves that multiply the same rows.

    Attributes:
        leaves: their numbers in the flattened tree; the first one gathers.
        place: of the first use, in execution order.
        visits: of that use, see `Rows`.
        empty: abstract statistics.
    """

    leaves: tuple[int, ...]
    place: tuple[int | None, ...]
    visits: np.ndarray | None
    empty: Any

    @property
    def nbytes(self) -> int:
        """Size of the statistics."""
        return sum(math.prod(part.shape) * 4 for part in jax.tree.leaves(self.empty))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A model with its taps; `step` is compiled once for each shape of the inputs.

    Attributes:
        leaves: paths and leaves of the tree.
        treedef: of the tree.
        layouts: of every leaf.
        refused: path of a selected leaf whose inputs cannot be gathered -> why.
        taps: leaf number -> tap, of all others.
        groups: in execution order; `Tap.group` counts them.
        step: `(totals, params of each stream, inputs, active) -> totals`.
    """

    leaves: list[tuple[str, Any]]
    treedef: Any
    layouts: list[LeafLayout]
    refused: Mapping[str, str]
    taps: Mapping[int, Tap]
    groups: Sequence[Group]
    step: Callable[..., Totals]

    def zeros(self) -> Totals:
        """Empty sums."""
        return {number: self.zero(number) for number in range(len(self.groups))}

    def zero(self, group: int) -> Statistics:
        """Empty sums of one group."""
        return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), self.groups[group].empty)

    def tree(self, entries: Mapping[int, Any], blank: Any) -> Params:
        """A tree with entries at some leaves."""
        return self.treedef.unflatten([entries.get(number, blank) for number in range(len(self.leaves))])


def build(
    apply: Callable[..., Any],
    params: Params,
    inputs: tuple[Any, ...],
    *,
    select: Selector | None,
    statistics: Sequence[Statistic],
    row_mask: RowMask | None,
    cross: bool = False,
) -> Program:
    """Traces the model, finds where each selected leaf meets its inputs, and which leaves share them."""
    _check_names(statistics)
    leaves, treedef = leaves_with_paths(params), jax.tree.structure(params, is_leaf=is_compressed)
    all_layouts = jax.tree.leaves(layouts(apply, params, *inputs))
    numbers = _selected(params, all_layouts, select)
    selected = {
        number: Tap(path=path, layout=layout, width=_width(leaf, layout), group=None)
        for number, ((path, leaf), layout) in enumerate(zip(leaves, all_layouts, strict=True))
        if number in numbers
    }
    refused = {number: _idle(tap.layout) for number, tap in selected.items() if not tap.layout.is_weight}
    if "histogram" in statistics:
        grouped = {number for number, tap in selected.items() if tap.layout.groups > 1}
        refused |= dict.fromkeys(grouped, "the groups of its convolution have no histogram in common")
    model = _Model(apply, *split_arrays(params))
    uses = _uses(model, inputs, {n: tap for n, tap in selected.items() if n not in refused}, row_mask, refused)
    shares = repeated_uses(uses, refused)
    loose = {
        number: dataclasses.replace(tap, shares=shares.get(number, {}))
        for number, tap in selected.items()
        if number not in refused
    }
    groups = _groups([use for use in uses if use.leaf in loose], loose, [leaf for _, leaf in leaves], statistics, cross)
    taps = dict(loose)
    for place, group in enumerate(groups):
        taps[group.leaves[0]] = dataclasses.replace(loose[group.leaves[0]], group=place)
    reasons = {leaves[number][0]: refused[number] for number in sorted(refused)}
    streams = 2 if cross else 1
    step = _step(model, taps, row_mask, streams)
    return Program(
        leaves=leaves, treedef=treedef, layouts=all_layouts, refused=reasons, taps=taps, groups=groups, step=step
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Model:
    """`apply` over the array leaves alone; whatever else is in the tree is static."""

    apply: Callable[..., Any]
    arrays: list[Any]
    static: Static


def _check_names(statistics: Sequence[Statistic]) -> None:
    unknown = [name for name in statistics if name not in get_args(Statistic)]
    if unknown or not statistics or isinstance(statistics, str):
        raise ValueError(f"`statistics` must be a sequence of names among {get_args(Statistic)}, got {statistics!r}.")


def _selected(params: Params, all_layouts: list[LeafLayout], select: Selector | None) -> set[int]:
    marks = [layout.is_weight for layout in all_layouts] if select is None else jax.tree.leaves(select(params))
    selected = {number for number, mark in enumerate(marks) if mark}
    if not selected:
        raise ValueError("The model contracts or looks up no leaf of the tree: there are no inputs to gather.")
    return selected


def _idle(layout: LeafLayout) -> str:
    reason = f": {layout.reason}" if layout.reason else ""
    return f"it is never multiplied by an input (the model's use of it is {layout.kind!r}{reason})"


def _width(leaf: Any, layout: LeafLayout) -> int:
    return math.prod(leaf.shape[axis] for axis in layout.input_axes)


def _uses(
    model: _Model, inputs: tuple[Any, ...], taps: Mapping[int, Tap], row_mask: RowMask | None, refused: dict[int, str]
) -> list[Use]:
    """Every use of the tapped leaves, in execution order; nothing is computed. Adds to `refused`."""
    uses: dict[tuple[Any, ...], Use] = {}

    def note(use: Use) -> None:
        # JAX may trace the body of a loop more than once.
        uses.setdefault((use.place, use.leaf), use)

    def refuse(number: int, reason: str) -> None:
        refused.setdefault(number, reason)

    run = _runner(model, taps, row_mask, 1, note, refuse)
    dynamic, static = split_arrays(inputs)
    jax.eval_shape(lambda arrays, dynamic: run({}, (arrays,), dynamic, static), model.arrays, dynamic)
    reached = {use.leaf for use in uses.values()}
    for number in taps:
        if number not in reached:
            refuse(number, "none of its inputs are reached")
    return list(uses.values())


def _groups(
    uses: Sequence[Use],
    taps: Mapping[int, Tap],
    leaves: Sequence[Any],
    statistics: Sequence[Statistic],
    cross: bool,
) -> list[Group]:
    of_leaf: dict[int, list[Use]] = {}
    for use in uses:
        of_leaf.setdefault(use.leaf, []).append(use)
    together: dict[Any, list[int]] = {}
    for number, uses_of_it in of_leaf.items():
        shared, use = taps[number].layout.input_id, uses_of_it[0]
        # A leaf that is used twice has sums of its own, and so has one whose rows count otherwise than once.
        weighed = use.rows is not None and use.rows.multiples is not None
        alone = len(uses_of_it) > 1 or shared is None or use.signature is None or weighed
        # The same value may enter several branches, or a loop: only within one body it is read equally often.
        shape = _stack_shape(leaves[number], taps[number])
        key = ("leaf", number) if alone else (shared, use.body, use.signature, shape)
        together.setdefault(key, []).append(number)
    groups = [
        Group(
            leaves=tuple(numbers),
            place=of_leaf[numbers[0]][0].place,
            visits=None if (rows := of_leaf[numbers[0]][0].rows) is None else rows.visits,
            empty=_empty(leaves[numbers[0]], taps[numbers[0]], statistics, cross),
        )
        for numbers in together.values()
    ]
    return sorted(groups, key=lambda group: tuple(-1 if part is None else part for part in group.place))


def _stack_shape(leaf: Any, tap: Tap) -> tuple[int, ...]:
    sizes = tuple(leaf.shape[axis] for axis in tap.layout.stack_axes)
    return sizes if tap.layout.groups == 1 else (*sizes, tap.layout.groups)


def _empty(leaf: Any, tap: Tap, statistics: Sequence[Statistic], cross: bool) -> Statistics:
    if tap.layout.kind == "lookup":
        rows = math.prod(leaf.shape[axis] for axis in tap.layout.output_axes)
        abstract = jax.ShapeDtypeStruct((rows,), jnp.float32)
        return LookupCounts(count=jax.ShapeDtypeStruct((), jnp.float32), rows=abstract)  # type: ignore[arg-type]
    stack = _stack_shape(leaf, tap)
    return jax.eval_shape(lambda: empty_statistics(stack, tap.width, statistics, cross=cross))


def _step(model: _Model, taps: Mapping[int, Tap], row_mask: RowMask | None, streams: int) -> Callable[..., Totals]:
    run = _runner(model, taps, row_mask, streams, lambda use: None, None)
    compiled = jax.jit(run, static_argnums=(3, 5), donate_argnums=0)

    def step(totals: Totals, trees: tuple[Params, ...], inputs: tuple[Any, ...], active: Any = None) -> Totals:
        dynamic, static = split_arrays(inputs)
        mesh = shared_mesh((trees, dynamic))
        if mesh is not None:
            totals = {number: jax.device_put(each, statistics_shardings(each, mesh)) for number, each in totals.items()}
        return compiled(totals, tuple(split_arrays(tree)[0] for tree in trees), dynamic, static, active, mesh)

    return step


def _runner(
    model: _Model,
    taps: Mapping[int, Tap],
    row_mask: RowMask | None,
    streams: int,
    note: Callable[[Use], None],
    refuse: Callable[[int, str], None] | None,
) -> Callable[..., Totals]:
    def run(
        totals: Totals,
        trees: tuple[list[Any], ...],
        dynamic: list[Any],
        static: Any,
        active: Any = None,
        mesh: Mesh | None = None,
    ) -> Totals:
        inputs = static.filled(dynamic)
        mask = None if row_mask is None else row_mask(*inputs)
        logical = [[plain(leaf) for leaf in leaves] for leaves in trees]
        closed = traced(model.apply, model.static.filled(logical[-1]), inputs).closed
        # What reaches no output is no use: `trace.layouts` does not see it either.
        live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
        values = [
            Value(leaves, Facts((Origin.of(number, leaves[-1].shape),), data=False))
            if number in taps
            # Only tapped leaves differ between the streams.
            else Value(leaves[-1:], Facts(data=False))
            for number, leaves in zip(model.static.numbers, zip(*logical, strict=True), strict=True)
        ]
        shardings = {} if mesh is None else {n: statistics_shardings(each, mesh) for n, each in totals.items()}
        interpreter = Interpreter(
            taps, dict(totals), mask, active, shardings=shardings, count=streams, note=note, refuse=refuse
        )
        interpreter.run(Body(live, closed.consts), [*values, *(Value((x,)) for x in dynamic)])
        return interpreter.totals

    return run
