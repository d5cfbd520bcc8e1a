"""Orbax, and nothing else: named arrays in a directory.

Imported inside the functions, because it takes half a second.
"""

import contextlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax

from jaxcompress._src.checkpoint.errors import CheckpointError


def orbax_version() -> str:
    """The version of Orbax."""
    import orbax.checkpoint as ocp

    return ocp.__version__


def write_arrays(directory: str, arrays: Mapping[str, Any]) -> None:
    """Writes arrays under their names, and waits until they are written.

    Args:
        directory: absolute; must not exist.
        arrays: JAX or NumPy arrays, none without elements. If there is none, nothing is written: Orbax refuses it.

    Raises:
        OSError: they cannot be written; says why in one line.
    """
    if not arrays:
        return
    import orbax.checkpoint as ocp

    try:
        with without_tracebacks(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory, dict(arrays))
            checkpointer.wait_until_finished()
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as err:
        raise as_os_error(directory, err) from None


def read_arrays(directory: str, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays by name.

    Orbax casts silently to the dtype of the target, so shapes and dtypes on disk are compared first.

    Args:
        directory: absolute.
        targets: by name, a `jax.ShapeDtypeStruct` with a sharding, or a NumPy array for a NumPy result.

    Returns:
        The arrays, by name.

    Raises:
        CheckpointError: the names, a shape or a dtype differ from what is stored, or Orbax cannot read it.
    """
    if not targets:
        return {}
    import orbax.checkpoint as ocp

    try:
        with without_tracebacks(), ocp.StandardCheckpointer() as checkpointer:
            _check_stored(directory, checkpointer.metadata(directory).item_metadata, targets)
            arrays = checkpointer.restore(directory, dict(targets))
    except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as err:
        raise CheckpointError(
            f"Orbax cannot read the arrays in {directory!r}: {type(err).__name__}: {err}. Restore them from a copy."
        ) from err
    return checked_arrays(directory, arrays, targets)


def checked_arrays(directory: str, arrays: Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, if their shapes and dtypes are those of the targets.

    Raises:
        CheckpointError: one is another; names it.
    """
    for name, target in targets.items():
        _check_array(directory, name, arrays[name], target)
    return dict(arrays)


@contextlib.contextmanager
def without_tracebacks() -> Iterator[None]:
    """Orbax logs a traceback for every thread that fails, and then raises the same error."""
    logger, silence = logging.getLogger("absl"), _of_orbax
    logger.addFilter(silence)
    try:
        yield
    finally:
        logger.removeFilter(silence)


def _of_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


def as_os_error(directory: str, err: Exception) -> OSError:
    """What Orbax raised, as the error of the file system that it is, in one line."""
    if isinstance(err, OSError):
        return err
    # TensorStore says the number of the error, but raises ValueError.
    if match := re.search(r"os_error_code='(\d+)'", str(err)):
        return OSError(int(match[1]), f"Orbax cannot write the arrays: {os.strerror(int(match[1]))}", directory)
    return OSError(f"Orbax cannot write the arrays to {directory!r}: {type(err).__name__}: {err}")


def _check_stored(directory: str, stored: Any, targets: Mapping[str, Any]) -> None:
    if stored is None or set(stored) != set(targets):
        names = set(stored or ())
        raise CheckpointError(
            f"The arrays in {directory!r} are not those of the manifest: "
            f"missing {_listed(set(targets) - names)}; not in the manifest {_listed(names - set(targets))}."
        )
    for name, target in targets.items():
        _check_array(directory, name, stored[name], target)


def _check_array(directory: str, name: str, array: Any, target: Any) -> None:
    if tuple(array.shape) != tuple(target.shape) or array.dtype != target.dtype:
        raise CheckpointError(
            f"Array {name!r} in {os.fspath(directory)!r} is {array.dtype}{list(array.shape)}; "
            f"the manifest says {target.dtype}{list(target.shape)}."
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "") if names else "none"
