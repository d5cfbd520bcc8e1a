"""Leaves, entries of stacks, and the kernels and biases in them.

Shape letters: D inputs of a kernel, O its outputs.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.paths import entry_name
from jaxcompress._src.types import plain

Entry = tuple[tuple[int, int], ...]
"""`(axis, index)` of the axes of a leaf along which one entry was cut out, by axis; empty for all of the leaf."""

Overlap = tuple[tuple[int | None, ...], tuple[int | None, ...]]
"""Where two entries of a leaf meet: an index into the array at the one, and into that at the other; None: all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPart:
    """A kernel or a bias in its leaf: all of it, or one entry of a stack that a scan runs over.

    Attributes:
        path: of the leaf.
        entry: of the stack; empty where there is none.
        input_axes: axes of the leaf that are summed over, by number; none of a bias.
        output_axes: the others, by number.
    """

    path: str
    entry: Entry = ()
    input_axes: tuple[int, ...] = ()
    output_axes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The path, and which entry: `"layers/kernel[3]"`."""
        return entry_name(self.path, *(index for _, index in self.entry))

    @on_auto_axes
    def matrix(self, leaf: Shaped[Any, "..."]) -> Shaped[Any, "D O"]:
        """The kernel in an array of the leaf's shape; a bias is one row."""
        entry = entry_of(leaf, self.entry)
        axes = sorted((*self.input_axes, *self.output_axes))
        moved = entry.transpose([axes.index(axis) for axis in (*self.input_axes, *self.output_axes)])
        return moved.reshape(math.prod(leaf.shape[axis] for axis in self.input_axes), -1)

    def put(self, leaf: Shaped[Any, "..."], matrix: Shaped[Any, "*D O"]) -> Shaped[np.ndarray, "..."]:
        """A copy of the leaf with another kernel, or with another bias (O,): the inverse of `matrix`."""
        changed = np.array(leaf)
        axes = (*self.input_axes, *self.output_axes)
        entry = np.asarray(matrix).reshape([changed.shape[axis] for axis in axes]).transpose(np.argsort(axes))
        changed[_index(self.entry, changed.ndim)] = entry.astype(changed.dtype)
        return changed

    @on_auto_axes
    def array(self, matrix: Shaped[Any, "*D O"], shape: tuple[int, ...]) -> Shaped[Any, "..."]:
        """The kernel, or the bias (O,), in the shape of its entry of a leaf of some shape: the inverse of `matrix`."""
        axes = (*self.input_axes, *self.output_axes)
        return matrix.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes).tolist())


@on_auto_axes
def entry_of(leaf: Any, entry: Entry) -> Any:
    """One entry of a leaf, or all of it, as a plain array without the axes of the entry."""
    whole = plain(leaf)
    return whole[_index(entry, whole.ndim)] if entry else whole


@on_auto_axes
def with_entry(leaf: Any, entry: Entry, array: Any) -> Any:
    """A copy of a plain leaf with another entry."""
    return jnp.asarray(leaf).at[_index(entry, leaf.ndim)].set(array)


def meet(entry: Entry, other: Entry) -> bool:
    """Whether two entries of a leaf have numbers in common.

    Example:
        >>> meet((), ((0, 2),)), meet(((0, 1),), ((0, 2),))
        (True, False)
    """
    places = dict(other)
    return all(places.get(axis, place) == place for axis, place in entry)


def overlap_of(entry: Entry, other: Entry, ndim: int) -> Overlap | None:
    """Where two entries of a leaf of some axes meet, if they do.

    Example:
        >>> overlap_of((), ((0, 2),), 3), overlap_of(((0, 2),), ((0, 2),), 3), overlap_of(((0, 1),), ((0, 2),), 3)
        (((2, None, None), (None, None)), ((None, None), (None, None)), None)
    """
    if not meet(entry, other):
        return None
    first, second = dict(entry), dict(other)
    at = tuple(second.get(axis) for axis in range(ndim) if axis not in first)
    return at, tuple(first.get(axis) for axis in range(ndim) if axis not in second)


@on_auto_axes
def laid_over(part: Any, other: Any, overlap: Overlap) -> Any:
    """The array at one entry, with that at another one in place where they meet; `part` is not read if that is all."""
    at, of = (tuple(slice(None) if place is None else place for place in index) for index in overlap)
    return jnp.asarray(part).at[at].set(other[of]) if is_partial(overlap) else other[of]


def is_partial(overlap: Overlap) -> bool:
    """Whether the array at the one entry has more than what is at the other."""
    return any(place is not None for place in overlap[0])


def _index(entry: Entry, ndim: int) -> tuple[Any, ...]:
    places = dict(entry)
    return tuple(places.get(axis, slice(None)) for axis in range(ndim))
