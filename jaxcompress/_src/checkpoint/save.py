"""Writing a checkpoint."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import jax
import numpy as np

from jaxcompress._src.checkpoint.coded import write_coded
from jaxcompress._src.checkpoint.files import digests, file_names, regular_size
from jaxcompress._src.checkpoint.leaves import encode_leaf
from jaxcompress._src.checkpoint.manifest import FORMAT_VERSION, FileRecord, LeafRecord, Manifest, Storage
from jaxcompress._src.checkpoint.manifest_file import MANIFEST_NAME, has_manifest, write_manifest
from jaxcompress._src.checkpoint.manifest_json import manifest_to_json
from jaxcompress._src.checkpoint.processes import by_first, differing, to_host, together
from jaxcompress._src.checkpoint.store import orbax_version, write_arrays
from jaxcompress._src.checkpoint.structure import describe_structure
from jaxcompress._src.checkpoint.versions import Workspace, close_workspace, open_workspace, publish
from jaxcompress._src.tree.paths import path_string


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
    written. A version is published by one atomic step: at every moment, and after a kill at any moment, there is the
    old one at `path` or the new one, whole, and what a killed save left beside it goes with the next save or restore.
    Several processes may save to one path and read from it at the same time; the last to publish wins.

    Layout: `manifest.json` (paths, classes, static fields, shapes, dtypes, config, checksums) and `arrays-ID/`, an
    Orbax checkpoint; every save has another ID. With entropy coding: `manifest.z`, the same in short, and
    `arrays-ID.bin`, in which every array has the fewest bytes that one of several coders gives. Codes of few values and
    much zero become small, dense floats hardly; ten million codes take seconds.

    With several JAX processes, all of them call it with the same tree, on a file system that they share. Arrays on the
    devices of one process, NumPy arrays and numbers must be equal in all; `config` and `metadata` are those of the
    first process.

    Args:
        path: the directory to create, absolute or relative, on a file system (no URL).
        params: the tree.
        config: of the model; JSON values with str keys. Tuples come back as lists, NumPy numbers as Python numbers.
        metadata: anything else to keep, JSON values like those of `config`.
        overwrite: whether a checkpoint at `path` may be replaced, with everything that is in its directory. Any other
            directory is never replaced.
        storage: "orbax", or "entropy": as few bytes as possible. Both come back bit for bit.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is False or it is no checkpoint.
        TypeError: a leaf, key, config or metadata entry of a type that cannot be stored; names it.
        ValueError: a donated array, a number that JSON does not have, a path that is a URL, an unknown `storage`, or
            leaves that differ between JAX processes.
        OSError: the directory cannot be written, or the disk is full.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from jaxcompress.checkpoint import restore, save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(directory + "/model", {"layers": ({"bias": jnp.arange(2)},)}, config={"width": 2})
        ...     params, info = restore(directory + "/model")
        >>> params, info.config
        ({'layers': ({'bias': Array([0, 1], dtype=int32)},)}, {'width': 2})
    """
    if storage not in get_args(Storage):
        raise ValueError(f"`storage` must be one of {get_args(Storage)}, got {storage!r}.")
    target = by_first(lambda: _check_target(path, overwrite).encode()).decode()
    manifest, arrays = together(lambda: _describe(params, config or {}, metadata or {}, storage))
    arrays = _check_same(manifest, arrays)
    with _new_version(target, overwrite) as workspace:
        name = f"arrays-{workspace.identity}" + (".bin" if storage == "entropy" else "")
        _write(os.path.join(workspace.new, name), manifest, arrays)
        manifest = dataclasses.replace(manifest, arrays=name)
        by_first(lambda: _write_manifest(workspace.new, manifest))


@contextlib.contextmanager
def _new_version(target: str, overwrite: bool) -> Iterator[Workspace]:
    """A workspace that all processes know; it is published when the block ends well, and removed in any case."""
    opened: list[tuple[Workspace, int]] = []

    def open_() -> bytes:
        opened.append(open_workspace(target))
        return opened[0][0].identity.encode()

    workspace = Workspace(target=target, identity=by_first(open_).decode())
    try:
        yield workspace
        by_first(lambda: publish(workspace, overwrite=overwrite) or b"")
    finally:
        for parts in opened:
            close_workspace(*parts)


def _describe(
    params: Any, config: Mapping[str, Any], metadata: Mapping[str, Any], storage: Storage
) -> tuple[Manifest, dict[str, Any]]:
    structure, leaves = describe_structure(params)
    records, arrays = _encode_leaves(leaves)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        versions=_versions(storage),
        config=_to_json(config, "config"),
        metadata=_to_json(metadata, "metadata"),
        structure=structure,
        leaves=records,
        files={},
        storage=storage,
    )
    return manifest, arrays


def _check_same(manifest: Manifest, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, those on devices of one process as NumPy arrays: Orbax writes these in the first process only."""
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


def _leaf_of(manifest: Manifest, name: str) -> str:
    return next(leaf.name for leaf in manifest.leaves if name in [array.array for array in leaf.value.arrays()])


def _write(path: str, manifest: Manifest, arrays: Mapping[str, Any]) -> None:
    if manifest.storage == "orbax":
        together(lambda: write_arrays(path, arrays))
        return
    gathered = {name: to_host(array) for name, array in arrays.items()}
    by_first(lambda: write_coded(path, manifest.leaves, gathered) or b"")


def _write_manifest(directory: str, manifest: Manifest) -> bytes:
    write_manifest(directory, dataclasses.replace(manifest, files=_describe_files(directory)))
    return b""


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
            value, leaf_arrays = encode_leaf(leaf, f"leaf_{at:05}")
        except (TypeError, ValueError) as err:
            kind = TypeError if isinstance(err, TypeError) else ValueError
            raise kind(f"Leaf {path_string(path)!r}: {err}.") from err
        records.append(LeafRecord(path=path, value=value))
        # Orbax refuses arrays without elements; their shapes in the manifest say all there is.
        arrays |= {name: array for name, array in leaf_arrays.items() if 0 not in array.shape}
    return tuple(records), arrays


def _describe_files(directory: str) -> dict[str, FileRecord]:
    return {
        name: FileRecord(size=regular_size(os.path.join(directory, name)) or 0, sha256=sha256)
        for name, sha256 in digests(directory, file_names(directory)).items()
    }


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
    versions = {"jaxcompress": _library_version(), "jax": jax.__version__}
    return versions | {"orbax": orbax_version()} if storage == "orbax" else versions


def _library_version() -> str:
    try:
        return importlib.metadata.version("jaxcompress")
    except importlib.metadata.PackageNotFoundError:
        # A source tree on the path, not installed.
        return "unknown"
