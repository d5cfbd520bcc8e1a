"""From the tables of a TOML file to checked values: types here, and what is in range by the steps themselves."""

import dataclasses
import math
import re
import typing
from typing import Any, Literal

import numpy as np

_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT, _SMALLEST_FLOAT = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def read_table(cls: Any, name: str, table: Any) -> Any:
    """A step of a recipe from the options in a table.

    Args:
        cls: a frozen dataclass whose annotations say what the options are.
        name: of the table, for messages.
        table: parsed TOML.

    Raises:
        ValueError: not a table, an unknown or a missing option, a value of the wrong type or out of range; names the
            table and the option.
    """
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a table of options, found {table!r}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise ValueError(f"{name}: unknown option {unknown[0]!r}; known are {', '.join(fields)}.")
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in table]
    if missing:
        raise ValueError(f"{name}: the option {missing[0]!r} is needed.")
    try:
        return cls(**{key: read_value(key, hints[key], value) for key, value in table.items()})
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from err


def check_select(select: str) -> None:
    """Raises a `ValueError` unless `select` is a regular expression that could match a path."""
    if not select:
        raise ValueError("`select` is empty: it is a regular expression over whole paths, such as '.*/kernel'.")
    try:
        re.compile(select)
    except (re.error, OverflowError, RecursionError) as err:
        raise ValueError(f"`select` {select!r} is not a regular expression: {err}.") from err


def check_numbers(step: Any) -> None:
    """Raises a `ValueError` for a field of a dataclass that float32 (or int32) cannot hold, NaN and Inf among them."""
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            check_number(field.name, number)


def check_number(name: str, value: Any) -> None:
    """Raises a `ValueError` for a number that float32 (or int32) cannot hold, NaN and Inf among them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        raise ValueError(f"`{name}` must be at most {_LARGEST_INT}, got {value}.")
    if not math.isfinite(value) or abs(value) > _LARGEST_FLOAT:
        raise ValueError(f"`{name}` must be finite, got {value}.")
    if value and abs(value) < _SMALLEST_FLOAT:
        raise ValueError(f"`{name}` is {value}, which float32 rounds to 0.")


def read_value(name: str, hint: Any, value: Any) -> Any:
    """A value of a TOML file as the type that an annotation says; whole numbers may stand for floats.

    Raises:
        ValueError: it is of another type, or none of the choices; names the option.
    """
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(kinds[0]) is Literal:
        # A choice that may be left out; a file cannot say None.
        return read_value(name, kinds[0], value)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"`{name}` must be a list, such as [32, 64], found {value!r}.")
        return tuple(read_value(name, kinds[0], item) for item in value)
    if typing.get_origin(hint) is Literal:
        if value not in kinds:
            raise ValueError(f"`{name}` must be {' or '.join(map(repr, kinds))}, found {value!r}.")
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST_INT:
        # Before the conversion to float, which fails beyond 1e308.
        raise ValueError(f"`{name}` must be at most {_LARGEST_INT}, found {value}.")
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise ValueError(f"`{name}` must be of type {wanted}, found {value!r}.")
    return value
