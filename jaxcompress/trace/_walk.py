"""The one walk over a jaxpr; `trace` and `execution` differ only in what they do at each equation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    kept = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}

    def read(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else env[var]

    for i, eqn in enumerate(jaxpr.eqns):
        env.update(zip(eqn.outvars, visit(eqn, [read(var) for var in eqn.invars]), strict=True))
        # An eager run would otherwise hold every activation until the end.
        for var in {v for v in eqn.invars if not isinstance(v, core.Literal)}:
            if last_use[var] == i and var not in kept:
                env.pop(var)
    return [read(var) for var in jaxpr.outvars]


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
