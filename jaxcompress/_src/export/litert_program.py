"""A model as one straight line of equations, as LiteRT's converter takes it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from jaxcompress._src.export.litert_rewrites import has_keys, known, rewritten
from jaxcompress._src.export.litert_weights import Site, Sites
from jaxcompress._src.trace.traced import traced
from jaxcompress._src.trace.walk import VALUES, Body, as_body, bind, called_body, walk
from jaxcompress._src.types import Params, is_compressed


class Program(NamedTuple):
    """A model without scans and calls.

    Attributes:
        run: the model, of parameters and inputs.
        eqns: its equations.
    """

    run: Callable[..., Any]
    eqns: Sequence[Any]


def straight_line(apply: Callable[..., Any], params: Params, inputs: Sequence[Any], sites: Sites) -> Program:
    """`apply` without scans and calls, and with the runtime's own GELU.

    What a scan runs over are layers of their own, whose weights are constants. Of `erf` the converter makes a
    polynomial of a dozen passes.

    Args:
        apply: as it is.
        params: as for `apply`; the program takes others of the same shapes.
        inputs: those of `apply`, perhaps abstract.
        sites: where the operations of the runtime are noted.

    Raises:
        ValueError: there is a loop of no fixed length, or a random key that depends on an input.
    """
    model = traced(apply, params, inputs)
    closed = jax.make_jaxpr(lambda *values: walk(as_body(model.closed), values, _visit))(*model.closed.in_avals)
    _check(closed.jaxpr.eqns)
    activations = {eqn.outvars[0]: x for eqn, x in _gelus(closed.jaxpr.eqns)}

    def run(params: Params, *inputs: Any) -> Any:
        leaves = [leaf for leaf in jax.tree.leaves((params, inputs), is_leaf=is_compressed) if hasattr(leaf, "dtype")]
        env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        env |= dict(zip(closed.jaxpr.invars, leaves, strict=True))
        for eqn in closed.jaxpr.eqns:
            if eqn.outvars[0] in activations:
                x = env[activations[eqn.outvars[0]]]
                env[eqn.outvars[0]] = sites.call(Site(kind="gelu"), x, x.shape).astype(x.dtype)
            else:
                env.update(zip(eqn.outvars, bind(eqn, [_read(env, var) for var in eqn.invars]), strict=True))
        return model.outputs.unflatten([_read(env, var) for var in closed.jaxpr.outvars])

    return Program(run, closed.jaxpr.eqns)


def unsupported_equation(eqns: Sequence[Any], accepts: Callable[[str], bool]) -> str | None:
    """The first equation that the converter or the runtime refuses by itself, in words; None if each alone is accepted.

    Args:
        eqns: of the program that was refused.
        accepts: whether a program, as StableHLO, is accepted.
    """
    tried: set[str] = set()
    for eqn in eqns:
        text = f"{eqn.primitive.name} of {_shapes(eqn)} {eqn.params}"
        if text in tried:
            continue
        tried.add(text)
        if not accepts(_alone(eqn)):
            return f"`{eqn.primitive.name}` of {_shapes(eqn)}, at {_place(eqn)}"
    return None


def _check(eqns: Sequence[Any]) -> None:
    for eqn in eqns:
        if eqn.primitive.name == "while":
            raise ValueError(
                "LiteRT's converter has no `while` loops: give loops a fixed length (`scan`, `fori_loop`); there is one"
                f" of {_shapes(eqn)}, at {_place(eqn)}."
            )
        if has_keys(eqn):
            raise ValueError(
                "LiteRT has no random keys; those that depend on no input are drawn from while the file is written, but"
                f" this one does: `{eqn.primitive.name}` of {_shapes(eqn)}, at {_place(eqn)}."
            )


def _place(eqn: Any) -> str:
    return source_info_util.summarize(eqn.source_info)


def _alone(eqn: Any) -> str:
    """The StableHLO of one equation."""
    literals = [isinstance(var, core.Literal) for var in eqn.invars]

    def run(*inputs: Any) -> Any:
        given = iter(inputs)
        return bind(
            eqn, [var.val if literal else next(given) for var, literal in zip(eqn.invars, literals, strict=True)]
        )

    specs = [
        jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
        for var, literal in zip(eqn.invars, literals, strict=True)
        if not literal
    ]
    return jax.jit(run).trace(*specs).lower(lowering_platforms=("cpu",)).as_text()


def _shapes(eqn: Any) -> str:
    """Shapes and dtypes of an equation."""
    inputs = ", ".join(var.aval.str_short() for var in eqn.invars)
    return f"({inputs}) -> ({', '.join(var.aval.str_short() for var in eqn.outvars)})"


def _read(env: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, core.Literal) else env[var]


def _visit(eqn: Any, values: list[Any]) -> Sequence[Any]:
    # Equations keep the lines of the model that they stand for; what JAX's own functions are made of has none.
    if ":" not in source_info_util.summarize(eqn.source_info):
        return _written(eqn, values)
    with source_info_util.user_context(eqn.source_info.traceback):
        return _written(eqn, values)


def _written(eqn: Any, values: list[Any]) -> Sequence[Any]:
    name = eqn.primitive.name
    if name == "scan":
        return _unrolled(eqn, values)
    if name == "cond":
        branches = [functools.partial(_branch, as_body(branch)) for branch in eqn.params["branches"]]
        return jax.lax.switch(values[0], branches, *values[1:])
    body = called_body(eqn) if name in VALUES else None
    return rewritten(eqn, values) if body is None else walk(body, values, _visit)


def _branch(body: Body, *operands: Any) -> list[Any]:
    return list(walk(body, operands, _visit))


def _unrolled(eqn: Any, values: list[Any]) -> list[Any]:
    length, consts, carried = (eqn.params[name] for name in ("length", "num_consts", "num_carry"))
    given, carry, stacks = values[:consts], values[consts : consts + carried], values[consts + carried :]
    written: dict[int, list[Any]] = {}
    for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
        entries = [_entry(stack, i) for stack in stacks]
        results = walk(as_body(eqn.params["jaxpr"]), [*given, *carry, *entries], _visit)
        carry, written[i] = results[:carried], results[carried:]
    columns = [[written[i][column] for i in range(length)] for column in range(len(eqn.outvars) - carried)]
    empty = [jnp.zeros(var.aval.shape, var.aval.dtype) for var in eqn.outvars[carried:]]
    return [*carry, *(jnp.stack(column) if column else zeros for column, zeros in zip(columns, empty, strict=True))]


def _entry(stack: Any, number: int) -> Any:
    with known([stack]):
        return jax.lax.squeeze(jax.lax.slice_in_dim(stack, number, number + 1), (0,))


def _gelus(eqns: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The equations whose result is x Φ(x), by `erf` or by `erfc`, each with x."""
    made = {out: eqn for eqn in eqns for out in eqn.outvars}

    def factor(var: Any) -> tuple[float, Any]:
        """The variable that `var` is a multiple of, and how many times."""
        eqn = None if isinstance(var, core.Literal) else made.get(var)
        if eqn is not None and eqn.primitive.name in ("neg", "copy"):
            times, base = factor(eqn.invars[0])
            return -times if eqn.primitive.name == "neg" else times, base
        if eqn is not None and eqn.primitive.name in ("mul", "div"):
            left, right = eqn.invars
            if eqn.primitive.name == "mul" and _number(left) is not None:
                left, right = right, left
            if (number := _number(right)) is not None:
                times, base = factor(left)
                return times * number if eqn.primitive.name == "mul" else times / number, base
        return 1.0, var

    def tail(var: Any) -> tuple[float, Any] | None:
        """(c, x) where a variable is 1 + erf(c x)."""
        eqn = None if isinstance(var, core.Literal) else made.get(var)
        if eqn is None:
            return None
        if eqn.primitive.name == "erfc":
            times, base = factor(eqn.invars[0])
            return -times, base
        if eqn.primitive.name == "add":
            for one, other in (eqn.invars, eqn.invars[::-1]):
                inner = None if isinstance(other, core.Literal) else made.get(other)
                if _number(one) == 1 and inner is not None and inner.primitive.name == "erf":
                    return factor(inner.invars[0])
        return None

    def argument(eqn: Any) -> Any:
        """The x of an equation that computes its GELU, or None."""
        factors = [factor(var) for var in eqn.invars]
        for (k, x), (m, phi) in (factors, factors[::-1]):
            found = tail(phi)
            if found is None or found[1] is not x:
                continue
            if math.isclose(k * m, 0.5, rel_tol=1e-6) and math.isclose(found[0], math.sqrt(0.5), rel_tol=1e-6):
                return x
        return None

    products = [(eqn, argument(eqn)) for eqn in eqns if eqn.primitive.name == "mul"]
    return [(eqn, x) for eqn, x in products if x is not None and not isinstance(x, core.Literal)]


def _number(var: Any) -> float | None:
    """The value of a single number in the program."""
    return float(var.val) if isinstance(var, core.Literal) and not np.ndim(var.val) else None
