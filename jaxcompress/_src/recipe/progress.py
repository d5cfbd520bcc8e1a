"""How long work tells what it is doing; drawn by whoever calls."""

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable


@runtime_checkable
class Task(Protocol):
    """One piece of work under way."""

    def advance(self, **figures: float) -> None:
        """One more step is done; `figures` (a loss, say) are shown beside it."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Where work is shown."""

    def task(self, name: str, total: int) -> contextlib.AbstractContextManager[Task]:
        """Begins a piece of work of `total` steps."""
        ...

    def note(self, text: str) -> None:
        """Says one line."""
        ...


class Silent:
    """Shows nothing."""

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        """Begins a piece of work that nobody sees."""
        del name, total
        yield _Unseen()

    def note(self, text: str) -> None:
        """Says nothing."""
        del text


class _Unseen:
    def advance(self, **figures: float) -> None:
        del figures
