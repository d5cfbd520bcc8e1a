"""What the interpreter carries: taps, uses, values."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxcompress.calibration._statistics import Statistics
from jaxcompress.trace import LeafLayout, Origin

Totals = dict[int, Statistics]
"""Number of a group of leaves that share their inputs -> what has been summed up."""

ALL, NONE = -1, -2
"""Of a group that is gathered in sequence: every stack entry, or nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tap:
    """A leaf whose inputs are gathered.

    Attributes:
        path: of the leaf.
        layout: of the leaf.
        width: number of its input features.
        group: where the sums go; None when another leaf of the group gathers them.
    """

    path: str
    layout: LeafLayout
    width: int
    group: int | None


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a tapped leaf meets its input.

    Attributes:
        leaf: number of the leaf.
        place: of the equation: (position,), inside a loop (position, iteration, position, ...). Loops over stack
            entries write None for the iteration.
        signature: two leaves used once each, of the same input and with the same signature, share their rows.
    """

    leaf: int
    place: tuple[int | None, ...]
    signature: Any

    @property
    def body(self) -> tuple[int | None, ...]:
        """The branches and loops around it."""
        return self.place[:-1]


@dataclasses.dataclass(frozen=True)
class Value:
    """What the walk carries.

    Attributes:
        streams: the array in the dense model and in the current one; one entry where they are the same.
        origin: set for re-arrangements of a tapped leaf.
        at: (leaf axis, first entry) for axes of the leaf that were sliced.
    """

    streams: tuple[Any, ...]
    origin: Origin | None = None
    at: tuple[tuple[int, Any], ...] = ()

    @property
    def last(self) -> Any:
        """The array in the current model."""
        return self.streams[-1]

    def plain(self) -> "Value":
        """The same array, no leaf any more."""
        return Value(self.streams)


def as_value(value: Any) -> Value:
    return value if isinstance(value, Value) else Value((value,))


def bind(eqn: Any, values: Sequence[Value]) -> list[Value]:
    """The equation as it stands, once for each stream."""
    count = max((len(value.streams) for value in values), default=1)
    results = []
    for stream in range(count):
        operands = [value.streams[stream % len(value.streams)] for value in values]
        with eqn.ctx.manager:
            found = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        results.append(list(found) if eqn.primitive.multiple_results else [found])
    return [Value(streams) for streams in zip(*results, strict=True)]
