"""A model that stops at its kernels, and goes on with others."""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcompress.calibration._site import LeafPart, Site
from jaxcompress.trace import Body, as_body, called_body, leaf_uses
from jaxcompress.tree import leaves_with_paths
from jaxcompress.types import Params

Pausing = Generator[Site, "tuple[Any, Any]", None]
"""Yields a site and is sent `(W, b)` to go on with: W (D, O); b (O,), of no matter where there is no bias."""


def pausing(apply: Callable[..., Any], paths: Sequence[str], params: Params, *inputs: Any) -> Pausing:
    """Runs a model up to its next kernel, again and again, in the order of the model.

    The model runs by its own jaxpr, operation by operation: no hooks, nothing model-specific, and one forward pass for
    all kernels together, although what one of them becomes decides what the next one sees. A scan over stacked layers
    runs layer by layer, and stops at each entry of a stack by itself.

    Args:
        apply: `(params, *inputs) -> outputs`.
        paths: of kernels, each (or each stack entry) used in exactly one matmul, which may sum over several axes.
        params: plain arrays.
        *inputs: of the model.

    Raises:
        ValueError: a kernel is in no matmul, or in several, or inside a `while`, `cond` or `shard_map`, or is not the
            second operand of its matmul, or its matmul has batch axes (experts); names it.

    Example:
        >>> params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
        >>> run = pausing(lambda p, x: x @ p["kernel"] + x[:, :1], ["kernel"], params, jnp.ones((3, 2)))
        >>> site = next(run)
        >>> site.kernel.name, site.inputs.shape, site.residual.shape, site.bias
        ('kernel', (3, 2), (3, 1), None)
        >>> run.close()
    """
    return _pausing(_Run(frozenset(paths), strict=True), apply, params, inputs)


def stops(
    apply: Callable[..., Any], params: Params, *inputs: Any, paths: Sequence[str] | None = None
) -> list[LeafPart]:
    """The kernels at which `pausing` stops, in its order; found without running the model.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: arrays, or `jax.ShapeDtypeStruct`.
        *inputs: of the model, likewise.
        paths: as for `pausing`; None: every leaf that is a kernel in the way that it asks for, others are passed over.

    Raises:
        ValueError: as `pausing`, for the `paths` given.

    Example:
        >>> params = {"layers": jnp.ones((2, 3, 3)), "head": jnp.ones((3, 4, 5))}
        >>> def apply(p, x):
        ...     x, _ = jax.lax.scan(lambda x, kernel: (x + x @ kernel, None), x, p["layers"])
        ...     return jnp.einsum("ni,ijk->njk", x, p["head"])
        >>> [part.name for part in stops(apply, params, jnp.ones((1, 3)))]
        ['layers[0]', 'layers[1]', 'head']
    """
    found: list[LeafPart] = []
    every = [path for path, _ in leaves_with_paths(params)] if paths is None else paths
    run = _Run(frozenset(every), strict=paths is not None)

    def dry(params: Params, inputs: Any) -> None:
        leaves, steps, reply = dict(leaves_with_paths(params)), _pausing(run, apply, params, inputs), None
        while (site := _next(steps, reply)) is not None:
            found.append(site.kernel)
            kernel = site.kernel.matrix(leaves[site.kernel.path])
            reply = kernel, jnp.zeros(kernel.shape[1], kernel.dtype)

    jax.eval_shape(dry, params, inputs)
    return [part for part in found if part.path not in run.passed]


def _next(steps: Pausing, reply: Any) -> Site | None:
    try:
        return steps.send(reply)
    except StopIteration:
        return None


def _pausing(run: "_Run", apply: Callable[..., Any], params: Params, inputs: tuple[Any, ...]) -> Pausing:
    closed = jax.make_jaxpr(apply)(params, *inputs)
    run.read_once = frozenset(path for path, uses in leaf_uses(closed, params).items() if uses == 1)
    weights = [_Weight(leaf, path, tuple(range(jnp.ndim(leaf)))) for path, leaf in leaves_with_paths(params)]
    for value in (yield from run.body(as_body(closed), [*weights, *jax.tree.leaves(inputs)])):
        yield from run.plain(value)
    if not run.strict:
        return
    if missing := sorted(run.paths - {path for path, _ in run.seen}):
        raise ValueError(f"Leaf {missing[0]!r} is in no matmul of the model: there is nothing to fit it to.")
    if unread := sorted(run.seen - set(run.replies)):
        raise ValueError(
            f"What leaf {unread[0][0]!r} writes is never read by the model: there is nothing to fit it to."
        )


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A parameter, or a re-arrangement of one.

    `axes` says which of the leaf's axes are left, in order, -1 for new ones; `entry` where others were cut by a scan.
    """

    value: Any
    path: str
    axes: tuple[int, ...]
    entry: tuple[tuple[int, int], ...] = ()

    def at(self, index: int) -> Any:
        """What a scan reads in one iteration."""
        if self.axes[0] < 0:
            return self.value[index]
        entry = tuple(sorted((*self.entry, (self.axes[0], index))))
        return _Weight(self.value[index], self.path, self.axes[1:], entry)


@dataclasses.dataclass(frozen=True, eq=False)
class _Output:
    """What a kernel will have written, once it is known what is added to it: the product, or product and bias.

    `multiply` is the matmul, as a function of the kernel (D, O). `written` holds the value once it is known: one that
    is read twice (by a GELU) is computed once.
    """

    site: Site
    multiply: Callable[[Any], jax.Array]
    shape: tuple[int, ...]
    dtype: Any
    bias: Any = None
    written: list[Any] = dataclasses.field(default_factory=list)

    @property
    def outputs(self) -> int:
        """O."""
        return math.prod(self.shape[len(self.shape) - len(self.site.kernel.output_axes) :])


_Steps = Generator[Site, "tuple[Any, Any]", list[Any]]
_Key = tuple[str, tuple[tuple[int, int], ...]]


class _Run:
    """The interpreter. It is a generator all the way down, so that it can stop inside of nested functions."""

    def __init__(self, paths: frozenset[str], *, strict: bool) -> None:
        self.paths = paths
        self.strict = strict
        # A leaf that something else reads, too, is no bias: another value would change that as well.
        self.read_once: frozenset[str] = frozenset()
        self.passed: set[str] = set()
        self.seen: set[_Key] = set()
        self.replies: dict[_Key, tuple[LeafPart | None, Any, Any]] = {}

    def body(self, body: Body, values: Sequence[Any]) -> _Steps:
        jaxpr = body.jaxpr
        env = dict(zip(jaxpr.constvars, body.consts, strict=True)) | dict(zip(jaxpr.invars, values, strict=True))
        last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, core.Literal)}
        last_use |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, core.Literal)}

        def read(var: Any) -> Any:
            return var.val if isinstance(var, core.Literal) else env[var]

        for i, eqn in enumerate(jaxpr.eqns):
            results = yield from self.equation(eqn, [read(var) for var in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
            # Many batches wait at the same kernel: each must hold no more than what it still needs.
            for var in {v for v in eqn.invars if not isinstance(v, core.Literal) and last_use[v] == i}:
                del env[var]
        return [read(var) for var in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[Any]) -> _Steps:
        name, first = eqn.primitive.name, values[0] if values else None
        if name == "dot_general" and (output := (yield from self.output(eqn, values))) is not None:
            return [output]
        if name in ("add", "add_any") and any(isinstance(value, _Output) for value in values):
            return [(yield from self.add(eqn, *values))]
        if name == "convert_element_type" and isinstance(first, _Output) and _is_float(eqn.params["new_dtype"]):
            return [dataclasses.replace(first, dtype=eqn.params["new_dtype"], written=[])]
        if name == "scan" and eqn.params["length"] and any(self.is_kernel(value) for value in values):
            return (yield from self.scan(eqn, values))
        if name in _WHOLE:
            self.check_outside(name, values)
        elif (body := called_body(eqn)) is not None:
            return (yield from self.body(body, values))
        plain = []
        for value in values:
            plain.append((yield from self.plain(value)))
        results = _bind(eqn, plain)
        if isinstance(first, _Weight) and (axes := _moved(eqn, first.axes)) is not None:
            return [dataclasses.replace(first, value=results[0], axes=axes)]
        return results

    def scan(self, eqn: Any, values: list[Any]) -> _Steps:
        """Iteration after iteration: the entries of its stacks are kernels of their own."""
        length, consts, carried = (eqn.params[name] for name in ("length", "num_consts", "num_carry"))
        self.check_outside("scan", values[: consts + carried])
        given, carry = ([_value(value) for value in part] for part in (values[:consts], values[consts:][:carried]))
        stacks = []
        for value in values[consts + carried :]:
            stacks.append(value if isinstance(value, _Weight) else (yield from self.plain(value)))
        written: dict[int, list[Any]] = {}
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            entries = [stack.at(i) if isinstance(stack, _Weight) else stack[i] for stack in stacks]
            results = yield from self.body(as_body(eqn.params["jaxpr"]), [*given, *carry, *entries])
            carry, written[i] = results[:carried], []
            for value in results[carried:]:
                written[i].append((yield from self.plain(value)))
        return [*carry, *(jnp.stack(column) for column in zip(*(written[i] for i in range(length)), strict=True))]

    def output(self, eqn: Any, values: list[Any]) -> Generator[Site, "tuple[Any, Any]", _Output | None]:
        found = [i for i, value in enumerate(values) if self.is_kernel(value)]
        if not found:
            return None
        place, weight = found[0], values[found[0]]
        contracted, batch = eqn.params["dimension_numbers"]
        inputs = tuple(weight.axes[axis] for axis in contracted[place])
        outputs = tuple(axis for i, axis in enumerate(weight.axes) if i not in contracted[place])
        # With the weight on the left, the output's first axis is the kernel's: rows would be columns.
        if batch[place] or place == 0 or not inputs or -1 in weight.axes or list(outputs) != sorted(outputs):
            return self.refuse(
                weight.path,
                f"Leaf {weight.path!r} must be the second operand of a plain matmul; found a shape of "
                f"{tuple(jnp.shape(weight.value))}, contracted over {tuple(contracted[place])}, batched over "
                f"{tuple(batch[place])}, as operand {place}.",
            )
        if (weight.path, weight.entry) in self.seen:
            return self.refuse(
                weight.path, f"Leaf {weight.path!r} is in more than one matmul: it cannot be fitted to all of them."
            )
        self.seen.add((weight.path, weight.entry))
        order = sorted(range(len(inputs)), key=lambda i: inputs[i])
        summed = [contracted[1 - place][i] for i in order]
        rows = jnp.moveaxis((yield from self.plain(values[1 - place])), summed, range(-len(summed), 0))
        kernel = LeafPart(path=weight.path, entry=weight.entry, input_axes=tuple(sorted(inputs)), output_axes=outputs)
        depth = math.prod(rows.shape[len(rows.shape) - len(summed) :])
        site = Site(kernel=kernel, inputs=rows.reshape(-1, depth), residual=None, bias=None)
        written = eqn.outvars[0].aval
        multiply = functools.partial(_multiply, site.inputs, weight.value.dtype, eqn.params["precision"], written.dtype)
        return _Output(site, multiply, written.shape, written.dtype)

    def add(self, eqn: Any, left: Any, right: Any) -> Generator[Site, "tuple[Any, Any]", Any]:
        """A bias and a residual may come in either order, once; of two outputs the first is the other's residual."""
        if _is_open(left) and _is_open(right):
            left = yield from self.plain(left)
        output, other = (left, right) if _is_open(left) else (right, left)
        if not _is_open(output):
            return _bind(eqn, [(yield from self.plain(left)), (yield from self.plain(right))])[0]
        if output.site.bias is None and isinstance(other, _Weight) and self.is_bias(other, output):
            axes = tuple(axis for axis in other.axes if axis >= 0)
            bias = LeafPart(path=other.path, entry=other.entry, output_axes=axes)
            value = _value(other).reshape(-1, output.outputs)[0]
            site = dataclasses.replace(output.site, bias=bias)
            return dataclasses.replace(output, site=site, bias=value, written=[])
        added = yield from self.plain(other)
        if output.site.residual is None and jnp.shape(added) == output.shape:
            site = dataclasses.replace(output.site, residual=added.reshape(-1, output.outputs))
            return dataclasses.replace(output, site=site, written=[])
        written = yield from self.plain(output)
        return _bind(eqn, [written, added] if output is left else [added, written])[0]

    def plain(self, value: Any) -> Generator[Site, "tuple[Any, Any]", Any]:
        """The value itself; stops if a kernel is to write it."""
        if not isinstance(value, _Output):
            return _value(value)
        if value.written:
            return value.written[0]
        kernel, bias = yield from self.reply(value)
        written = value.multiply(kernel)
        # A float32 bias is added to a bfloat16 product after a cast.
        written = written.astype(jnp.promote_types(written.dtype, value.dtype))
        if value.site.bias is not None:
            written = written + jnp.asarray(bias, written.dtype)[None, :]
        if value.site.residual is not None:
            written = written + value.site.residual
        value.written.append(written.astype(value.dtype).reshape(value.shape))
        return value.written[0]

    def reply(self, value: _Output) -> Generator[Site, "tuple[Any, Any]", tuple[Any, Any]]:
        """The kernel and bias to go on with; what is read in several ways stops the model at the first of them."""
        key = value.site.kernel.path, value.site.kernel.entry
        if key not in self.replies:
            # Not the site: it would hold the inputs of every kernel to the end.
            self.replies[key] = (value.site.bias, *(yield value.site))
        fitted, kernel, bias = self.replies[key]
        return kernel, bias if fitted == value.site.bias else value.bias

    def is_kernel(self, value: Any) -> bool:
        return isinstance(value, _Weight) and value.path in self.paths

    def is_bias(self, other: _Weight, output: _Output) -> bool:
        return other.path in self.read_once and _is_bias(other, output)

    def refuse(self, path: str, message: str) -> None:
        if self.strict:
            raise ValueError(message)
        self.passed.add(path)

    def check_outside(self, name: str, values: list[Any]) -> None:
        for value in values:
            if self.is_kernel(value):
                self.refuse(
                    value.path, f"Leaf {value.path!r} is used as a whole inside a `{name}`, where it cannot be fitted."
                )


_WHOLE = frozenset({"scan", "while", "cond", "shard_map"})


def _multiply(inputs: Any, dtype: Any, precision: Any, written: Any, kernel: Any) -> jax.Array:
    return jnp.matmul(inputs, jnp.asarray(kernel, dtype), precision=precision, preferred_element_type=written)


def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _is_open(value: Any) -> bool:
    """Whether a kernel is still to write it."""
    return isinstance(value, _Output) and not value.written


def _is_bias(other: _Weight, output: _Output) -> bool:
    """Whether it is a whole leaf, or the same entry of a stack, and adds one number to each output."""
    own = len(output.site.kernel.output_axes)
    added, axes = other.axes[: len(other.axes) - own], other.axes[len(other.axes) - own :]
    same_entry = [index for _, index in other.entry] == [index for _, index in output.site.kernel.entry]
    same_sizes = jnp.shape(other.value)[len(added) :] == output.shape[len(output.shape) - own :]
    return same_entry and same_sizes and set(added) <= {-1} and -1 not in axes and list(axes) == sorted(axes)


def _moved(eqn: Any, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes after an equation that only moves them; None after any other."""
    name = eqn.primitive.name
    if name in ("convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint"):
        return axes
    if name == "transpose":
        return tuple(axes[axis] for axis in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        before, places_of = eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"]
        if any(eqn.params["shape"][place] != size for place, size in zip(places_of, before, strict=True)):
            # One number for several outputs.
            return None
        places: Mapping[int, int] = dict(zip(places_of, axes, strict=True))
        return tuple(places.get(axis, -1) for axis in range(len(eqn.params["shape"])))
    if name == "reshape":
        # A bias gets leading axes of size 1.
        sizes, before = eqn.params["new_sizes"], eqn.invars[0].aval.shape
        added = len(sizes) - len(before)
        return (*[-1] * added, *axes) if added >= 0 and tuple(sizes[added:]) == tuple(before) else None
    return None


def _value(value: Any) -> Any:
    return value.value if isinstance(value, _Weight) else value


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]
