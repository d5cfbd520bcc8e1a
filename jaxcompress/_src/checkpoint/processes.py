"""Several JAX processes as one: the first decides, and an error in one of them is an error in all.

With one process, which is the rule, every function here just calls what it is given.
"""

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from jaxcompress._src.checkpoint.errors import CheckpointError

_T = TypeVar("_T")
_MESSAGE_BYTES, _MESSAGE_LETTERS = 8192, 600
_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (CheckpointError, FileExistsError, FileNotFoundError, OSError, PermissionError, TypeError, ValueError)
}


def is_first() -> bool:
    """Whether this process touches what all processes share."""
    return jax.process_index() == 0


def together(function: Callable[[], _T]) -> _T:
    """Calls a function in every process; if it fails in one, all raise.

    What the function does must not wait for the other processes after it may have failed in one of them.
    """
    if jax.process_count() == 1:
        return function()
    result, error = None, None
    try:
        result = function()
    except Exception as err:
        error = err
    messages = _gather(np.frombuffer(_encode(error).ljust(_MESSAGE_BYTES), np.uint8))
    if error is not None:
        raise error
    for at, row in enumerate(messages):
        if message := row.tobytes().rstrip():
            raise _decode(message, f"In JAX process {at}: ")
    return result  # type: ignore[return-value]


def by_first(function: Callable[[], bytes]) -> bytes:
    """Calls a function in the first process only; all get the result, or raise the error."""
    if jax.process_count() == 1:
        return function()
    content, failed, error = b"", 0, None
    if is_first():
        try:
            content = function()
        except Exception as err:
            content, failed, error = _encode(err), 1, err
    failed, length = _broadcast(np.array([failed, len(content)], np.int32))
    # A power of two, so that few lengths are compiled.
    room = max(1024, 1 << int(length).bit_length())
    content = _broadcast(np.frombuffer(content.ljust(room), np.uint8)).tobytes()[:length]
    if error is not None:
        raise error
    if failed:
        raise _decode(content, "In JAX process 0: ")
    return content


def differing(values: list[bytes]) -> list[int]:
    """Which of some short values of the same lengths are not the same in all processes."""
    if jax.process_count() == 1 or not values:
        return []
    table = np.frombuffer(b"".join(values), np.uint8).reshape(len(values), -1)
    tables = _gather(table)
    return np.flatnonzero((tables != tables[0]).any(axis=(0, 2))).tolist()


def gather_count(count: int) -> list[int]:
    """A number of each process."""
    return [count] if jax.process_count() == 1 else [int(number) for number in _gather(np.array(count, np.int32))]


def gather_bytes(content: bytes) -> list[bytes]:
    """Some bytes of each process, in their order."""
    if jax.process_count() == 1:
        return [content]
    lengths = gather_count(len(content))
    rows = _gather(np.frombuffer(content.ljust(max(1024, 1 << max(lengths).bit_length())), np.uint8))
    return [row.tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, on the devices of a sharding, of which a process may have some."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _gather(array: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))


def _broadcast(array: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def _encode(error: Exception | None) -> bytes:
    if error is None:
        return b""
    names = [cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _ERRORS]
    # A letter takes up to 12 bytes in JSON; cutting letters, not bytes, keeps it valid.
    return json.dumps([(names or ["ValueError"])[0], str(error)[:_MESSAGE_LETTERS]]).encode()


def _decode(message: bytes, prefix: str) -> Exception:
    name, text = json.loads(message)
    return _ERRORS[name](prefix + text)
