"""The program of a model without calls: who makes each value, who reads it, and which values are leaves."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jax.extend import core

from jaxcompress._src.trace.origin import Origin, rearrange
from jaxcompress._src.trace.traced import Traced
from jaxcompress._src.trace.walk import inlined


@dataclasses.dataclass(frozen=True)
class LeafView:
    """A leaf as one part of the program sees it: the whole, or what one iteration of the scans around gets.

    Attributes:
        path: of the leaf.
        aval: shape and dtype of the whole leaf.
        loops: for each scan around, outermost first, the axis of the leaf that it runs over; None where every iteration
            gets the same.
    """

    path: str
    aval: Any
    loops: tuple[int | None, ...] = ()

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The axes that scans run over, outermost first."""
        return tuple(axis for axis in self.loops if axis is not None)

    @property
    def stacked_by(self) -> tuple[bool, ...]:
        """Which of the scans around run over the leaf."""
        return tuple(axis is not None for axis in self.loops)

    def inside(self, axis: int | None) -> "LeafView":
        """The same leaf inside one more scan."""
        return dataclasses.replace(self, loops=(*self.loops, axis))


class Graph:
    """A flat program; the bodies of its scans are graphs of their own, by the place of the equation.

    `origins` holds the values that are leaves, re-arranged; their `leaf` counts `views`.
    """

    def __init__(self, jaxpr: Any, entering: Mapping[Any, tuple[Origin, LeafView]]) -> None:
        self.jaxpr = jaxpr
        self.views = [view for _, view in entering.values()]
        self.origins = {
            var: dataclasses.replace(origin, leaf=n) for n, (var, (origin, _)) in enumerate(entering.items())
        }
        self.maker: dict[Any, Any] = {}
        self.readers: dict[Any, list[Any]] = {}
        self.bodies: dict[int, Graph] = {}
        for place, eqn in enumerate(jaxpr.eqns):
            for var in {v for v in eqn.invars if not isinstance(v, core.Literal)}:
                self.readers.setdefault(var, []).append(eqn)
            self.maker |= dict.fromkeys(eqn.outvars, eqn)
            moved = rearrange(eqn, origin) if eqn.invars and (origin := self.origin(eqn.invars[0])) else None
            if moved is not None:
                self.origins[eqn.outvars[0]] = moved
            if eqn.primitive.name == "scan":
                body = inlined(eqn.params["jaxpr"]).jaxpr
                self.bodies[place] = Graph(body, {body.invars[k]: each for k, each in self._entering(eqn).items()})
        self.outputs = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}

    def origin(self, var: Any) -> Origin | None:
        """What re-arranged leaf a value is, if any."""
        return None if isinstance(var, core.Literal) else self.origins.get(var)

    def uses(self) -> Counter[str]:
        """How often each leaf is read, in scans too, as anything but a re-arrangement of itself."""
        read = list(self.jaxpr.outvars)
        for place, eqn in enumerate(self.jaxpr.eqns):
            moved = (0,) if any(out in self.origins for out in eqn.outvars) else ()
            followed = self._entering(eqn) if place in self.bodies else moved
            read += [var for k, var in enumerate(eqn.invars) if k not in followed]
        counts = Counter(self.views[origin.leaf].path for var in read if (origin := self.origin(var)))
        return sum((body.uses() for body in self.bodies.values()), counts)

    def _entering(self, eqn: Any) -> dict[int, tuple[Origin, LeafView]]:
        """The operands of a scan that are leaves inside, too: constants, and stacks that it runs over in full."""
        consts, entering = eqn.params["num_consts"], {}
        for k, var in enumerate(eqn.invars):
            origin = self.origin(var)
            if origin is None or consts <= k < consts + eqn.params["num_carry"]:
                continue
            view = self.views[origin.leaf]
            if k < consts:
                entering[k] = origin, view.inside(None)
            elif not origin.axes[0].tables:
                entering[k] = origin.scanned(None), view.inside(None)
            elif (stack := origin.whole((0,))) is not None:
                entering[k] = origin.scanned(None), view.inside(stack[0])
        return entering


def graph_of(model: Traced) -> Graph:
    """The graph of a model.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress._src.trace.traced import traced
        >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
        >>> model = traced(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) * p["b"], params, (params["b"],))
        >>> sorted(graph_of(model).uses().items())
        [('b', 2), ('w', 1)]
    """
    jaxpr = inlined(model.closed, derivatives=True).jaxpr
    leaves = zip(jaxpr.invars, model.paths, strict=False)
    return Graph(
        jaxpr,
        {
            var: (Origin.of(number, var.aval.shape), LeafView(path, var.aval))
            for number, (var, path) in enumerate(leaves)
        },
    )
