"""Static fields of compressed arrays as JSON, and back."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class StaticField(NamedTuple):
    """How a static field is written as JSON and read back.

    Attributes:
        encode: value -> JSON; raises `TypeError` for a value of another type.
        decode: JSON -> value; raises `ValueError` for JSON of another type.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def exactly(*kinds: type) -> StaticField:
    """Values that JSON has, of these types and no subclass."""

    def check(value: Any, error: type[Exception]) -> Any:
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise error(f"{value!r} is of type {type(value).__name__}, expected {names}")
        return value

    return StaticField(lambda value: check(value, TypeError), lambda value: check(value, ValueError))


def tuple_of(item: StaticField) -> StaticField:
    """Tuples, as lists."""

    def encode(value: Any) -> Any:
        return [item.encode(entry) for entry in exactly(tuple).encode(value)]

    return StaticField(encode, lambda value: tuple(item.decode(entry) for entry in exactly(list).decode(value)))


def optional(item: StaticField) -> StaticField:
    """None, or a value of a field."""
    return StaticField(
        lambda value: None if value is None else item.encode(value),
        lambda value: None if value is None else item.decode(value),
    )


def _decode_dtype(value: Any) -> jnp.dtype:
    try:
        return jnp.dtype(exactly(str).decode(value))
    except TypeError as err:
        raise ValueError(f"{value!r} is not the name of a dtype") from err


def _number(kind: type, *abstract: type) -> StaticField:
    """Python and NumPy numbers are written as Python numbers: shapes computed with NumPy end up in static fields."""

    def encode(value: Any) -> Any:
        number = kind(value) if isinstance(value, abstract) else exactly(kind).encode(value)
        if not math.isfinite(number):
            raise TypeError(f"{value!r} is not finite")
        return number

    return StaticField(encode, exactly(kind).decode)


INT = _number(int, np.integer)
BOOL = _number(bool, np.bool_)
FLOAT = _number(float, np.floating, int, np.integer)
DTYPE = StaticField(lambda value: jnp.dtype(value).name, _decode_dtype)
INTS = tuple_of(INT)
FLOATS = tuple_of(FLOAT)
