"""Writing a checkpoint."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from jaxcompress._src.checkpoint.coded import write_coded
from jaxcompress._src.checkpoint.describe import describe, same_in_all_processes
from jaxcompress._src.checkpoint.files import digests, file_names, regular_size
from jaxcompress._src.checkpoint.manifest import FileRecord, Manifest, Storage
from jaxcompress._src.checkpoint.manifest_file import MANIFEST_NAME, has_manifest, write_manifest
from jaxcompress._src.checkpoint.processes import by_first, together
from jaxcompress._src.checkpoint.store import write_arrays
from jaxcompress._src.checkpoint.versions import Workspace, close_workspace, open_workspace, publish
from jaxcompress._src.meshes import to_host


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
    manifest, arrays = together(lambda: describe(params, config or {}, metadata or {}, storage))
    arrays = same_in_all_processes(manifest, arrays)
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


def _describe_files(directory: str) -> dict[str, FileRecord]:
    return {
        name: FileRecord(size=regular_size(os.path.join(directory, name)) or 0, sha256=sha256)
        for name, sha256 in digests(directory, file_names(directory)).items()
    }
