"""Layouts, execution order and FLOPs of every leaf, from one abstract trace."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.interpreters import partial_eval

from jaxcompress.meshes import abstract
from jaxcompress.trace._layout import LeafKind, LeafLayout
from jaxcompress.trace._origin import Origin, rearrange
from jaxcompress.trace._walk import Body, as_body, called_body, walk
from jaxcompress.types import Params, is_compressed


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
        >>> found = layouts(apply, params, jnp.ones((5, 3)))
        >>> found["kernel"].input_axes, found["kernel"].output_axes, found["kernel"].flops, found["bias"].kind
        ((1,), (0, 2), 240, 'other')
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_compressed)
    arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    input_leaves, input_treedef = jax.tree.flatten(inputs)
    dynamic = [i for i, leaf in enumerate(input_leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def flat_apply(weights: list[Any], values: list[Any]) -> Any:
        filled, filled_inputs = list(leaves), list(input_leaves)
        for i, weight in zip(arrays, weights, strict=True):
            filled[i] = weight
        for i, value in zip(dynamic, values, strict=True):
            filled_inputs[i] = value
        return apply(treedef.unflatten(filled), *input_treedef.unflatten(filled_inputs))

    shapes = [abstract(leaves[i]) for i in arrays]
    closed = jax.make_jaxpr(flat_apply)(shapes, [input_leaves[i] for i in dynamic])
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    recorder = _Recorder(itertools.count())
    origins = [Origin(i, tuple((axis,) for axis in range(len(leaves[i].shape)))) for i in arrays]
    values = [*origins, *(next(recorder.ids) for _ in dynamic)]
    recorder.consume(walk(Body(live, closed.consts), values, recorder.visit))
    known = set(arrays)
    found = [
        _layout(recorder.uses.get(i), leaf) if i in known else LeafLayout(kind="other", reason="it is no array")
        for i, leaf in enumerate(leaves)
    ]
    return treedef.unflatten(_renumbered(found, recorder))


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


@dataclasses.dataclass
class _Recorder:
    """Carries, for each value, its `Origin` or the number of its source, and notes the uses of leaves."""

    ids: "itertools.count[int]"
    repeats: int = 1
    uses: dict[int, _Uses] = dataclasses.field(default_factory=dict)

    def visit(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        handler = _HANDLERS.get(eqn.primitive.name)
        if handler is not None:
            return handler(self, eqn, values)
        if isinstance(values[0] if values else None, Origin):
            moved = rearrange(eqn, values[0])
            if moved is not None:
                return [moved]
        elif eqn.primitive.name in ("convert_element_type", "copy", "sharding_constraint", "reshard"):
            return [values[0]]
        # What is inside sees parts of the leaves, in shapes of their own.
        opaque = eqn.primitive.name in ("shard_map", "pallas_call")
        body = None if opaque else called_body(eqn)
        if body is not None:
            return walk(body, values, self.visit)
        reason = f"it goes into `{eqn.primitive.name}`" + (", which is not looked into" if opaque else "")
        for value, var in zip(values, eqn.invars, strict=True):
            spread = isinstance(value, Origin) and _is_spread(value, var.aval.shape, eqn.outvars[0].aval.shape)
            self.consume([value], reason, spread=spread and not opaque)
        return [next(self.ids) for _ in eqn.outvars]

    def consume(self, values: Sequence[Any], reason: str = "the model returns it", *, spread: bool = False) -> None:
        """Notes a use that is neither a contraction nor a look-up."""
        for value in values:
            if isinstance(value, Origin):
                use = self._use(value)
                use.kinds.add("other")
                use.spread = spread and use.spread is not False
                use.reason = use.reason or reason

    def contract(
        self, kind: str, origin: Origin, summed: Sequence[int], free: Sequence[int], other: Any, flops: int
    ) -> None:
        """Notes a matmul or convolution over the axes `summed` of a re-arranged leaf."""
        use = self._use(origin)
        use.kinds.add(kind)
        use.axes.setdefault("contracted", (origin.over(summed), origin.over(free)))
        use.flops += flops * self.repeats
        if use.input_id is None and not isinstance(other, Origin):
            use.input_id = other

    def look_up(self, origin: Origin, rows: Sequence[int]) -> None:
        """Notes a gather of rows."""
        use = self._use(origin)
        use.kinds.add("lookup")
        others = [axis for axis in range(len(origin.axes)) if axis not in rows]
        use.axes.setdefault("lookup", (origin.over(others), origin.over(rows)))

    def inside(self, repeats: int) -> "_Recorder":
        """The same recorder, inside a loop."""
        return dataclasses.replace(self, repeats=self.repeats * repeats)

    def _use(self, origin: Origin) -> _Uses:
        return self.uses.setdefault(origin.leaf, _Uses(order=len(self.uses)))


def _dot_general(recorder: _Recorder, eqn: Any, values: list[Any]) -> Sequence[Any]:
    (contracted, batch), shapes = eqn.params["dimension_numbers"], [var.aval.shape for var in eqn.invars]
    flops = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted[0])
    for side in (0, 1):
        if isinstance(values[side], Origin):
            free = [a for a in range(len(shapes[side])) if a not in contracted[side] and a not in batch[side]]
            recorder.contract("matmul", values[side], contracted[side], free, values[1 - side], flops)
    return [next(recorder.ids)]


def _conv(recorder: _Recorder, eqn: Any, values: list[Any]) -> Sequence[Any]:
    out_axis, *in_axes = eqn.params["dimension_numbers"].rhs_spec
    kernel = eqn.invars[1].aval.shape
    flops = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel[axis] for axis in in_axes)
    if isinstance(values[1], Origin):
        recorder.contract("conv", values[1], in_axes, [out_axis], values[0], flops)
    recorder.consume(values[:1], "a convolution slides over it")
    return [next(recorder.ids)]


def _gather(recorder: _Recorder, eqn: Any, values: list[Any]) -> Sequence[Any]:
    numbers = eqn.params["dimension_numbers"]
    rows = [axis for axis in numbers.collapsed_slice_dims if axis in numbers.start_index_map]
    if isinstance(values[0], Origin) and rows:
        recorder.look_up(values[0], rows)
        recorder.consume(values[1:], "it is an index")
    else:
        recorder.consume(values, "entries of it are gathered, not rows")
    return [next(recorder.ids)]


def _scan(recorder: _Recorder, eqn: Any, values: list[Any]) -> Sequence[Any]:
    carried = eqn.params["num_consts"] + eqn.params["num_carry"]
    inner = recorder.inside(eqn.params["length"])
    recorder.consume(values[eqn.params["num_consts"] : carried], "it is carried through a loop")
    # A carry changes from step to step: a leaf in it is no re-arrangement of itself inside.
    carry = [next(recorder.ids) for _ in range(eqn.params["num_carry"])]
    sliced = [v.without(0) if isinstance(v, Origin) else next(recorder.ids) for v in values[carried:]]
    body = as_body(eqn.params["jaxpr"])
    inner.consume(walk(body, [*values[: eqn.params["num_consts"]], *carry, *sliced], inner.visit))
    return [next(recorder.ids) for _ in eqn.outvars]


def _while(recorder: _Recorder, eqn: Any, values: list[Any]) -> Sequence[Any]:
    cond_end = eqn.params["cond_nconsts"]
    body_end = cond_end + eqn.params["body_nconsts"]
    recorder.consume(values[body_end:], "it is carried through a loop")
    carry = [next(recorder.ids) for _ in values[body_end:]]
    recorder.consume(walk(as_body(eqn.params["cond_jaxpr"]), [*values[:cond_end], *carry], recorder.visit))
    recorder.consume(walk(as_body(eqn.params["body_jaxpr"]), [*values[cond_end:body_end], *carry], recorder.visit))
    return [next(recorder.ids) for _ in eqn.outvars]


def _cond(recorder: _Recorder, eqn: Any, values: list[Any]) -> Sequence[Any]:
    for branch in eqn.params["branches"]:
        recorder.consume(walk(as_body(branch), values[1:], recorder.visit))
    return [next(recorder.ids) for _ in eqn.outvars]


_HANDLERS: dict[str, Callable[[_Recorder, Any, list[Any]], Sequence[Any]]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _is_spread(origin: Origin, shape: Sequence[int], result: Sequence[int]) -> bool:
    """Whether a leaf has new axes, or is repeated along its axes of size 1: as biases are to meet activations."""
    repeated = len(shape) == len(result) and any(own < new for own, new in zip(shape, result, strict=True))
    return repeated or any(not axes for axes in origin.axes)


def _layout(use: _Uses | None, leaf: Any) -> LeafLayout:
    every = frozenset(range(len(leaf.shape)))
    if use is None:
        return LeafLayout(kind="unused", output_axes=tuple(sorted(every)))
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
    )


def _renumbered(found: list[LeafLayout], recorder: _Recorder) -> list[LeafLayout]:
    """Input ids counted from 0, in execution order."""
    by_order = sorted(recorder.uses.values(), key=lambda use: use.order)
    ids = dict.fromkeys(use.input_id for use in by_order if use.input_id is not None)
    numbers: dict[int | None, int] = {number: i for i, number in enumerate(ids)}
    return [dataclasses.replace(layout, input_id=numbers.get(layout.input_id)) for layout in found]
