"""Reading a manifest from a directory."""

import os
from typing import Any

from jaxcompress.checkpoint._directory import leftovers
from jaxcompress.checkpoint._errors import CheckpointError
from jaxcompress.checkpoint._manifest import FORMAT_VERSION, Manifest
from jaxcompress.checkpoint._manifest_file import MANIFEST_NAME, read_content
from jaxcompress.checkpoint._manifest_json import manifest_from_json


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of a checkpoint, without loading an array.

    Args:
        path: the checkpoint's directory.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: not a checkpoint of this library, of a newer format, or damaged.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from jaxcompress.checkpoint import read_manifest, save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(directory + "/model", {"dense": {"kernel": jnp.ones((2, 3))}}, config={"layers": 1})
        ...     manifest = read_manifest(directory + "/model")
        >>> manifest.config, [(leaf.name, leaf.value.shape, leaf.value.nbytes) for leaf in manifest.leaves]
        ({'layers': 1}, [('dense/kernel', (2, 3), 24)])
    """
    path = os.fspath(path)
    content = _load_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{path!r} holds a {MANIFEST_NAME} that is not of a jaxcompress checkpoint: its `format_version` is "
            f"{version!r}; it should be a number from 1 to {FORMAT_VERSION}."
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint {path!r} has format version {version}, written by jaxcompress "
            f"{_writer(content)}; this version reads up to {FORMAT_VERSION}. Upgrade jaxcompress."
        )
    try:
        return manifest_from_json(content)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"The manifest of the checkpoint {path!r} is damaged: {err}.") from err


def _load_json(path: str) -> Any:
    try:
        return read_content(path)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise _missing(path) from err
    except (ValueError, RecursionError) as err:
        raise CheckpointError(
            f"The manifest of the checkpoint {path!r} is damaged: {err}. The file may be truncated; restore it from a "
            "copy."
        ) from err


def _missing(path: str) -> Exception:
    if not os.path.lexists(path):
        beside = "".join(f" The interrupted save left {name!r}." for name in leftovers(path))
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
