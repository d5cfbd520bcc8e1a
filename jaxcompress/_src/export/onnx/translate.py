"""The walk over a jaxpr that writes it as a graph."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util

from jaxcompress._src.execution.values import Runs, Weight
from jaxcompress._src.export.onnx import control_flow, folding
from jaxcompress._src.export.onnx.graph import Graph, Tensor
from jaxcompress._src.export.onnx.leaves import LeafRules
from jaxcompress._src.export.onnx.options import LeafOptions
from jaxcompress._src.export.onnx.rules import RULES
from jaxcompress._src.trace.walk import VALUES, Body, as_body, called_body, walk


class Translator:
    """Writes jaxprs into a graph. What depends on no input is computed on the way."""

    def __init__(self, graph: Graph, options: LeafOptions) -> None:
        self.graph = graph
        self.leaves = LeafRules(self, options)
        self._place = ""

    def run(self, body: Body, values: Sequence[Any]) -> list[Any]:
        """The outputs of a body: tensors, known arrays, or compressed leaves that come out as they went in."""
        results = walk(body, values, self._visit)
        return [_normal(value, var.aval) for value, var in zip(results, body.jaxpr.outvars, strict=True)]

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Writes what a JAX function does.

        Args:
            function: of arrays, or trees of them.
            *arguments: trees of tensors, known arrays and compressed leaves; the function sees plain arrays.

        Returns:
            The leaves of what it gives.
        """
        values, structure = jax.tree.flatten(arguments, is_leaf=lambda x: isinstance(x, Weight))
        logical = [value.array if isinstance(value, Weight) else value for value in values]
        specs = [jax.ShapeDtypeStruct(tuple(value.shape), value.dtype) for value in logical]
        closed = jax.make_jaxpr(lambda *leaves: function(*structure.unflatten(leaves)))(*specs)
        return self.run(as_body(closed), values)

    def _visit(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        values = [_normal(value, var.aval) for value, var in zip(values, eqn.invars, strict=True)]
        outer = self._place
        # What JAX's own functions are made of has no line of the user's.
        self._place = _place(eqn) or outer
        try:
            if name in VALUES and (body := called_body(eqn)) is not None:
                return self.run(body, values)
            return self._written(eqn, name, values)
        except (NotImplementedError, ValueError) as err:
            if not getattr(err, "__notes__", None):
                err.add_note(f"in `{name}` of {_shapes(eqn)}, at {self._place}")
            raise
        finally:
            self._place = outer

    def _written(self, eqn: Any, name: str, values: list[Any]) -> Sequence[Any]:
        if name in _CONTROL and not all(folding.is_known(value) for value in values):
            return self._control(eqn, values)
        if any(isinstance(value, Weight | Runs) for value in values):
            return self.leaves.visit(eqn, values)
        if all(folding.is_known(value) for value in values):
            folded = folding.folded(eqn, values)
            if folded is not None:
                return folded
        return self._control(eqn, values) if name in _CONTROL else self.plain(eqn, values)

    def _control(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        """Loops and branches; what a leaf that is carried, or comes out, stands for is unpacked."""
        name = eqn.primitive.name
        carried = control_flow.carried(eqn)
        values = [self.leaves.plain(value, name) if i in carried else value for i, value in enumerate(values)]
        if name == "scan":
            values = [*values[: carried.stop], *map(self.leaves.unstackable, values[carried.stop :])]

        def run(body: Body, values: Sequence[Any]) -> list[Any]:
            return [self.leaves.plain(result, name) for result in self.run(body, values)]

        return _CONTROL[name](self.graph, eqn, values, run)

    def plain(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        """The outputs of an equation of tensors and known arrays."""
        name = eqn.primitive.name
        if name not in RULES:
            raise NotImplementedError(
                f"ONNX export has no rule for the primitive `{name}` of {_shapes(eqn)}, at {self._place}."
            )
        return RULES[name](self.graph, eqn, values)


_CONTROL: Mapping[str, Callable[..., Sequence[Any]]] = {
    "scan": control_flow.scan,
    "while": control_flow.while_loop,
    "cond": control_flow.cond,
}


def _normal(value: Any, aval: Any) -> Any:
    """Known arrays as NumPy has them; those with dtypes of JAX alone, such as keys, as they are."""
    if isinstance(value, Tensor | Weight | Runs | np.ndarray):
        return value
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return value
    return np.asarray(value, aval.dtype)


def _shapes(eqn: Any) -> str:
    inputs = ", ".join(var.aval.str_short() for var in eqn.invars)
    outputs = ", ".join(var.aval.str_short() for var in eqn.outvars)
    return f"({inputs}) -> ({outputs})"


def _place(eqn: Any) -> str:
    """The line of the user's program, or nothing."""
    text = source_info_util.summarize(eqn.source_info)
    return text if ":" in text else ""
