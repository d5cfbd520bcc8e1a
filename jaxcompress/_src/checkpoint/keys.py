"""Key paths as JSON: the type and the value of every key, so that `1` and `"1"`, `a/b` and `a`, `b` stay apart."""

from typing import Any, TypeAlias

from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

EncodedKey: TypeAlias = tuple[str, str | int]
"""Class name of the key entry, and its value."""

_FIELDS = {
    "DictKey": (DictKey, "key", (str, int)),
    "SequenceKey": (SequenceKey, "idx", (int,)),
    "GetAttrKey": (GetAttrKey, "name", (str,)),
    "FlattenedIndexKey": (FlattenedIndexKey, "key", (int,)),
}


def encode_key(key: Any) -> EncodedKey:
    """A JAX key entry as class name and value.

    Raises:
        TypeError: another class of key, or a dict key that is neither str nor int.

    Example:
        >>> from jax.tree_util import DictKey
        >>> encode_key(DictKey(1)), encode_key(DictKey("1"))
        (('DictKey', 1), ('DictKey', '1'))
    """
    name = type(key).__name__
    if name not in _FIELDS:
        raise TypeError(f"a key entry of class {name} cannot be stored, only {', '.join(_FIELDS)}")
    _, field, kinds = _FIELDS[name]
    value = getattr(key, field)
    # The exact type: True is an int, and a NumPy integer or a str enum would come back as another class.
    if type(value) not in kinds:
        raise TypeError(f"the key {value!r} of type {type(value).__name__} cannot be stored, only str and int")
    return name, value


def decode_key(encoded: Any) -> Any:
    """The inverse of `encode_key`.

    Raises:
        ValueError: not a pair of a known class name and a value of its type.
    """
    known = isinstance(encoded, list | tuple) and len(encoded) == 2 and isinstance(encoded[0], str)
    if not known or encoded[0] not in _FIELDS:
        raise ValueError(f"a key is a pair of one of {', '.join(_FIELDS)} and its value, found {encoded!r}")
    cls, _, kinds = _FIELDS[encoded[0]]
    if type(encoded[1]) not in kinds:
        raise ValueError(f"a {encoded[0]} holds {' or '.join(kind.__name__ for kind in kinds)}, found {encoded[1]!r}")
    return cls(encoded[1])
