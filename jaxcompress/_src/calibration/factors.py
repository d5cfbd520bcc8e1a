"""What a model multiplies a leaf by before its matmul: as seen from its inputs, and from its outputs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from jaxcompress._src.trace.origin import Factor, Origin


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """What a leaf is multiplied by, as far as its inputs differ in it.

    Attributes:
        arrays: it, in the shape of the leaf's operand, for each stream.
        taken: for each axis of the leaf's operand, the entry to take, or where the axis is in the other operand.
    """

    arrays: tuple[Any, ...]
    taken: tuple[tuple[str, int], ...]

    def beside(self, array: Shaped[Array, "..."], rank: int) -> Shaped[Array, "..."]:
        """One of the arrays, to be multiplied by the other operand, of `rank` axes."""
        scales = array[tuple(number if what == "entry" else slice(None) for what, number in self.taken)]
        places = [number for what, number in self.taken if what == "axis"]
        order = sorted(range(len(places)), key=lambda k: places[k])
        scales = scales.transpose(order)
        return jnp.expand_dims(scales, tuple(axis for axis in range(rank) if axis not in places))


@dataclasses.dataclass(frozen=True, eq=False)
class Multiples:
    """What the outputs of a leaf are multiplied by, and how often they are made.

    Attributes:
        arrays: for each factor, for each stream: it, in the shape of the leaf's operand.
        order: its axes: those of which one entry is taken, stack axes, output axes.
        taken: the entries to take.
        stacked: number of stack axes.
        there: which of the outputs there are, over the output axes.
        outputs: how many different ones.
        groups: of a convolution, into which the outputs fall one after another.
    """

    arrays: tuple[tuple[Any, ...], ...]
    order: tuple[int, ...]
    taken: tuple[int, ...]
    stacked: int
    there: Bool[np.ndarray, "..."]
    outputs: int
    groups: int

    def mean_square(self, arrays: Sequence[Any], stream: int) -> Any:
        """Sum of the squares over all copies of an output, on average; one for all, or for each stack entry."""
        if not arrays:
            return float(self.there.sum()) / max(self.outputs, 1)
        product = math.prod(jnp.asarray(factor[stream % len(factor)], jnp.float32) for factor in arrays)
        squares = jnp.square(product).transpose(self.order)[self.taken]
        squares = jnp.where(self.there, squares, 0.0)
        sizes = *squares.shape[: self.stacked], self.groups, -1
        return squares.reshape(sizes).sum(axis=-1).reshape(-1) * self.groups / max(self.outputs, 1)


def scales_of(origin: Origin, free: Sequence[int], places: Mapping[int, int]) -> tuple[Scale, ...]:
    """What differs between outputs stays out: each output has its own multiple of the same rows; see `Multiples`."""
    taken = tuple(
        ("axis", places[k]) if k in places else ("entry", int(np.argmax(axis.mask)))
        for k, axis in enumerate(origin.axes)
    )
    return tuple(Scale(factor.arrays, taken) for factor in origin.factors if not _differs(origin, factor, free))


def _differs(origin: Origin, factor: Factor, places: Sequence[int]) -> bool:
    return any(origin.axes[place].size > 1 and place not in factor.even for place in places)


def multiples_of(
    origin: Origin, parts: tuple[Sequence[int], Sequence[int], Sequence[int]], outputs: int, groups: int
) -> Multiples | None:
    """What the outputs are multiplied by, where that is not 1; `parts` are the summed, stack and output axes."""
    summed, stacked, free = parts
    factors = [f for f in origin.factors if _differs(origin, f, free) and not _differs(origin, f, summed)]
    rest = [k for k in range(len(origin.axes)) if k not in free and k not in stacked]
    if any(_differs(origin, factor, [k for k in rest if k not in summed]) for factor in factors):
        raise ValueError("its outputs are multiplied by other numbers in each entry of a batch")
    there = np.ones((), bool)
    for place in free:
        there = np.logical_and.outer(there, origin.axes[place].mask)
    if not factors and there.sum() == outputs:
        return None
    # They are the same for all inputs, but for those that are padding.
    taken = tuple(int(np.argmax(origin.axes[place].mask)) for place in rest)
    return Multiples(
        arrays=tuple(factor.arrays for factor in factors),
        order=(*rest, *stacked, *free),
        taken=taken,
        stacked=len(stacked),
        there=there,
        outputs=outputs,
        groups=groups,
    )
