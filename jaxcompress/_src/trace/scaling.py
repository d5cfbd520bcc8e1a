"""The way back from a value to the leaves that can scale its features."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jaxcompress._src.trace.axis_rules import CASTS, MOVES, axes_before, operand_axes
from jaxcompress._src.trace.graph import Graph
from jaxcompress._src.trace.origin import Origin


class Scaling:
    """The way back from one value."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers: dict[int, tuple[int, ...]] = {}
        self.scaled: dict[Any, tuple[int, ...]] = {}

    def back(self, var: Any, axes: tuple[int, ...]) -> bool:
        """Whether leaves can scale the features along some axes of a value; notes them, and what is scaled too."""
        if isinstance(var, core.Literal):
            return bool((var.val == 0) if not hasattr(var.val, "shape") else (var.val == 0).all())
        if var in self.graph.origins:
            return self._leaf(self.graph.origins[var], axes)
        if var in self.scaled:
            return self.scaled[var] == axes
        eqn = self.graph.maker.get(var)
        # A cast to integers rounds.
        if not jnp.issubdtype(var.aval.dtype, jnp.floating):
            return False
        handler = None if eqn is None else _HANDLERS.get(eqn.primitive.name)
        if handler is None:
            return False
        before = dict(self.producers), dict(self.scaled)
        self.scaled[var] = axes
        if handler(self, eqn, axes):
            return True
        self.producers, self.scaled = before
        return False

    def closed(self, scaled: set[Any], last: Any) -> bool:
        """Whether all that reads some values is scaled too, or is the equation `last`."""
        readers = [eqn for var in scaled for eqn in self.graph.readers.get(var, [])]
        return all(eqn is last or any(out in self.scaled for out in eqn.outvars) for eqn in readers)

    def once(self, eqn: Any) -> bool:
        """Whether a factor passes an equation whose outputs are scaled: products take it from one operand only."""
        if eqn.primitive.name not in ("mul", "div", "dot_general"):
            return True
        return sum(self._is_scaled(var) for var in eqn.invars) == 1

    def _is_scaled(self, var: Any) -> bool:
        origin = self.graph.origin(var)
        return origin.leaf in self.producers if origin else not isinstance(var, core.Literal) and var in self.scaled

    def _leaf(self, origin: Origin, axes: tuple[int, ...]) -> bool:
        leaf_axes = origin.whole(axes)
        exact = jnp.issubdtype(self.graph.views[origin.leaf].aval.dtype, jnp.floating)
        if leaf_axes is None or not exact or origin.leaf in self.producers:
            return False
        self.producers[origin.leaf] = leaf_axes
        return True


def _all(trace: Scaling, eqn: Any, axes: tuple[int, ...]) -> bool:
    shape = eqn.outvars[0].aval.shape
    return all(_carries(var, shape, axes) and trace.back(var, axes) for var in eqn.invars)


def _either(trace: Scaling, eqn: Any, axes: tuple[int, ...]) -> bool:
    # A leaf first: the scale of a norm stands beside what has been normalized.
    shape = eqn.outvars[0].aval.shape
    order = sorted(eqn.invars, key=lambda var: isinstance(var, core.Literal) or var not in trace.graph.origins)
    for var in order:
        if isinstance(var, core.Literal) or not _carries(var, shape, axes):
            continue
        before = dict(trace.producers), dict(trace.scaled)
        # In x sigmoid(x), x goes two ways: then it is the other side of a product that can be scaled.
        if trace.back(var, axes) and trace.closed(set(trace.scaled) - set(before[1]), eqn):
            return True
        trace.producers, trace.scaled = before
    return False


def _first(trace: Scaling, eqn: Any, axes: tuple[int, ...]) -> bool:
    return _carries(eqn.invars[0], eqn.outvars[0].aval.shape, axes) and trace.back(eqn.invars[0], axes)


def _cases(trace: Scaling, eqn: Any, axes: tuple[int, ...]) -> bool:
    return all(trace.back(var, axes) for var in eqn.invars[1:])


def _move(trace: Scaling, eqn: Any, axes: tuple[int, ...]) -> bool:
    if isinstance(eqn.invars[0], core.Literal):
        return trace.back(eqn.invars[0], axes)
    before = axes_before(eqn, axes)
    return before is not None and trace.back(eqn.invars[0], before)


def _matmul(trace: Scaling, eqn: Any, axes: tuple[int, ...]) -> bool:
    stacks = len(eqn.params["dimension_numbers"][1][0])
    for side in (1, 0):
        places = operand_axes(eqn, side)
        if all(axis in places for axis in axes) and any(axis >= stacks for axis in axes):
            return trace.back(eqn.invars[side], tuple(places[axis] for axis in axes))
    return False


def _carries(var: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether an operand has all the features; along other axes it may be broadcast."""
    if isinstance(var, core.Literal):
        return True
    sizes = var.aval.shape
    return len(sizes) == len(shape) and all(sizes[axis] == shape[axis] for axis in axes)


_HANDLERS: dict[str, Callable[[Scaling, Any, tuple[int, ...]], bool]] = {
    "add": _all,
    "add_any": _all,
    "sub": _all,
    "max": _all,
    "neg": _first,
    "mul": _either,
    "div": _first,
    "select_n": _cases,
    **dict.fromkeys(CASTS | MOVES, _move),
    "dot_general": _matmul,
}
