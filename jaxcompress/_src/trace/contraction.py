"""What the axes of a parameter are to a matmul that it takes part in, re-arranged."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxcompress._src.trace.axis import Axis, merged
from jaxcompress._src.trace.origin import Origin


class Roles(NamedTuple):
    """Axes of a parameter.

    Attributes:
        inputs: that are summed over.
        outputs: that stay.
        stack: of which an entry is chosen, or which both operands have.
    """

    inputs: frozenset[int]
    outputs: frozenset[int]
    stack: frozenset[int]


def roles(origin: Origin, summed: Sequence[int], batched: Sequence[int], free: Sequence[int]) -> Roles:
    """What each axis of a parameter is to a contraction.

    Args:
        origin: of the operand.
        summed: its axes that are summed over.
        batched: that both operands have.
        free: the others.

    Raises:
        ValueError: one matrix of weights for each stack entry is not what it multiplies by; says why.

    Example:
        >>> roles(Origin.of(0, (5, 3, 4)), [1], [0], [2]).stack
        frozenset({0})
    """
    uses: dict[int, set[str]] = {}
    for name, places in (("inputs", summed), ("outputs", free), ("stack", batched)):
        for place in places:
            for number in origin.axes[place].tables:
                uses.setdefault(number, set()).add(name)
    for number, names in sorted(uses.items()):
        if len(names) > 1:
            raise ValueError(f"a matmul uses one part of its axis {number} as {' and another as '.join(sorted(names))}")
        if number in origin.moving and "stack" not in names:
            raise ValueError(f"a loop goes over parts of its axis {number}, which a matmul has as {''.join(names)}")
    if not any("inputs" in names for names in uses.values()):
        raise ValueError("none of its axes is summed over")
    for factor in origin.factors:
        uneven = {place for place, axis in enumerate(origin.axes) if axis.size > 1} - factor.even
        if uneven & set(summed) and uneven & set(free) and not factor.is_mask:
            raise ValueError("it is multiplied entry by entry by another array before its matmul")
    inputs, outputs = (frozenset(k for k, names in uses.items() if name in names) for name in ("inputs", "outputs"))
    return Roles(inputs, outputs, frozenset(range(len(origin.shape))) - inputs - outputs)


def entries(origin: Origin, places: Sequence[int], axes: Sequence[int]) -> Int[np.ndarray, " n"]:
    """Where the entries along some axes of a value are in a parameter.

    Args:
        origin: of the value.
        places: axes of the value, flattened in this order.
        axes: of the parameter, flattened in this order; what a loop adds to the index along them is left out.

    Returns:
        For each entry of the value its number among those of the parameter; -1 where it is none of it.

    Example:
        >>> entries(Origin.of(0, (2, 3)), [1, 0], [0, 1]).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    flat = merged([origin.axes[place] for place in places]) if places else Axis(1)
    numbers = np.zeros(flat.size, np.int64)
    for k, axis in enumerate(axes):
        stride = math.prod(origin.shape[later] for later in axes[k + 1 :])
        numbers += stride * (flat.tables.get(axis, 0) + origin.fixed.get(axis, 0))
    return numbers if flat.present is None else np.where(flat.present, numbers, -1)


def share(origin: Origin) -> float:
    """How much of a value is of the parameter, from 0 to 1."""
    return math.prod((float(axis.mask.mean()) for axis in origin.axes if axis.present is not None), start=1.0)


def is_by_expert(eqn: Any) -> bool:
    """Whether a ragged matmul has one matrix, of its second operand, for each part of the rows of the first.

    Others contract along the ragged axis (as derivatives do), have batches, or see a part of the experts.
    """
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (left, _), (batch, _) = numbers.dot_dimension_numbers
    ragged, stack = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    whole = eqn.params.get("group_offset") is None and len(eqn.invars) == 3
    return whole and len(ragged) == len(stack) == 1 and ragged[0] not in left and not batch
