"""What of this machine decides how fast a model runs."""

import functools
import os
from pathlib import Path

_SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_SETS += ("asimd", "asimddp", "i8mm", "bf16", "sve")  # of ARM


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of this processor that multiply floats and integers, as Linux names them; else none.

    Example:
        >>> set(instruction_sets()) <= set(_SETS)
        True
    """
    path = Path("/proc/cpuinfo")
    words = set(path.read_text("utf-8").split()) if path.exists() else set()
    return tuple(name for name in _SETS if name in words)


def processor_count() -> int:
    """The processors that this process may use.

    Example:
        >>> processor_count() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
