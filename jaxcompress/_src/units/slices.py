"""Acting on the slices of units: multiply, mask, sum."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.maps import leaves_by_path, map_with_path
from jaxcompress._src.types import Params, plain
from jaxcompress._src.units.group import UnitGroup, UnitSlices, index_owners, leaf_shapes

Values = Mapping[str, Any]
"""Name of a group -> one number for each of its units: an array, or a list."""


@on_auto_axes
def multiply_units(params: Params, groups: Sequence[UnitGroup], values: Values) -> Params:
    """Multiplies the gated slices of every unit by its number; differentiable.

    Args:
        params: plain float leaves where a group has gated slices.
        groups: see `check_groups`; those without an entry in `values` are left alone.
        values: name -> float (count,).

    Returns:
        `params`, with those leaves multiplied, in their own dtype.

    Example:
        >>> group = UnitGroup(name="ffn", count=2, slices=(UnitSlices(path="down", axis=0, gated=True),))
        >>> multiply_units({"down": jnp.ones((2, 2))}, [group], {"ffn": jnp.array([0.5, 0.0])})["down"]
        Array([[0.5, 0.5],
               [0. , 0. ]], dtype=float32)
    """
    factors = _factors(params, groups, values, gated_only=True)

    def multiply(path: str, leaf: Any) -> Any:
        for factor in factors.get(path, ()):
            leaf = leaf * factor.astype(leaf.dtype)
        return leaf

    return map_with_path(multiply, params)


@on_auto_axes
def unit_masks(
    params: Params, groups: Sequence[UnitGroup], keep: Values, *, gated_only: bool = False
) -> dict[str, jax.Array]:
    """Which weights the kept units leave, for every leaf that a group has slices of.

    Args:
        params: gives the shapes.
        groups: see `check_groups`; those without an entry in `keep` keep everything.
        keep: name -> bool (count,); may be traced.
        gated_only: by the gated slices alone.

    Returns:
        path -> bool mask that broadcasts against the leaf, True = kept: a weight is kept when all its units are.

    Example:
        >>> group = UnitGroup(name="ffn", count=2, slices=(UnitSlices(path="down", axis=0),))
        >>> unit_masks({"down": jnp.ones((2, 3))}, [group], {"ffn": jnp.array([True, False])})["down"].shape
        (2, 1)
    """
    factors = _factors(params, groups, keep, gated_only=gated_only)
    return {path: functools.reduce(jnp.logical_and, (each > 0 for each in arrays)) for path, arrays in factors.items()}


@on_auto_axes
def sum_units(group: UnitGroup, tree: Params, *, gated_only: bool = False) -> jax.Array:
    """The sum of the entries that each unit owns, over all its slices, in float32.

    Args:
        group: its units.
        tree: of the structure of the parameters: weights, or scores of weights.
        gated_only: over the gated slices alone.

    Returns:
        float32 (count,).

    Example:
        >>> group = UnitGroup(name="ffn", count=2, slices=(UnitSlices(path="down", axis=0),))
        >>> sum_units(group, {"down": jnp.ones((2, 3))})
        Array([3., 3.], dtype=float32)
    """
    leaves = leaves_by_path(tree)
    total = jnp.zeros((group.count,), jnp.float32)
    for part in group.gated if gated_only else group.slices:
        leaf = leaves[part.path]
        entries = jnp.asarray(plain(leaf), jnp.float32)
        if part.unit is not None:
            total = total.at[part.unit].add(entries.sum())
            continue
        along = entries.sum(axis=tuple(axis for axis in range(entries.ndim) if axis != part.axis))
        # What nobody owns goes to one unit more, which is left out.
        owners = index_owners(part, group.count, len(along)) % (group.count + 1)
        total = total + jax.ops.segment_sum(along, owners, group.count + 1)[:-1]
    return total


def spread_units(part: UnitSlices, values: Any, length: int) -> Any:
    """One number for every index of the slices' axis: that of the unit that owns it, 1 where none does.

    Args:
        part: slices with an axis.
        values: (count,), a number for each unit; an array of NumPy or of JAX, and so is the result.
        length: of the axis.

    Example:
        >>> spread_units(UnitSlices(path="w", axis=0, offset=1), np.array([5.0, 7.0]), 4)
        array([1., 5., 7., 1.])
    """
    module = jnp if isinstance(values, jax.Array) else np
    owners = index_owners(part, len(values), length)
    return module.where(owners >= 0, values[owners], module.ones((), values.dtype))


def _factors(
    params: Params, groups: Sequence[UnitGroup], values: Values, *, gated_only: bool
) -> dict[str, list[jax.Array]]:
    """For each leaf, arrays that broadcast against it: its units' numbers."""
    shapes, factors = leaf_shapes(params), {}
    for group in groups:
        if group.name not in values:
            continue
        numbers = jnp.asarray(values[group.name])
        if numbers.shape != (group.count,):
            raise ValueError(f"Unit group {group.name!r} needs {group.count} values, got shape {numbers.shape}.")
        for part in group.gated if gated_only else group.slices:
            factors.setdefault(part.path, []).append(_factor(part, numbers, shapes[part.path]))
    return factors


def _factor(part: UnitSlices, numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if part.unit is not None:
        return jnp.broadcast_to(numbers[part.unit], (1,) * len(shape))
    assert part.axis is not None  # checked by UnitSlices
    along = spread_units(part, numbers, shape[part.axis])
    return along.reshape([-1 if axis == part.axis else 1 for axis in range(len(shape))])
