"""A model as one straight line of equations, as LiteRT's converter takes it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxcompress._src.export.litert_weights import Site, Sites
from jaxcompress._src.trace.traced import traced
from jaxcompress._src.trace.walk import VALUES, Body, as_body, bind, called_body, walk
from jaxcompress._src.types import Params, is_compressed


def straight_line(apply: Callable[..., Any], params: Params, inputs: Sequence[Any], sites: Sites) -> Callable[..., Any]:
    """`apply` without scans and calls, and with the runtime's own GELU.

    What a scan runs over are layers of their own, whose weights are constants. Of `erf` the converter makes a
    polynomial of a dozen passes.

    Args:
        apply: as it is.
        params: as for `apply`; the function that is returned takes others of the same shapes.
        inputs: those of `apply`, perhaps abstract.
        sites: where the operations of the runtime are noted.

    Raises:
        ValueError: there is a loop of no fixed length.
    """
    model = traced(apply, params, inputs)
    closed = jax.make_jaxpr(lambda *values: walk(as_body(model.closed), values, _visit))(*model.closed.in_avals)
    if any(eqn.primitive.name == "while" for eqn in closed.jaxpr.eqns):
        raise ValueError("LiteRT's converter has no `while` loops: give loops a fixed length (`scan`, `fori_loop`).")
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

    return run


def _read(env: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, core.Literal) else env[var]


def _visit(eqn: Any, values: list[Any]) -> Sequence[Any]:
    if eqn.primitive.name == "scan":
        return _unrolled(eqn, values)
    if eqn.primitive.name == "cond":
        branches = [functools.partial(_branch, as_body(branch)) for branch in eqn.params["branches"]]
        return jax.lax.switch(values[0], branches, *values[1:])
    if eqn.primitive.name == "rem":
        return [_remainder(*values)]
    body = called_body(eqn) if eqn.primitive.name in VALUES else None
    return bind(eqn, values) if body is None else walk(body, values, _visit)


def _branch(body: Body, *operands: Any) -> list[Any]:
    return list(walk(body, operands, _visit))


def _remainder(x: jax.Array, y: jax.Array) -> jax.Array:
    """Has the sign of `x`: of `rem` the converter makes a remainder that has the sign of `y`."""
    if not jnp.issubdtype(x.dtype, jnp.signedinteger) and not jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.rem(x, y)
    magnitude = jax.lax.rem(jnp.abs(x), jnp.abs(y))
    return jnp.where(x < 0, -magnitude, magnitude)


def _unrolled(eqn: Any, values: list[Any]) -> list[Any]:
    length, consts, carried = (eqn.params[name] for name in ("length", "num_consts", "num_carry"))
    given, carry, stacks = values[:consts], values[consts : consts + carried], values[consts + carried :]
    written: dict[int, list[Any]] = {}
    for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
        entries = [jax.lax.squeeze(jax.lax.slice_in_dim(stack, i, i + 1), (0,)) for stack in stacks]
        results = walk(as_body(eqn.params["jaxpr"]), [*given, *carry, *entries], _visit)
        carry, written[i] = results[:carried], results[carried:]
    columns = [[written[i][column] for i in range(length)] for column in range(len(eqn.outvars) - carried)]
    empty = [jnp.zeros(var.aval.shape, var.aval.dtype) for var in eqn.outvars[carried:]]
    return [*carry, *(jnp.stack(column) if column else zeros for column, zeros in zip(columns, empty, strict=True))]


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
