"""Files and directories that appear as a whole, or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool, companion: str = "") -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends well, and is removed if not.

    What is wrong with the target is said before the block begins, so that work worth minutes belongs inside.

    Args:
        path: of the file.
        overwrite: whether a file that exists is replaced.
        companion: what is put behind the name of a second file that the block may write beside the first; an older
            one that it does not write again goes away with its file.

    Raises:
        FileExistsError: there is a file, and `overwrite` is not set; or there is something that is no file.
        FileNotFoundError: the directory does not exist.
        OSError: the directory cannot be written.
    """
    path = _target(path)
    names = [f"{path.name}{companion}", path.name] if companion else [path.name]
    _check_files(path, names, overwrite=overwrite)
    with _beside(path) as temporary:
        yield temporary
        # Another process may have written there since.
        _check_files(path, names, overwrite=overwrite)
        for name in names:
            place = temporary.with_name(name)
            if place.exists():
                _sync(place)
                os.replace(place, path.with_name(name))
            else:
                path.with_name(name).unlink(missing_ok=True)
        _sync(path.parent)


@contextlib.contextmanager
def new_directory(directory: Path, *, overwrite: bool, marker: str = "config.json") -> Iterator[Path]:
    """An empty directory beside `directory`, which takes its place when the block ends well, and is removed if not.

    Raises:
        FileExistsError: it exists and is not empty, and `overwrite` is not set; or what is there has no file `marker`,
            which every directory of the sort holds.
        OSError: it cannot be made or written.
    """
    directory = _target(directory)
    _check_directory(directory, overwrite=overwrite, marker=marker)
    with _beside(directory) as temporary:
        temporary.mkdir()
        yield temporary
        # Another process may have written there since.
        if _check_directory(directory, overwrite=overwrite, marker=marker):
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


def check_writable(directory: Path) -> None:
    """Raises before hours of work when their result could not be written.

    Raises:
        OSError: `directory` cannot be made or written to.
    """
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{str(directory)!r} cannot be written: {str(existing)!r} is not a directory.")
    if directory.is_symlink() and not directory.exists():
        raise FileExistsError(f"{str(directory)!r} cannot be written: it is a link to nothing.")
    try:
        # Permissions alone do not tell: a file system may be read-only, or full, or made of something else than files.
        with tempfile.TemporaryDirectory(dir=existing, prefix=".jaxcompress-"):
            pass
    except OSError as err:
        raise OSError(f"{str(directory)!r} cannot be written: {err.strerror} in {str(existing)!r}.") from err


def _check_files(path: Path, names: Sequence[str], *, overwrite: bool) -> None:
    if path.is_symlink():
        raise FileExistsError(f"{str(path)!r} is a link to itself; give another path.")
    for place in (path.with_name(name) if path.name else path for name in reversed(names)):
        if place.exists() and not place.is_file():
            raise FileExistsError(f"{str(place)!r} exists and is no file; give another path.")
        if place.exists() and not overwrite:
            raise FileExistsError(f"{str(place)!r} exists; give a new path, or `overwrite=True`.")
    if not path.parent.exists():
        raise FileNotFoundError(f"There is no directory {str(path.parent)!r} to write {path.name!r} to.")
    check_writable(path.parent)


def _check_directory(directory: Path, *, overwrite: bool, marker: str) -> bool:
    """Whether there is an older directory that may be replaced."""
    if directory.is_symlink():
        raise FileExistsError(f"{str(directory)!r} is a link to itself; give another path.")
    if directory == Path.cwd():
        raise FileExistsError(f"{str(directory)!r} is the working directory, which cannot be replaced; give a new one.")
    older = directory.is_dir() and any(directory.iterdir())
    if (directory.exists() and not directory.is_dir()) or (older and not overwrite):
        raise FileExistsError(f"{str(directory)!r} exists; give a new directory, or `overwrite=True`.")
    if older and not (directory / marker).is_file():
        # Everything in it would be removed.
        raise FileExistsError(f"{str(directory)!r} holds no {marker}: it is no saved model, and is not overwritten.")
    check_writable(directory.parent)
    return older


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
        with contextlib.suppress(OSError):
            for parent in missing:
                # Only what is empty: another process may have written there since.
                parent.rmdir()
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
