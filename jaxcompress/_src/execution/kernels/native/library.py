"""The compiled library: where it lies, whether it loads, what it may use of the processor.

Loaded once, on first use. Nothing here raises where there is no library: `why_missing` says what is the matter.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

INSTRUCTION_SETS = ("portable", "avx2", "avx512vnni")
"""From the lowest up; each includes those before it."""

VARIABLE = "JAXCOMPRESS_INSTRUCTIONS"
"""The environment variable that lowers the instruction set."""

WEIGHT_ONLY, INTEGER = "jaxcompress_weight_only", "jaxcompress_integer"
EXPAND, SPARSE_PRODUCT = "jaxcompress_expand", "jaxcompress_sparse_product"
"""Names of the handlers, in the library and in XLA."""


def library_path() -> Path:
    """Where the build hook puts the library: beside this module."""
    return Path(__file__).with_name("libjaxcompress" + {"darwin": ".dylib"}.get(sys.platform, ".so"))


def why_missing() -> str | None:
    """Why there are no compiled kernels, in one clause, or None if there are.

    Example:
        >>> why_missing() is None or "librar" in why_missing()
        True
    """
    return _load().reason


def instruction_set() -> str | None:
    """What the kernels use: "portable", "avx2" or "avx512vnni"; None without a library.

    It is the best of the processor, unless `JAXCOMPRESS_INSTRUCTIONS` names a lower one.
    """
    handle = _load().handle
    return None if handle is None else INSTRUCTION_SETS[handle.jaxcompress_instruction_level()]


@contextlib.contextmanager
def limited_to(name: str) -> Iterator[None]:
    """No more than this instruction set, in the whole process; for tests and benchmarks.

    Raises:
        ValueError: `name` is none of `INSTRUCTION_SETS`.
    """
    handle = _load().handle
    if handle is not None:
        handle.jaxcompress_limit_instructions(_level(name))
    try:
        yield
    finally:
        if handle is not None:
            handle.jaxcompress_limit_instructions(_limit_of_environment())


@dataclasses.dataclass(frozen=True)
class _Loaded:
    handle: ctypes.CDLL | None
    reason: str | None


@functools.cache
def _load() -> _Loaded:
    limit = _limit_of_environment()
    path = library_path()
    if not path.exists():
        recorded = path.with_name("why_missing.txt")
        why = f": {recorded.read_text('utf-8').strip()}" if recorded.exists() else ""
        return _Loaded(None, f"the compiled library was not built when jaxcompress was installed{why}")
    try:
        handle = ctypes.CDLL(str(path))
        for name in (WEIGHT_ONLY, INTEGER, EXPAND, SPARSE_PRODUCT):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(handle, name)), platform="cpu")
    except Exception as err:  # of the loader, or of XLA where the versions do not fit
        return _Loaded(None, f"the compiled library does not load ({err})")
    handle.jaxcompress_limit_instructions(limit)
    return _Loaded(handle, None)


def _limit_of_environment() -> int:
    return _level(os.environ.get(VARIABLE) or INSTRUCTION_SETS[-1])


def _level(name: str) -> int:
    if name not in INSTRUCTION_SETS:
        raise ValueError(f"`{VARIABLE}` is one of {', '.join(INSTRUCTION_SETS)}, got {name!r}.")
    return INSTRUCTION_SETS.index(name)
