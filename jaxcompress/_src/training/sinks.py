"""Where figures of a run go: functions of the step and the figures."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeAlias

Sink: TypeAlias = Callable[[int, Mapping[str, float]], Any]
"""`(step, figures)`: called in the first process, with steps that only go up within a run."""


def console(*, stream: TextIO | None = None) -> Sink:
    """Prints a line: the step, the figures, and how many steps were done in a second since the line before.

    Args:
        stream: where to; by default the standard error.

    Example:
        >>> import sys
        >>> from jaxcompress.training import console
        >>> console(stream=sys.stdout)(100, {"loss": 0.25, "accuracy": 0.5})
        step 100  loss 0.25  accuracy 0.5
    """
    before: list[tuple[int, float]] = []

    def write(step: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        words = [f"step {step}", *(f"{name} {value:.5g}" for name, value in figures.items())]
        if before and step > before[0][0]:
            words.append(f"{(step - before[0][0]) / max(now - before[0][1], 1e-9):.3g} steps/s")
        before[:] = [(step, now)]
        print("  ".join(words), file=stream or sys.stderr, flush=True)

    return write


def jsonl(path: str | os.PathLike[str]) -> Sink:
    """Appends lines of JSON to a file: `{"step": 100, "loss": 0.25}`; NaN and Inf are null.

    A run that goes on from a checkpoint replaces what the killed one wrote after it: the file has every step once.

    Args:
        path: the file; made, with its directory, if there is none.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxcompress.training import jsonl
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     for step in (1, 2, 3):
        ...         jsonl(directory + "/log.jsonl")(step, {"loss": 1 / step})
        ...     jsonl(directory + "/log.jsonl")(2, {"loss": 0.5})
        ...     print(pathlib.Path(directory, "log.jsonl").read_text())
        {"step": 1, "loss": 1.0}
        {"step": 2, "loss": 0.5}
    """
    path = Path(path)
    begun = False

    def write(step: int, figures: Mapping[str, float]) -> None:
        nonlocal begun
        if not begun:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut(path, step)
            begun = True
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    return write


def _cut(path: Path, step: int) -> None:
    """Removes the lines of a step and of all after it, and a last line that a kill left unfinished."""
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.decode().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for at, line in enumerate(lines):
        try:
            logged = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as err:
            raise ValueError(f"Line {at + 1} of {str(path)!r} is no figures of a run: {line!r:.80}.") from err
        if logged >= step:
            lines = lines[:at]
            break
    kept = "".join(lines).encode()
    if kept != content:
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(kept)
        temporary.replace(path)
