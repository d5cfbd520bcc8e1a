"""Axes of values as indices along the axes of parameters: how they are carried through a program, joined and pinned."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxcompress._src.trace.axis import LONGEST
from jaxcompress._src.trace.facts import Facts, facts_of
from jaxcompress._src.trace.index_classes import IndexClasses, Indices, Reason

Along = Indices | None
"""The indices along one axis. None: all entries are the same by construction (a new axis that repeats, a number, an
axis of length 1), so that nothing hinders any of them from going."""

INNER = Reason("it lies inside the units of an axis that it is merged, split or contracted with", final=False)
ENTRY = Reason("fixed entries of it are taken")
CONSTANT = Reason("a constant of the program runs along it")
LONG = Reason(f"it is merged into an axis of more than {LONGEST} entries", expected=False)
TWO_ACTIVATIONS = Reason("a matmul of two activations sums over it")
NO_LEAF = Reason("a matmul reads it by weights that are no linear function of parameters", expected=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What is carried of a value.

    Attributes:
        shape: of the value.
        axes: what runs along each of them.
        terms: where the value is a sum of products of entries of parameters: for each summand, and for each axis, the
            indices of the one parameter by whose zeros the summand is zero; -1 where it is zero anyway, and None for an
            axis along which no single parameter makes it so. None for the whole: it is no such sum.
        data: whether it depends on the inputs of the model.
        facts: what is known of it, if it is a constant.
    """

    shape: tuple[int, ...]
    axes: tuple[Along, ...]
    terms: tuple[tuple[Along, ...], ...] | None = None
    data: bool = True
    facts: Facts = dataclasses.field(default_factory=Facts)

    def gates(self, axis: int) -> list[Indices]:
        """What has to be zero for the value to be zero at indices of an axis; empty if parameters can't make it so."""
        along = [term[axis] for term in self.terms or ()]
        known = [indices for indices in along if indices is not None]
        return known if len(known) == len(along) else []


@dataclasses.dataclass(frozen=True)
class Regrouping:
    """What a reshape does to a run of axes.

    Attributes:
        sizes: before.
        source: the one of them whose indices are followed.
        new_sizes: after.
        target: the one of them along which these indices run; constant along the others.
    """

    sizes: tuple[int, ...]
    source: int
    new_sizes: tuple[int, ...]
    target: int

    def grid(self, along: Indices) -> Int[np.ndarray, "target others"]:
        """(entries of the target axis, all others): the indices of the source axis in the new shape."""
        shape = [-1 if k == self.source else 1 for k in range(len(self.sizes))]
        wide = np.broadcast_to(along.reshape(shape), self.sizes).reshape(self.new_sizes)
        return np.moveaxis(wide, self.target, 0).reshape(self.new_sizes[self.target], -1)

    def moved(self, along: Along) -> list[Along]:
        """The new axes."""
        axes: list[Along] = [None] * len(self.new_sizes)
        if along is not None:
            axes[self.target] = self.grid(along)[:, 0]
        return axes


class Coupling:
    """What a program joins and pins.

    Attributes:
        excluded: place of a choice -> axes that are not to be chosen.
        classes: of the indices.
        choices: place of a choice -> the axis that was chosen, and its indices.
        marks: what happens -> when it happens, and to which indices, in order.
        step: number of the equation.
    """

    def __init__(self, excluded: Mapping[Any, frozenset[int]]) -> None:
        self.excluded = excluded
        self.classes = IndexClasses()
        self.choices: dict[Any, tuple[int, Indices]] = {}
        self.marks: dict[str, list[tuple[int, Indices]]] = {}
        self.step = 0

    def new(self, shape: Sequence[int]) -> tuple[Along, ...]:
        """Axes whose indices nothing has joined yet."""
        return tuple(self.classes.new(size) if size > 1 else None for size in shape)

    def fixed(self, size: int, reason: Reason) -> Along:
        """An axis that must stay."""
        return self.classes.fixed(size, reason) if size > 1 else None

    def constant(self, value: Any) -> Value:
        """A constant of the program."""
        shape = tuple(np.shape(value))
        axes: list[Along] = [self.fixed(size, CONSTANT) for size in shape]
        facts = facts_of(value)
        if facts.constant is not None and hasattr(value, "dtype") and 0 < math.prod(shape) <= LONGEST:
            array = facts.constant()
            for axis in range(len(shape)):
                if (array == array.take([0], axis=axis)).all():
                    axes[axis] = None
        return Value(shape, tuple(axes), data=False, facts=facts)

    def pin(self, along: Iterable[Along], reason: Reason) -> None:
        """These axes must stay."""
        for indices in along:
            if indices is not None:
                self.classes.pin(indices, reason)

    def mark(self, name: str, along: Iterable[Along]) -> None:
        """Notes what happens to indices."""
        for indices in along:
            if indices is not None:
                self.marks.setdefault(name, []).append((self.step, indices))

    def mark_written(self, value: Value, axes: Iterable[int]) -> None:
        """Notes that parameters go into activations with these axes."""
        for axis in axes:
            self.mark("written", (term[axis] for term in value.terms or ()))

    def united(self, along: Iterable[Along]) -> Along:
        """One axis of several that stay or go together, index by index."""
        known = [indices for indices in along if indices is not None]
        for indices in known[1:]:
            if indices is not known[0]:
                self.classes.unite(known[0], indices)
        return known[0] if known else None

    def is_live(self, along: Along) -> bool:
        """Whether some index of an axis may go, as far as is known."""
        return along is not None and not self.classes.is_pinned(along).all()

    def choose(self, place: Any, candidates: Mapping[int, Along]) -> int:
        """Which of several axes that can't all be cut into units is; the others lie inside these units.

        The outermost one, unless an earlier pass over the program found that it must stay.
        """
        possible = [axis for axis in candidates if axis not in self.excluded.get(place, ())]
        axis = min(possible or candidates)
        indices = candidates[axis]
        if len(candidates) > 1 and indices is not None:
            self.choices[place] = axis, indices
        return axis

    def regroup(
        self, axes: Sequence[Along], sizes: Sequence[int], new_sizes: Sequence[int], place: Any
    ) -> tuple[list[Along], Regrouping | None]:
        """What a reshape makes of a run of axes.

        Args:
            axes: of the run.
            sizes: of these.
            new_sizes: of the axes that they become.
            place: in the program.

        Returns:
            The new axes, and how indices move; None if no index that may go does.
        """
        held = {axis: indices for axis, indices in enumerate(axes) if indices is not None}
        if math.prod(sizes) > LONGEST:
            self.pin(held.values(), LONG)
        live = {axis: indices for axis, indices in held.items() if self.is_live(indices)}
        if not live:
            pinned = [self.classes.find(indices[:1]) for indices in held.values()]
            return [np.broadcast_to(pinned[0], (n,)) if pinned and n > 1 else None for n in new_sizes], None
        source = self.choose((place, "merged"), live)
        self.pin((indices for axis, indices in live.items() if axis != source), INNER)
        moves = [
            Regrouping(tuple(sizes), source, tuple(new_sizes), target) for target, n in enumerate(new_sizes) if n > 1
        ]
        roots = self.classes.find(live[source])
        varying = [move for move in moves if (grid := move.grid(roots)).size and (grid != grid[:1]).any()] or moves[:1]
        lines = {move.target: move.grid(live[source])[:, 0] for move in varying}
        target = self.choose((place, "split"), lines)
        move = next(move for move in varying if move.target == target)
        if len(varying) > 1:
            grid = move.grid(live[source])
            self.classes.unite(grid.reshape(-1), np.repeat(grid[:, 0], grid.shape[1]))
        after = [lines[k] if k == target else self.fixed(n, INNER) for k, n in enumerate(new_sizes)]
        return after, move

    def contract(self, left: Value, right: Value, pairs: Sequence[tuple[int, int]]) -> None:
        """Two values are multiplied and summed over axes.

        Zeros of a parameter along the axis switch a unit off, wherever one of both values is weights: these are marked
        as `read`.

        Args:
            left: one value.
            right: the other.
            pairs: (axis of `left`, axis of `right`).
        """
        along = {j: self.united((left.axes[i], right.axes[j])) for i, j in pairs}
        live = {axis: indices for axis, indices in along.items() if self.is_live(indices)}
        if not live:
            return
        summed = self.choose((self.step, "summed"), live)
        self.pin((indices for axis, indices in live.items() if axis != summed), INNER)
        ends = [(right, summed), (left, next(i for i, j in pairs if j == summed))]
        # Of weights that are looked up rather the other operand.
        ends.sort(key=lambda end: end[0].data)
        readers = [gates for value, axis in ends if (gates := value.gates(axis))]
        if readers:
            self.mark("read", readers[0])
            for written in readers[1:]:
                self.mark("written", written)
        elif any(value.axes[axis] is None for value, axis in ends):
            self.mark("reduced", [live[summed]])
        else:
            self.pin([live[summed]], TWO_ACTIVATIONS if left.data and right.data else NO_LEAF)
