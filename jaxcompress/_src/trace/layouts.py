"""Layouts, execution order and FLOPs of every leaf, from one abstract trace."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from jaxcompress._src.trace.axis_rules import free_axes, is_cast
from jaxcompress._src.trace.contraction import Roles, entries, is_by_expert, roles, share
from jaxcompress._src.trace.facts import Facts, facts_of, follow
from jaxcompress._src.trace.layout import LeafKind, LeafLayout
from jaxcompress._src.trace.origin import Origin
from jaxcompress._src.trace.traced import traced
from jaxcompress._src.trace.walk import Body, as_body, called_body, walk
from jaxcompress._src.types import Params, is_compressed


def layouts(apply: Callable[..., Any], params: Params, *inputs: Any) -> Params:
    """What `apply` does with each leaf, read from its jaxpr; nothing is computed.

    Uses that do not reach an output are ignored. Matmuls inside `scan` count once per iteration, those of every branch
    of `cond` once, those of `while` once. When a leaf is contracted more than once, its first contraction gives the
    axes.

    Args:
        apply: `(params, *inputs) -> outputs`, pure.
        params: the tree; arrays, `jax.ShapeDtypeStruct` or compressed arrays.
        *inputs: trees of arrays or `jax.ShapeDtypeStruct`; anything else (flags, None) is static.

    Returns:
        A tree of `LeafLayout` of the structure of `params`; leaves that are no arrays get kind "other" without axes.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(params, x):
        ...     return jnp.einsum("bi,hio->bho", x, params["kernel"]) + params["bias"]
        >>> params = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((1, 2, 4))}
        >>> by_leaf = layouts(apply, params, jnp.ones((5, 3)))
        >>> kernel = by_leaf["kernel"]
        >>> kernel.input_axes, kernel.output_axes, kernel.flops, by_leaf["bias"].kind
        ((1,), (0, 2), 240, 'other')
    """
    model = traced(apply, params, inputs)
    jaxpr = model.closed.jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    recorder = _Recorder(itertools.count())
    origins = [Origin.of(number, leaf.shape) for number, leaf in zip(model.numbers, model.leaves, strict=True)]
    values = [recorder.new(Facts((origin,), data=False)) for origin in origins]
    values += [recorder.new() for _ in model.values]
    recorder.consume(walk(Body(live, model.closed.consts), values, recorder.visit))
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_compressed)
    known = set(model.numbers)
    flat = [
        _layout(recorder.uses.get(i), leaf) if i in known else LeafLayout(kind="other", reason="it is no array")
        for i, leaf in enumerate(leaves)
    ]
    return treedef.unflatten(_renumbered(flat, recorder))


@dataclasses.dataclass
class _Uses:
    """What has been seen of one leaf."""

    order: int
    kinds: set[str] = dataclasses.field(default_factory=set)
    axes: dict[str, tuple[frozenset[int], frozenset[int]]] = dataclasses.field(default_factory=dict)
    flops: int = 0
    input_id: int | None = None
    reason: str = ""
    spread: bool | None = None
    groups: int | None = None
    refusal: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """What the walk carries.

    Attributes:
        facts: about the value.
        source: the same number, or pair of numbers, for the casts of one value.
        lost: leaves that went into it in ways that nothing here follows, each with what happened to it.
    """

    facts: Facts
    source: Any
    lost: Mapping[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Recorder:
    """Notes the uses of leaves."""

    ids: "itertools.count[int]"
    repeats: int = 1
    uses: dict[int, _Uses] = dataclasses.field(default_factory=dict)
    inputs: dict[Any, int] = dataclasses.field(default_factory=dict)
    constants: dict[int, tuple[_Value, Any]] = dataclasses.field(default_factory=dict)

    def visit(self, eqn: Any, values: list[Any]) -> Sequence[_Value]:
        values = [self.value(value) for value in values]
        handler = _HANDLERS.get(eqn.primitive.name)
        if handler is not None and (outputs := handler(self, eqn, values)) is not None:
            return outputs
        # What is inside sees parts of the leaves, in shapes of their own.
        opaque = eqn.primitive.name in ("shard_map", "pallas_call")
        body = None if opaque else called_body(eqn)
        if body is not None:
            return [self.value(value) for value in walk(body, values, self.visit)]
        about = follow(eqn, [value.facts for value in values])
        carried = {origin.leaf for facts in about for origin in facts.origins}.union(*(each.absent for each in about))
        reason = f"it goes into `{eqn.primitive.name}`" + (", which is not looked into" if opaque else "")
        for value, var in zip(values, eqn.invars, strict=True):
            # What is added to activations is a bias, or learned positions.
            added = eqn.primitive.name in ("add", "add_any", "sub") and any(other.facts.data for other in values)
            spread = added or _is_spread(value.facts.origins, var.aval.shape, eqn.outvars[0].aval.shape)
            self.consume([value], reason, carried, spread=spread and not opaque)
        lost = {}
        if not any(facts.data for facts in about):
            lost = {number: reason for value in values for number in self.leaves(value) - carried}
            lost |= {number: why for value in values for number, why in value.lost.items()}
        return [_Value(facts, values[0].source if is_cast(eqn) else next(self.ids), lost) for facts in about]

    def value(self, value: Any) -> _Value:
        """What is carried of a value, or of a constant of the program."""
        if isinstance(value, _Value):
            return value
        if id(value) not in self.constants:
            # The constant, too: another one could get its number.
            self.constants[id(value)] = self.new(facts_of(value)), value
        return self.constants[id(value)][0]

    def new(self, facts: Facts | None = None) -> _Value:
        """A value of a source of its own."""
        return _Value(Facts() if facts is None else facts, next(self.ids))

    def leaves(self, value: _Value) -> set[int]:
        """That it is a linear function of."""
        return {origin.leaf for origin in value.facts.origins}

    def consume(
        self,
        values: Sequence[Any],
        reason: str = "the model returns it",
        carried: Collection[int] = (),
        *,
        spread: bool = False,
    ) -> None:
        """Notes a use that is neither a contraction nor a look-up, of all leaves but those carried on."""
        for origin in (origin for value in values for origin in self.value(value).facts.origins):
            use = self._use(origin.leaf)
            if origin.leaf not in carried:
                use.kinds.add("lookup" if origin.gathered and "lookup" in use.axes else "other")
                use.spread = spread and use.spread is not False
                use.reason = use.reason or reason

    def contract(
        self, kind: str, values: Sequence[_Value], axes: tuple[Sequence[int], Sequence[int], Sequence[int]], flops: int
    ) -> None:
        """Notes a matmul or convolution of the first value, a re-arranged leaf, with the second.

        Args:
            kind: which.
            values: both.
            axes: of the first value: summed over, of both operands, the others.
            flops: of the whole.
        """
        value, other = values
        for number, why in value.lost.items():
            self._use(number).refusal = why
        for origin in value.facts.origins:
            if origin.gathered and not other.facts.data:
                self.consume([_Value(Facts((origin,)), 0)], "rows of it are gathered")
                continue
            use = self._use(origin.leaf)
            if value.facts.origin_of(origin.leaf) is None:
                use.refusal = "it is added to a re-arrangement of itself before a matmul"
                continue
            try:
                axis_roles = roles(origin, *axes)
            except ValueError as err:
                use.refusal = str(err)
                continue
            use.kinds.add(kind)
            use.axes.setdefault("contracted", (axis_roles.inputs, axis_roles.outputs))
            use.flops += round(flops * share(origin)) * self.repeats
            if use.input_id is None and not other.facts.origins:
                key = other.source, *_order_of_inputs(origin, axes[0], axis_roles)
                use.input_id = self.inputs.setdefault(key, len(self.inputs))

    def look_up(self, value: _Value, rows: Sequence[int]) -> None:
        """Notes a gather of rows."""
        for origin in value.facts.origins:
            others = [axis for axis in range(len(origin.axes)) if axis not in rows]
            numbers = [frozenset(k for place in part for k in origin.axes[place].tables) for part in (others, rows)]
            self._use(origin.leaf).axes.setdefault("lookup", (numbers[0], numbers[1]))

    def inside(self, repeats: int) -> "_Recorder":
        """The same recorder, inside a loop."""
        return dataclasses.replace(self, repeats=self.repeats * repeats)

    def _use(self, leaf: int) -> _Uses:
        return self.uses.setdefault(leaf, _Uses(order=len(self.uses)))


def _order_of_inputs(origin: Origin, summed: Sequence[int], axis_roles: Roles) -> tuple[Any, ...]:
    """Two leaves that meet the same input in different orders, or scaled, do not have the same input."""
    order = entries(origin, sorted(summed), sorted(axis_roles.inputs))
    scaled = object() if origin.factors or origin.when else None
    return None if np.array_equal(order, np.arange(len(order))) else order.tobytes(), scaled


def _dot_general(recorder: _Recorder, eqn: Any, values: list[_Value]) -> Sequence[_Value]:
    (contracted, batch), shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    flops = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted[0])
    for side in (0, 1):
        both = values[side], values[1 - side]
        recorder.contract("matmul", both, (contracted[side], batch[side], free_axes(eqn, side)), flops)
    return [recorder.new(Facts(data=any(value.facts.data for value in values)))]


def _conv(recorder: _Recorder, eqn: Any, values: list[_Value]) -> Sequence[_Value]:
    out_axis, *in_axes = eqn.params["dimension_numbers"].rhs_spec
    kernel = eqn.invars[1].aval.shape
    flops = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[axis] for axis in in_axes)
    recorder.contract("conv", values[::-1], (in_axes, (), [out_axis]), flops)
    for number in recorder.leaves(values[1]):
        use = recorder.uses[number]
        use.groups = use.groups or eqn.params["feature_group_count"]
    recorder.consume(values[:1], "a convolution slides over it")
    return [recorder.new(Facts(data=any(value.facts.data for value in values)))]


def _ragged_dot(recorder: _Recorder, eqn: Any, values: list[_Value]) -> Sequence[_Value]:
    numbers, shape = eqn.params["ragged_dot_dimension_numbers"], eqn.invars[1].aval.shape
    summed = numbers.dot_dimension_numbers[0][1]
    name = f"it goes into `{eqn.primitive.name}`"
    recorder.consume([values[0], *values[2:]], f"{name}, as the ragged operand or the sizes of its parts")
    if not is_by_expert(eqn):
        recorder.consume(values[1:2], f"{name}, but not as one matrix for each part of the rows")
    else:
        stack = numbers.rhs_group_dimensions
        flops = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in summed)
        # The same rows in other parts are another input.
        other = dataclasses.replace(values[0], source=(values[0].source, values[2].source))
        free = [axis for axis in range(len(shape)) if axis not in (*summed, *stack)]
        recorder.contract("matmul", (values[1], other), (summed, stack, free), flops)
    return [recorder.new(Facts(data=any(value.facts.data for value in values)))]


def _gather(recorder: _Recorder, eqn: Any, values: list[_Value]) -> Sequence[_Value] | None:
    if not values[0].facts.origins:
        return None
    numbers = eqn.params["dimension_numbers"]
    rows = [axis for axis in numbers.collapsed_slice_dims if axis in numbers.start_index_map]
    if rows:
        recorder.look_up(values[0], rows)
    (facts,) = follow(eqn, [value.facts for value in values])
    if facts.origins:
        # In a known order: a look-up if it is used as rows, a re-arrangement if it is contracted.
        return [recorder.new(facts)]
    if rows:
        for number in recorder.leaves(values[0]):
            recorder.uses[number].kinds.add("lookup")
        recorder.consume(values[1:], "it is an index")
    else:
        recorder.consume(values, "entries of it are gathered, not rows")
    return [recorder.new()]


def _scan(recorder: _Recorder, eqn: Any, values: list[_Value]) -> Sequence[_Value]:
    consts = eqn.params["num_consts"]
    carried = consts + eqn.params["num_carry"]
    inner = recorder.inside(eqn.params["length"])
    recorder.consume(values[consts:carried], "it is carried through a loop")
    # A carry changes from step to step: a leaf in it is no re-arrangement of itself inside.
    carry = [recorder.new() for _ in range(eqn.params["num_carry"])]
    sliced = [_scanned(recorder, value) for value in values[carried:]]
    results = walk(as_body(eqn.params["jaxpr"]), [*values[:consts], *carry, *sliced], inner.visit)
    inner.consume(results, "a loop returns it")
    return [recorder.new() for _ in eqn.outvars]


def _scanned(recorder: _Recorder, value: _Value) -> _Value:
    origins = tuple(origin.scanned(None) for origin in value.facts.origins)
    return _Value(Facts(origins, value.facts.data), next(recorder.ids), value.lost)


def _while(recorder: _Recorder, eqn: Any, values: list[_Value]) -> Sequence[_Value]:
    cond_end = eqn.params["cond_nconsts"]
    body_end = cond_end + eqn.params["body_nconsts"]
    recorder.consume(values[body_end:], "it is carried through a loop")
    carry = [recorder.new() for _ in values[body_end:]]
    for name, consts in (("cond_jaxpr", values[:cond_end]), ("body_jaxpr", values[cond_end:body_end])):
        recorder.consume(walk(as_body(eqn.params[name]), [*consts, *carry], recorder.visit), "a loop returns it")
    return [recorder.new() for _ in eqn.outvars]


def _cond(recorder: _Recorder, eqn: Any, values: list[_Value]) -> Sequence[_Value]:
    for branch in eqn.params["branches"]:
        recorder.consume(walk(as_body(branch), values[1:], recorder.visit), "a branch returns it")
    return [recorder.new() for _ in eqn.outvars]


_HANDLERS: dict[str, Callable[[_Recorder, Any, list[_Value]], Sequence[_Value] | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
    "gather": _gather,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _is_spread(origins: Sequence[Origin], shape: Sequence[int], result: Sequence[int]) -> bool:
    """Whether a leaf has new axes, or is repeated along its axes of size 1: as biases are to meet activations."""
    repeated = len(shape) == len(result) and any(before < after for before, after in zip(shape, result, strict=True))
    return bool(origins) and (repeated or any(not axis.tables for axis in origins[0].axes))


def _layout(use: _Uses | None, leaf: Any) -> LeafLayout:
    every = frozenset(range(len(leaf.shape)))
    if use is None:
        return LeafLayout(kind="unused", output_axes=tuple(sorted(every)))
    if use.refusal:
        return LeafLayout(kind="other", output_axes=tuple(sorted(every)), order=use.order, reason=use.refusal)
    contracted = use.kinds & {"matmul", "conv"}
    if not contracted and "lookup" not in use.kinds:
        outputs = tuple(sorted(every))
        return LeafLayout(
            kind="other", output_axes=outputs, order=use.order, reason=use.reason, spread=bool(use.spread)
        )
    inputs, outputs = use.axes["contracted" if contracted else "lookup"]
    kind: LeafKind = "lookup"
    if contracted:
        kind = "tied" if "lookup" in use.kinds else "conv" if "conv" in contracted else "matmul"
    return LeafLayout(
        kind=kind,
        stack_axes=tuple(sorted(every - inputs - outputs)),
        input_axes=tuple(sorted(inputs)),
        output_axes=tuple(sorted(outputs - inputs)),
        flops=use.flops,
        order=use.order,
        input_id=use.input_id,
        groups=(use.groups or 1) if kind == "conv" else 1,
    )


def _renumbered(flat: list[LeafLayout], recorder: _Recorder) -> list[LeafLayout]:
    """Input ids counted from 0, in execution order."""
    by_order = sorted(recorder.uses.values(), key=lambda use: use.order)
    ids = dict.fromkeys(use.input_id for use in by_order if use.input_id is not None)
    numbers: dict[int | None, int] = {number: i for i, number in enumerate(ids)}
    return [dataclasses.replace(layout, input_id=numbers.get(layout.input_id)) for layout in flat]
