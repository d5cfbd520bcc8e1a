"""What is ranked together."""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxcompress._src.solvers.candidates import Candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of all leaves as one vector: a single entry, or those of one leaf after those of another.

    Attributes:
        leaves: the candidates.
        together: all leaves are one group.
    """

    leaves: tuple[Candidates, ...]
    together: bool

    @property
    def sizes(self) -> list[int]:
        """Of a group; one per leaf, or a single one."""
        sizes = [math.prod(leaf.shape[axis] for axis in leaf.axes) for leaf in self.leaves]
        return [sum(sizes)] if self.together else sizes

    def join(self, parts: list[Array]) -> Shaped[Array, " groups"]:
        """Counts in every leaf -> counts per group."""
        return functools.reduce(jnp.add, parts) if self.together else jnp.concatenate(parts)

    def repeat(self, numbers: Shaped[Array, " leaves"]) -> Shaped[Array, " groups"]:
        """One number per leaf, or a single one -> one per group."""
        if self.together:
            return numbers
        counts = [math.prod(leaf.group_shape) for leaf in self.leaves]
        return jnp.repeat(numbers, jnp.array(counts), total_repeat_length=sum(counts))

    def apart(self) -> "Groups":
        """The same leaves, none of them sharing a group with another."""
        leaves = tuple(dataclasses.replace(leaf, together=False) for leaf in self.leaves)
        return Groups(leaves=leaves, together=False)
