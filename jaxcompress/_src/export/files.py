"""Files and directories that appear as a whole, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends well, and is removed if not.

    Raises:
        FileExistsError: there is a file, and `overwrite` is not set; or there is a directory.
    """
    path = _target(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(
            f"{str(path)!r} exists; give a new path{'' if path.is_dir() else ', or `overwrite=True`'}."
        )
    with _beside(path) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextlib.contextmanager
def new_directory(directory: Path, *, overwrite: bool, marker: str = "config.json") -> Iterator[Path]:
    """An empty directory beside `directory`, which takes its place when the block ends well, and is removed if not.

    Raises:
        FileExistsError: it exists and is not empty, and `overwrite` is not set; or what is there has no file `marker`,
            which every directory of the sort holds.
    """
    directory = _target(directory)
    if directory == Path.cwd():
        raise FileExistsError(f"{str(directory)!r} is the working directory, which cannot be replaced; give a new one.")
    older = directory.is_dir() and any(directory.iterdir())
    if (directory.exists() and not directory.is_dir()) or (older and not overwrite):
        raise FileExistsError(f"{str(directory)!r} exists; give a new directory, or `overwrite=True`.")
    if older and not (directory / marker).is_file():
        # Everything in it would be removed.
        raise FileExistsError(f"{str(directory)!r} holds no {marker}: it is no saved model, and is not overwritten.")
    with _beside(directory) as temporary:
        temporary.mkdir()
        yield temporary
        if older:
            aside = temporary.with_name(f"{temporary.name}.older")
            os.rename(directory, aside)
            try:
                os.rename(temporary, directory)
            except BaseException:
                os.rename(aside, directory)
                raise
        else:
            os.replace(temporary, directory)
        _sync(directory.parent)


def _target(path: Path) -> Path:
    """What a symbolic link stands for: the link itself is not replaced."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path in a temporary directory beside `path`: a rename is atomic within one file system only."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as temporary:
            yield Path(temporary, path.name)
    except BaseException:
        if missing:
            shutil.rmtree(missing[-1], ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
