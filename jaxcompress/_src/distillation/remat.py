"""Values that the backward pass computes again instead of keeping."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxcompress._src.distillation.objective import Apply
from jaxcompress._src.distillation.outputs import Outputs
from jaxcompress._src.trace.traced import traced
from jaxcompress._src.trace.walk import CALLS, as_body, bind, called_body, walk
from jaxcompress._src.types import Params

Policy = Callable[..., Any]
"""As those of `jax.checkpoint_policies`."""


def rematerialized(apply: Apply, policy: Policy) -> Apply:
    """A model that keeps for its backward pass what a policy names, and computes the rest again.

    Every scan over layers (one whose body multiplies) gets its body checkpointed, so that one layer at a time is
    computed again. A model without any is checkpointed as a whole.

    Args:
        apply: `(params, batch, *, key, train) -> outputs`, of plain arrays: `execute` goes around it.
        policy: such as `jax.checkpoint_policies.dots_saveable`.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(params, batch, *, key, train):
        ...     return {"y": jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch["x"], params["w"])[0]}
        >>> again = rematerialized(apply, jax.checkpoint_policies.nothing_saveable)
        >>> params, batch = {"w": jnp.ones((3, 2, 2))}, {"x": jnp.ones((1, 2))}
        >>> again(params, batch, key=None, train=True)["y"] == apply(params, batch, key=None, train=True)["y"]
        Array([[ True,  True]], dtype=bool)
    """

    def run(params: Params, batch: Any, *, key: jax.Array | None, train: bool) -> Outputs:
        model = traced(lambda *args: apply(args[0], args[1], key=args[2], train=train), params, (batch, key))
        body = as_body(model.closed)
        again = functools.partial(walk, body, visit=functools.partial(_visit, policy=policy))
        if not _has_layers(body.jaxpr):
            again = jax.checkpoint(functools.partial(walk, body, visit=bind), policy=policy)
        return model.outputs.unflatten(again([*model.leaves, *model.values]))

    return run


def _visit(eqn: Any, values: list[Any], *, policy: Policy) -> Sequence[Any]:
    if _is_layers(eqn):
        return _scan(eqn, values, policy)
    body = called_body(eqn) if eqn.primitive.name in CALLS and _has_layers(eqn.params["jaxpr"].jaxpr) else None
    return bind(eqn, values) if body is None else walk(body, values, functools.partial(_visit, policy=policy))


def _scan(eqn: Any, values: list[Any], policy: Policy) -> list[Any]:
    begin = eqn.params["num_consts"]
    end = begin + eqn.params["num_carry"]
    # The loop keeps the two computations of a layer apart.
    layer = jax.checkpoint(core.jaxpr_as_fun(eqn.params["jaxpr"]), policy=policy, prevent_cse=False)

    def step(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any]]:
        results = layer(*values[:begin], *carry, *sliced)
        return results[: end - begin], results[end - begin :]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = jax.lax.scan(step, values[begin:end], values[end:], **options)
    return [*carry, *stacked]


def _has_layers(jaxpr: Any) -> bool:
    return any(
        _is_layers(eqn) or (eqn.primitive.name in CALLS and _has_layers(eqn.params["jaxpr"].jaxpr))
        for eqn in jaxpr.eqns
    )


def _is_layers(eqn: Any) -> bool:
    return eqn.primitive.name == "scan" and _multiplies(eqn.params["jaxpr"].jaxpr)


def _multiplies(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in ("dot_general", "conv_general_dilated")
        or any(_multiplies(inner) for inner in core.jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )
