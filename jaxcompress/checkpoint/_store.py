"""Orbax, and nothing else: named arrays in a directory.

Imported inside the functions, because it takes half a second.
"""

import os
from collections.abc import Collection, Mapping
from typing import Any

import jax

from jaxcompress.checkpoint._errors import CheckpointError

ARRAYS_NAME = "arrays"
"""The Orbax checkpoint, inside ours."""


def orbax_version() -> str:
    """The version of Orbax."""
    import orbax.checkpoint as ocp

    return ocp.__version__


def write_arrays(directory: str, arrays: Mapping[str, Any]) -> None:
    """Writes arrays under their names, and waits until they are written.

    Args:
        directory: absolute; must not exist.
        arrays: JAX or NumPy arrays, none without elements. If there is none, nothing is written: Orbax refuses it.
    """
    if not arrays:
        return
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, dict(arrays))
        checkpointer.wait_until_finished()


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
        with ocp.StandardCheckpointer() as checkpointer:
            _check_stored(directory, checkpointer.metadata(directory).item_metadata, targets)
            found = checkpointer.restore(directory, dict(targets))
    except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as err:
        raise CheckpointError(
            f"Orbax cannot read the arrays in {directory!r}: {type(err).__name__}: {err}. Restore them from a copy."
        ) from err
    for name, target in targets.items():
        _check_array(directory, name, found[name], target)
    return found


def _check_stored(directory: str, stored: Any, targets: Mapping[str, Any]) -> None:
    if stored is None or set(stored) != set(targets):
        names = set(stored or ())
        raise CheckpointError(
            f"The arrays in {directory!r} are not those of the manifest: "
            f"missing {_listed(set(targets) - names)}; not in the manifest {_listed(names - set(targets))}."
        )
    for name, target in targets.items():
        _check_array(directory, name, stored[name], target)


def _check_array(directory: str, name: str, found: Any, target: Any) -> None:
    if tuple(found.shape) != tuple(target.shape) or found.dtype != target.dtype:
        raise CheckpointError(
            f"Array {name!r} in {os.fspath(directory)!r} is {found.dtype}{list(found.shape)}; "
            f"the manifest says {target.dtype}{list(target.shape)}."
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "") if names else "none"
