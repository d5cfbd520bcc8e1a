"""Locks that die with their process. Where a file system has none, everything goes on without them."""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from typing import Literal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Outcome = Literal["held", "busy", "unknown"]
"""We hold it; another process does; the file system has no locks."""


def try_lock(descriptor: int, *, shared: bool = False) -> Outcome:
    """Takes the lock of an open file or directory, without waiting; closing it gives the lock back."""
    if fcntl is None:
        return "unknown"
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return "busy"
    except OSError as err:
        if err.errno in (errno.EACCES, errno.EAGAIN):
            return "busy"
        return "unknown"
    return "held"


@contextlib.contextmanager
def waiting_lock(path: str, *, seconds: float) -> Iterator[None]:
    """Holds the lock of a directory, so that what happens inside happens in one process at a time.

    Raises:
        TimeoutError: another process held it for `seconds`.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end = time.monotonic() + seconds
        while try_lock(descriptor) == "busy":
            if time.monotonic() > end:
                raise TimeoutError(f"Another process has been publishing a checkpoint at {path!r} for {seconds:.0f} s.")
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)
