"""Reading a checkpoint."""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxcompress._src.checkpoint.coded import read_coded
from jaxcompress._src.checkpoint.errors import CheckpointError
from jaxcompress._src.checkpoint.files import NotAFileError, checksums, digests, regular_size
from jaxcompress._src.checkpoint.leaves import decode_leaf
from jaxcompress._src.checkpoint.manifest import LeafRecord, Manifest, StoredValue
from jaxcompress._src.checkpoint.manifest_file import MANIFEST_NAME, SHORT_NAME
from jaxcompress._src.checkpoint.processes import is_first, place, together
from jaxcompress._src.checkpoint.read import CONTRADICTIONS, read_whole
from jaxcompress._src.checkpoint.shardings import ShardingChoice, array_shardings
from jaxcompress._src.checkpoint.store import read_arrays
from jaxcompress._src.checkpoint.structure import check_rebuildable, order_like, rebuild_structure
from jaxcompress._src.checkpoint.versions import remove_leftovers


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreInfo:
    """What a checkpoint says beside its tree.

    Attributes:
        config: of the model, as given to `save`; empty if none was.
        metadata: as given to `save`; empty if none was.
        versions: of `jaxcompress`, `jax` and, where it holds the arrays, `orbax` that wrote it.
        format_version: of the layout of the checkpoint.
        disk_bytes: size of all its files.
        verified: whether a checksum covers everything. In formats 1 and 2 only the files of the arrays have one.
    """

    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    versions: Mapping[str, str]
    format_version: int
    disk_bytes: int
    verified: bool


def restore(
    path: str | os.PathLike[str], *, sharding: ShardingChoice | None = None, like: Any = None
) -> tuple[Any, RestoreInfo]:
    """Reads a tree that `save` wrote: the same containers, classes, static fields, shapes, dtypes and bits.

    Rebuilt from the path alone: dict (str and int keys), OrderedDict, FrozenDict, list, tuple, None, Unselected,
    `TransformState`, NNX `State` with the variables of flax, and all leaves that `save` accepts. Other containers
    (named tuples, dataclasses, Equinox modules) can only be built by their class, and a class is never imported because
    a file names it: give `like`.

    NumPy arrays come back as NumPy arrays, unless `sharding` puts them on devices. All arrays are strongly typed.
    Checksums cover the manifest and every file, and every shape and dtype is compared with the manifest.

    While another process saves to the same path, what comes back is one whole version, the old one or the new one.
    Leftovers of saves that were killed are removed. With several JAX processes, all of them call it, on a file system
    that they share; arrays without a `sharding` are then restored in every process, on its own default device.

    Args:
        path: the checkpoint's directory.
        sharding: None: the default device. A `Sharding`: for every logical leaf. A function `(path, abstract leaf) ->
            sharding or None`, or a tree of shardings (or None) by leaf, where an entry stands for all leaves below it.
            Shardings are for the logical array; those of the parts of a compressed array follow from
            `arrays.component_shardings`, or are given one by one as a compressed array of shardings. The number of
            devices may differ from that of the save.
        like: a tree with the key paths that were saved, whose containers are used instead of the stored ones. Its
            leaves may be abstract (`jax.eval_shape`); if they have shapes, they must be the logical ones.

    Returns:
        `(params, info)`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: it is damaged, foreign, needs `like`, or contradicts `like`; names what was found.
        OSError: the file system does not let it be read (`PermissionError`, an input/output error).
        ValueError: `sharding` does not fit a leaf; names it.

    Example:
        >>> import collections, tempfile, jax.numpy as jnp
        >>> from jaxcompress.checkpoint import restore, save
        >>> Layer = collections.namedtuple("Layer", "kernel")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(directory + "/model", Layer(jnp.ones(2)))
        ...     params, info = restore(directory + "/model", like=Layer(jnp.zeros(2)))
        >>> params, info.format_version
        (Layer(kernel=Array([1., 1.], dtype=float32)), 3)
    """
    path = os.path.realpath(path)
    params, manifest = read_whole(path, lambda manifest: (_read_tree(path, manifest, sharding, like), manifest))
    if is_first():
        remove_leftovers(path)
    if manifest.checksum is None:
        warnings.warn(
            f"The checkpoint {path!r} has format version {manifest.format_version}, without a checksum: "
            "a changed scale or shape of it would go unnoticed. Save it again.",
            stacklevel=2,
        )
    return params, RestoreInfo(
        config=manifest.config,
        metadata=manifest.metadata,
        versions=manifest.versions,
        format_version=manifest.format_version,
        disk_bytes=_disk_bytes(path, manifest),
        verified=manifest.checksum is not None,
    )


def _read_tree(path: str, manifest: Manifest, sharding: Any, like: Any) -> Any:
    # Step by step, because Orbax waits for all processes: an error in one must be known to all before.
    together(lambda: _check_files(path, manifest))
    target, targets = together(lambda: _plan(path, manifest, sharding, like))
    arrays = together(lambda: _read(path, manifest, targets))
    together(lambda: _check_sizes(path, manifest))
    with _checkpoint_errors(path):
        return target([_decode(record, arrays) for record in manifest.leaves])


def _plan(path: str, manifest: Manifest, sharding: Any, like: Any) -> tuple[Callable[[Sequence[Any]], Any], Any]:
    """What puts the leaves in place, and what to read; fails before any array is read."""
    with _checkpoint_errors(path):
        target = _target(manifest, like)
        abstract = [_decode(record, _abstract_arrays(record.value)) for record in manifest.leaves]
    return target, _targets(path, manifest, array_shardings(manifest.leaves, abstract, sharding))


@contextlib.contextmanager
def _checkpoint_errors(path: str) -> Iterator[None]:
    try:
        yield
    except CONTRADICTIONS as err:
        raise CheckpointError(f"Cannot restore the checkpoint {path!r}: {err}.") from err


def _target(manifest: Manifest, like: Any) -> Callable[[Sequence[Any]], Any]:
    """What puts the leaves in place; fails before any array is read."""
    if like is None:
        check_rebuildable(manifest.structure)
        return lambda leaves: rebuild_structure(manifest.structure, leaves)
    treedef, order = order_like(manifest, like)
    return lambda leaves: treedef.unflatten([leaves[at] for at in order])


def _check_files(path: str, manifest: Manifest) -> None:
    # Orbax reads over a changed byte in silence, and what it says about a cut file depends on the file.
    _check_sizes(path, manifest)
    # Every process reads its share, whoever reads the arrays later.
    names = list(manifest.files)[jax.process_index() :: jax.process_count()]
    summed = [name for name in names if manifest.files[name].sha256 is None]
    try:
        found = digests(path, set(names) - set(summed)) | checksums(path, summed)
    except (FileNotFoundError, NotAFileError) as err:
        raise _damaged(path, str(err)) from err
    for name in names:
        file = manifest.files[name]
        kind, expected = ("SHA-256", file.sha256) if file.sha256 is not None else ("CRC-32", file.crc32)
        if found[name] != expected:
            raise _damaged(path, f"{name!r} has the {kind} {found[name]}, {expected} was written")


def _check_sizes(path: str, manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        size = regular_size(os.path.join(path, name))
        if size != file.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise _damaged(path, f"{name!r} {found}, {file.size} bytes were written")


def _disk_bytes(path: str, manifest: Manifest) -> int:
    names = (os.path.join(path, name) for name in (MANIFEST_NAME, SHORT_NAME))
    return sum(file.size for file in manifest.files.values()) + (
        next(filter(None, map(regular_size, names)), None) or 0
    )


def _damaged(path: str, what: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint {path!r} is damaged: {what}. Restore it from a copy.")


def _decode(record: LeafRecord, arrays: Mapping[str, Any]) -> Any:
    try:
        return decode_leaf(record.value, arrays)
    except CONTRADICTIONS as err:
        raise ValueError(f"leaf {record.name!r}: {err}") from err


def _abstract_arrays(value: StoredValue) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        array.array or "": jax.ShapeDtypeStruct(array.shape or (), jnp.dtype(array.dtype)) for array in value.arrays()
    }


def _targets(path: str, manifest: Manifest, shardings: Mapping[str, Sharding | None]) -> dict[str, Any]:
    default = jnp.zeros(()).sharding
    targets: dict[str, Any] = {}
    for record in manifest.leaves:
        for array in record.value.arrays():
            name, sharding = array.array or "", shardings[array.array or ""]
            # One element, broadcast: a target of the right shape and dtype that takes no memory.
            target = np.broadcast_to(np.zeros((), jnp.dtype(array.dtype)), array.shape or ())
            if sharding is not None or not array.kind.startswith("numpy"):
                _check_precision(path, record, array)
                target = jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=sharding or default)
            targets[name] = target
    return targets


def _read(path: str, manifest: Manifest, targets: Mapping[str, Any]) -> dict[str, Any]:
    stored = {name: target for name, target in targets.items() if 0 not in target.shape}
    directory = os.path.join(path, manifest.arrays)
    if manifest.storage == "orbax":
        arrays = read_arrays(directory, stored)
    else:
        arrays = read_coded(directory, manifest.leaves, stored)
    return arrays | {name: _empty(target) for name, target in targets.items() if name not in stored}


def _empty(target: Any) -> Any:
    array = np.zeros(target.shape, target.dtype)
    return array if isinstance(target, np.ndarray) else place(array, target.sharding)


def _check_precision(path: str, record: LeafRecord, array: StoredValue) -> None:
    dtype = jnp.dtype(array.dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"Cannot restore the checkpoint {path!r}: leaf {record.name!r} is {dtype}, which JAX would cast to "
            f"{jax.dtypes.canonicalize_dtype(dtype)}. Call `jax.config.update('jax_enable_x64', True)` first."
        )
