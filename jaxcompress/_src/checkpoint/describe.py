"""What a manifest says of a tree, and the arrays that it names."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress._src.checkpoint.leaves import encode_leaf
from jaxcompress._src.checkpoint.manifest import FORMAT_VERSION, LeafRecord, Manifest, Storage
from jaxcompress._src.checkpoint.manifest_json import manifest_to_json
from jaxcompress._src.checkpoint.processes import differing
from jaxcompress._src.checkpoint.store import orbax_version
from jaxcompress._src.checkpoint.structure import describe_structure
from jaxcompress._src.tree.paths import path_string


def describe(
    params: Any, config: Mapping[str, Any], metadata: Mapping[str, Any], storage: Storage
) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of a tree, without files, and its arrays by name, none of them without elements.

    Raises:
        TypeError: a leaf, key, config or metadata entry of a type that cannot be stored; names it.
        ValueError: a donated array, or a number that JSON does not have.
    """
    structure, leaves = describe_structure(params)
    records, arrays = _encode_leaves(leaves)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        versions=_versions(storage),
        config=to_json(config, "config"),
        metadata=to_json(metadata, "metadata"),
        structure=structure,
        leaves=records,
        files={},
        storage=storage,
    )
    return manifest, arrays


def same_in_all_processes(manifest: Manifest, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, those on devices of one process as NumPy arrays: Orbax writes these in the first process only.

    Raises:
        ValueError: the processes have different trees, or different values in an array that each has for itself.
    """
    if jax.process_count() == 1:
        return dict(arrays)
    content = manifest_to_json(dataclasses.replace(manifest, config={}, metadata={}))
    if differing([hashlib.sha256(json.dumps(content).encode()).digest()]):
        raise ValueError(
            "`params` has other leaves, shapes or numbers in other JAX processes; it must be the same tree."
        )
    shared = {
        name: array for name, array in arrays.items() if isinstance(array, jax.Array) and not array.is_fully_addressable
    }
    local = {name: np.asarray(array) for name, array in arrays.items() if name not in shared}
    for at in differing([hashlib.sha256(array.tobytes()).digest() for array in local.values()]):
        raise ValueError(
            f"Leaf {_leaf_of(manifest, list(local)[at])!r} is an array of each JAX process, and they differ; make one "
            "array of them (`jax.make_array_from_process_local_data`), or the same array in all."
        )
    return shared | local


def to_json(value: Any, where: str) -> Any:
    """`value` as JSON would give it back; what JSON would change silently is an error.

    Args:
        value: None, bool, numbers, str, lists, tuples and mappings of them.
        where: its name in messages.

    Raises:
        TypeError: JSON has no such type.
        ValueError: JSON has no such number.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"`{where}` has the key {key!r} of type {type(key).__name__}; JSON has str keys only.")
        return {str(key): to_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, f"{where}[{at}]") for at, item in enumerate(value)]
    if isinstance(value, np.generic):
        return to_json(value.item(), where)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{where}` is {value}, which JSON does not have; store it as text or leave it out.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"`{where}` is of type {type(value).__name__}, which JSON does not have: {value!r:.80}")


def _encode_leaves(leaves: list[tuple[tuple[Any, ...], Any]]) -> tuple[tuple[LeafRecord, ...], dict[str, Any]]:
    records, arrays = [], {}
    for at, (path, leaf) in enumerate(leaves):
        try:
            value, leaf_arrays = encode_leaf(leaf, f"leaf_{at:05}")
        except (TypeError, ValueError) as err:
            kind = TypeError if isinstance(err, TypeError) else ValueError
            raise kind(f"Leaf {path_string(path)!r}: {err}.") from err
        records.append(LeafRecord(path=path, value=value))
        # Orbax refuses arrays without elements; their shapes in the manifest say all there is.
        arrays |= {name: array for name, array in leaf_arrays.items() if 0 not in array.shape}
    return tuple(records), arrays


def _leaf_of(manifest: Manifest, name: str) -> str:
    return next(leaf.name for leaf in manifest.leaves if name in [array.array for array in leaf.value.arrays()])


def _versions(storage: Storage) -> dict[str, str]:
    versions = {"jaxcompress": _library_version(), "jax": jax.__version__}
    return versions | {"orbax": orbax_version()} if storage == "orbax" else versions


def _library_version() -> str:
    try:
        return importlib.metadata.version("jaxcompress")
    except importlib.metadata.PackageNotFoundError:
        # A source tree on the path, not installed.
        return "unknown"
