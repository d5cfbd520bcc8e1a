"""Files and directories that are written whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(target: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """A place beside `target` for a file or a directory, which takes its name when the block ends without an error.

    Args:
        target: the path to write; its parent directories are made.
        overwrite: whether something that exists is replaced.

    Yields:
        A path that does not exist yet.

    Raises:
        FileExistsError: there is something, and `overwrite` is not set; nothing has been computed then.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with written_whole(folder / "name", overwrite=False) as place:
        ...     _ = place.write_text("content")
        >>> [path.name for path in folder.iterdir()]
        ['name']
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{str(target)!r} exists; give another path, or `overwrite=True`.")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder / "new"
        # A directory cannot be renamed onto one that is not empty.
        old = target.rename(folder / "old") if target.exists() else None
        try:
            (folder / "new").rename(target)
        except BaseException:
            if old is not None:
                old.rename(target)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
