"""The manifest as JSON and back. Reading trusts nothing: every field is checked for its type."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, cast, get_args

import jax.numpy as jnp

from jaxcompress._src.checkpoint.keys import decode_key, encode_key
from jaxcompress._src.checkpoint.manifest import FileRecord, LeafRecord, Manifest, Storage, StoredValue, StructureNode

STORED_DTYPES = frozenset(
    ["bool"]
    + [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    + ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
    + [f"float8_{kind}" for kind in ("e3m4", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")]
)
"""What Orbax stores exactly. Types below 8 bits are left out: packed codes are smaller and always load."""

MAX_AXES = 32
"""Orbax stores no array that has more."""

_SUB_BYTE = ("int1", "uint1", "int2", "uint2", "int4", "uint4")


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON values."""
    content: dict[str, Any] = {
        "format_version": manifest.format_version,
        "versions": dict(manifest.versions),
        "config": manifest.config,
        "metadata": manifest.metadata,
        "structure": _node_to_json(manifest.structure),
        "leaves": [
            {"path": [list(encode_key(key)) for key in leaf.path], "value": _value_to_json(leaf.value)}
            for leaf in manifest.leaves
        ],
        "files": {name: _file_to_json(file) for name, file in manifest.files.items()},
        "arrays": manifest.arrays,
    }
    return content if manifest.storage == "orbax" else content | {"storage": manifest.storage}


def manifest_from_json(content: Mapping[str, Any]) -> Manifest:
    """The inverse of `manifest_to_json`.

    Raises:
        ValueError: a field is missing or of another type, or the fields contradict one another; says which.
    """
    version, storage = _get(content, "format_version", int), _storage(_get(content, "storage", str, default="orbax"))
    checked = {} if version < 3 and "checksum" not in content else {"checksum": _get(content, "checksum", str)}
    manifest = Manifest(
        format_version=version,
        versions={name: _get(content["versions"], name, str) for name in _get(content, "versions", dict)},
        config=_get(content, "config", dict),
        metadata=_get(content, "metadata", dict),
        structure=_node_from_json(_get(content, "structure", dict)),
        leaves=tuple(_leaf_from_json(at, leaf) for at, leaf in enumerate(_get(content, "leaves", list))),
        files={name: _file_from_json(content["files"], name) for name in _get(content, "files", dict)},
        storage=storage,
        arrays=_arrays(content, storage) if version >= 3 else "arrays" if storage == "orbax" else "arrays.bin",
        **checked,
    )
    _check_consistent(manifest)
    return manifest


def _check_consistent(manifest: Manifest) -> None:
    places = [(path, node.leaf) for path, node in manifest.structure.walk() if node.kind == "leaf"]
    if places != [(leaf.path, at) for at, leaf in enumerate(manifest.leaves)]:
        raise ValueError(
            f"`structure` has {len(places)} leaves and `leaves` has {len(manifest.leaves)}; "
            "they must be the same, in the same order"
        )
    arrays = [array for leaf in manifest.leaves for array in leaf.value.arrays()]
    if len({array.array for array in arrays}) != len(arrays):
        raise ValueError("two arrays have the same name")
    if not manifest.files and any(0 not in (array.shape or ()) for array in arrays):
        raise ValueError("`files` is empty, but there are arrays")
    for name in manifest.files:
        # Nothing outside may be taken for a part of the checkpoint.
        if name.split("/")[0] != manifest.arrays or {"", ".", ".."} & set(name.split("/")):
            raise ValueError(f"`files` has {name!r}, which is not in {manifest.arrays!r}")


def _arrays(content: Mapping[str, Any], storage: Storage) -> str:
    name = _get(content, "arrays", str)
    if not re.fullmatch(r"arrays-[0-9a-f]{12}" + (r"\.bin" if storage == "entropy" else ""), name):
        raise ValueError(f"`arrays` is a name with 12 hexadecimal digits, found {name!r}")
    return name


def _storage(name: str) -> Storage:
    if name not in get_args(Storage):
        raise ValueError(f"`storage` is one of {get_args(Storage)}, found {name!r}")
    return cast(Storage, name)


def _file_from_json(content: Mapping[str, Any], name: str) -> FileRecord:
    file = _get(content, name, dict)
    kind = "crc32" if "crc32" in file else "sha256"
    return FileRecord(size=_get(file, "size", int), **{kind: _get(file, kind, str)})


def _file_to_json(file: FileRecord) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(file).items() if value is not None}


def _node_to_json(node: StructureNode) -> dict[str, Any]:
    if node.kind == "leaf":
        return {"leaf": node.leaf}
    children = [[*encode_key(key), _node_to_json(child)] for key, child in node.children]
    content: dict[str, Any] = {"kind": node.kind, "children": children}
    if node.opaque:
        content["opaque"] = True
    if node.static:
        content["static"] = dict(node.static)
    return content


def _node_from_json(content: Any) -> StructureNode:
    if not isinstance(content, dict):
        raise ValueError(f"a node of `structure` is an object, found {content!r}")
    if "leaf" in content:
        return StructureNode(kind="leaf", leaf=_get(content, "leaf", int))
    children = []
    for child in _get(content, "children", list):
        if not isinstance(child, list) or len(child) != 3:
            raise ValueError(f"a child in `structure` is key class, key and node, found {child!r}")
        children.append((decode_key(child[:2]), _node_from_json(child[2])))
    return StructureNode(
        kind=_get(content, "kind", str),
        opaque=_get(content, "opaque", bool, default=False),
        static=_get(content, "static", dict, default={}),
        children=tuple(children),
    )


def _leaf_from_json(at: int, content: Any) -> LeafRecord:
    where = f"leaf {at}"
    try:
        if not isinstance(content, dict):
            raise ValueError(f"it is an object, found {content!r}")
        leaf = LeafRecord(
            path=tuple(decode_key(key) for key in _get(content, "path", list)), value=StoredValue(kind="None")
        )
        where = f"leaf {leaf.name!r}"
        return LeafRecord(path=leaf.path, value=_value_from_json(_get(content, "value", dict)))
    except ValueError as err:
        raise ValueError(f"{where}: {err}") from err


def _value_to_json(value: StoredValue) -> dict[str, Any]:
    content: dict[str, Any] = {"kind": value.kind}
    if value.shape is not None:
        content |= {"shape": list(value.shape), "dtype": value.dtype}
    if value.array is not None:
        content["array"] = value.array
    if value.static:
        content["static"] = dict(value.static)
    if value.parts:
        content["parts"] = {name: _value_to_json(part) for name, part in value.parts.items()}
    return content


def _value_from_json(content: Any) -> StoredValue:
    if not isinstance(content, dict):
        raise ValueError(f"a stored value is an object, found {content!r}")
    value = StoredValue(
        kind=_get(content, "kind", str),
        shape=_shape(content) if "shape" in content else None,
        dtype=_get(content, "dtype", str) if "shape" in content else None,
        array=_get(content, "array", str) if "array" in content else None,
        static=_get(content, "static", dict, default={}),
        parts={name: _value_from_json(part) for name, part in _get(content, "parts", dict, default={}).items()},
    )
    if value.array is not None and (value.dtype not in STORED_DTYPES or value.shape is None):
        raise ValueError(f"array {value.array!r} needs a shape and a dtype that can be stored, found {value.dtype!r}")
    return value


def _shape(content: Mapping[str, Any]) -> tuple[int, ...]:
    shape = _get(content, "shape", list)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"`shape` is a list of sizes, found {shape!r}")
    if len(shape) > MAX_AXES or math.prod(size or 1 for size in shape) >= 2**56:
        raise ValueError(f"`shape` has at most {MAX_AXES} axes and 2**56 elements, found {shape!r:.80}")
    return tuple(shape)


def _get(content: Mapping[str, Any], name: str, kind: type, **default: Any) -> Any:
    if name not in content and "default" in default:
        return default["default"]
    if type(content.get(name)) is not kind:
        found = repr(content[name])[:80] if name in content else "nothing"
        raise ValueError(f"`{name}` should be of type {kind.__name__}, found {found}")
    return content[name]


def dtype_name(dtype: Any) -> str:
    """The name of a dtype that can be stored.

    Raises:
        TypeError: Orbax cannot store it, or not exactly.

    Example:
        >>> dtype_name("bfloat16")
        'bfloat16'
    """
    name = jnp.dtype(dtype).name
    if name not in STORED_DTYPES:
        hint = "; pack integers below 8 bits with `jaxcompress.arrays.pack`" if name in _SUB_BYTE else ""
        raise TypeError(f"arrays of dtype {name} cannot be stored{hint}")
    return name
