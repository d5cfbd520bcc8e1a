"""Loops and branches."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress._src.execution.runs import cut
from jaxcompress._src.execution.values import Runs, Weight, ignore
from jaxcompress._src.export.onnx.dimensions import is_static
from jaxcompress._src.export.onnx.graph import Body, Graph, Tensor
from jaxcompress._src.export.onnx.types import carrier
from jaxcompress._src.trace.walk import as_body

_SHORT = 4
"""Iterations that are always written one by one."""
_LONGEST = 256
"""Iterations over weights that are written one by one, so that the runtime can prepare each weight."""

Run = Callable[[Any, Sequence[Any]], list[Any]]
"""Writes a body: `(body, values) -> values`."""


def carried(eqn: Any) -> range:
    """The operands that an iteration replaces."""
    params = eqn.params
    if eqn.primitive.name == "scan":
        return range(params["num_consts"], params["num_consts"] + params["num_carry"])
    if eqn.primitive.name == "while":
        return range(params["cond_nconsts"] + params["body_nconsts"], len(eqn.invars))
    return range(0)


def scan(graph: Graph, eqn: Any, values: list[Any], run: Run) -> Sequence[Any]:
    """Iterations one by one where they are few or go over weights, else ONNX's `Scan`."""
    begin, length = eqn.params["num_consts"], eqn.params["length"]
    end = begin + eqn.params["num_carry"]
    consts, carry, stacks = values[:begin], values[begin:end], values[end:]
    if _is_unrolled(stacks, length):
        return _unrolled(graph, eqn, consts, carry, stacks, run)
    return _scan(graph, eqn, consts, carry, stacks, run)


def _is_unrolled(stacks: Sequence[Any], length: Any) -> bool:
    if not is_static(length):
        return False
    if any(isinstance(stack, Weight | Runs) for stack in stacks):
        return True
    weights = any(isinstance(stack, np.ndarray) and stack.ndim > 2 for stack in stacks)
    return length <= (_LONGEST if weights else _SHORT)


def _unrolled(
    graph: Graph, eqn: Any, consts: list[Any], carry: list[Any], stacks: list[Any], run: Run
) -> Sequence[Any]:
    length, body = eqn.params["length"], as_body(eqn.params["jaxpr"])
    outputs: list[list[Any]] = []
    order = range(length)
    for number in reversed(order) if eqn.params["reverse"] else order:
        results = run(body, [*consts, *carry, *(_entry(graph, stack, number) for stack in stacks)])
        carry = results[: len(carry)]
        outputs.append([graph.full(result) for result in results[len(carry) :]])
    if eqn.params["reverse"]:
        outputs.reverse()
    variables = eqn.outvars[len(carry) :]
    joined = [
        _stacked(graph, column, var.aval) for column, var in zip(zip(*outputs, strict=True), variables, strict=True)
    ]
    return [*carry, *(joined or [np.zeros(var.aval.shape, var.aval.dtype) for var in variables])]


def _entry(graph: Graph, stack: Any, number: int) -> Any:
    """One entry of a stack."""
    if isinstance(stack, np.ndarray):
        return stack[number]
    if isinstance(stack, Runs):
        return _entry(graph, cut(stack, number, number + 1, ignore), 0)
    if isinstance(stack, Weight):
        # As a scan does: the parts of such a leaf are stacked as it is.
        return Weight(jax.tree.map(lambda part: part[number], stack.array), stack.path)
    if isinstance(stack, jax.Array):
        return np.asarray(stack)[number]
    index = graph.scalar(number, np.int64)
    if is_static(stack.held[0]) and stack.held[0] == 1:
        index = graph.scalar(0, np.int64)
    name = graph.op("Gather", stack.name, index, axis=0)
    return Tensor(name, stack.held[1:], stack.shape[1:], stack.dtype)


def _stacked(graph: Graph, entries: Sequence[Tensor], result: Any) -> Tensor:
    rows = [graph.reshape(entry, (1, *entry.shape)).name for entry in entries]
    return graph.new(rows[0] if len(rows) == 1 else graph.op("Concat", *rows, axis=0), result)


def _scan(graph: Graph, eqn: Any, consts: list[Any], carry: list[Any], stacks: list[Any], run: Run) -> Sequence[Any]:
    body, count = as_body(eqn.params["jaxpr"]), len(carry)
    variables = body.jaxpr.invars[len(consts) :]
    begins = [graph.full(value).name for value in carry]
    scanned = [graph.full(value).name for value in stacks]
    inner = [graph.new(graph.fresh(), var.aval) for var in variables]
    inputs = [_typed(tensor) for tensor in inner]
    if not scanned:
        # An operator without anything to go over: the number of the iteration, which nothing reads.
        count_name = graph.op("Squeeze", graph.dimensions.size(eqn.params["length"]))
        scanned = [graph.op("Range", graph.scalar(0, np.int64), count_name, graph.scalar(1, np.int64))]
        inputs.append((graph.fresh(), np.dtype(np.int64), 0))
    with graph.scope() as nodes:
        results = [_output(graph, result) for result in run(body, [*consts, *inner])]
    attributes: dict[str, Any] = {"num_scan_inputs": len(scanned)}
    if eqn.params["reverse"]:
        attributes["scan_input_directions"] = [1] * len(scanned)
    if eqn.params["reverse"] and len(results) > count:
        attributes["scan_output_directions"] = [1] * (len(results) - count)
    inside = Body(inputs=tuple(inputs), outputs=tuple(_typed(result) for result in results), nodes=tuple(nodes))
    names = graph.ops("Scan", *begins, *scanned, outputs=len(results), body=inside, **attributes)
    return [graph.new(name, var.aval) for name, var in zip(names, eqn.outvars, strict=True)]


def while_loop(graph: Graph, eqn: Any, values: list[Any], run: Run) -> Sequence[Any]:
    """ONNX's `Loop`, whose body says at its end whether there is another iteration."""
    split = eqn.params["cond_nconsts"]
    end = split + eqn.params["body_nconsts"]
    condition, body = as_body(eqn.params["cond_jaxpr"]), as_body(eqn.params["body_jaxpr"])
    carry = [graph.full(value) for value in values[end:]]
    go_on = _condition(graph, run(condition, [*values[:split], *carry])[0])
    number, before = graph.fresh(), graph.fresh()
    inner = [graph.new(graph.fresh(), var.aval) for var in eqn.outvars]
    with graph.scope() as nodes:
        after = run(body, [*values[split:end], *inner])
        if condition.jaxpr.outvars[0].aval.shape:
            # Under `vmap`, with one condition for each entry: those that are done stay as they are.
            running = graph.full(run(condition, [*values[:split], *inner])[0])
            after = [_where(graph, running, new, old) for new, old in zip(after, inner, strict=True)]
        after = [_output(graph, result) for result in after]
        again = _output(graph, _condition(graph, run(condition, [*values[:split], *after])[0]))
    inside = Body(
        inputs=((number, np.dtype(np.int64), 0), (before, np.dtype(bool), 0), *(_typed(x) for x in inner)),
        outputs=(_typed(again), *(_typed(x) for x in after)),
        nodes=tuple(nodes),
    )
    names = graph.ops("Loop", "", go_on.name, *(x.name for x in carry), outputs=len(carry), body=inside)
    return [graph.new(name, var.aval) for name, var in zip(names, eqn.outvars, strict=True)]


def _condition(graph: Graph, value: Any) -> Tensor:
    """Whether any entry is to go on."""
    tensor = graph.full(value)
    if not tensor.shape:
        return tensor
    number = graph.cast(tensor.name, np.bool_, np.int32)
    number = graph.op("ReduceMax", number, graph.ints(*range(tensor.ndim)), keepdims=0)
    return Tensor(graph.cast(number, np.int32, np.bool_), (), (), np.dtype(bool))


def _where(graph: Graph, which: Tensor, new: Any, old: Tensor) -> Tensor:
    """Entries along the leading axes."""
    flag = graph.reshape(which, (*which.shape, *(1,) * (old.ndim - which.ndim)))
    return graph.chosen(flag, graph.full(new), old)


def cond(graph: Graph, eqn: Any, values: list[Any], run: Run) -> Sequence[Any]:
    """One branch where the index is known, else ONNX's `If`, several of them for more than two branches."""
    which, *operands = values
    branches = [as_body(branch) for branch in eqn.params["branches"]]
    if isinstance(which, np.ndarray):
        return run(branches[int(np.clip(int(which), 0, len(branches) - 1))], operands)
    index = graph.full(which)
    names = _branch(graph, index, 0, branches, operands, run, len(eqn.outvars))
    return [graph.new(name, var.aval) for name, var in zip(names, eqn.outvars, strict=True)]


def _branch(
    graph: Graph, index: Tensor, number: int, branches: Sequence[Any], operands: list[Any], run: Run, count: int
) -> tuple[str, ...]:
    if index.dtype == bool:
        is_last = index.name
    else:
        name = graph.cast(index.name, index.dtype, np.int64)
        is_last = graph.op("Greater", name, graph.scalar(number, np.int64))
    with graph.scope() as first:
        outputs = [_output(graph, result) for result in run(branches[number], operands)]
    kinds = tuple(_typed(result) for result in outputs)
    with graph.scope() as others:
        if number + 2 == len(branches):
            results = [_output(graph, result) for result in run(branches[number + 1], operands)]
        else:
            inner = _branch(graph, index, number + 1, branches, operands, run, count)
            results = [Tensor(name, out.held, out.shape, out.dtype) for name, out in zip(inner, outputs, strict=True)]
    this = Body(inputs=(), outputs=kinds, nodes=tuple(first))
    rest = Body(inputs=(), outputs=tuple(_typed(result) for result in results), nodes=tuple(others))
    return graph.ops("If", is_last, outputs=count, then_branch=rest, else_branch=this)


def _output(graph: Graph, value: Any) -> Tensor:
    """A value as a new one of the graph at hand, where what comes out of a body must be made."""
    tensor = graph.full(value)
    name = graph.fresh_identity(tensor.name)
    return Tensor(name, tensor.shape, tensor.shape, tensor.dtype)


def _typed(tensor: Tensor) -> tuple[str, np.dtype, int]:
    return tensor.name, carrier(tensor.dtype), tensor.ndim
