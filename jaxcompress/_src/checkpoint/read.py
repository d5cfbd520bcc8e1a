"""Reading a manifest from a directory, and one whole version of what it names."""

import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from jaxcompress._src.checkpoint.errors import CheckpointError
from jaxcompress._src.checkpoint.files import NotAFileError
from jaxcompress._src.checkpoint.manifest import FORMAT_VERSION, Manifest
from jaxcompress._src.checkpoint.manifest_file import MANIFEST_NAME, RawManifest, checksum, decode_raw, read_raw
from jaxcompress._src.checkpoint.manifest_json import manifest_from_json
from jaxcompress._src.checkpoint.processes import by_first, is_first
from jaxcompress._src.checkpoint.versions import aside, pinned

_T = TypeVar("_T")
_ATTEMPTS = 100

CONTRADICTIONS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What is raised where fields do not fit together: a manifest without a checksum may say anything."""


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of a checkpoint, without loading an array.

    Args:
        path: the checkpoint's directory.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: not a checkpoint of this library, of a newer format, or damaged.
        OSError: the file system does not give the manifest away.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from jaxcompress._src.checkpoint.read import read_manifest
        >>> from jaxcompress.checkpoint import save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(directory + "/model", {"dense": {"kernel": jnp.ones((2, 3))}}, config={"layers": 1})
        ...     manifest = read_manifest(directory + "/model")
        >>> manifest.config, [(leaf.name, leaf.value.shape, leaf.value.nbytes) for leaf in manifest.leaves]
        ({'layers': 1}, [('dense/kernel', (2, 3), 24)])
    """
    path = os.fspath(path)
    return _parse(path, _read_raw(path))


def read_whole(path: str, read: Callable[[Manifest], _T]) -> _T:
    """Calls `read` with the manifest, again if a newer version was published meanwhile.

    Args:
        path: the checkpoint's directory, without symbolic links.
        read: reads what the manifest names; may fail where that is being removed. Fails in all JAX processes or in
            none.

    Returns:
        What `read` returned for a version that was there, whole, from its beginning to its end.

    Raises:
        CheckpointError: newer versions were published faster than one could be read; or as `read` and
            `read_manifest` say.
        OSError: the file system does not let it be read.
    """
    for attempt in range(_ATTEMPTS):
        raw = _agreed_raw(path)
        manifest = _parse(path, raw)
        # One process holds the arrays for all.
        with pinned(os.path.join(path, manifest.arrays) if is_first() else "") as stays:
            try:
                result = read(manifest)
            except (CheckpointError, OSError):
                if _same_version(path, raw, stays=False):
                    raise
            else:
                # Older versions save to the same names, whoever holds them.
                if _same_version(path, raw, stays=stays and manifest.format_version >= 3):
                    return result
        time.sleep(random.uniform(0, 0.001 * min(attempt, 50)))
    raise CheckpointError(f"The checkpoint {path!r} was replaced {_ATTEMPTS} times while it was read. Try again.")


def _agreed_raw(path: str) -> RawManifest:
    name, _, data = by_first(lambda: b"\n".join([(raw := _read_raw(path)).name.encode(), raw.data])).partition(b"\n")
    return RawManifest(name.decode(), data)


def _same_version(path: str, raw: RawManifest, *, stays: bool) -> bool:
    def compare() -> bytes:
        try:
            return b"same" if stays or read_raw(path) == raw else b"other"
        except (OSError, ValueError):
            return b"other"

    return by_first(compare) == b"same"


def _parse(path: str, raw: RawManifest) -> Manifest:
    try:
        content = decode_raw(raw)
    except (ValueError, RecursionError) as err:
        raise _damaged(path, err) from err
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{path!r} holds a {MANIFEST_NAME} that is not of a jaxcompress checkpoint: its `format_version` is "
            f"{version!r:.80}; it should be a number from 1 to {FORMAT_VERSION}."
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint {path!r} has format version {version}, written by jaxcompress "
            f"{_writer(content)}; this version reads up to {FORMAT_VERSION}. Upgrade jaxcompress."
        )
    try:
        # Before anything is made of it. One that is missing, where it must not be, is found below.
        written = content.get("checksum")
        if isinstance(written, str) and written != (found := checksum(content)):
            raise ValueError(f"its checksum is {found}, {written:.32} was written")
        return manifest_from_json(content)
    except CONTRADICTIONS as err:
        raise CheckpointError(f"The manifest of the checkpoint {path!r} is damaged: {err}.") from err


def _read_raw(path: str) -> RawManifest:
    try:
        return read_raw(path)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise _missing(path) from err
    except NotAFileError as err:
        raise CheckpointError(f"The manifest of the checkpoint {path!r} cannot be read: {err}.") from err


def _damaged(path: str, err: Exception) -> CheckpointError:
    return CheckpointError(
        f"The manifest of the checkpoint {path!r} is damaged: {err}. The file may be truncated; restore it from a copy."
    )


def _missing(path: str) -> Exception:
    if not os.path.lexists(path):
        beside = "".join(f" The interrupted save left {name!r}." for name in aside(path))
        return FileNotFoundError(f"There is no checkpoint at {path!r}.{beside}")
    if not os.path.isdir(path):
        return CheckpointError(f"{path!r} is a file; a checkpoint is a directory with a {MANIFEST_NAME}.")
    if any(os.path.exists(os.path.join(path, name)) for name in ("_METADATA", "_CHECKPOINT_METADATA")):
        return CheckpointError(
            f"{path!r} is an Orbax checkpoint without a jaxcompress {MANIFEST_NAME}. Load it with Orbax, and write it "
            "again with `jaxcompress.checkpoint.save`."
        )
    return CheckpointError(
        f"{path!r} has no {MANIFEST_NAME}: it is not a jaxcompress checkpoint, or a damaged one. It holds "
        f"{', '.join(sorted(os.listdir(path))[:10]) or 'nothing'}."
    )


def _writer(content: Any) -> str:
    versions = content.get("versions")
    return str(versions.get("jaxcompress", "?")) if isinstance(versions, dict) else "?"
