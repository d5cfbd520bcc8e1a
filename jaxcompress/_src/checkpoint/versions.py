"""Versions of a checkpoint: how one takes the place of another, and how a reader sees exactly one.

A checkpoint at `path` is a directory with one manifest (`manifest.json`, or `manifest.z` beside coded arrays) that
names its arrays: `arrays-ID`, or `arrays-ID.bin`, where ID belongs to one save and never comes back.

A save writes into a workspace beside it, `.NAME.writing-ID/new/`, and publishes by one atomic step:
- There is nothing at `path`: `new` is renamed to `path`, which succeeds for one of several writers.
- There is a checkpoint: the arrays are renamed into `path`, where no manifest names them yet, and then the manifest
  replaces the old one. `os.replace` does that on every file system (exchanging directories works on few). The two kinds
  of manifest have two names, and `manifest.json` counts if both exist: `manifest.z` is put in place first, and removing
  `manifest.json` publishes it.
So a process that dies at any moment leaves the old version or the new one at `path`, whole. What is not named by the
manifest is removed after publishing.

A reader reads the manifest once. Everything else has a name of its own, so it can't mix versions; it can only find
arrays gone, when a newer version was published: it then starts again. While it reads, it holds a shared lock of the
arrays, which a writer that wants to remove them respects, so that frequent saves don't starve it.

A writer holds the lock of `.NAME.writing-ID/lock` for as long as it lives. Leftovers are workspaces whose lock can be
taken, and arrays that the manifest doesn't name and whose workspace is gone or dead; the next save or restore removes
them. The order matters: first the lock is taken, then the manifest is read, because a writer publishes before it gives
its lock away. Publishing itself is done under a lock of `path`, for writers of different storages. On file systems
without locks, a leftover counts as dead after a day, readers go without a lock and compare the manifest at the end, and
two processes must not save with different storages to one path at the same time.

In several JAX processes, the first one does all of this, and the others follow.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator

from jaxcompress._src.checkpoint.files import sync_directory, sync_tree
from jaxcompress._src.checkpoint.locks import try_lock, waiting_lock
from jaxcompress._src.checkpoint.manifest_file import MANIFEST_NAME, SHORT_NAME, arrays_name, has_manifest

_WRITING, _REPLACED, _LOCK = "writing", "replaced", "lock"
_PUBLISH_SECONDS = 60.0
_DEAD_SECONDS = 24 * 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
    """Where a save writes before it publishes.

    Attributes:
        target: the path to publish at.
        identity: of this save: 12 hexadecimal digits.
    """

    target: str
    identity: str

    @property
    def directory(self) -> str:
        """The hidden directory beside the target."""
        parent, name = os.path.split(self.target)
        return os.path.join(parent, f".{name}.{_WRITING}-{self.identity}")

    @property
    def new(self) -> str:
        """The new version, to be filled."""
        return os.path.join(self.directory, "new")


def open_workspace(path: str) -> tuple[Workspace, int]:
    """Makes a workspace that counts as alive until its descriptor is closed.

    Args:
        path: absolute, without symbolic links.

    Returns:
        The workspace, and the descriptor that holds its lock.

    Raises:
        OSError: the parent cannot be written to.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while True:
        workspace = Workspace(target=path, identity=uuid.uuid4().hex[:12])
        # Not `tempfile.mkdtemp`, whose directories nobody else may read.
        os.mkdir(workspace.directory)
        try:
            descriptor = os.open(os.path.join(workspace.directory, _LOCK), os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue  # Taken for a leftover before it had a lock.
        if try_lock(descriptor) != "busy" and _is_still(os.path.join(workspace.directory, _LOCK), descriptor):
            os.mkdir(workspace.new)
            return workspace, descriptor
        os.close(descriptor)


def close_workspace(workspace: Workspace, descriptor: int) -> None:
    """Removes a workspace, and lets it count as dead."""
    # After an error, threads of Orbax may still create files for a moment.
    for wait in (0.0, 0.1, 0.5, 2.0):
        time.sleep(wait)
        _remove_workspace(workspace.directory)
        if not os.path.exists(workspace.directory):
            break
    os.close(descriptor)


def publish(workspace: Workspace, *, overwrite: bool) -> None:
    """Puts the new version in the place of the old one, and removes what is not needed any more.

    Args:
        workspace: with a whole version in `new`.
        overwrite: whether a checkpoint at the target may be replaced.

    Raises:
        FileExistsError: there is something, and `overwrite` is False or it is no checkpoint.
        TimeoutError: another process publishes at the same path without an end.
        OSError: a rename failed; the old version is where it was.
    """
    path = workspace.target
    sync_tree(workspace.new)
    if not os.path.lexists(path) and _rename_to_nothing(workspace.new, path):
        sync_directory(os.path.dirname(path))
    elif not overwrite:
        raise FileExistsError(f"{path!r} appeared while the checkpoint was written; pass `overwrite=True`.")
    elif not has_manifest(path):
        raise FileExistsError(f"{path!r} appeared while the checkpoint was written, and is not a checkpoint.")
    else:
        with waiting_lock(path, seconds=_PUBLISH_SECONDS):
            _replace(workspace)
        _remove_all_but_current(path)
    remove_leftovers(path)


@contextlib.contextmanager
def pinned(arrays: str) -> Iterator[bool]:
    """Keeps the arrays of a version from being removed by a save, where the file system can.

    Args:
        arrays: path of the file or directory.

    Yields:
        Whether they are there and will stay.
    """
    try:
        descriptor = os.open(arrays, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        yield False
        return
    try:
        yield try_lock(descriptor, shared=True) == "held" and _is_still(arrays, descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(path: str) -> None:
    """Removes what dead writers left at and beside a checkpoint; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        for leftover in _siblings(path, _WRITING):
            _remove_if_dead(leftover)
        if has_manifest(path):
            # Older versions moved what they replaced aside.
            for leftover in _siblings(path, _REPLACED):
                shutil.rmtree(leftover, ignore_errors=True)
            _remove_unpublished(path)
            for name in os.listdir(path):
                if re.fullmatch(r"arrays-[0-9a-f]{12}(\.bin)?", name):
                    _remove_arrays(path, name)


def aside(path: str) -> list[str]:
    """What an interrupted save of an older version left beside `path`: the checkpoint that it was replacing."""
    return _siblings(os.path.realpath(path), _REPLACED)


def _rename_to_nothing(new: str, path: str) -> bool:
    try:
        os.rename(new, path)
    except OSError:
        if os.path.lexists(path):
            return False
        raise
    return True


def _replace(workspace: Workspace) -> None:
    new, path = workspace.new, workspace.target
    moved = []
    try:
        for name in sorted(set(os.listdir(new)) - {MANIFEST_NAME, SHORT_NAME}):
            moved.append(os.path.join(path, name))
            os.rename(os.path.join(new, name), moved[-1])
        sync_directory(path)
        if os.path.lexists(os.path.join(new, SHORT_NAME)):
            os.replace(os.path.join(new, SHORT_NAME), os.path.join(path, SHORT_NAME))
            if os.path.lexists(os.path.join(path, MANIFEST_NAME)):
                sync_directory(path)
                os.unlink(os.path.join(path, MANIFEST_NAME))
        else:
            os.replace(os.path.join(new, MANIFEST_NAME), os.path.join(path, MANIFEST_NAME))
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, SHORT_NAME))
    except BaseException:
        for name in moved:
            # Not if the manifest is in place already: an interrupt may come right after that.
            _remove_arrays(path, os.path.basename(name), own=True)
        raise
    sync_directory(path)


def _remove_all_but_current(path: str) -> None:
    with contextlib.suppress(OSError):
        for name in set(os.listdir(path)) - {MANIFEST_NAME, SHORT_NAME}:
            _remove_arrays(path, name)


def _remove_arrays(path: str, name: str, *, own: bool = False) -> None:
    """Removes an entry of a checkpoint, unless the manifest names it, a reader holds it, or its writer is alive."""
    if arrays_name(path) in (name, None) or (not own and _writer_lives(path, name)):
        return
    arrays_path = os.path.join(path, name)
    try:
        descriptor = os.open(arrays_path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        descriptor = None
    try:
        # Once more, because its writer may have published it before it gave its lock away.
        if (descriptor is None or try_lock(descriptor) != "busy") and arrays_name(path) not in (name, None):
            _remove(arrays_path)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _remove_unpublished(path: str) -> None:
    """Removes a `manifest.z` whose writer died before it removed `manifest.json`."""
    short = os.path.join(path, SHORT_NAME)
    if os.path.lexists(short) and os.path.lexists(os.path.join(path, MANIFEST_NAME)):
        with contextlib.suppress(TimeoutError), waiting_lock(path, seconds=0.0):
            name = arrays_name(path, SHORT_NAME)
            both = os.path.lexists(os.path.join(path, MANIFEST_NAME))
            if both and (name is None or not _writer_lives(path, name)):
                os.unlink(short)


def _writer_lives(path: str, name: str) -> bool:
    parent, checkpoint = os.path.split(path)
    workspace = os.path.join(parent, f".{checkpoint}.{_WRITING}-{name.removeprefix('arrays-')[:12]}")
    try:
        with _lock_of_dead(workspace):
            return False
    except _AliveError:
        return True
    except FileNotFoundError:
        return False


def _remove_if_dead(workspace: str) -> None:
    # Held while it is removed, or its maker could take the lock in between.
    with contextlib.suppress(_AliveError), _lock_of_dead(workspace):
        _remove_workspace(workspace)


class _AliveError(Exception):
    """The writer of a workspace is alive."""


@contextlib.contextmanager
def _lock_of_dead(workspace: str) -> Iterator[None]:
    lock = os.path.join(workspace, _LOCK)
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        # Of an older version, or just being made: then it is empty, and its maker starts again without it.
        if _age(workspace) < _DEAD_SECONDS:
            _remove_empty(workspace)
            raise _AliveError from None
        yield
        return
    try:
        outcome = try_lock(descriptor)
        if outcome == "busy" or (outcome == "unknown" and _age(lock) < _DEAD_SECONDS):
            raise _AliveError
        yield
    finally:
        os.close(descriptor)


def _remove_empty(directory: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(directory)


def _age(path: str) -> float:
    return time.time() - os.stat(path).st_mtime


def _remove_workspace(directory: str) -> None:
    # The lock last: without it, what is left would count as alive for a day.
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(directory), key=lambda name: name == _LOCK):
            _remove(os.path.join(directory, name))
        os.rmdir(directory)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _is_still(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _siblings(path: str, purpose: str) -> list[str]:
    parent, name = os.path.split(path)
    if not os.path.isdir(parent):
        return []
    pattern = re.compile(rf"\.{re.escape(name)}\.{purpose}-[0-9a-f]{{12}}")
    return [os.path.join(parent, entry) for entry in sorted(os.listdir(parent)) if pattern.fullmatch(entry)]
