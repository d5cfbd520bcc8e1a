"""One leaf that is being ranked, and the fused reads of it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped, UInt32

from jaxcompress._src.solvers.counting import count_true
from jaxcompress._src.solvers.order import order_keys

Axes: TypeAlias = tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "start"],
    meta_fields=["score", "shape", "axes", "together"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Candidates:
    """A leaf of `keep_largest`, and where its groups lie in a vector over all groups.

    XLA compiles equal kernels once. So everything that differs between leaves of one shape is data: `start` is an array
    and not a number. The functions below are jitted for the same end: one trace for all leaves of one shape.

    Attributes:
        values: what `score` maps to scores.
        start: int32, of the first group of this leaf.
        score: `values -> scores`.
        shape: of the scores; (1,) for a scalar.
        axes: of one group.
        together: whether all leaves form one group: the vector has one entry.
    """

    values: Any
    start: Any
    score: Callable[[Any], Array]
    shape: tuple[int, ...]
    axes: Axes
    together: bool

    @property
    def group_shape(self) -> tuple[int, ...]:
        """The shape, with 1 on the axes of a group."""
        return tuple(1 if axis in self.axes else size for axis, size in enumerate(self.shape))

    def keys(self, after: Shaped[Array, " groups"]) -> UInt32[Array, "..."]:
        """The keys, computed anew wherever this is called, once `after` is known; no entry of `after` is -1."""
        # That `after` is never -1 is not known to XLA, so it cannot compute all keys before the loop that needs them,
        # which would take 4 bytes per entry. (It removes optimization barriers before it looks for such chances.)
        never = after[0].astype(jnp.int32) == -1
        values = jax.tree.map(lambda part: jnp.where(never, jnp.zeros((), part.dtype), part), self.values)
        return order_keys(self.score(values)).reshape(self.shape)

    def by_group(self, vector: Shaped[Array, " groups"]) -> Shaped[Array, "..."]:
        """The entries for this leaf, so that they broadcast against it."""
        if self.together:
            return vector.reshape(self.group_shape)
        part = jax.lax.dynamic_slice(vector, (self.start,), (math.prod(self.group_shape),))
        return part.reshape(self.group_shape)


@jax.jit
def count_below(leaf: Candidates, limits: UInt32[Array, " groups"]) -> Int32[Array, " own"]:
    """Keys below the limit, in each group of the leaf."""
    return count_true(leaf.keys(limits) < leaf.by_group(limits), leaf.axes).reshape(-1)


@jax.jit
def count_ties(
    leaf: Candidates, limits: UInt32[Array, " groups"], ends: Int32[Array, " groups"]
) -> Int32[Array, " own"]:
    """Keys at the limit that lie before the end, in each group of the leaf."""
    ties = leaf.keys(ends) == leaf.by_group(limits)
    return count_true(ties & _lies_before(leaf, leaf.by_group(ends)), leaf.axes).reshape(-1)


@jax.jit
def at_least(leaf: Candidates, limits: UInt32[Array, " groups"]) -> Bool[Array, "..."]:
    """Keys not below the limit."""
    return leaf.keys(limits) >= leaf.by_group(limits)


@jax.jit
def above(leaf: Candidates, limits: UInt32[Array, " groups"], ends: Int32[Array, " groups"]) -> Bool[Array, "..."]:
    """Keys above the limit, and those at the limit that lie before the end."""
    keys, limit = leaf.keys(limits), leaf.by_group(limits)
    return (keys > limit) | ((keys == limit) & _lies_before(leaf, leaf.by_group(ends)))


def _lies_before(leaf: Candidates, end: Int32[Array, "..."]) -> Bool[Array, "..."]:
    """Whether the flat index of an entry in its group is below `end`.

    Compares axis by axis: flat indices of one shape would be computed once and kept, 4 bytes per entry.
    """
    before = jnp.zeros((1,) * len(leaf.shape), bool)
    for axis in reversed(leaf.axes):
        place = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis)
        # `lax` because the signs of `%` and `//` double the number of operations to compile.
        here = end if axis == leaf.axes[0] else jax.lax.rem(end, jnp.full_like(end, leaf.shape[axis]))
        before = (place < here) | ((place == here) & before)
        end = jax.lax.div(end, jnp.full_like(end, leaf.shape[axis]))
    return before
