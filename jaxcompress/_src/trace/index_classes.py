"""Indices of axes in disjoint classes: those of one class stay or go together."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

Indices = Int[np.ndarray, " _"]
"""Numbers of the indices along an axis. An axis of which every index has one number has strides of 0."""


class Reason(NamedTuple):
    """Why indices must stay.

    Attributes:
        text: as the end of a sentence whose subject is the axis.
        expected: whether that is in the nature of the model, such as of its inputs, rather than a limit of what is
            followed here.
        final: whether another way to cut axes into units could not change it.
    """

    text: str
    expected: bool = True
    final: bool = True


_FREE = np.iinfo(np.int64).max
_NOT_FINAL = 1 << 32


class IndexClasses:
    """Disjoint sets of numbered indices (union-find), and what is pinned: must stay.

    The representative of a class is its smallest number.

    Example:
        >>> classes = IndexClasses()
        >>> first, second = classes.new(3), classes.new(3)
        >>> classes.unite(first, second[::-1])
        >>> classes.find(second).tolist()
        [2, 1, 0]
        >>> classes.pin(second[:1], Reason("the model returns it"))
        >>> classes.is_pinned(first).tolist()
        [False, False, True]
    """

    def __init__(self) -> None:
        self._parent = np.zeros(0, np.int64)
        self._pins = np.zeros(0, np.int64)
        self._size = 0
        self._reasons: dict[Reason, int] = {}
        self._pinned: dict[Reason, Indices] = {}

    @property
    def size(self) -> int:
        """The number of all indices."""
        return self._size

    def new(self, count: int) -> Indices:
        """New indices, each in a class of its own."""
        start, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            length = len(self._parent)
            more = max(self._size, 2 * length) - length
            self._parent = np.concatenate([self._parent, np.arange(length, length + more)])
            self._pins = np.concatenate([self._pins, np.full(more, _FREE)])
        return np.arange(start, self._size)

    def find(self, indices: Indices) -> Indices:
        """The representatives of their classes."""
        if len(indices) > 1 and indices.strides == (0,):
            return np.broadcast_to(self.find(indices[:1]), indices.shape)
        roots = self._parent[indices]
        while not np.array_equal(higher := self._parent[roots], roots):
            roots = higher
        self._parent[indices] = roots
        return roots

    def unite(self, first: Indices, second: Indices) -> None:
        """Joins the classes of the indices at the same place."""
        a, b = np.broadcast_arrays(self.find(first), self.find(second))
        while (differ := a != b).any():
            a, b = a[differ], b[differ]
            touched = np.concatenate([a, b])
            # Of several smaller ones only the last is taken; the next round joins the others.
            self._parent[np.maximum(a, b)] = np.minimum(a, b)
            a, b = self.find(a), self.find(b)
            np.minimum.at(self._pins, self.find(touched), self._pins[touched])

    def pin(self, indices: Indices, reason: Reason) -> None:
        """Whole classes must stay."""
        np.minimum.at(self._pins, self.find(indices), self._code(reason))

    def fixed(self, count: int, reason: Reason) -> Indices:
        """Pinned indices, all in one class."""
        if reason not in self._pinned:
            self._pinned[reason] = self.new(1)
            self.pin(self._pinned[reason], reason)
        return np.broadcast_to(self._pinned[reason], (count,))

    def _code(self, reason: Reason) -> int:
        """The smaller, the more it tells."""
        return self._reasons.setdefault(reason, len(self._reasons)) + (0 if reason.final else _NOT_FINAL)

    def is_pinned(self, indices: Indices, *, final: bool = False) -> Bool[np.ndarray, " _"]:
        """Which of them must stay.

        Args:
            indices: numbers.
            final: only for a final reason.
        """
        return self._pins[self.find(indices)] < (_NOT_FINAL if final else _FREE)

    def reasons(self, indices: Indices) -> list[Reason | None]:
        """Why they must stay, each reason once: of a class the first one given, a final one before others.

        None: some of them need not.
        """
        names = dict(enumerate(self._reasons))
        pins = np.unique(self._pins[self.find(indices)]).tolist()
        return [None if pin == _FREE else names[pin % _NOT_FINAL] for pin in pins]
