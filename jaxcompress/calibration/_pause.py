"""A model that stops at its kernels: what goes into each, what its output is added to, and another kernel on the way.

Shape letters: N rows (tokens), D inputs of a kernel, O its outputs.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float

from jaxcompress.trace import Body, as_body, called_body
from jaxcompress.tree import leaves_with_paths
from jaxcompress.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One kernel at work: it writes `inputs @ W + bias + residual`.

    Attributes:
        path: of the kernel.
        inputs: rows of its input.
        residual: what the output is added to, in rows; None if it is added to nothing.
        bias: path of the bias that is added to the output; None without one.
        input_axis: the kernel's axis that is summed over; the other one is its outputs.
    """

    path: str
    inputs: Float[Array, "N D"]
    residual: Float[Array, "N O"] | None
    bias: str | None
    input_axis: int


Pausing = Generator[Site, "tuple[Any, Any]", None]
"""Yields a site and is sent `(W, b)` to go on with: W (D, O); b (O,), of no matter where there is no bias."""


def pausing(apply: Callable[..., Any], paths: Sequence[str], params: Params, *inputs: Any) -> Pausing:
    """Runs a model up to its next kernel, again and again, in the order of the model.

    The model runs by its own jaxpr, operation by operation: no hooks, nothing model-specific, and one forward pass for
    all kernels together, although what one of them becomes decides what the next one sees.

    Args:
        apply: `(params, *inputs) -> outputs`.
        paths: of kernels with two axes, each used in exactly one matmul.
        params: plain arrays.
        *inputs: of the model.

    Raises:
        ValueError: a kernel is in no matmul, or in several, or inside a loop (stacked layers), or has not two axes, or
            its matmul has batch axes; names it.

    Example:
        >>> params = {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}
        >>> run = pausing(lambda p, x: x @ p["kernel"] + x[:, :1], ["kernel"], params, jnp.ones((3, 2)))
        >>> site = next(run)
        >>> site.inputs.shape, site.residual.shape, site.bias, site.input_axis
        ((3, 2), (3, 1), None, 0)
        >>> run.close()
    """
    closed = jax.make_jaxpr(apply)(params, *inputs)
    weights = [_Weight(leaf, path, tuple(range(jnp.ndim(leaf)))) for path, leaf in leaves_with_paths(params)]
    run = _Run(frozenset(paths))
    for value in (yield from run.body(as_body(closed), [*weights, *jax.tree.leaves(inputs)])):
        yield from run.plain(value)
    if missing := sorted(run.paths - run.seen):
        raise ValueError(f"Leaf {missing[0]!r} is in no matmul of the model: there is nothing to fit it to.")
    if unread := sorted(run.paths - set(run.replies)):
        raise ValueError(f"What leaf {unread[0]!r} writes is never read by the model: there is nothing to fit it to.")


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A parameter, or a re-arrangement of one: `axes` says which of its axes are left, in order; -1 for new ones."""

    value: Any
    path: str
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Output:
    """What a kernel will have written, once it is known what is added to it: the product, or product and bias.

    `written` holds it from then on: a value that is read twice (by a GELU) is computed once.
    """

    site: Site
    shape: tuple[int, ...]
    dtype: Any
    bias: Any = None
    written: list[Any] = dataclasses.field(default_factory=list)


_Steps = Generator[Site, "tuple[Any, Any]", list[Any]]


class _Run:
    """The interpreter. It is a generator all the way down, so that it can stop inside of nested functions."""

    def __init__(self, paths: frozenset[str]) -> None:
        self.paths = paths
        self.seen: set[str] = set()
        self.replies: dict[str, tuple[Site, Any, Any]] = {}

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
        name = eqn.primitive.name
        if name == "dot_general" and (output := self.output(eqn, values)) is not None:
            return [output]
        if name in ("add", "add_any") and any(isinstance(value, _Output) for value in values):
            return [(yield from self.add(eqn, *values))]
        if name == "convert_element_type" and isinstance(values[0], _Output):
            return [dataclasses.replace(values[0], dtype=eqn.params["new_dtype"], written=[])]
        if name in _LOOPS:
            self.check_outside(name, values)
        elif (body := called_body(eqn)) is not None:
            return (yield from self.body(body, values))
        plain = []
        for value in values:
            plain.append((yield from self.plain(value)))
        results = _bind(eqn, plain)
        if isinstance(values[0] if values else None, _Weight) and (axes := _moved(eqn, values[0].axes)) is not None:
            return [_Weight(results[0], values[0].path, axes)]
        return results

    def output(self, eqn: Any, values: list[Any]) -> _Output | None:
        found = [i for i, value in enumerate(values) if isinstance(value, _Weight) and value.path in self.paths]
        if not found:
            return None
        place, weight = found[0], values[found[0]]
        if weight.path in self.seen:
            raise ValueError(f"Leaf {weight.path!r} is in more than one matmul: its units cannot be fitted.")
        self.seen.add(weight.path)
        contracted, batch = eqn.params["dimension_numbers"]
        # With the weight on the left, the output's first axis is the kernel's: rows would be columns.
        if batch[place] or len(contracted[place]) != 1 or sorted(weight.axes) != [0, 1] or place == 0:
            raise ValueError(
                f"Leaf {weight.path!r} must have two axes and be the second operand of a plain matmul; found a shape "
                f"of {tuple(jnp.shape(weight.value))}, contracted over {tuple(contracted[place])}, batched over "
                f"{tuple(batch[place])}, as operand {place}."
            )
        rows = jnp.moveaxis(_value(values[1 - place]), contracted[1 - place][0], -1)
        axis = weight.axes[contracted[place][0]]
        inputs = rows.reshape(-1, rows.shape[-1])
        site = Site(path=weight.path, inputs=inputs, residual=None, bias=None, input_axis=axis)
        return _Output(site, eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)

    def add(self, eqn: Any, left: Any, right: Any) -> Generator[Site, "tuple[Any, Any]", Any]:
        output, other = (left, right) if isinstance(left, _Output) else (right, left)
        bias = isinstance(other, _Weight) and other.axes == (*[-1] * (len(other.axes) - 1), 0)
        if bias and output.site.bias is None:
            site = dataclasses.replace(output.site, bias=other.path)
            return dataclasses.replace(output, site=site, bias=_value(other).reshape(-1), written=[])
        if isinstance(other, _Output) or jnp.shape(_value(other)) != output.shape:
            plain = [(yield from self.plain(left)), (yield from self.plain(right))]
            return _bind(eqn, plain)[0]
        residual = _value(other).reshape(-1, output.shape[-1])
        site = dataclasses.replace(output.site, residual=residual)
        return (yield from self.plain(dataclasses.replace(output, site=site, written=[])))

    def plain(self, value: Any) -> Generator[Site, "tuple[Any, Any]", Any]:
        """The value itself; stops if a kernel is to write it."""
        if not isinstance(value, _Output):
            return _value(value)
        if value.written:
            return value.written[0]
        kernel, bias = yield from self.reply(value)
        written = value.site.inputs @ jnp.asarray(kernel, value.site.inputs.dtype)
        if value.site.bias is not None:
            written = written + jnp.asarray(bias, written.dtype)[None, :]
        if value.site.residual is not None:
            written = written + value.site.residual
        value.written.append(written.astype(value.dtype).reshape(value.shape))
        return value.written[0]

    def reply(self, value: _Output) -> Generator[Site, "tuple[Any, Any]", tuple[Any, Any]]:
        """The kernel and bias to go on with; what is read in several ways stops the model at the first of them."""
        path = value.site.path
        if path not in self.replies:
            self.replies[path] = (value.site, *(yield value.site))
        stopped, kernel, bias = self.replies[path]
        return kernel, bias if stopped.bias == value.site.bias else value.bias

    def check_outside(self, name: str, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, _Weight) and value.path in self.paths:
                raise ValueError(
                    f"Leaf {value.path!r} is used inside a `{name}`: unstack the layers before fitting it."
                )


_LOOPS = frozenset({"scan", "while", "cond"})


def _moved(eqn: Any, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes after an equation that only moves them; None after any other."""
    name = eqn.primitive.name
    if name in ("convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint"):
        return axes
    if name == "transpose":
        return tuple(axes[axis] for axis in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        places: Mapping[int, int] = dict(zip(eqn.params["broadcast_dimensions"], axes, strict=True))
        return tuple(places.get(axis, -1) for axis in range(len(eqn.params["shape"])))
    if name == "reshape" and len(axes) == 1:
        # A bias gets leading axes of size 1.
        sizes = eqn.params["new_sizes"]
        return (*[-1] * (len(sizes) - 1), *axes) if sizes[-1] == eqn.invars[0].aval.shape[0] else None
    return None


def _value(value: Any) -> Any:
    return value.value if isinstance(value, _Weight) else value


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]
