"""Plain files of a checkpoint: read only what is a file, hash, and wait for the disk.

A checkpoint comes from elsewhere, so a name in it may lead to a pipe that never answers, to a device without an end, or
round in circles. Every read goes through `open_regular`, which opens without waiting and asks what it got.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

_BLOCK = 1 << 20
_DIGEST_LENGTH = 32


class NotAFileError(ValueError):
    """What lies under a name is not a file that can be read to its end."""


@contextlib.contextmanager
def open_regular(path: str) -> Iterator[BinaryIO]:
    """Opens a regular file, or a link to one, for reading.

    Raises:
        FileNotFoundError: there is nothing, or a link to nothing.
        NotAFileError: it is something else; says what.
        OSError: it cannot be read.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as err:
        if err.errno in (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG):
            raise NotAFileError(f"{path!r} is {_what(path)}, not a file ({os.strerror(err.errno)})") from err
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(f"{path!r} is {_what(path)}, not a file")
    with open(descriptor, "rb") as file:
        yield file


def read_regular(path: str, limit: int) -> bytes:
    """The content of a regular file.

    Raises:
        NotAFileError: it is no regular file, or larger than `limit` bytes.
        OSError: as `open_regular` says.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise NotAFileError(f"{path!r} has more than {limit} bytes")
    return content


def regular_size(path: str) -> int | None:
    """The size of a regular file in bytes; None if there is none, or something else."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        if err.errno == errno.ELOOP:
            return None
        raise
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def file_names(directory: str) -> list[str]:
    """Relative paths of all files below a directory, with `/`, sorted."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), directory).replace(os.sep, "/")
        for folder, _, names in os.walk(directory)
        for name in names
    )


def digest(content: bytes) -> str:
    """The first half of SHA-256, in hexadecimal: 128 bits are enough against accidents."""
    return hashlib.sha256(content).hexdigest()[:_DIGEST_LENGTH]


def digests(directory: str, names: Iterable[str]) -> dict[str, str]:
    """`digest` of files, by relative path."""
    return _each(directory, names, _file_digest)


def checksums(directory: str, names: Iterable[str]) -> dict[str, str]:
    """CRC-32 of files, in hexadecimal, by relative path: what formats 1 and 2 have."""
    return _each(directory, names, _file_crc32)


def write_synced(path: str, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_tree(directory: str) -> None:
    """Waits until all files and folders below a directory are on the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(os.path.join(folder, name))
        _sync(folder)


def sync_directory(path: str) -> None:
    """Waits until the names in a directory are on the disk; not every system can."""
    _sync(path)


def _sync(path: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _each(directory: str, names: Iterable[str], function: object) -> dict[str, str]:
    # Several at once: reading and summing both release the interpreter lock.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        names = list(names)
        results = pool.map(lambda name: function(os.path.join(directory, name)), names)  # type: ignore[operator]
        return dict(zip(names, results, strict=True))


def _file_digest(path: str) -> str:
    total = hashlib.sha256()
    for block in _blocks(path):
        total.update(block)
    return total.hexdigest()[:_DIGEST_LENGTH]


def _file_crc32(path: str) -> str:
    total = 0
    for block in _blocks(path):
        total = zlib.crc32(block, total)
    return f"{total:08x}"


def _blocks(path: str) -> Iterator[bytes]:
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            yield block


def _what(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "a link that leads nowhere"
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
    return kinds.get(stat.S_IFMT(mode), "a special file")
