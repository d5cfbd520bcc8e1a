"""Factors that move between the leaves of a fold, one for each feature and stack entry.

Shape letters: S stack entries, D features, in the order of the fold; R what else a leaf has.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxcompress._src.calibration.statistics import InputStatistics
from jaxcompress._src.trace.folds import Fold, FoldedLeaf
from jaxcompress._src.tree.checks import all_finite
from jaxcompress._src.tree.maps import leaves_by_path
from jaxcompress._src.types import Params
from jaxcompress._src.weights.unseen import fill_unseen


def sizes(leaf: Any, place: FoldedLeaf) -> tuple[int, int]:
    """S and D."""
    stack, width = (math.prod(leaf.shape[axis] for axis in axes) for axes in (place.stack_axes, place.axes))
    return stack, width


def features(leaf: Shaped[Array, "..."], place: FoldedLeaf) -> Shaped[Array, "S D R"]:
    """A leaf with its stack entries and features first.

    Example:
        >>> features(jnp.ones((2, 3, 5, 4)), FoldedLeaf("kernel", axes=(2, 1), stack_axes=(3,))).shape
        (4, 15, 2)
    """
    first = (*place.stack_axes, *place.axes)
    return jnp.moveaxis(leaf, first, tuple(range(len(first)))).reshape(*sizes(leaf, place), -1)


def moved(fold: Fold, leaves: Mapping[str, Any], factor: Float[Array, "S D"]) -> dict[str, jax.Array]:
    """The consumers times a factor and the producers divided by it, by path."""
    changed = {place.path: _scaled(leaves[place.path], place, factor) for place in fold.consumers}
    return changed | {place.path: _scaled(leaves[place.path], place, 1.0 / factor) for place in fold.producers}


def fold_statistic(fold: Fold, statistics: Params, name: str, leaves: Mapping[str, Any]) -> Float[Array, "S D"]:
    """A statistic of the features, from any of the consumers (all have the same inputs).

    Features that are 0 in every row get the mean of the others: a factor made of 0 would take their weights away.

    Args:
        fold: the fold.
        statistics: from `calibration.input_statistics`.
        name: of the statistic.
        leaves: by path.

    Raises:
        ValueError: no consumer has the statistic; it is of another width or stack, or holds NaN or Inf. Names the leaf.
    """
    given = leaves_by_path(statistics)
    for place in fold.consumers:
        entry = given.get(place.path)
        if isinstance(entry, InputStatistics) and getattr(entry, name) is not None:
            statistic = _checked(getattr(entry, name), leaves[place.path], place)
            return fill_unseen(statistic, statistic <= 0)
    raise ValueError(f"Leaf {fold.consumers[0].path!r} has no statistic {name!r}; gather it with `input_statistics`.")


def by_stack(factor: Float[Array, "S D"], leaf: Any, place: FoldedLeaf) -> Float[Array, "*stack D"]:
    """One axis for each scan, outermost first: none for a leaf without a stack."""
    return factor.reshape(*(leaf.shape[axis] for axis in place.stack_axes), factor.shape[1])


def as_matrix_inputs(factor: Float[Array, "S D"], leaf: Any, place: FoldedLeaf) -> Float[Array, "S D"]:
    """Entries and features in the order of the leaf's axes, which is that of statistics and matrices."""
    return _relaid(factor, leaf, (place.stack_axes, place.axes), _ascending(place)).reshape(factor.shape)


def _checked(statistic: Any, leaf: Any, place: FoldedLeaf) -> Any:
    stack, width = sizes(leaf, place)
    if statistic.shape[-1] != width or statistic.size != stack * width:
        entries = f" in each of {stack} stack entries" if place.stack_axes else ""
        raise ValueError(
            f"Leaf {place.path!r} has {width} inputs{entries}, its statistics have shape {statistic.shape}."
        )
    if not all_finite(statistic):
        raise ValueError(f"The statistics of leaf {place.path!r} hold NaN or Inf.")
    return _relaid(statistic, leaf, _ascending(place), (place.stack_axes, place.axes)).reshape(stack, width)


def _scaled(leaf: Any, place: FoldedLeaf, factor: Float[Array, "S D"]) -> jax.Array:
    """A leaf times one factor for each entry and feature."""
    axes = tuple(sorted((*place.stack_axes, *place.axes)))
    spread = _relaid(factor, leaf, (place.stack_axes, place.axes), (axes,))
    shape = [leaf.shape[axis] if axis in axes else 1 for axis in range(leaf.ndim)]
    return (leaf.astype(jnp.float32) * spread.reshape(shape)).astype(leaf.dtype)


def _relaid(
    values: Float[Array, "..."], leaf: Any, old: Sequence[tuple[int, ...]], new: Sequence[tuple[int, ...]]
) -> Float[Array, "..."]:
    """Values that run over the axes `old` of a leaf, over the same axes in the order `new`."""
    before, after = sum(old, ()), sum(new, ())
    return values.reshape([leaf.shape[axis] for axis in before]).transpose([before.index(axis) for axis in after])


def _ascending(place: FoldedLeaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(sorted(place.stack_axes)), tuple(sorted(place.axes))
