"""Writing a checkpoint."""

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Mapping
from typing import Any, get_args

import jax
import numpy as np

from jaxcompress.checkpoint._coded import CODED_NAME, write_coded
from jaxcompress.checkpoint._directory import checksums, file_sizes, new_directory
from jaxcompress.checkpoint._leaves import encode_leaf
from jaxcompress.checkpoint._manifest import FORMAT_VERSION, FileRecord, LeafRecord, Manifest, Storage
from jaxcompress.checkpoint._manifest_file import MANIFEST_NAME, has_manifest, write_manifest
from jaxcompress.checkpoint._store import ARRAYS_NAME, orbax_version, write_arrays
from jaxcompress.checkpoint._structure import describe_structure
from jaxcompress.tree import path_string


def save(
    path: str | os.PathLike[str],
    params: Any,
    *,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    storage: Storage = "orbax",
) -> None:
    """Writes a tree, so that `restore` needs nothing but the path.

    Any tree can be saved: parameters with compressed leaves, `TransformState`, optimizer state, random keys. Leaves are
    JAX and NumPy arrays, typed keys, Python numbers and compressed arrays. Everything is checked before anything is
    written. The directory appears whole or not at all, and `overwrite` never leaves a moment without a whole
    checkpoint; a save that is killed half-way can leave a hidden sibling `.NAME.writing-*` or `.NAME.replaced-*`.

    Layout: `manifest.json` (paths, classes, static fields, shapes, dtypes, config) and `arrays/`, an Orbax checkpoint.
    With entropy coding: `manifest.z`, the same in short, and `arrays.bin`, in which every array has the fewest bytes
    that one of several coders gives (see `clustering.encode_codes`). Codes of few values and much zero become small,
    dense floats hardly; ten million codes take seconds, sparse ones longer.

    Args:
        path: the directory to create, absolute or relative, on a local file system.
        params: the tree.
        config: of the model; JSON values with str keys. Tuples come back as lists, NumPy numbers as Python numbers.
        metadata: anything else to keep, likewise.
        overwrite: whether a checkpoint at `path` may be replaced. Any other directory is never replaced.
        storage: "orbax", or "entropy": as few bytes as possible. Both come back bit for bit.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is False or it is no checkpoint.
        TypeError: a leaf, key, config or metadata entry of a type that cannot be stored; names it.
        ValueError: a donated array, a number that JSON does not have, a path that is a URL, an unknown `storage`.
        OSError: the directory cannot be written.
        NotImplementedError: more than one JAX process.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from jaxcompress.checkpoint import restore, save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(directory + "/model", {"layers": ({"bias": jnp.arange(2)},)}, config={"width": 2})
        ...     params, info = restore(directory + "/model")
        >>> params, info.config
        ({'layers': ({'bias': Array([0, 1], dtype=int32)},)}, {'width': 2})
    """
    if jax.process_count() > 1:
        raise NotImplementedError(f"`save` works in one JAX process, this is one of {jax.process_count()}.")
    if storage not in get_args(Storage):
        raise ValueError(f"`storage` must be one of {get_args(Storage)}, got {storage!r}.")
    target = _check_target(path, overwrite)
    structure, leaves = describe_structure(params)
    records, arrays = _encode_leaves(leaves)
    manifest = Manifest(
        format_version=1 if storage == "orbax" else FORMAT_VERSION,
        versions=_versions(storage),
        config=_to_json(config or {}, "config"),
        metadata=_to_json(metadata or {}, "metadata"),
        structure=structure,
        leaves=records,
        files={},
        storage=storage,
    )
    with new_directory(target, overwrite=overwrite) as writing:
        if storage == "orbax":
            write_arrays(os.path.join(writing, ARRAYS_NAME), arrays)
        else:
            write_coded(os.path.join(writing, CODED_NAME), records, arrays)
        write_manifest(writing, dataclasses.replace(manifest, files=_describe_files(writing)))


def _check_target(path: str | os.PathLike[str], overwrite: bool) -> str:
    if "://" in os.fspath(path):
        raise ValueError(f"`path` must be on a local file system, got {os.fspath(path)!r}.")
    # Renaming a link would leave what it points to behind.
    target = os.path.realpath(path)
    if not os.path.lexists(target):
        return target
    if not overwrite:
        raise FileExistsError(f"{target!r} exists; pass `overwrite=True` to replace the checkpoint there.")
    if not has_manifest(target):
        raise FileExistsError(
            f"{target!r} exists and is not a checkpoint (it has no {MANIFEST_NAME}); `overwrite=True` replaces "
            "checkpoints only. Remove it, or choose another path."
        )
    return target


def _encode_leaves(leaves: list[tuple[tuple[Any, ...], Any]]) -> tuple[tuple[LeafRecord, ...], dict[str, Any]]:
    records, arrays = [], {}
    for at, (path, leaf) in enumerate(leaves):
        try:
            value, found = encode_leaf(leaf, f"leaf_{at:05}")
        except (TypeError, ValueError) as err:
            kind = TypeError if isinstance(err, TypeError) else ValueError
            raise kind(f"Leaf {path_string(path)!r}: {err}.") from err
        records.append(LeafRecord(path=path, value=value))
        # Orbax refuses arrays without elements; their shapes in the manifest say all there is.
        arrays |= {name: array for name, array in found.items() if 0 not in array.shape}
    return tuple(records), arrays


def _describe_files(directory: str) -> dict[str, FileRecord]:
    sizes = file_sizes(directory)
    return {name: FileRecord(size=sizes[name], crc32=crc32) for name, crc32 in checksums(directory, sizes).items()}


def _to_json(value: Any, where: str) -> Any:
    """`value` as JSON would give it back; what JSON would change silently is an error."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"`{where}` has the key {key!r} of type {type(key).__name__}; JSON has str keys only.")
        return {str(key): _to_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item, f"{where}[{at}]") for at, item in enumerate(value)]
    if isinstance(value, np.generic):
        return _to_json(value.item(), where)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{where}` is {value}, which JSON does not have; store it as text or leave it out.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"`{where}` is of type {type(value).__name__}, which JSON does not have: {value!r:.80}")


def _versions(storage: Storage) -> dict[str, str]:
    found = {"jaxcompress": _library_version(), "jax": jax.__version__}
    return found | {"orbax": orbax_version()} if storage == "orbax" else found


def _library_version() -> str:
    try:
        return importlib.metadata.version("jaxcompress")
    except importlib.metadata.PackageNotFoundError:
        # A source tree on the path, not installed.
        return "unknown"
