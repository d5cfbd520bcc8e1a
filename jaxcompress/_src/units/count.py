"""How many weights units own, and how many are left."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params
from jaxcompress._src.units.group import UnitGroup, UnitSlices, index_owners
from jaxcompress._src.units.slicing import spread_units


def expected_parameters(
    params: Params,
    groups: Sequence[UnitGroup],
    probabilities: Mapping[str, Any],
    *,
    weights: Mapping[str, float] | None = None,
) -> jax.Array:
    """Σ over leaves of Π over axes of the expected kept indices: the size of what is left; differentiable.

    Units of different groups are taken as independent, and so are the axes of a leaf; at probabilities 0 and 1 it is
    the number of weights that `remove_units` leaves (zeroed leaves without an axis to shrink count as removed).

    Args:
        params: gives the shapes.
        groups: see `check_groups`; those without an entry in `probabilities` keep everything.
        probabilities: name -> float (count,), that a unit is kept.
        weights: path -> factor of a leaf's count (FLOPs per weight, say); paths without an entry are not counted. By
            default every leaf counts once.

    Returns:
        float32 scalar.

    Example:
        >>> from jaxcompress._src.units.group import UnitSlices
        >>> group = UnitGroup(name="ffn", count=2, slices=(UnitSlices(path="down", axis=0),))
        >>> float(expected_parameters({"down": jnp.ones((2, 3))}, [group], {"ffn": [1.0, 0.5]}))
        4.5
    """
    owners: dict[str, list[tuple[UnitSlices, jax.Array]]] = {}
    for group in groups:
        if group.name in probabilities:
            own = jnp.asarray(probabilities[group.name], jnp.float32)
            for part in group.slices:
                owners.setdefault(part.path, []).append((part, own))
    total = jnp.zeros((), jnp.float32)
    for path, leaf in leaves_with_paths(params):
        factor = 1.0 if weights is None else weights.get(path, 0.0)
        if factor and hasattr(leaf, "shape"):
            total = total + factor * _expected(leaf.shape, owners.get(path, ()))
    return total


def unit_parameters(group: UnitGroup, params: Params) -> int:
    """How many weights one unit of the group owns, the slices of all leaves together.

    Example:
        >>> from jaxcompress._src.units.group import UnitSlices
        >>> group = UnitGroup(name="ffn", count=2, slices=(UnitSlices(path="down", axis=0),))
        >>> unit_parameters(group, {"down": jnp.ones((2, 3))})
        3
    """
    # Units that own whole leaves are alike: those of the first are counted.
    return int(unit_sizes(group, params)[0])


def unit_sizes(group: UnitGroup, params: Params, *, weights: Mapping[str, float] | None = None) -> np.ndarray:
    """How many weights each unit owns, the slices of all leaves together; units may differ.

    Args:
        group: its units.
        params: gives the shapes.
        weights: as in `expected_parameters`: path -> factor of a leaf's count; paths without an entry are not counted.

    Returns:
        float64 (count,).

    Example:
        >>> from jaxcompress._src.units.group import UnitSlices
        >>> slices = (UnitSlices(path="a", axis=0, unit=0), UnitSlices(path="b", axis=0, unit=1))
        >>> group = UnitGroup(name="layers", count=2, slices=slices)
        >>> unit_sizes(group, {"a": jnp.ones((2, 3)), "b": jnp.ones(5)}).tolist()
        [6.0, 5.0]
    """
    shapes = {path: leaf.shape for path, leaf in leaves_with_paths(params) if hasattr(leaf, "shape")}
    sizes = np.zeros(group.count)
    for part in group.slices:
        size = math.prod(shapes[part.path]) * (1.0 if weights is None else weights.get(part.path, 0.0))
        if part.unit is not None:
            sizes[part.unit] += size
        elif part.axis is not None:
            length = shapes[part.path][part.axis]
            owners = index_owners(part, group.count, length)
            sizes += size / max(length, 1) * np.bincount(owners[owners >= 0], minlength=group.count)
    return sizes


def _expected(shape: tuple[int, ...], owners: Sequence[tuple[UnitSlices, jax.Array]]) -> Any:
    size: Any = 1.0
    for axis, length in enumerate(shape):
        on_axis = [(part, own) for part, own in owners if part.axis == axis]
        kept: Any = float(length)
        if on_axis:
            along = jnp.ones((length,), jnp.float32)
            for part, own in on_axis:
                along = along * spread_units(part, own, length)
            kept = along.sum()
        size = size * kept
    for part, own in owners:
        if part.axis is None:
            size = size * own[part.unit]
    return size
