"""What is ranked together."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, UInt32

Axes: TypeAlias = tuple[int, ...]

Keys: TypeAlias = Callable[[Array], UInt32[Array, "..."]]
"""`after -> keys` of one leaf, computed anew wherever it is called, not before `after` is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of all leaves as one vector: a single entry, or those of one leaf after those of another.

    Attributes:
        shapes: of the leaves.
        axes: of a group in each leaf.
        together: all leaves are one group.
    """

    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[Axes, ...]
    together: bool

    @property
    def group_shapes(self) -> list[tuple[int, ...]]:
        """Of the leaves, with 1 on the axes of a group."""
        pairs = zip(self.shapes, self.axes, strict=True)
        return [tuple(1 if i in axes else d for i, d in enumerate(shape)) for shape, axes in pairs]

    @property
    def sizes(self) -> list[int]:
        """Of a group; one per leaf, or a single one."""
        pairs = zip(self.shapes, self.axes, strict=True)
        sizes = [math.prod(shape[axis] for axis in axes) for shape, axes in pairs]
        return [sum(sizes)] if self.together else sizes

    @property
    def offsets(self) -> list[int]:
        """The index, in its group, of the first entry of each leaf."""
        if not self.together:
            return [0] * len(self.shapes)
        return list(itertools.accumulate(map(math.prod, self.shapes[:-1]), initial=0))

    def join(self, parts: list[Array]) -> Array:
        """Counts in every leaf -> counts per group."""
        flat = [part.reshape(-1) for part in parts]
        return functools.reduce(jnp.add, flat) if self.together else jnp.concatenate(flat)

    def repeat(self, numbers: Array) -> Array:
        """One number per leaf, or a single one -> one per group."""
        if self.together:
            return numbers
        counts = [math.prod(shape) for shape in self.group_shapes]
        return jnp.repeat(numbers, jnp.array(counts), total_repeat_length=sum(counts))

    def split(self, vector: Array) -> list[Array]:
        """One number per group -> per leaf, so that it broadcasts against the leaf."""
        if self.together:
            return [vector.reshape(shape) for shape in self.group_shapes]
        ends = itertools.accumulate(math.prod(shape) for shape in self.group_shapes[:-1])
        parts = jnp.split(vector, list(ends))
        return [part.reshape(shape) for part, shape in zip(parts, self.group_shapes, strict=True)]
