"""What a person sees: progress with loss and time left, tables, lines. Everything goes to stderr but results."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text


class Screen:
    """Shows progress bars on a terminal, and a plain line every few seconds elsewhere.

    Args:
        as_json: print results as one JSON object.
        hold: keep notes back until the work begins: a mistake found before is the only line then.
    """

    def __init__(self, *, as_json: bool, hold: bool = False) -> None:
        self._as_json, self._hold = as_json, hold
        self._held: list[str] = []
        self._errors = Console(stderr=True, highlight=False)
        self._output = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

    def note(self, text: str) -> None:
        """One line about what happens."""
        if self._hold:
            self._held.append(text)
        else:
            self._errors.print(text, markup=False, soft_wrap=True)

    def error(self, text: str) -> None:
        """One line about what is wrong with a result."""
        self._let_go()
        print(f"jaxcompress: error: {' '.join(text.split())}", file=sys.stderr)

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator["_Bar | _Lines"]:
        """A piece of work; see `recipe.progress.Progress`."""
        self._let_go()
        if not self._errors.is_terminal:
            yield _Lines(self, name, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with RichProgress(*columns, console=self._errors) as bars:
            yield _Bar(bars, bars.add_task(name, total=total, figures=""))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of results; nothing with `--json`."""
        self._let_go()
        if self._as_json:
            return
        # As text: brackets in titles and cells are no markup.
        table = Table(title=Text(title), title_justify="left")
        for i, name in enumerate(header):
            figures = i > 0 and all(row[i][:1] in "0123456789-+" for row in rows)
            table.add_column(name, justify="right" if figures else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self._output.print(table)

    def text(self, text: str) -> None:
        """A file as it is; nothing with `--json`."""
        self._let_go()
        if not self._as_json:
            self._output.print(text, markup=False, soft_wrap=True)

    def result(self, figures: dict[str, Any], *, lines: Sequence[str] = ()) -> None:
        """One JSON object with `--json`, else a few lines."""
        self._let_go()
        if self._as_json:
            print(json.dumps(figures))
        else:
            for line in lines:
                self._output.print(line, markup=False, soft_wrap=True)

    def _let_go(self) -> None:
        self._hold = False
        for text in self._held:
            self.note(text)
        self._held.clear()


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, **figures: float) -> None:
        self._bars.update(self._task, advance=1, figures=_figures(figures))


class _Lines:
    """Says a line at the first step, at the last, and every ten seconds."""

    def __init__(self, screen: Screen, name: str, total: int) -> None:
        self._screen, self._name, self._total = screen, name, total
        self._done, self._begun, self._said = 0, time.monotonic(), 0.0

    def advance(self, **figures: float) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._said < 10 and self._done not in (1, self._total):
            return
        self._said = now
        left = (now - self._begun) / self._done * (self._total - self._done)
        self._screen.note(f"{self._name}: {self._done}/{self._total}  {_figures(figures)}  {left:.0f} s left")


def _figures(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
