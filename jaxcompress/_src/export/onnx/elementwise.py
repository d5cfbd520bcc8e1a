"""Primitives that work entry by entry. They work on what is held: axes that are only broadcast stay so."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.export.onnx.graph import Graph, Tensor, held_shape
from jaxcompress._src.export.onnx.types import arithmetic, carrier, is_float, onnx_type

Write = Callable[..., str]
"""`(graph, *names) -> name`."""


def elementwise(write: Write, *, exact: bool = False) -> Callable[[Graph, Any, list[Any]], Sequence[Any]]:
    """A rule that computes in the type of `arithmetic`.

    Args:
        write: gets the names of the operands.
        exact: whether the result needs no rounding: it is one of the operands, up to sign.
    """

    def rule(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
        tensors = [graph.tensor(value) for value in values]
        result = eqn.outvars[0].aval
        dtype = tensors[0].dtype
        names = [_cast(graph, tensor, arithmetic(tensor.dtype)) for tensor in tensors]
        name = write(graph, *names)
        if result.dtype != bool:
            if arithmetic(dtype) != carrier(result.dtype):
                name = graph.op("Cast", name, to=onnx_type(carrier(result.dtype)))
            name = name if exact else graph.rounded(name, result.dtype)
        return [_like(name, tensors, result)]

    return rule


def _cast(graph: Graph, tensor: Tensor, dtype: np.dtype) -> str:
    return tensor.name if carrier(tensor.dtype) == dtype else graph.op("Cast", tensor.name, to=onnx_type(dtype))


def _like(name: str, tensors: Sequence[Tensor], result: Any) -> Tensor:
    return Tensor(name, held_shape(tensors), tuple(result.shape), np.dtype(result.dtype))


def _plain(op: str) -> Write:
    return lambda graph, *names: graph.op(op, *names)


def _chain(*ops: str) -> Write:
    return lambda graph, name: functools.reduce(lambda inner, op: graph.op(op, inner), ops, name)


def _of_floats(write: Callable[..., str], *, exact: bool = False) -> Callable[[Graph, Any, list[Any]], Sequence[Any]]:
    """A rule whose `write` gets a function for constants of the operands' type: `(graph, constant, *names)`."""

    def rule(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
        dtype = arithmetic(eqn.invars[0].aval.dtype)

        def with_constants(graph: Graph, *names: str) -> str:
            return write(graph, lambda value: graph.scalar(value, dtype), *names)

        return elementwise(with_constants, exact=exact)(graph, eqn, values)

    return rule


def _expm1(graph: Graph, c: Callable[[float], str], x: str) -> str:
    """tanh(x / 2) (exp x + 1), which loses no digits near 0."""
    half = graph.op("Tanh", graph.op("Mul", x, c(0.5)))
    return graph.op("Mul", half, graph.op("Add", graph.op("Exp", x), c(1)))


def _log1p(graph: Graph, c: Callable[[float], str], x: str) -> str:
    """log(u) x / (u - 1) with u = 1 + x as it is rounded: Kahan's way, which loses no digits near 0."""
    u = graph.op("Add", x, c(1))
    log, less = graph.op("Log", u), graph.op("Sub", u, c(1))
    is_one = graph.op("Equal", u, c(1))
    quotient = graph.op("Div", graph.op("Mul", log, x), graph.op("Where", is_one, c(1), less))
    plain = graph.op("Where", graph.op("Greater", x, c(1)), log, quotient)
    return graph.op("Where", is_one, x, plain)


def _round(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    if int(eqn.params["rounding_method"]) == 1:
        return elementwise(_plain("Round"), exact=True)(graph, eqn, values)
    return _of_floats(_round_away, exact=True)(graph, eqn, values)


def _round_away(graph: Graph, c: Callable[[float], str], x: str) -> str:
    """Halves away from zero; x + 0.5 would round twice."""
    size = graph.op("Abs", x)
    whole = graph.op("Floor", size)
    up = graph.op("GreaterOrEqual", graph.op("Sub", size, whole), c(0.5))
    return graph.op("Mul", graph.op("Sign", x), graph.op("Where", up, graph.op("Add", whole, c(1)), whole))


def _integer_pow(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    power = eqn.params["y"]

    def write(graph: Graph, c: Callable[[float], str], x: str) -> str:
        result, square, left = None, x, abs(power)
        while left:
            if left & 1:
                result = square if result is None else graph.op("Mul", result, square)
            left >>= 1
            square = graph.op("Mul", square, square) if left else square
        assert result is not None  # JAX writes x^0 as a constant
        return graph.op("Div", c(1), result) if power < 0 else result

    return _of_floats(write)(graph, eqn, values)


def _atan2(graph: Graph, c: Callable[[float], str], y: str, x: str) -> str:
    base = graph.op("Atan", graph.op("Div", y, x))
    negative = graph.op("Less", x, c(0))
    below = graph.op("Less", y, c(0))
    turn = graph.op("Where", below, c(-np.pi), c(np.pi))
    turned = graph.op("Where", negative, graph.op("Add", base, turn), base)
    half = graph.op("Mul", graph.op("Sign", y), c(np.pi / 2))
    return graph.op("Where", graph.op("Equal", x, c(0)), half, turned)


def _is_finite(graph: Graph, x: str) -> str:
    return graph.op("Not", graph.op("Or", graph.op("IsInf", x), graph.op("IsNaN", x)))


def _convert(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    tensor, target = graph.tensor(values[0]), np.dtype(eqn.params["new_dtype"])
    name = tensor.name
    source = carrier(tensor.dtype)
    if source != carrier(target):
        if is_float(source) and carrier(target).kind in "iu":
            name = _saturated(graph, name, source, target)
        name = graph.op("Cast", name, to=onnx_type(carrier(target)))
    if target == jnp.bfloat16 and tensor.dtype != target:
        name = graph.rounded(name, target)
    return [Tensor(name, tensor.held, tensor.shape, target)]


def _saturated(graph: Graph, name: str, source: np.dtype, target: np.dtype) -> str:
    """Within the target's range, where JAX stops and ONNX leaves the result open; NaN is 0."""
    least, most = int(np.iinfo(target).min), int(np.iinfo(target).max)
    wide = np.float64 if target.itemsize >= 4 else np.float32
    name = name if source == wide else graph.op("Cast", name, to=onnx_type(wide))
    name = graph.op("Where", graph.op("IsNaN", name), graph.scalar(0, wide), name)
    most = most if target.itemsize < 8 else most - 2**10
    return graph.op("Min", graph.op("Max", name, graph.scalar(least, wide)), graph.scalar(most, wide))


def _reduce_precision(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    bits = (eqn.params["exponent_bits"], eqn.params["mantissa_bits"])
    tensor = graph.tensor(values[0])
    if bits == (8, 7):
        return [Tensor(graph.rounded(tensor.name, jnp.bfloat16), tensor.held, tensor.shape, tensor.dtype)]
    info = jnp.finfo(tensor.dtype)
    if bits[0] < info.nexp or bits[1] < info.nmant:
        raise NotImplementedError(f"ONNX export can reduce the precision to that of bfloat16 alone, got {bits}.")
    return [tensor]


def _select(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    which, *cases = (graph.tensor(value) for value in values)
    result = cases[0]
    for number, other in enumerate(cases[1:], 1):
        flag = which
        if which.dtype != bool:
            flag = dataclasses.replace(which, name=graph.op("Equal", which.name, graph.scalar(number, which.dtype)))
        result = graph.chosen(flag, other, result)
    return [dataclasses.replace(result, shape=tuple(eqn.outvars[0].aval.shape))]


def _clamp(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    low, x, high = values
    write = elementwise(lambda graph, x, low, high: graph.op("Min", graph.op("Max", x, low), high), exact=True)
    return write(graph, eqn, [x, low, high])


def _logical(of_bools: str, of_integers: str) -> Callable[[Graph, Any, list[Any]], Sequence[Any]]:
    def rule(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
        tensors = [graph.tensor(value) for value in values]
        op = of_bools if tensors[0].dtype == bool else of_integers
        return [_like(graph.op(op, *(tensor.name for tensor in tensors)), tensors, eqn.outvars[0].aval)]

    return rule


def _shift(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    """ONNX shifts unsigned integers alone, and leaves open what a shift by all bits and more gives: 0, or the sign."""
    x, by = (graph.tensor(value) for value in values)
    bits = 8 * x.dtype.itemsize
    unsigned, with_sign = (
        np.dtype(f"uint{bits}"),
        x.dtype.kind == "i" and eqn.primitive.name == "shift_right_arithmetic",
    )
    amount = _cast_all(graph, by.name, unsigned, np.int64)
    inside = graph.op("Less", amount, graph.scalar(bits, np.int64))
    number = _cast_all(graph, x.name, *(() if with_sign else (unsigned,)), np.int64)
    negative = graph.op("Less", number, graph.scalar(0, np.int64))
    if with_sign:
        number = graph.op("Where", negative, graph.op("BitwiseNot", number), number)
    amount = _cast_all(graph, graph.op("Min", amount, graph.scalar(bits - 1, np.int64)), np.uint64)
    direction = "LEFT" if eqn.primitive.name == "shift_left" else "RIGHT"
    number = graph.op("BitShift", _cast_all(graph, number, np.uint64), amount, direction=direction)
    number = graph.op("Where", inside, _cast_all(graph, number, np.int64), graph.scalar(0, np.int64))
    if with_sign:
        number = graph.op("Where", negative, graph.op("BitwiseNot", number), number)
    return [_like(_cast_all(graph, number, unsigned, x.dtype), [x, by], eqn.outvars[0].aval)]


def _population_count(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    """From a table of bytes; wider integers are sums of theirs."""
    x = graph.tensor(values[0])
    bits = 8 * x.dtype.itemsize
    table = graph.constant(np.array([number.bit_count() for number in range(256)], np.int64))
    number = _cast_all(graph, x.name, np.dtype(f"uint{bits}"), np.uint64)
    counts = []
    for place in range(0, bits, 8):
        byte = graph.op("BitShift", number, graph.scalar(place, np.uint64), direction="RIGHT")
        byte = graph.op("BitwiseAnd", byte, graph.scalar(255, np.uint64))
        counts.append(graph.op("Gather", table, _cast_all(graph, byte, np.int64), axis=0))
    total = functools.reduce(lambda first, second: graph.op("Add", first, second), counts)
    return [_like(_cast_all(graph, total, x.dtype), [x], eqn.outvars[0].aval)]


def _cast_all(graph: Graph, name: str, *dtypes: Any) -> str:
    """Casts of integers one after another; they wrap around."""
    return functools.reduce(lambda inner, dtype: graph.op("Cast", inner, to=onnx_type(dtype)), dtypes, name)


def _not_equal(graph: Graph, first: str, second: str) -> str:
    return graph.op("Not", graph.op("Equal", first, second))


def _erfc(graph: Graph, c: Callable[[float], str], x: str) -> str:
    """1 - erf(x), written as 1 + erf(-x)."""
    return graph.op("Add", graph.op("Erf", graph.op("Neg", x)), c(1))


def _cbrt(graph: Graph, c: Callable[[float], str], x: str) -> str:
    return graph.op("Mul", graph.op("Sign", x), graph.op("Pow", graph.op("Abs", x), c(1 / 3)))


def _rem(graph: Graph, first: str, second: str) -> str:
    return graph.op("Mod", first, second, fmod=1)


def _as_it_is(graph: Graph, eqn: Any, values: list[Any]) -> Sequence[Any]:
    del graph, eqn
    return values


_EXACT = {"abs": "Abs", "neg": "Neg", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "max": "Max", "min": "Min"}
_ROUNDED = {
    "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "exp": "Exp", "log": "Log",
    "tanh": "Tanh", "sqrt": "Sqrt", "erf": "Erf", "logistic": "Sigmoid", "sin": "Sin", "cos": "Cos", "tan": "Tan",
    "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh", "acosh": "Acosh",
    "atanh": "Atanh",
}  # fmt: skip
_COMPARISONS = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
_COMPARISONS |= {"le_to": "LessOrEqual", "lt_to": "Less"}  # a total order, but for NaN
_IDENTITIES = (
    "stop_gradient", "copy", "copy_p", "optimization_barrier", "sharding_constraint", "reshard", "mesh_cast", "pvary",
    "layout_constraint",
)  # fmt: skip

RULES: dict[str, Callable[[Graph, Any, list[Any]], Sequence[Any]]] = {
    **{name: elementwise(_plain(op), exact=True) for name, op in _EXACT.items()},
    **{name: elementwise(_plain(op)) for name, op in {**_ROUNDED, **_COMPARISONS}.items()},
    **dict.fromkeys(_IDENTITIES, _as_it_is),
    "ne": elementwise(_not_equal),
    "square": elementwise(lambda graph, x: graph.op("Mul", x, x)),
    "rsqrt": elementwise(_chain("Sqrt", "Reciprocal")),
    "exp2": _of_floats(lambda graph, c, x: graph.op("Pow", c(2), x)),
    "cbrt": _of_floats(_cbrt),
    "erfc": _of_floats(_erfc),
    "expm1": _of_floats(_expm1),
    "log1p": _of_floats(_log1p),
    "atan2": _of_floats(_atan2),
    "integer_pow": _integer_pow,
    "round": _round,
    "rem": elementwise(_rem),
    "is_finite": elementwise(_is_finite),
    "convert_element_type": _convert,
    "reduce_precision": _reduce_precision,
    "select_n": _select,
    "clamp": _clamp,
    "and": _logical("And", "BitwiseAnd"),
    "or": _logical("Or", "BitwiseOr"),
    "xor": _logical("Xor", "BitwiseXor"),
    "not": _logical("Not", "BitwiseNot"),
    "population_count": _population_count,
    "shift_left": _shift,
    "shift_right_logical": _shift,
    "shift_right_arithmetic": _shift,
}
