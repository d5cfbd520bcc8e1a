"""Bytes on disk, counted from a path."""

import os


def disk_bytes(path: str | os.PathLike[str]) -> int:
    """Size of a file, or of all files below a directory, metadata included.

    Args:
        path: a file or a directory. Links to files count as the files, each file once; links to directories below it
            are not followed.

    Returns:
        Bytes: the lengths of the files, not the blocks that the file system gives them.

    Raises:
        FileNotFoundError: there is nothing at `path`.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = pathlib.Path(directory, "a").write_bytes(b"123")
        ...     disk_bytes(directory)
        3
    """
    if not os.path.isdir(path):
        return os.stat(path).st_size
    sizes = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            # A model cache holds links to its files; a dangling one has no size.
            if os.path.exists(file):
                status = os.stat(file)
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())
