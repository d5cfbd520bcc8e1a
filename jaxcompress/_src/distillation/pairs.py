"""Which layers of student and teacher are compared: fixed pairs, or those that lie closest."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcompress._src.distillation.outputs import LossFn, Outputs, as_float32, mean, named, same_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClosestLayers:
    """Pairs of layers that each step chooses anew: those with the least distance, in ascending order.

    Every layer of the shorter list is paired with a layer of its own of the longer one, so that both ascend, and that
    the sum of the distances is the least of all such pairings (found exactly; the first one if several are). The choice
    is made on the whole batch, or on each micro-batch, and without a gradient.

    Args:
        student: places in the student's output, ascending.
        teacher: places in the teacher's output, ascending; all states must have one shape.

    Raises:
        ValueError: an empty list, or one that does not ascend; when called: a place that does not exist.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.distillation import hidden_states
        >>> student = {"states": [jnp.full((1, 2), 3.0), jnp.full((1, 2), 7.0)]}
        >>> teacher = {"states": [jnp.full((1, 2), value) for value in (0.0, 2.0, 4.5, 7.0)]}
        >>> pairs = ClosestLayers(student=(0, 1), teacher=(0, 1, 2, 3))
        >>> hidden_states(pairs=pairs, output="states")(student, teacher, {})  # 1 with 2, by 1; 7 with 7, by 0
        (Array(1., dtype=float32), Array(2., dtype=float32))

    References:
        Xia et al. 2022, "Structured pruning learns compact and accurate models" (CoFi), section 3.2, where each teacher
        layer of a fixed list takes the student layer that is closest, one by one instead of all together.
    """

    student: Sequence[int]
    teacher: Sequence[int]

    def __post_init__(self) -> None:
        """Checks the places."""
        for name in ("student", "teacher"):
            places = tuple(getattr(self, name))
            if not places or any(second <= first for first, second in itertools.pairwise(places)):
                raise ValueError(f"`{name}` must be ascending places of layers, at least one, got {places}.")
            object.__setattr__(self, name, places)


Pairs: TypeAlias = Sequence[tuple[int, int]] | ClosestLayers | None
"""(student, teacher) places in an output that is a sequence or has a leading layer axis; None: the output is one."""

Compare: TypeAlias = Callable[[jax.Array, jax.Array, Mapping[str, Any]], tuple[jax.Array, jax.Array]]
"""`(student, teacher, batch) -> (sum, count)` of one pair, in float32."""


def pair_loss(
    pairs: Pairs,
    output: str,
    compare: Compare,
    *,
    project: Callable[[list[Any], Outputs], list[Any]] = lambda states, _: states,
    equal_shapes: bool = True,
) -> LossFn:
    """A loss that compares pairs of layers, summed over them.

    Args:
        pairs: which.
        output: its name in the outputs of both models.
        compare: for one pair.
        project: `(states of the student, its outputs) -> states` that are compared.
        equal_shapes: whether the two of a pair must have the same shape.

    Raises:
        ValueError: no pairs; when called: a missing output, a layer that does not exist, shapes that differ.
    """
    if not isinstance(pairs, ClosestLayers) and pairs is not None and not pairs:
        raise ValueError("`pairs` needs at least one (student layer, teacher layer).")

    def compared(one: Any, other: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        s, t = same_shape(one, other, output) if equal_shapes else (as_float32(one), as_float32(other))
        return compare(s, t, batch)

    def loss(student: Outputs, teacher: Outputs, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        ours, theirs = _places(pairs)
        ours = project(_layers(student, output, ours, "student"), student)
        theirs = _layers(teacher, output, theirs, "teacher")
        if isinstance(pairs, ClosestLayers):
            ours, theirs = _closest(ours, theirs, lambda one, other: compared(one, other, batch))
        total, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
        for one, other in zip(ours, theirs, strict=True):
            part, number = compared(one, other, batch)
            total, count = total + part, count + number
        return total, count

    return loss


def ascending_assignment(costs: Float[Array, "m n"]) -> Int[Array, " m"]:
    """A column for each row, ascending, with the least sum of all; needs m <= n.

    Example:
        >>> ascending_assignment(jnp.array([[5.0, 1.0, 9.0], [0.0, 7.0, 2.0]]))
        Array([1, 2], dtype=int32)
    """
    rows, columns = costs.shape
    earlier = jnp.tri(columns, k=-1, dtype=bool)
    # best[j]: the least sum of the rows so far, of which the last one has column j.
    best, origins = costs[0], []
    for row in range(1, rows):
        before = jnp.where(earlier, best[None, :], jnp.inf)
        origins.append(before.argmin(axis=1))
        best = costs[row] + before.min(axis=1)
    assignment = [best.argmin()]
    for origin in reversed(origins):
        assignment.append(origin[assignment[-1]])
    return jnp.stack(assignment[::-1]).astype(jnp.int32)


def _places(pairs: Pairs) -> tuple[Sequence[int] | None, Sequence[int] | None]:
    if isinstance(pairs, ClosestLayers):
        return pairs.student, pairs.teacher
    return (None, None) if pairs is None else ([s for s, _ in pairs], [t for _, t in pairs])


def _layers(outputs: Outputs, output: str, places: Sequence[int] | None, owner: str) -> list[Any]:
    states = named(outputs, output, owner)
    if places is None:
        return [states]
    missing = [place for place in places if not -len(states) <= place < len(states)]
    if missing:
        # An index beyond the end of an array would silently give its last layer.
        raise ValueError(f"The {owner}'s {output!r} has {len(states)} entries; there is none at {missing}.")
    return [states[place] for place in places]


def _closest(
    ours: list[Any], theirs: list[Any], compared: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
) -> tuple[list[Any], list[Any]]:
    costs = jnp.stack([jnp.stack([mean(*compared(one, other)) for other in theirs]) for one in ours])
    costs = jax.lax.stop_gradient(costs)
    if len(ours) <= len(theirs):
        stacked = jnp.stack(theirs)
        return ours, [stacked[place] for place in ascending_assignment(costs)]
    stacked = jnp.stack(ours)
    return [stacked[place] for place in ascending_assignment(costs.T)], theirs
