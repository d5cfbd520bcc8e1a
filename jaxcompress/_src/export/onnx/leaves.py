"""Compressed leaves on their way through the walk: moved as they are stored, then multiplied, looked up or unpacked."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.arrays.protocol import can_unstack, cast, changes_inputs, describe_leaf
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.execution.rules import RULES as MOVES
from jaxcompress._src.execution.runs import sliced_runs
from jaxcompress._src.execution.values import Runs, Weight, ignore
from jaxcompress._src.export.onnx.graph import Tensor
from jaxcompress._src.export.onnx.integer_matmul import integer_matmul
from jaxcompress._src.export.onnx.options import LeafOptions, OnnxLeaf
from jaxcompress._src.export.onnx.products import RULES as PRODUCTS
from jaxcompress._src.export.onnx.types import is_exportable
from jaxcompress._src.export.onnx.weight_matmul import weight_matmul
from jaxcompress._src.types import is_compressed

_LARGE = 256
"""Bytes; smaller parts of a leaf are computed with while the graph is written."""
_MOVING = frozenset(
    {"transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "slice", "dynamic_slice", "copy",
     "copy_p", "stop_gradient", "reshard"}
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MovedWeight(Weight):
    """A leaf that was moved, and how, so that the graph can unpack what is stored in only one arrangement.

    Attributes:
        origin: the leaf before.
        moves: equations that moved it, in order, with their other operands.
    """

    origin: Weight
    moves: tuple[tuple[Any, tuple[Any, ...]], ...]


class LeafRules:
    """What is written for equations with a compressed operand."""

    def __init__(self, translator: Any, options: LeafOptions) -> None:
        self._translator = translator
        self._options = options
        self.notes: dict[OnnxLeaf, None] = {}

    def visit(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        """The outputs of an equation."""
        name = eqn.primitive.name
        if name == "concatenate" and eqn.params["dimension"] == 0:
            return [Runs.joined(values)]
        first = values[0]
        if any(isinstance(value, Runs) for value in values):
            return self._moved_runs(eqn, first) or self._plain(eqn, values)
        if name in _MOVING and isinstance(first, Weight) and all(isinstance(v, np.ndarray) for v in values[1:]):
            moved = MOVES[name](eqn, [first.array, *values[1:]])
            if moved is not None:
                return [_moved(first, moved[0], eqn, values[1:])]
        written = _WRITERS[name](self, eqn, values) if name in _WRITERS else None
        return self._plain(eqn, values) if written is None else written

    def _moved_runs(self, eqn: Any, first: Any) -> Sequence[Any] | None:
        """What only casts or cuts a stack leaves its runs in their stored forms."""
        name = eqn.primitive.name
        if isinstance(first, Runs) and name == "convert_element_type":
            parts = [_cast(part, eqn.params["new_dtype"]) for part in first.parts]
            return None if any(part is None for part in parts) else [Runs(tuple(parts))]
        if isinstance(first, Runs) and name == "slice" and (pieces := sliced_runs(eqn, first, ignore)) is not None:
            return [pieces]
        return None

    def note(self, path: str, form: str, reason: str = "") -> None:
        """Says what became of a leaf."""
        self.notes[OnnxLeaf(path=path, form=form, reason=reason)] = None

    def plain(self, value: Any, use: str = "output") -> Any:
        """The plain array, unpacked by the graph from what the leaf stores; what is no leaf as it is."""
        if isinstance(value, Runs):
            parts = [self.plain(part, use) for part in value.parts]
            graph = self._translator.graph
            name = graph.op("Concat", *(graph.full(part).name for part in parts), axis=0)
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            return Tensor(name, shape, shape, np.dtype(parts[0].dtype))
        if not isinstance(value, Weight):
            return value
        if changes_inputs(value.array) and use != "output":
            raise ValueError(
                f"The inputs of leaf {value.path!r} are to be quantized, but `{use}` changes it before a matmul, or "
                "uses it otherwise; exclude it."
            )
        return self._unpacked(value, use)

    def unstackable(self, value: Any) -> Any:
        """A stack that can be taken apart as it is stored, or else unpacked."""
        parts = value.parts if isinstance(value, Runs) else (value,)
        fit = all(can_unstack(part.array) for part in parts if isinstance(part, Weight))
        return value if fit else self.plain(value, "scan")

    def _unpacked(self, weight: Weight, use: str) -> Any:
        return self._unpacked_for(weight, f"for `{use}`")

    def stored(self, leaf: Any) -> Any:
        """A leaf of tensors: what is computed with it is left to the graph."""
        return jax.tree.map(self._part, leaf)

    def _part(self, part: Any) -> Any:
        """A stored part; a large one is a tensor, so that what is computed with it is left to the graph."""
        array = np.asarray(part)
        large = array.nbytes >= _LARGE and is_exportable(array.dtype)
        return self._translator.graph.tensor(array) if large else array

    def _plain(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        return self._translator.plain(eqn, [self.plain(value, name) for value in values])

    def _dot(self, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
        changes = [isinstance(value, Weight) and changes_inputs(value.array) for value in values]
        side = changes.index(True) if any(changes) else 0 if isinstance(values[0], Weight) else 1
        weight, other = values[side], self.plain(values[1 - side], "dot_general")
        leaf = weight.array
        if isinstance(leaf, InputQuantizedArray):
            return self._dot_of_rounded(eqn, weight, other, side)
        if isinstance(leaf, LowRankArray):
            return self._dot_of_factors(eqn, weight, other, side)
        if isinstance(leaf, QuantizedArray):
            written, form, reason = weight_matmul(self._translator.graph, eqn, leaf, other, side, self._options)
            if written is not None:
                self.note(weight.path, form, reason)
                return [written]
            operands = [self._unpacked_for(weight, reason), other]
            return PRODUCTS["dot_general"](self._translator.graph, eqn, operands[:: 1 if side == 0 else -1])
        return None

    def _unpacked_for(self, weight: Weight, reason: str) -> Any:
        self.note(weight.path, f"{describe_leaf(weight.array)}, unpacked in the graph", reason)
        origin, moves = (weight.origin, weight.moves) if isinstance(weight, MovedWeight) else (weight, ())
        (plain,) = self._translator.call(lambda leaf: leaf.materialize(), self.stored(origin.array))
        for eqn, others in moves:
            (plain,) = self._translator.plain(eqn, [plain, *others])
        return plain

    def _dot_of_factors(self, eqn: Any, weight: Weight, other: Any, side: int) -> Sequence[Any] | None:
        """Two matmuls, each with a factor as it is stored."""
        leaf: Any = weight.array
        parts = {name: getattr(leaf, name) for name in ("left", "right", "residual")}
        parts = {name: _part_of(weight, name, part) for name, part in parts.items()}
        fits = jax.eval_shape(lambda x: leaf.dot(x, side, eqn.params), jax.ShapeDtypeStruct(other.shape, other.dtype))
        if fits is None:
            return None
        self.note(weight.path, "two matmuls")
        return self._translator.call(
            lambda parts, x: dataclasses.replace(leaf, **parts).dot(x, side, eqn.params), parts, other
        )

    def _dot_of_rounded(self, eqn: Any, weight: Weight, other: Any, side: int) -> Sequence[Any]:
        """In whole numbers where the weight allows it, else the matmul of the weight with rounded inputs."""
        leaf: Any = weight.array
        written, form, reason = integer_matmul(self._translator, eqn, leaf, other, side, self._options)
        if written is not None:
            self.note(weight.path, form, reason)
            return [written]
        contracted, batch = eqn.params["dimension_numbers"]

        def rounded(x: Any) -> Any:
            return leaf.inputs.rounded(x, contracted[1 - side], *leaf.input_parameters(x.ndim, batch[1 - side]))

        self.note(weight.path, "inputs rounded as floats", reason)
        inner = Weight(leaf.weight, weight.path) if is_compressed(leaf.weight) else np.asarray(leaf.weight)
        operands = [inner, self._translator.call(rounded, other)[0]][:: 1 if side == 0 else -1]
        if isinstance(inner, Weight):
            return self.visit(eqn, operands)
        return self._translator.plain(eqn, operands)

    def _convolution(self, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
        inputs, kernel = values
        if not isinstance(kernel, Weight) or isinstance(inputs, Weight):
            return None
        leaf: Any = kernel.array
        if not isinstance(leaf, InputQuantizedArray):
            return None
        stored = leaf.weight
        plain = (
            self._unpacked(Weight(stored, kernel.path), "convolution") if is_compressed(stored) else np.asarray(stored)
        )
        self.note(kernel.path, "inputs rounded as floats", "for `conv_general_dilated`")
        return self._translator.call(
            lambda weight, x: dataclasses.replace(leaf, weight=weight).convolve(x, eqn.params), plain, inputs
        )

    def _look_up(self, eqn: Any, values: list[Any]) -> Sequence[Any] | None:
        """The rows asked for, unpacked."""
        table, indices = values
        if not isinstance(table, Weight) or isinstance(indices, Weight):
            return None
        shape = jax.ShapeDtypeStruct(tuple(indices.shape), indices.dtype)
        try:
            jax.eval_shape(lambda rows: _rows(eqn, table.array, rows), shape)
        except _NoRowsError:
            return None
        stored = self.stored(table.array)
        self.note(table.path, f"{describe_leaf(table.array)}, rows looked up and unpacked")
        return self._translator.call(lambda leaf, rows: _rows(eqn, leaf, rows), stored, indices)


def _part_of(weight: Weight, name: str, part: Any) -> Any:
    """A factor or residual as a leaf of its own, or a plain array."""
    if part is None:
        return None
    return Weight(part, f"{weight.path}/{name}") if is_compressed(part) else np.asarray(part)


def _cast(part: Any, dtype: Any) -> Any:
    """A run of a stack in another dtype, or None."""
    if not isinstance(part, Weight):
        return part.astype(dtype) if isinstance(part, np.ndarray) else None
    array = cast(part.array, dtype)
    return None if array is None else Weight(array, part.path)


def _moved(weight: Weight, array: Any, eqn: Any, others: Sequence[Any]) -> MovedWeight:
    origin, moves = (weight.origin, weight.moves) if isinstance(weight, MovedWeight) else (weight, ())
    return MovedWeight(array, weight.path, origin, (*moves, (eqn, tuple(others))))


class _NoRowsError(Exception):
    """A gather that is no look-up of rows."""


def _rows(eqn: Any, leaf: Any, indices: Any) -> Any:
    result = MOVES["gather"](eqn, [leaf, indices])
    if result is None:
        raise _NoRowsError
    return result[0]


_WRITERS: dict[str, Callable[[LeafRules, Any, list[Any]], Sequence[Any] | None]] = {
    "dot_general": LeafRules._dot,
    "conv_general_dilated": LeafRules._convolution,
    "gather": LeafRules._look_up,
}
