"""A kernel or a bias in its leaf.

Shape letters: D inputs of a kernel, O its outputs.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.paths import entry_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPart:
    """A kernel or a bias in its leaf: all of it, or one entry of a stack that a scan runs over.

    Attributes:
        path: of the leaf.
        entry: `(axis, index)` of the stack axes, by axis; empty where there are none.
        input_axes: axes of the leaf that are summed over, by number; none of a bias.
        output_axes: the others, by number.
    """

    path: str
    entry: tuple[tuple[int, int], ...] = ()
    input_axes: tuple[int, ...] = ()
    output_axes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The path, and which entry: `"layers/kernel[3]"`."""
        return entry_name(self.path, *(index for _, index in self.entry))

    @on_auto_axes
    def matrix(self, leaf: Shaped[Any, "..."]) -> Shaped[Any, "D O"]:
        """The kernel in an array of the leaf's shape; a bias is one row."""
        own = self.entry_of(leaf)
        axes = sorted((*self.input_axes, *self.output_axes))
        moved = own.transpose([axes.index(axis) for axis in (*self.input_axes, *self.output_axes)])
        return moved.reshape(math.prod(leaf.shape[axis] for axis in self.input_axes), -1)

    @on_auto_axes
    def entry_of(self, leaf: Shaped[Any, "..."]) -> Shaped[Any, "..."]:
        """The entry of an array of the leaf's shape, without its stack axes."""
        return leaf[self._index(leaf.ndim)]

    def put(self, leaf: Shaped[Any, "..."], matrix: Shaped[Any, "*D O"]) -> Shaped[np.ndarray, "..."]:
        """A copy of the leaf with another kernel, or with another bias (O,): the inverse of `matrix`."""
        changed = np.array(leaf)
        axes = (*self.input_axes, *self.output_axes)
        own = np.asarray(matrix).reshape([changed.shape[axis] for axis in axes]).transpose(np.argsort(axes))
        changed[self._index(changed.ndim)] = own.astype(changed.dtype)
        return changed

    @on_auto_axes
    def array(self, matrix: Shaped[Any, "*D O"], shape: tuple[int, ...]) -> Shaped[Any, "..."]:
        """The kernel, or the bias (O,), in the shape of its entry of a leaf of some shape: the inverse of `matrix`."""
        axes = (*self.input_axes, *self.output_axes)
        return matrix.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes).tolist())

    def _index(self, ndim: int) -> tuple[Any, ...]:
        entry = dict(self.entry)
        return tuple(entry.get(axis, slice(None)) for axis in range(ndim))
