"""Directories that appear whole or not at all."""

import concurrent.futures
import contextlib
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator

_WRITING = "writing"
_REPLACED = "replaced"


@contextlib.contextmanager
def new_directory(path: str, *, overwrite: bool) -> Iterator[str]:
    """A temporary sibling of `path` to write into; it takes the place of `path` when the block ends well.

    What was at `path` is renamed aside, replaced by the new directory, and only then deleted: a whole directory exists
    at every moment, at `path` or beside it. A block that raises leaves `path` as it was and nothing beside it.

    Args:
        path: absolute, without symbolic links.
        overwrite: whether a directory at `path` may be replaced.

    Yields:
        The directory to fill.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is False.
        OSError: the parent cannot be written to.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    writing = _sibling(path, _WRITING)
    # Not `tempfile.mkdtemp`, whose directories nobody else may read.
    os.mkdir(writing)
    try:
        yield writing
        _sync_directory(writing)
        _move_in(writing, path, overwrite)
    finally:
        _remove(writing)


def leftovers(path: str) -> list[str]:
    """What an interrupted save left beside `path` that holds a whole checkpoint: the one it was replacing."""
    parent, name = os.path.split(os.path.realpath(path))
    prefix = f".{name}.{_REPLACED}-"
    return [os.path.join(parent, found) for found in _list(parent) if found.startswith(prefix)]


def file_sizes(directory: str) -> dict[str, int]:
    """Sizes in bytes of all files below a directory, by relative path with `/`."""
    sizes = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            file = os.path.join(folder, name)
            sizes[os.path.relpath(file, directory).replace(os.sep, "/")] = os.path.getsize(file)
    return dict(sorted(sizes.items()))


def checksums(directory: str, names: Iterable[str]) -> dict[str, str]:
    """CRC-32 of files, in hexadecimal, by relative path."""
    # Several at once: reading and summing both release the interpreter lock.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        names = list(names)
        return dict(zip(names, pool.map(lambda name: _checksum(os.path.join(directory, name)), names), strict=True))


def write_synced(path: str, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _move_in(writing: str, path: str, overwrite: bool) -> None:
    if not os.path.lexists(path):
        os.rename(writing, path)
    elif not overwrite:
        raise FileExistsError(f"{path!r} appeared while the checkpoint was written; pass `overwrite=True`.")
    else:
        replaced = _sibling(path, _REPLACED)
        os.rename(path, replaced)
        try:
            os.rename(writing, path)
        except BaseException:
            os.rename(replaced, path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    _sync_directory(os.path.dirname(path))


def _sibling(path: str, purpose: str) -> str:
    parent, name = os.path.split(path)
    return os.path.join(parent, f".{name}.{purpose}-{uuid.uuid4().hex[:12]}")


def _checksum(file: str) -> str:
    total = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            total = zlib.crc32(block, total)
    return f"{total:08x}"


def _remove(path: str) -> None:
    # After an error, threads of Orbax may still create files for a moment.
    for wait in (0.0, 0.1, 0.5, 2.0):
        time.sleep(wait)
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.exists(path):
            return


def _sync_directory(path: str) -> None:
    # A rename is durable once its directory is; not every system lets a directory be opened.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _list(parent: str) -> list[str]:
    return sorted(os.listdir(parent)) if os.path.isdir(parent) else []
