"""Which indices of the axes of parameters must stay or go together, followed through the jaxpr of a model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.interpreters import partial_eval

from jaxcompress._src.trace.coupling import Along, Coupling, Value
from jaxcompress._src.trace.coupling_rules import apply_rule
from jaxcompress._src.trace.facts import follow
from jaxcompress._src.trace.index_classes import IndexClasses, Indices, Reason
from jaxcompress._src.trace.traced import Traced
from jaxcompress._src.trace.walk import Body, as_body, called_body, walk

INPUT = Reason("it is an axis of the model's inputs")
OUTPUT = Reason("it is an axis of the model's outputs")
LOOP = Reason("a loop runs over it")


@dataclasses.dataclass(frozen=True)
class CoupledAxes:
    """What must stay or go together.

    Attributes:
        classes: of all indices.
        axes: (number of the leaf, axis) -> its indices; axes of length 1 and less are left out.
        marks: "read" by a matmul or convolution whose sum the index is a part of, "written" into activations, "reduced"
            by another sum or maximum over the axis, an axis of "heads" (of a batched matmul of activations) or of
            "channels" (of a convolution): each with the number of the equation and the indices, in order.
    """

    classes: IndexClasses
    axes: Mapping[tuple[int, int], Indices]
    marks: Mapping[str, Sequence[tuple[int, Indices]]]


def coupled_axes(model: Traced) -> CoupledAxes:
    """Follows every axis of every parameter through a program; nothing is computed.

    Where an axis is cut into several, or several are merged or summed over at once, only one of them can be cut into
    units: the outermost one that may go. Which may is known in the end only, so the program is followed again with
    what has been learned until nothing changes.

    Args:
        model: the program.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress._src.trace.traced import traced
        >>> params = {"down": jnp.ones((3, 2)), "up": jnp.ones((4, 3))}
        >>> coupled = coupled_axes(traced(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, (jnp.ones((5, 4)),)))
        >>> [coupled.classes.find(coupled.axes[place]).tolist() for place in ((0, 0), (1, 1))]
        [[0, 1, 2], [0, 1, 2]]
        >>> coupled.classes.reasons(coupled.axes[0, 1])[0].text
        "it is an axis of the model's outputs"
    """
    excluded: dict[Any, frozenset[int]] = {}
    while True:
        walked = _Walk(Coupling(excluded))
        axes = walked.model(model)
        coupling = walked.coupling
        wrong = {
            place: excluded.get(place, frozenset()) | {axis}
            for place, (axis, indices) in coupling.choices.items()
            if axis not in excluded.get(place, ()) and coupling.classes.is_pinned(indices, final=True).all()
        }
        if not wrong:
            return CoupledAxes(coupling.classes, axes, coupling.marks)
        excluded |= wrong


@dataclasses.dataclass(frozen=True)
class _Walk:
    coupling: Coupling

    def model(self, model: Traced) -> dict[tuple[int, int], Indices]:
        """Follows a whole program; returns the indices of the leaves."""
        jaxpr = model.closed.jaxpr
        live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
        leaves, axes = [], {}
        for number, var in enumerate(jaxpr.invars[: len(model.leaves)]):
            along = self.coupling.new(var.aval.shape)
            leaves.append(Value(var.aval.shape, along, (along,), data=False))
            axes |= {(number, axis): indices for axis, indices in enumerate(along) if indices is not None}
        inputs = [self.blank(var.aval.shape, INPUT) for var in jaxpr.invars[len(model.leaves) :]]
        for result in self.body(Body(live, model.closed.consts), [*leaves, *inputs]):
            self.coupling.pin(result.axes, OUTPUT)
        return axes

    def body(self, body: Body, values: Sequence[Value]) -> list[Value]:
        return [self.value(value) for value in walk(body, values, self.visit)]

    def value(self, value: Any) -> Value:
        return value if isinstance(value, Value) else self.coupling.constant(value)

    def blank(self, shape: Sequence[int], reason: Reason) -> Value:
        return Value(tuple(shape), tuple(self.coupling.fixed(size, reason) for size in shape))

    def visit(self, eqn: Any, values: list[Any]) -> Sequence[Value]:
        self.coupling.step += 1
        values = [self.value(value) for value in values]
        name = eqn.primitive.name
        if name == "scan":
            return self.scan(eqn, values)
        if name == "while":
            return self.loop(eqn, values)
        if name == "cond":
            branches = [self.body(as_body(branch), values[1:]) for branch in eqn.params["branches"]]
            return [self.joined(results) for results in zip(*branches, strict=True)]
        # What is inside of these sees parts of the values, in shapes of their own.
        body = None if name in ("shard_map", "pallas_call") else called_body(eqn)
        if body is not None:
            return self.body(body, values)
        outputs = apply_rule(self.coupling, eqn, values)
        facts = follow(eqn, [value.facts for value in values])
        return [dataclasses.replace(value, facts=each) for value, each in zip(outputs, facts, strict=True)]

    def scan(self, eqn: Any, values: Sequence[Value]) -> list[Value]:
        consts = eqn.params["num_consts"]
        carried = consts + eqn.params["num_carry"]
        carry = [self.carry(value) for value in values[consts:carried]]
        entries = [self.entry(value) for value in values[carried:]]
        results = self.body(as_body(eqn.params["jaxpr"]), [*values[:consts], *carry, *entries])
        stacks = []
        for result in results[len(carry) :]:
            shape = (eqn.params["length"], *result.shape)
            stacks.append(Value(shape, (self.coupling.fixed(shape[0], LOOP), *result.axes)))
        return [*map(self.joined, zip(carry, results, strict=False)), *stacks]

    def loop(self, eqn: Any, values: Sequence[Value]) -> list[Value]:
        cond_end = eqn.params["cond_nconsts"]
        body_end = cond_end + eqn.params["body_nconsts"]
        carry = [self.carry(value) for value in values[body_end:]]
        self.body(as_body(eqn.params["cond_jaxpr"]), [*values[:cond_end], *carry])
        results = self.body(as_body(eqn.params["body_jaxpr"]), [*values[cond_end:body_end], *carry])
        return [self.joined(each) for each in zip(carry, results, strict=True)]

    def carry(self, value: Value) -> Value:
        """What every iteration finds where the first one finds a value."""
        self.coupling.mark_written(value, range(len(value.shape)))
        axes = self.coupling.new(value.shape)
        return Value(value.shape, tuple(map(self.united, axes, value.axes)))

    def entry(self, value: Value) -> Value:
        """What one iteration gets of a stack."""
        self.coupling.pin(value.axes[:1], LOOP)
        terms = None if value.terms is None else tuple(term[1:] for term in value.terms)
        return Value(value.shape[1:], value.axes[1:], terms, value.data)

    def joined(self, values: Sequence[Value]) -> Value:
        """A value that is one of several."""
        for value in values:
            self.coupling.mark_written(value, range(len(value.shape)))
        columns = zip(*(value.axes for value in values), strict=True)
        return Value(values[0].shape, tuple(self.coupling.united(along) for along in columns))

    def united(self, *along: Along) -> Along:
        return self.coupling.united(along)
