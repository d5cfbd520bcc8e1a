"""Loops and branches: the sums travel in their carries."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.calibration.values import Value, as_value, bind_streams
from jaxcompress._src.trace.facts import Facts
from jaxcompress._src.trace.walk import as_body, walk


def _scan(run: Any, eqn: Any, values: list[Value]) -> list[Value]:
    num_consts, num_carry, length = (eqn.params[name] for name in ("num_consts", "num_carry", "length"))
    consts, first = values[:num_consts], values[num_consts : num_consts + num_carry]
    stacked = values[num_consts + num_carry :]
    run.lose(first, "it is carried through a loop, in which its inputs are not followed")
    over_stack = any(value.origins for value in stacked)
    outer = run.place

    def step(state: Any, sliced: Any) -> Any:
        carry, run.totals, i = state
        at = length - 1 - i if eqn.params["reverse"] else i
        run.place = (*outer, None if over_stack else 0, 0)
        inner = [
            _unstacked(value, streams, at, eqn.params["reverse"])
            for value, streams in zip(stacked, sliced, strict=True)
        ]
        results = run.run(as_body(eqn.params["jaxpr"]), [*consts, *map(Value, carry), *inner])
        run.lose(results, "a loop returns it, after which its inputs are not followed")
        wide = [_streams(value, run.count) for value in results]
        return (wide[:num_carry], run.totals, i + 1), wide[num_carry:]

    carry = [_streams(value, run.count) for value in first]
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    state = (carry, run.totals, jnp.zeros((), jnp.int32))
    (carry, totals, _), collected = jax.lax.scan(step, state, [value.streams for value in stacked], **options)
    run.totals, run.place = totals, outer
    return [Value(streams) for streams in (*carry, *collected)]


def _while(run: Any, eqn: Any, values: list[Value]) -> list[Value]:
    cond_end = eqn.params["cond_nconsts"]
    body_end = cond_end + eqn.params["body_nconsts"]
    outer, totals = run.place, run.totals
    run.lose(values[:cond_end], "it goes into the condition of a loop, in which no inputs are gathered")
    run.lose(values[body_end:], "it is carried through a loop, in which its inputs are not followed")

    def condition(state: Any) -> Any:
        # Never gathers: a condition is evaluated once more than the body.
        operands = [*(Value((value.last,)) for value in values[:cond_end]), *(Value(s[-1:]) for s in state[0])]
        body = as_body(eqn.params["cond_jaxpr"])
        return as_value(
            walk(body, operands, lambda eqn, values: bind_streams(eqn, list(map(as_value, values))))[0]
        ).last

    def step(state: Any) -> Any:
        carry, run.totals = state
        run.place = (*outer, 0, 0)
        results = run.run(as_body(eqn.params["body_jaxpr"]), [*values[cond_end:body_end], *map(Value, carry)])
        run.lose(results, "a loop returns it, after which its inputs are not followed")
        return [_streams(value, run.count) for value in results], run.totals

    carry = [_streams(value, run.count) for value in values[body_end:]]
    carry, totals = jax.lax.while_loop(condition, step, (carry, totals))
    run.totals, run.place = totals, outer
    return [Value(streams) for streams in carry]


def _cond(run: Any, eqn: Any, values: list[Value]) -> list[Value]:
    outer, totals = run.place, run.totals

    def branch(number: int) -> Callable[[Any], Any]:
        def evaluate(state: Any) -> Any:
            run.totals = state
            run.place = (*outer, number, 0)
            results = run.run(as_body(eqn.params["branches"][number]), values[1:])
            run.lose(results, "a branch returns it, after which its inputs are not followed")
            return [_streams(value, run.count) for value in results], run.totals

        return evaluate

    branches = [branch(number) for number in range(len(eqn.params["branches"]))]
    # With two streams, both follow the current model.
    results, totals = jax.lax.switch(values[0].last, branches, totals)
    run.totals, run.place = totals, outer
    return [Value(tuple(streams)) for streams in results]


CONTROL: dict[str, Callable[[Any, Any, list[Value]], list[Value]]] = {"scan": _scan, "while": _while, "cond": _cond}
"""Primitive -> `(interpreter, equation, values) -> outputs`."""


def _streams(value: Value, count: int) -> tuple[Any, ...]:
    return tuple(jnp.asarray(value.streams[stream % len(value.streams)]) for stream in range(count))


def _unstacked(value: Value, streams: tuple[Any, ...], at: Any, reverse: bool) -> Value:
    """One iteration's slice of a value that a scan runs over."""
    origins = tuple(origin.scanned(at, reverse=reverse) for origin in value.origins)
    return Value(streams, Facts(origins, data=value.facts.data))
