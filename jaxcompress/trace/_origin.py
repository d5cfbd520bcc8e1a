"""Which axes of a parameter the axes of a re-arranged value are."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Origin:
    """A value that is a re-arrangement of one parameter.

    Attributes:
        leaf: number of the parameter in the flattened tree.
        axes: for each axis of the value, the axes of the parameter that it runs over (none for new axes, several for
            merged ones).
    """

    leaf: int
    axes: tuple[tuple[int, ...], ...]

    def over(self, axes: Sequence[int]) -> frozenset[int]:
        """The parameter's axes behind some axes of the value."""
        return frozenset(original for axis in axes for original in self.axes[axis])

    def without(self, axis: int) -> "Origin":
        """The value with one axis taken away (sliced, scanned over)."""
        return Origin(self.leaf, self.axes[:axis] + self.axes[axis + 1 :])


def rearrange(eqn: Any, origin: Origin) -> Origin | None:
    """The origin of the output of an equation that re-arranges its first input; None if it does something else."""
    rule = _RULES.get(eqn.primitive.name)
    return None if rule is None else rule(eqn, origin)


def _same(eqn: Any, origin: Origin) -> Origin:
    return origin


def _transpose(eqn: Any, origin: Origin) -> Origin:
    return Origin(origin.leaf, tuple(origin.axes[axis] for axis in eqn.params["permutation"]))


def _squeeze(eqn: Any, origin: Origin) -> Origin:
    dropped = eqn.params["dimensions"]
    return Origin(origin.leaf, tuple(axes for i, axes in enumerate(origin.axes) if i not in dropped))


def _broadcast(eqn: Any, origin: Origin) -> Origin:
    places = dict(zip(eqn.params["broadcast_dimensions"], origin.axes, strict=True))
    return Origin(origin.leaf, tuple(places.get(axis, ()) for axis in range(len(eqn.params["shape"]))))


def _reshape(eqn: Any, origin: Origin) -> Origin | None:
    if eqn.params["dimensions"] is not None:
        return None
    axes: list[tuple[int, ...]] = []
    for old, new in reshape_runs(eqn.invars[0].aval.shape, eqn.params["new_sizes"]):
        merged = tuple(sorted(origin.over(old)))
        # An axis that is split stands behind each of its pieces.
        axes += [merged if eqn.params["new_sizes"][axis] != 1 or len(new) == 1 else () for axis in new]
    return Origin(origin.leaf, tuple(axes))


_RULES: dict[str, Callable[[Any, Origin], Origin | None]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _same,
    "dynamic_slice": _same,
    "convert_element_type": _same,
    "reduce_precision": _same,
    "copy": _same,
    "copy_p": _same,
    "stop_gradient": _same,
    "sharding_constraint": _same,
    "reshard": _same,
}


def reshape_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cuts a reshape into the shortest runs of axes with equal products.

    Args:
        old: shape before.
        new: shape after, of the same size.

    Returns:
        Pairs (axes of `old`, axes of `new`); one side is empty for axes of size 1 that come or go.

    Example:
        >>> reshape_runs((2, 6, 5), (12, 1, 5))
        [([0, 1], [0]), ([], [1]), ([2], [2])]
    """
    if math.prod(old) == 0:
        return [(list(range(len(old))), list(range(len(new))))]
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [i][: len(old) - i], [j][: len(new) - j]
        a = old[i] if left else 1
        b = new[j] if right else 1
        if a != b and 1 in (a, b):
            left, right = (left, []) if a == 1 and left else ([], right)
            a = b = 1
        while a != b:
            if a < b:
                left.append(left[-1] + 1)
                a *= old[left[-1]]
            else:
                right.append(right[-1] + 1)
                b *= new[right[-1]]
        runs.append((left, right))
        i, j = i + len(left), j + len(right)
    return runs
