"""Which compressed arrays checkpoints and exported functions know. For a new class, add one row to `COMPRESSED`."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.export
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.additive import AdditiveCodebookArray
from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.codebook import CodebookArray
from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.arrays.n_of_m import NMSparseArray
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.quantization.inputs import InputRounding
from jaxcompress._src.quantization.spec import QuantSpec


class Codec(NamedTuple):
    """How a static field is written as JSON and read back.

    Attributes:
        encode: value -> JSON; raises `TypeError` for a value of another type.
        decode: JSON -> value; raises `ValueError` for JSON of another type.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


class CompressedType(NamedTuple):
    """A class of compressed arrays: a dataclass whose fields are arrays (or compressed arrays), or static.

    Attributes:
        cls: the class.
        static: codecs of its static fields, by name; all other fields are parts.
        later: static fields that older checkpoints do not have, with what stood for them; written where they differ.
    """

    cls: type
    static: Mapping[str, Codec]
    later: Mapping[str, Any] = {}

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the fields that hold arrays."""
        return tuple(field.name for field in dataclasses.fields(self.cls) if field.name not in self.static)


def _exactly(*kinds: type) -> Codec:
    def check(value: Any, error: type[Exception]) -> Any:
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise error(f"{value!r} is of type {type(value).__name__}, expected {names}")
        return value

    return Codec(lambda value: check(value, TypeError), lambda value: check(value, ValueError))


def _tuple_of(item: Codec) -> Codec:
    def encode(value: Any) -> Any:
        return [item.encode(entry) for entry in _exactly(tuple).encode(value)]

    return Codec(encode, lambda value: tuple(item.decode(entry) for entry in _exactly(list).decode(value)))


def _optional(item: Codec) -> Codec:
    return Codec(
        lambda value: None if value is None else item.encode(value),
        lambda value: None if value is None else item.decode(value),
    )


def _decode_dtype(value: Any) -> jnp.dtype:
    try:
        return jnp.dtype(_exactly(str).decode(value))
    except TypeError as err:
        raise ValueError(f"{value!r} is not the name of a dtype") from err


def _number(kind: type, *abstract: type) -> Codec:
    """Python and NumPy numbers are written as Python numbers: shapes computed with NumPy end up in static fields."""

    def encode(value: Any) -> Any:
        number = kind(value) if isinstance(value, abstract) else _exactly(kind).encode(value)
        if not math.isfinite(number):
            raise TypeError(f"{value!r} is not finite")
        return number

    return Codec(encode, _exactly(kind).decode)


def _encode_rounding(value: Any) -> Any:
    return dataclasses.asdict(_exactly(InputRounding).encode(value))


def _decode_rounding(value: Any) -> InputRounding:
    try:
        fields = _exactly(dict).decode(value)
        return InputRounding(**fields | {"spec": QuantSpec(**fields["spec"])})
    except (KeyError, TypeError) as err:
        raise ValueError(f"{value!r} does not describe how inputs are rounded: {err}") from err


INT = _number(int, np.integer)
BOOL = _number(bool, np.bool_)
FLOAT = _number(float, np.floating, int, np.integer)
DTYPE = Codec(lambda value: jnp.dtype(value).name, _decode_dtype)
INTS = _tuple_of(INT)
FLOATS = _tuple_of(FLOAT)
ROUNDING = Codec(_encode_rounding, _decode_rounding)

COMPRESSED: dict[str, CompressedType] = {
    row.cls.__name__: row
    for row in (
        CompressedType(PackedArray, {"bits": INT, "signed": BOOL, "axis": INT, "width": INT}),
        CompressedType(
            QuantizedArray,
            {"dtype": DTYPE, "levels": _optional(FLOATS), "partial": _optional(INTS)},
            later={"partial": None},
        ),
        CompressedType(CodebookArray, {"dtype": DTYPE, "zero": BOOL}),
        CompressedType(AdditiveCodebookArray, {"dtype": DTYPE, "axis": INT, "width": INT}),
        CompressedType(BitmaskSparseArray, {"row_shape": INTS}),
        CompressedType(InputQuantizedArray, {"inputs": ROUNDING}),
        CompressedType(NMSparseArray, {"pattern": INTS, "axis": INT, "width": INT}),
        CompressedType(LowRankArray, {"dtype": DTYPE}),
    )
}
"""By class name, as it stands in the manifest. Classes come from this table alone, never from a file."""


def _export_statics(row: CompressedType, values: tuple[Any, ...]) -> bytes:
    """Static fields in the order in which JAX keeps them, which is that of the table."""
    try:
        fields = {name: codec.encode(value) for (name, codec), value in zip(row.static.items(), values, strict=True)}
    except TypeError as err:
        raise TypeError(f"a static field of {row.cls.__name__} cannot be exported: {err}") from err
    return json.dumps(fields).encode()


def _import_statics(row: CompressedType, content: bytes) -> tuple[Any, ...]:
    fields = json.loads(content)
    return tuple(codec.decode(fields[name]) for name, codec in row.static.items())


# `jax.export.export(jax.jit(execute(f)))(compressed, x).serialize()` writes down the trees of its arguments.
for _name, _row in COMPRESSED.items():
    jax.export.register_pytree_node_serialization(
        _row.cls,
        serialized_name=f"jaxcompress.{_name}",
        serialize_auxdata=functools.partial(_export_statics, _row),
        deserialize_auxdata=functools.partial(_import_statics, _row),
    )
