"""Sizes that are known when the graph runs: symbols of `jax.export.symbolic_shape` as arithmetic on shapes."""

import ast
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.export
import numpy as np

Shape = tuple[Any, ...]
"""Sizes: integers, and symbolic ones."""


class _Source(NamedTuple):
    """An input whose size on an axis is `factor` times a symbol, plus `offset`."""

    name: str
    axis: int
    factor: int
    offset: int


class Dimensions:
    """Turns sizes into values of the graph; all are lists of one int64, made in the outermost graph."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._sources: dict[str, _Source] = {}

    def add_input(self, name: str, shape: Shape) -> None:
        """Lets symbols be read off an input."""
        for axis, dim in enumerate(shape):
            if is_static(dim):
                continue
            linear = _linear(_parsed(dim))
            if linear is not None:
                symbol, factor, offset = linear
                new = _Source(name, axis, factor, offset)
                old = self._sources.get(symbol, new)
                self._sources[symbol] = old if (old.factor, old.offset) == (1, 0) else new

    def shape(self, dims: Sequence[Any]) -> str:
        """The name of a list of sizes."""
        graph = self._graph
        if all(is_static(dim) for dim in dims):
            return graph.ints(*dims)
        with graph.outermost():
            parts = [graph.ints(dim) if is_static(dim) else self.size(dim) for dim in dims]
            return parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=0)

    def size(self, dim: Any) -> str:
        """The name of a list of one size."""
        if is_static(dim):
            return self._graph.ints(dim)
        with self._graph.outermost():
            return self._evaluate(_parsed(dim), dim)

    def reshape_target(self, old: Shape, new: Shape) -> str:
        """The second input of `Reshape`: 0 for sizes that stay in their place, -1 for one other symbolic size."""
        kept = [i < len(old) and not is_static(dim) and (old[i] is dim or old[i] == dim) for i, dim in enumerate(new)]
        unknown = [i for i, dim in enumerate(new) if not is_static(dim) and not kept[i]]
        if len(unknown) > 1 or 0 in new or (unknown and 0 in old):
            return self.shape(new)
        return self._graph.ints(*(0 if kept[i] else -1 if i in unknown else dim for i, dim in enumerate(new)))

    def _evaluate(self, node: ast.expr, dim: Any) -> str:
        graph = self._graph
        match node:
            case ast.Constant(value=int(value)):
                return graph.ints(value)
            case ast.Name(id=symbol):
                return self._symbol(symbol, dim)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return graph.op("Neg", self._evaluate(operand, dim))
            case ast.BinOp(op=operation, left=left, right=right):
                return graph.op(_OPERATORS[type(operation)], self._evaluate(left, dim), self._evaluate(right, dim))
            case ast.Call(func=ast.Name(id=function), args=[left, right]):
                first, second = self._evaluate(left, dim), self._evaluate(right, dim)
                if function == "floordiv":
                    return graph.op("Div", graph.op("Sub", first, graph.op("Mod", first, second)), second)
                return graph.op({"mod": "Mod", "max": "Max", "min": "Min"}[function], first, second)
        raise NotImplementedError(f"ONNX export cannot compute the size {dim}.")

    def _symbol(self, symbol: str, dim: Any) -> str:
        if symbol not in self._sources:
            raise ValueError(
                f"No input has an axis that says what {symbol!r} is in the size {dim}: one must have it alone, such as "
                f"a shape ({symbol!r},)."
            )
        name, axis, factor, offset = self._sources[symbol]
        size = self._graph.op("Shape", name, start=axis, end=axis + 1)
        if offset:
            size = self._graph.op("Sub", size, self._graph.ints(offset))
        return size if factor == 1 else self._graph.op("Div", size, self._graph.ints(factor))


_OPERATORS: dict[type, str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Pow: "Pow"}


def is_static(dim: Any) -> bool:
    """Whether a size is a number."""
    return not jax.export.is_symbolic_dim(dim)


def broadcast(first: Shape, second: Shape) -> Shape:
    """The shape of elementwise arithmetic; axes of size 1 are broadcast."""
    if len(first) < len(second):
        first, second = second, first
    aligned = (*(1,) * (len(first) - len(second)), *second)
    return tuple(b if is_static(a) and a == 1 else a for a, b in zip(first, aligned, strict=True))


def product(dims: Sequence[Any]) -> Any:
    """The number of entries."""
    total: Any = 1
    for dim in dims:
        total = total * dim
    return total


def _parsed(dim: Any) -> ast.expr:
    """The arithmetic that the text of a size stands for, which is the one that `symbolic_shape` reads."""
    return ast.parse(str(dim).replace("^", "**"), mode="eval").body


def _linear(node: ast.expr) -> tuple[str, int, int] | None:
    """(symbol, factor, offset) of a size that is linear in one symbol."""
    match node:
        case ast.Name(id=symbol):
            return symbol, 1, 0
        case ast.BinOp(op=ast.Mult(), left=ast.Constant(value=int(factor)), right=ast.Name(id=symbol)):
            return symbol, factor, 0
        case ast.BinOp(op=(ast.Add() | ast.Sub()) as operation, left=left, right=ast.Constant(value=int(offset))):
            inner = _linear(left)
            return inner and (inner[0], inner[1], inner[2] + (offset if isinstance(operation, ast.Add) else -offset))
    return None


def known_shape(shape: Shape) -> bool:
    """Whether all sizes are numbers."""
    return all(is_static(dim) for dim in shape)


def onnx_dim(dim: Any) -> int | str:
    """What a value's type says of a size."""
    return int(np.int64(dim)) if is_static(dim) else str(dim)
