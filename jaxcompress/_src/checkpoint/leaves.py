"""Leaves as stored values and named arrays, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress._src.arrays.protocol import KINDS, call
from jaxcompress._src.checkpoint.manifest import StoredValue
from jaxcompress._src.checkpoint.manifest_json import MAX_AXES, dtype_name
from jaxcompress._src.tree.unselected import Unselected, is_unselected
from jaxcompress._src.types import is_compressed

_NUMBERS = {kind.__name__: kind for kind in (bool, int, float, complex)}


def encode_leaf(value: Any, name: str) -> tuple[StoredValue, dict[str, Any]]:
    """Describes a leaf, and names its arrays.

    Args:
        value: a JAX or NumPy array, a typed key, a Python number, or a compressed array of the table.
        name: of the arrays, such as `leaf_00017`; parts of a compressed array add their field names.

    Returns:
        The description, and all arrays by name, those without elements included.

    Raises:
        TypeError: the leaf, a part, a static field or a dtype cannot be stored; says why.
        ValueError: an array was deleted (donated).
    """
    if is_compressed(value):
        return _encode_compressed(value, name)
    if isinstance(value, jax.Array):
        return _encode_jax(value, name)
    if type(value) in (np.ndarray, np.memmap) or isinstance(value, np.generic):
        kind = "numpy.generic" if isinstance(value, np.generic) else "numpy.ndarray"
        dtype = _checked_dtype(value)
        # One memory order and one byte order, so that equal arrays are stored as equal bytes.
        plain = np.require(np.asarray(value), np.dtype(dtype), ["C"])
        return StoredValue(kind=kind, shape=value.shape, dtype=dtype, array=name), {name: plain}
    if type(value) in _NUMBERS.values():
        # As text, because JSON has no infinities and no complex numbers; repr is exact.
        kind = type(value).__name__
        return StoredValue(kind="python", shape=(), dtype=kind, static={"value": repr(value)}), {}
    raise TypeError(
        f"a leaf of type {type(value).__name__} cannot be stored; it can be a JAX or NumPy array, a typed random key, "
        f"a bool, int, float or complex, or one of {', '.join(KINDS)}"
    )


def decode_leaf(value: StoredValue, arrays: Mapping[str, Any]) -> Any:
    """The leaf that `encode_leaf` described.

    Args:
        value: its description.
        arrays: at least its arrays, by name; abstract ones give an abstract leaf.

    Raises:
        ValueError: an unknown class, or fields that contradict the logical shape or dtype; says which.
    """
    if value.array is not None:
        array = arrays[value.array]
        return array[()] if value.kind == "numpy.generic" and isinstance(array, np.ndarray) else array
    if value.kind == "python":
        return _decode_number(value)
    if value.kind == "prng_key":
        return _decode_key(value, arrays)
    if value.kind == "None":
        return None
    if value.kind == "Unselected":
        return Unselected
    return _decode_compressed(value, arrays)


def _encode_jax(value: jax.Array, name: str) -> tuple[StoredValue, dict[str, Any]]:
    if isinstance(value, Tracer):
        raise TypeError("a traced value cannot be stored; save outside `jit`, `grad` and `vmap`")
    if value.is_deleted():
        raise ValueError("its array was deleted: it was donated to a jitted function")
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        dtype = _checked_dtype(value)
        return StoredValue(kind="jax.Array", shape=value.shape, dtype=dtype, array=name), {name: value}
    impl = str(jax.random.key_impl(value))
    data, arrays = _encode_jax(jax.random.key_data(value), f"{name}.data")
    _abstract_key(arrays[f"{name}.data"], impl)
    return StoredValue(
        kind="prng_key", shape=value.shape, dtype=value.dtype.name, static={"impl": impl}, parts={"data": data}
    ), arrays


def _checked_dtype(value: Any) -> str:
    if value.ndim > MAX_AXES:
        raise TypeError(f"an array of {value.ndim} axes cannot be stored, {MAX_AXES} are the most; reshape it")
    return dtype_name(value.dtype)


def _encode_compressed(value: Any, name: str) -> tuple[StoredValue, dict[str, Any]]:
    kind = KINDS.get(type(value).__name__)
    if kind is None or type(value) is not kind.cls:
        raise TypeError(f"compressed arrays of class {type(value).__qualname__} cannot be stored yet")
    parts, arrays = {}, {}
    for field in kind.parts:
        part, part_arrays = _encode_part(getattr(value, field), field, f"{name}.{field}")
        parts[field], arrays = part, arrays | part_arrays
    try:
        static = {
            name: field.encode(getattr(value, name))
            for name, field in kind.static.items()
            if name not in kind.later or getattr(value, name) != kind.later[name]
        }
    except TypeError as err:
        raise TypeError(f"a static field of {type(value).__name__}: {err}") from err
    whole = _is_whole(parts)
    return StoredValue(
        kind=type(value).__name__,
        shape=tuple(int(size) for size in value.shape) if whole else None,
        dtype=jnp.dtype(value.dtype).name if whole else None,
        static=static,
        parts=parts,
    ), arrays


def _encode_part(part: Any, field: str, name: str) -> tuple[StoredValue, dict[str, Any]]:
    if part is None or is_unselected(part):
        return StoredValue(kind="None" if part is None else "Unselected"), {}
    try:
        return encode_leaf(part, name)
    except (TypeError, ValueError) as err:
        kind = TypeError if isinstance(err, TypeError) else ValueError
        raise kind(f"in `{field}`: {err}") from err


def _decode_compressed(value: StoredValue, arrays: Mapping[str, Any]) -> Any:
    kind = KINDS.get(value.kind)
    if kind is None:
        raise ValueError(f"class {value.kind!r} is unknown; this version knows {', '.join(KINDS)}")
    known = {**{name: kind.static[name].encode(older) for name, older in kind.later.items()}, **value.static}
    if set(value.parts) != set(kind.parts) or set(known) != set(kind.static):
        raise ValueError(
            f"{value.kind} has parts {sorted(kind.parts)} and static fields {sorted(kind.static)}, "
            f"found {sorted(value.parts)} and {sorted(value.static)}"
        )
    fields = {name: field.decode(known[name]) for name, field in kind.static.items()}
    leaf = kind.cls(**fields, **{name: decode_leaf(part, arrays) for name, part in value.parts.items()})
    if _is_whole(value.parts):
        _check_logical(leaf, value)
    return leaf


def _check_logical(leaf: Any, value: StoredValue) -> None:
    try:
        found = tuple(leaf.shape), jnp.dtype(leaf.dtype).name
    except (AttributeError, TypeError, IndexError) as err:
        raise ValueError(f"the parts of {value.kind} do not fit together: {err}") from err
    if found != (value.shape, value.dtype):
        raise ValueError(
            f"the parts of {value.kind} make {found[1]}{list(found[0])}; "
            f"the manifest says {value.dtype}{list(value.shape or ())}"
        )
    # So that bytes are never read with the wrong number of bits.
    call(leaf, "validate_shapes")


def _is_whole(parts: Mapping[str, StoredValue]) -> bool:
    """Whether no part, at any depth, is left out (as in a tree for an optimizer): then there is a logical shape."""
    return all(part.kind != "Unselected" and _is_whole(part.parts) for part in parts.values())


def _decode_number(value: StoredValue) -> Any:
    text = value.static.get("value")
    if value.dtype == "bool" and text in ("True", "False"):
        return text == "True"
    if value.dtype in ("int", "float", "complex") and isinstance(text, str):
        return _NUMBERS[value.dtype](text)
    raise ValueError(f"a Python number has a `dtype` of {', '.join(_NUMBERS)} and a `value`, found {value!r}")


def _decode_key(value: StoredValue, arrays: Mapping[str, Any]) -> Any:
    impl = value.static.get("impl")
    if not isinstance(impl, str) or set(value.parts) != {"data"}:
        raise ValueError(f"a random key has an `impl` and a part `data`, found {value!r}")
    data = decode_leaf(value.parts["data"], arrays)
    abstract = _abstract_key(data, impl)
    if abstract.shape != value.shape:
        raise ValueError(f"key data of shape {data.shape} make keys of shape {abstract.shape}, not {value.shape}")
    return (
        abstract if isinstance(data, jax.ShapeDtypeStruct) else jax.random.wrap_key_data(jnp.asarray(data), impl=impl)
    )


def _abstract_key(data: Any, impl: str) -> jax.ShapeDtypeStruct:
    try:
        return jax.eval_shape(
            lambda bits: jax.random.wrap_key_data(bits, impl=impl), jax.ShapeDtypeStruct(data.shape, data.dtype)
        )
    except (TypeError, ValueError) as err:
        raise ValueError(f"random keys of the implementation {impl!r} cannot be stored: {err}") from err
