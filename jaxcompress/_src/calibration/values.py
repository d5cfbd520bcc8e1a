"""What the interpreter carries: taps, uses, values."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcompress._src.calibration.rows import Rows
from jaxcompress._src.calibration.statistics import ALL as ALL
from jaxcompress._src.calibration.statistics import NONE as NONE
from jaxcompress._src.calibration.statistics import Statistics
from jaxcompress._src.trace.facts import UNKNOWN, Facts, facts_of
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.trace.origin import Origin
from jaxcompress._src.trace.walk import bind

Totals = dict[int, Statistics]
"""Number of a group of leaves that share their inputs -> what has been summed up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tap:
    """A leaf whose inputs are gathered.

    Attributes:
        path: of the leaf.
        layout: of the leaf.
        width: number of its input features.
        group: where the sums go; None when another leaf of the group gathers them.
        shares: place of a use -> (how much the products of its rows count, whether the rows themselves do), where
            several uses multiply the same rows.
    """

    path: str
    layout: LeafLayout
    width: int
    group: int | None
    shares: Mapping[tuple[int | None, ...], tuple[float, bool]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a tapped leaf meets its input.

    Attributes:
        leaf: number of the leaf.
        place: of the equation: (position,), inside a loop (position, iteration, position, ...). Loops over stack
            entries write None for the iteration.
        signature: two leaves used once each, of the same input and with the same signature, share their rows.
        rows: of a contraction; None of a look-up.
        source: what stands for the input: the same object for the same input, cast or not.
    """

    leaf: int
    place: tuple[int | None, ...]
    signature: Any
    rows: Rows | None = None
    source: Any = None

    @property
    def body(self) -> tuple[int | None, ...]:
        """The branches and loops around it."""
        return self.place[:-1]


@dataclasses.dataclass(frozen=True)
class Value:
    """What the walk carries.

    Attributes:
        streams: the array in the dense model and in the current one; one entry where they are the same.
        facts: what is known about it without computing it; of the parameters it may come from, the tapped ones.
        source: the object that stands for the value that it is a cast of; None: for itself.
    """

    streams: tuple[Any, ...]
    facts: Facts = UNKNOWN
    source: Any = None

    @property
    def last(self) -> Any:
        """The array in the current model."""
        return self.streams[-1]

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The tapped leaves that it is made of."""
        return self.facts.origins

    @property
    def identity(self) -> Any:
        """The same object for all casts of one value."""
        return self.last if self.source is None else self.source


def as_value(value: Any) -> Value:
    return value if isinstance(value, Value) else Value((value,), facts_of(value))


def bind_streams(eqn: Any, values: Sequence[Value]) -> list[Value]:
    """The equation as it stands, once for each stream."""
    count = max((len(value.streams) for value in values), default=1)
    results = []
    for stream in range(count):
        operands = [value.streams[stream % len(value.streams)] for value in values]
        results.append(bind(eqn, operands))
    return [Value(streams) for streams in zip(*results, strict=True)]
