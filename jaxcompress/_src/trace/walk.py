"""The one evaluator of jaxprs; its users differ only in what they do at each equation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

Visit = Callable[[Any, list[Any]], Sequence[Any]]
"""`(equation, values of its inputs) -> values of its outputs`; a value is whatever the walk carries."""


class Body(NamedTuple):
    """A jaxpr inside an equation, with its constants."""

    jaxpr: Any
    consts: Sequence[Any]


def walk(body: Body, values: Sequence[Any], visit: Visit) -> list[Any]:
    """Visits the equations of `body` in order and returns the values of its outputs.

    Args:
        body: the jaxpr and its constants.
        values: one for each input variable.
        visit: called for each equation; literals reach it as their Python or array values.

    Returns:
        One value for each output.
    """
    jaxpr = body.jaxpr
    env = dict(zip(jaxpr.constvars, body.consts, strict=True)) | dict(zip(jaxpr.invars, values, strict=True))
    last_use = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not isinstance(var, core.Literal)}
    last_use |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, core.Literal)}

    def read(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else env[var]

    for i, eqn in enumerate(jaxpr.eqns):
        results = visit(eqn, [read(var) for var in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
        # An eager run would otherwise hold every activation until the end.
        for var in {v for v in eqn.invars if not isinstance(v, core.Literal) and last_use[v] == i}:
            del env[var]
    return [read(var) for var in jaxpr.outvars]


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of an equation as it stands."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def inlined(closed: Any, *, derivatives: bool = False) -> Any:
    """The same program without the calls that only wrap.

    Args:
        closed: a closed jaxpr.
        derivatives: also without the functions that have derivatives of their own: where only values matter.
    """
    calls = VALUES if derivatives else WRAPPERS

    def visit(eqn: Any, values: list[Any]) -> Sequence[Any]:
        body = called_body(eqn) if eqn.primitive.name in calls else None
        return bind(eqn, values) if body is None else walk(body, values, visit)

    return jax.make_jaxpr(lambda *values: walk(as_body(closed), list(values), visit))(*closed.in_avals)


def called_body(eqn: Any) -> Body | None:
    """The body of an equation whose inputs are the body's, one to one (`jit`, `remat`, `custom_jvp`), or None."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            body = as_body(eqn.params[name])
            ranks = [[len(var.aval.shape) for var in invars] for invars in (body.jaxpr.invars, eqn.invars)]
            # The body of a `reduce` takes as many inputs as it, but single numbers of them.
            return body if ranks[0] == ranks[1] else None
    return None


def as_body(jaxpr: Any) -> Body:
    """A `Body` from a closed or an open jaxpr (one without constants)."""
    return Body(jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else Body(jaxpr, ())


CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Primitives that run their body and nothing else."""

WRAPPERS = CALLS | {"remat", "remat2", "checkpoint"}
"""Those, and what only says what derivatives keep."""

VALUES = WRAPPERS | {"custom_jvp_call", "custom_vjp_call"}
"""Primitives whose values are those of their body."""
