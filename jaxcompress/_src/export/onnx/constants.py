"""Constants of a graph: each stored once, in whatever arrangements it is used."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

_SMALL = 1024
"""Bytes; below, an arrangement of a constant is stored anew."""


class Arrangement(NamedTuple):
    """A constant that is another one, moved: reshaped to `shape`, then transposed.

    Attributes:
        name: of the constant.
        stored: the name of what is in the file.
        shape: of the array as it lies in memory.
        permutation: of its axes, or None.
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None


class Constants:
    """Arrays by name; what is equal has one name."""

    def __init__(self, fresh: Callable[[], str]) -> None:
        self._fresh = fresh
        self._arrays: dict[str, np.ndarray] = {}
        self._names: dict[Any, str] = {}

    def add(self, array: np.ndarray) -> str:
        """The name of a constant."""
        memory, permutation = _as_in_memory(array)
        key = (_digest(memory), memory.shape, permutation)
        if key not in self._names:
            self._names[key] = self._fresh()
            self._arrays[self._names[key]] = array
        return self._names[key]

    def stored(self, used: Iterable[str]) -> tuple[dict[str, np.ndarray], list[Arrangement]]:
        """What the file holds, and how the other constants come from it.

        A table that is looked up and multiplied with, transposed, is stored once.

        Args:
            used: names, of constants among others.
        """
        stored: dict[str, np.ndarray] = {}
        moved: list[Arrangement] = []
        groups: dict[bytes, list[str]] = {}
        for name in sorted(set(used) & set(self._arrays), key=lambda name: int(name[1:])):
            array = self._arrays[name]
            if array.nbytes < _SMALL:
                stored[name] = array
            else:
                groups.setdefault(_digest(_as_in_memory(array)[0]), []).append(name)
        for names in groups.values():
            if len(names) == 1:
                stored[names[0]] = self._arrays[names[0]]
                continue
            memory, _ = _as_in_memory(self._arrays[names[0]])
            base = self._fresh()
            stored[base] = memory
            for name in names:
                view, permutation = _as_in_memory(self._arrays[name])
                moved.append(Arrangement(name, base, view.shape, permutation))
        return stored, moved


def _as_in_memory(array: np.ndarray) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """The array in the order of its memory, and the axes to take from that to get it back."""
    if array.flags.c_contiguous:
        return array, None
    order = sorted(range(array.ndim), key=lambda axis: (-array.strides[axis], axis))
    memory = array.transpose(order)
    if not memory.flags.c_contiguous:
        return np.ascontiguousarray(array), None
    return memory, tuple(order.index(axis) for axis in range(array.ndim))


def _digest(memory: np.ndarray) -> bytes:
    total = hashlib.blake2b(memory.dtype.name.encode(), digest_size=16)
    total.update(memory.reshape(-1).view(np.uint8).data if memory.size else b"")
    return total.digest()
