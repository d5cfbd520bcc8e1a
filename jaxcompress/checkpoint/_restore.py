"""Reading a checkpoint."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxcompress.checkpoint._coded import CODED_NAME, read_coded
from jaxcompress.checkpoint._directory import checksums, file_sizes
from jaxcompress.checkpoint._errors import CheckpointError
from jaxcompress.checkpoint._leaves import decode_leaf
from jaxcompress.checkpoint._manifest import LeafRecord, Manifest, StoredValue
from jaxcompress.checkpoint._read import read_manifest
from jaxcompress.checkpoint._shardings import ShardingChoice, array_shardings
from jaxcompress.checkpoint._store import ARRAYS_NAME, read_arrays
from jaxcompress.checkpoint._structure import check_rebuildable, order_like, rebuild_structure


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreInfo:
    """What a checkpoint says beside its tree.

    Attributes:
        config: of the model, as given to `save`; empty if none was.
        metadata: likewise.
        versions: of `jaxcompress`, `jax` and, where it holds the arrays, `orbax` that wrote it.
        format_version: of the layout of the checkpoint.
        disk_bytes: size of all its files.
    """

    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    versions: Mapping[str, str]
    format_version: int
    disk_bytes: int


def restore(
    path: str | os.PathLike[str], *, sharding: ShardingChoice | None = None, like: Any = None
) -> tuple[Any, RestoreInfo]:
    """Reads a tree that `save` wrote: the same containers, classes, static fields, shapes, dtypes and bits.

    Rebuilt from the path alone: dict (str and int keys), OrderedDict, FrozenDict, list, tuple, None, Unselected,
    `TransformState`, NNX `State` with the variables of flax, and all leaves that `save` accepts. Other containers
    (named tuples, dataclasses, Equinox modules) can only be built by their class, and a class is never imported because
    a file names it: give `like`.

    NumPy arrays come back as NumPy arrays, unless `sharding` puts them on devices. All arrays are strongly typed. Sizes
    and checksums of the files, and every shape and dtype, are compared with the manifest.

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
        ValueError: `sharding` does not fit a leaf; names it.

    Example:
        >>> import collections, tempfile, jax.numpy as jnp
        >>> from jaxcompress.checkpoint import restore, save
        >>> Layer = collections.namedtuple("Layer", "kernel")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(directory + "/model", Layer(jnp.ones(2)))
        ...     params, info = restore(directory + "/model", like=Layer(jnp.zeros(2)))
        >>> params, info.format_version
        (Layer(kernel=Array([1., 1.], dtype=float32)), 1)
    """
    path = os.path.realpath(path)
    manifest = read_manifest(path)
    _check_files(path, manifest)
    with _checkpoint_errors(path):
        target = _target(manifest, like)
        abstract = [_decode(record, _abstract_arrays(record.value)) for record in manifest.leaves]
    arrays = _read(path, manifest, array_shardings(manifest.leaves, abstract, sharding))
    with _checkpoint_errors(path):
        params = target([_decode(record, arrays) for record in manifest.leaves])
    return params, RestoreInfo(
        config=manifest.config,
        metadata=manifest.metadata,
        versions=manifest.versions,
        format_version=manifest.format_version,
        disk_bytes=sum(file_sizes(path).values()),
    )


@contextlib.contextmanager
def _checkpoint_errors(path: str) -> Iterator[None]:
    try:
        yield
    except ValueError as err:
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
    sizes = file_sizes(path)
    for name, file in manifest.files.items():
        if sizes.get(name) != file.size:
            found = f"has {sizes[name]} bytes" if name in sizes else "is missing"
            raise _damaged(path, f"{name!r} {found}, {file.size} bytes were written")
    for name, found in checksums(path, manifest.files).items():
        if found != manifest.files[name].crc32:
            raise _damaged(path, f"{name!r} has the CRC-32 {found}, {manifest.files[name].crc32} was written")


def _damaged(path: str, what: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint {path!r} is damaged: {what}. Restore it from a copy.")


def _decode(record: LeafRecord, arrays: Mapping[str, Any]) -> Any:
    try:
        return decode_leaf(record.value, arrays)
    except ValueError as err:
        raise ValueError(f"leaf {record.name!r}: {err}") from err


def _abstract_arrays(value: StoredValue) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        array.array or "": jax.ShapeDtypeStruct(array.shape or (), jnp.dtype(array.dtype)) for array in value.arrays()
    }


def _read(path: str, manifest: Manifest, shardings: Mapping[str, Sharding | None]) -> dict[str, Any]:
    default = jnp.zeros(()).sharding
    stored, empty = {}, {}
    for record in manifest.leaves:
        for array in record.value.arrays():
            name, sharding = array.array or "", shardings[array.array or ""]
            # One element, broadcast: a target of the right shape and dtype that takes no memory.
            target = np.broadcast_to(np.zeros((), jnp.dtype(array.dtype)), array.shape or ())
            if sharding is not None or not array.kind.startswith("numpy"):
                _check_precision(path, record, array)
                target = jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=sharding or default)
            (empty if 0 in target.shape else stored)[name] = target
    if manifest.storage == "orbax":
        arrays = read_arrays(os.path.join(path, ARRAYS_NAME), stored)
    else:
        arrays = read_coded(os.path.join(path, CODED_NAME), manifest.leaves, stored)
    return arrays | {name: _empty(target) for name, target in empty.items()}


def _empty(target: Any) -> Any:
    array = np.zeros(target.shape, target.dtype)
    return array if isinstance(target, np.ndarray) else jax.device_put(array, target.sharding)


def _check_precision(path: str, record: LeafRecord, array: StoredValue) -> None:
    dtype = jnp.dtype(array.dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"Cannot restore the checkpoint {path!r}: leaf {record.name!r} is {dtype}, which JAX would cast to "
            f"{jax.dtypes.canonicalize_dtype(dtype)}. Call `jax.config.update('jax_enable_x64', True)` first."
        )
