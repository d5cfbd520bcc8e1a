"""The interpreter behind a model that stops at its kernels."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from jaxcompress._src.calibration.pending import (
    Output,
    Weight,
    adds_bias,
    cut,
    is_float,
    is_open,
    moved,
    multiply,
    plain_value,
    rows_first,
)
from jaxcompress._src.calibration.site import LeafPart, Site
from jaxcompress._src.meshes import as_typed, on_auto_axes
from jaxcompress._src.trace.walk import Body, as_body, bind, called_body, walk_in_steps

Steps = Generator[Site, "tuple[Any, Any]", list[Any]]
Key = tuple[str, tuple[tuple[int, int], ...]]

Repeated = Literal["refuse", "first", "each"]
"""A kernel in several matmuls is refused, or stops the model once, or each time."""


class PausingRun:
    """The interpreter. It is a generator all the way down, so that it can stop inside of nested functions."""

    def __init__(
        self,
        paths: frozenset[str],
        read_once: frozenset[str],
        repeated: Repeated = "refuse",
        refused: dict[str, str] | None = None,
    ) -> None:
        self.paths = paths
        # A leaf that something else reads, too, is no bias: another value would change that as well.
        self.read_once = read_once
        self.repeated = repeated
        # Path -> why it cannot stop there; None: it raises.
        self.refused = refused
        self.uses: Counter[Key] = Counter()
        self.replies: dict[tuple[Key, int], tuple[LeafPart | None, Any, Any]] = {}

    def body(self, body: Body, values: Sequence[Any]) -> Steps:
        return walk_in_steps(body, values, self.equation)

    def equation(self, eqn: Any, values: list[Any]) -> Steps:
        name, first = eqn.primitive.name, values[0] if values else None
        if name == "dot_general" and (output := (yield from self.output(eqn, values))) is not None:
            return [output]
        if name in ("add", "add_any") and any(isinstance(value, Output) for value in values):
            return [(yield from self.add(eqn, *values))]
        if name == "convert_element_type" and isinstance(first, Output) and is_float(eqn.params["new_dtype"]):
            return [dataclasses.replace(first, dtype=eqn.params["new_dtype"], written=[])]
        if name == "transpose" and isinstance(first, Output) and is_open(first):
            axes = tuple(first.axes[axis] for axis in eqn.params["permutation"])
            return [dataclasses.replace(first, axes=axes, aval=eqn.outvars[0].aval, written=[])]
        if name == "scan" and eqn.params["length"] and any(self.is_kernel(value) for value in values):
            return (yield from self.scan(eqn, values))
        if name in _WHOLE:
            self.check_outside(name, values)
        elif (body := called_body(eqn)) is not None:
            return (yield from self.body(body, values))
        plain = []
        for value in values:
            plain.append((yield from self.plain(value)))
        results = bind(eqn, plain)
        if isinstance(first, Weight) and name == "slice" and (entry := cut(eqn, first)) is not None:
            return [dataclasses.replace(entry, value=results[0])]
        if isinstance(first, Weight) and (axes := moved(eqn, first.axes)) is not None:
            return [dataclasses.replace(first, value=results[0], axes=axes)]
        return results

    def scan(self, eqn: Any, values: list[Any]) -> Steps:
        """Iteration after iteration: the entries of its stacks are kernels of their own."""
        length, consts, carried = (eqn.params[name] for name in ("length", "num_consts", "num_carry"))
        self.check_outside("scan", values[: consts + carried])
        given, carry = ([plain_value(value) for value in part] for part in (values[:consts], values[consts:][:carried]))
        stacks = []
        for value in values[consts + carried :]:
            stacks.append(value if isinstance(value, Weight) else (yield from self.plain(value)))
        written: dict[int, list[Any]] = {}
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            body = as_body(eqn.params["jaxpr"])
            avals = [var.aval for var in body.jaxpr.invars[consts + carried :]]
            entries = [_entry(stack, i, aval) for stack, aval in zip(stacks, avals, strict=True)]
            results = yield from self.body(body, [*given, *carry, *entries])
            carry, written[i] = results[:carried], []
            for value in results[carried:]:
                written[i].append((yield from self.plain(value)))
        columns = zip(*(written[i] for i in range(length)), strict=True)
        avals = [var.aval for var in eqn.outvars[carried:]]
        return [*carry, *(as_typed(_stack(list(c)), aval) for c, aval in zip(columns, avals, strict=True))]

    def output(self, eqn: Any, values: list[Any]) -> Generator[Site, "tuple[Any, Any]", Output | None]:
        found = [i for i, value in enumerate(values) if self.is_kernel(value)]
        if not found:
            return None
        place, weight = found[0], values[found[0]]
        contracted, batch = eqn.params["dimension_numbers"]
        inputs = tuple(weight.axes[axis] for axis in contracted[place])
        outputs = tuple(axis for i, axis in enumerate(weight.axes) if i not in contracted[place])
        if batch[place] or not inputs or -1 in weight.axes:
            return self.refuse(
                weight.path,
                f"Leaf {weight.path!r} must be in a plain matmul; found a shape of {tuple(jnp.shape(weight.value))}, "
                f"contracted over {tuple(contracted[place])}, batched over {tuple(batch[place])}.",
            )
        key = weight.path, weight.entry
        if self.uses[key] and self.repeated == "refuse":
            return self.refuse(
                weight.path, f"Leaf {weight.path!r} is in more than one matmul: it cannot be fitted to all of them."
            )
        self.uses[key] += 1
        order = sorted(range(len(inputs)), key=lambda i: inputs[i])
        summed = [contracted[1 - place][i] for i in order]
        other = yield from self.plain(values[1 - place])
        kernel = LeafPart(
            path=weight.path, entry=weight.entry, input_axes=tuple(sorted(inputs)), output_axes=tuple(sorted(outputs))
        )
        site = Site(kernel=kernel, inputs=_rows(summed, other), residual=None, bias=None)
        written = eqn.outvars[0].aval
        times = functools.partial(multiply, weight.value.dtype, eqn.params["precision"], written.dtype)
        rank = len(written.shape) - len(outputs)
        own = tuple(rank + sorted(outputs).index(axis) for axis in outputs)
        # The axes of the first operand come first.
        axes = (*own, *range(rank)) if place == 0 else (*range(rank), *own)
        shape = tuple(written.shape[axes.index(axis)] for axis in range(len(axes)))
        use = self.uses[key] - 1 if self.repeated == "each" else 0
        return Output(site, times, shape, axes, written, written.dtype, use)

    def add(self, eqn: Any, left: Any, right: Any) -> Generator[Site, "tuple[Any, Any]", Any]:
        """A bias and a residual may come in either order, once; of two outputs the first is the other's residual."""
        if is_open(left) and is_open(right):
            left = yield from self.plain(left)
        output, other = (left, right) if is_open(left) else (right, left)
        if not is_open(output):
            return bind(eqn, [(yield from self.plain(left)), (yield from self.plain(right))])[0]
        if output.site.bias is None and isinstance(other, Weight) and self.is_bias(other, output):
            ordered = rows_first(other, output)
            axes = tuple(axis for axis in ordered.axes if axis >= 0)
            bias = LeafPart(path=other.path, entry=other.entry, output_axes=axes)
            value = _matrix(output.outputs, ordered.value, 0)
            site = dataclasses.replace(output.site, bias=bias)
            return dataclasses.replace(output, site=site, bias=value, written=[])
        added = yield from self.plain(other)
        if output.site.residual is None and jnp.shape(added) == output.aval.shape:
            residual = _matrix(output.outputs, on_auto_axes(jnp.transpose)(added, output.order))
            site = dataclasses.replace(output.site, residual=residual)
            return dataclasses.replace(output, site=site, written=[])
        written = yield from self.plain(output)
        return bind(eqn, [written, added] if output is left else [added, written])[0]

    def plain(self, value: Any) -> Generator[Site, "tuple[Any, Any]", Any]:
        """The value itself; stops if a kernel is to write it."""
        if not isinstance(value, Output):
            return plain_value(value)
        if value.written:
            return value.written[0]
        kernel, bias = yield from self.reply(value)
        site = value.site
        parts = site.inputs, kernel, None if site.bias is None else bias, site.residual
        value.written.append(as_typed(_write(value.multiply, value.shape, value.axes, value.dtype, *parts), value.aval))
        return value.written[0]

    def reply(self, value: Output) -> Generator[Site, "tuple[Any, Any]", tuple[Any, Any]]:
        """The kernel and bias to go on with; what is read in several ways stops the model at the first of them."""
        key = (value.site.kernel.path, value.site.kernel.entry), value.use
        if key not in self.replies:
            # Not the site: it would hold the inputs of every kernel to the end.
            self.replies[key] = (value.site.bias, *(yield value.site))
        fitted, kernel, bias = self.replies[key]
        return kernel, bias if fitted == value.site.bias else value.bias

    def is_kernel(self, value: Any) -> bool:
        return isinstance(value, Weight) and value.path in self.paths

    def is_bias(self, other: Weight, output: Output) -> bool:
        same_rank = len(other.axes) == len(output.axes)
        return same_rank and other.path in self.read_once and adds_bias(rows_first(other, output), output)

    def refuse(self, path: str, message: str) -> None:
        if self.refused is None:
            raise ValueError(message)
        self.refused.setdefault(path, message)

    def check_outside(self, name: str, values: list[Any]) -> None:
        for value in values:
            if self.is_kernel(value):
                self.refuse(
                    value.path, f"Leaf {value.path!r} is used as a whole inside a `{name}`, where it cannot be fitted."
                )


def _entry(stack: Any, index: int, aval: Any) -> Any:
    if not isinstance(stack, Weight):
        return as_typed(_cut(stack, index), aval)
    entry = stack.at(index)
    if not isinstance(entry, Weight):
        return as_typed(entry, aval)
    return dataclasses.replace(entry, value=as_typed(entry.value, aval))


@on_auto_axes
def _cut(stack: Any, index: int) -> Any:
    return stack[index]


@on_auto_axes
def _stack(parts: list[Any]) -> Any:
    return jnp.stack(parts)


@on_auto_axes
def _rows(summed: Sequence[int], x: Any) -> Any:
    """The axes that are summed over, last and as one."""
    depth = math.prod(x.shape[axis] for axis in summed)
    return jnp.moveaxis(x, summed, range(-len(summed), 0)).reshape(-1, depth)


@on_auto_axes
def _matrix(outputs: int, x: Any, row: Any = slice(None)) -> Any:
    return x.reshape(-1, outputs)[row]


@on_auto_axes
def _write(
    times: Callable[..., Any],
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    dtype: Any,
    inputs: Any,
    kernel: Any,
    bias: Any,
    residual: Any,
) -> Any:
    """What a kernel writes: product, bias, residual."""
    written = times(inputs, kernel)
    # A float32 bias is added to a bfloat16 product after a cast.
    written = written.astype(jnp.promote_types(written.dtype, dtype))
    if bias is not None:
        written = written + jnp.asarray(bias, written.dtype)[None, :]
    if residual is not None:
        written = written + residual
    return written.astype(dtype).reshape(shape).transpose(axes)


_WHOLE = frozenset({"scan", "while", "cond", "shard_map"})
