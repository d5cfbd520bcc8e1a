"""Acting on the slices of units: multiply, mask, sum, take out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.types import Params, is_compressed
from jaxcompress._src.units.group import UnitGroup, UnitSlices, index_owners

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
    factors = _factors(groups, values, gated_only=True)

    def multiply(path: str, leaf: Any) -> Any:
        for factor in factors.get(path, ()):
            leaf = leaf * factor(leaf.shape).astype(leaf.dtype)
        return leaf

    return map_with_path(multiply, params)


@on_auto_axes
def unit_masks(params: Params, groups: Sequence[UnitGroup], keep: Values) -> dict[str, jax.Array]:
    """Which weights the kept units leave, for every leaf that a group has slices of.

    Args:
        params: gives the shapes.
        groups: see `check_groups`; those without an entry in `keep` keep everything.
        keep: name -> bool (count,); may be traced.

    Returns:
        path -> bool mask that broadcasts against the leaf, True = kept: a weight is kept when all its units are.

    Example:
        >>> group = UnitGroup(name="ffn", count=2, slices=(UnitSlices(path="down", axis=0),))
        >>> unit_masks({"down": jnp.ones((2, 3))}, [group], {"ffn": jnp.array([True, False])})["down"].shape
        (2, 1)
    """
    shapes = {path: leaf.shape for path, leaf in leaves_with_paths(params) if hasattr(leaf, "shape")}
    masks = {}
    for path, factors in _factors(groups, keep, gated_only=False).items():
        masks[path] = math.prod(factor(shapes[path]).astype(jnp.float32) for factor in factors) > 0
    return masks


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
    leaves = dict(leaves_with_paths(tree))
    total = jnp.zeros((group.count,), jnp.float32)
    for part in group.gated if gated_only else group.slices:
        leaf = leaves[part.path]
        entries = jnp.asarray(leaf.materialize() if is_compressed(leaf) else leaf, jnp.float32)
        if part.unit is not None:
            total = total.at[part.unit].add(entries.sum())
            continue
        along = entries.sum(axis=tuple(axis for axis in range(entries.ndim) if axis != part.axis))
        # What nobody owns goes to one unit more, which is left out.
        owners = index_owners(part, group.count, len(along)) % (group.count + 1)
        total = total + jax.ops.segment_sum(along, owners, group.count + 1)[:-1]
    return total


@on_auto_axes
def remove_units(params: Params, groups: Sequence[UnitGroup], keep: Values) -> Params:
    """Takes the slices of units that are not kept out of the arrays: they become smaller.

    Where a leaf belongs to one unit only and has no axis to shrink, it becomes zero.

    Args:
        params: plain leaves where a group has slices; kept ones are copied bit by bit.
        groups: see `check_groups`.
        keep: name -> bool (count,), concrete; groups without an entry keep everything.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: an entry of `keep` has another length than its group; a leaf is compressed; names it.

    Example:
        >>> group = UnitGroup(name="ffn", count=2, slices=(UnitSlices(path="down", axis=0),))
        >>> remove_units({"down": jnp.ones((2, 3))}, [group], {"ffn": [True, False]})["down"].shape
        (1, 3)
    """
    by_path: dict[str, list[tuple[UnitSlices, np.ndarray]]] = {}
    for group in groups:
        if group.name in keep:
            kept = _concrete(group, keep[group.name])
            for part in group.slices:
                by_path.setdefault(part.path, []).append((part, kept))

    def remove(path: str, leaf: Any) -> Any:
        owners = by_path.get(path, ())
        if owners and is_compressed(leaf):
            raise ValueError(f"Leaf {path!r} is compressed: remove units before quantizing, or `materialize` first.")
        if any(part.axis is None and not kept[part.unit] for part, kept in owners):
            leaf = jnp.zeros_like(leaf)
        for axis in sorted({part.axis for part, _ in owners if part.axis is not None}):
            on_axis = [(part, kept) for part, kept in owners if part.axis == axis]
            stays = np.logical_and.reduce([spread_units(part, kept, leaf.shape[axis]) for part, kept in on_axis])
            if not stays.all():
                leaf = jnp.take(leaf, np.flatnonzero(stays), axis=axis)
        return leaf

    return map_with_path(remove, params)


def spread_units(part: UnitSlices, own: Any, length: int) -> jax.Array:
    """One number for every index of the slices' axis: that of the unit that owns it, 1 where none does.

    Args:
        part: slices with an axis.
        own: (count,), a number for each unit.
        length: of the axis.
    """
    own = jnp.asarray(own)
    owners = index_owners(part, len(own), length)
    return jnp.where(owners >= 0, own[owners], jnp.ones((), own.dtype))


Factor = Callable[[tuple[int, ...]], jax.Array]
"""`shape of a leaf -> array that broadcasts against it`."""


def _factors(groups: Sequence[UnitGroup], values: Values, *, gated_only: bool) -> dict[str, list[Factor]]:
    found: dict[str, list[Factor]] = {}
    for group in groups:
        if group.name in values:
            own = jnp.asarray(values[group.name])
            if own.shape != (group.count,):
                raise ValueError(f"Unit group {group.name!r} needs {group.count} values, got shape {own.shape}.")
            for part in group.gated if gated_only else group.slices:
                found.setdefault(part.path, []).append(_factor(part, own))
    return found


def _factor(part: UnitSlices, own: jax.Array) -> Factor:
    def factor(shape: tuple[int, ...]) -> jax.Array:
        if part.unit is not None:
            return jnp.broadcast_to(own[part.unit], (1,) * len(shape))
        assert part.axis is not None  # checked by UnitSlices
        along = spread_units(part, own, shape[part.axis])
        return along.reshape([-1 if axis == part.axis else 1 for axis in range(len(shape))])

    return factor


def _concrete(group: UnitGroup, keep: Any) -> np.ndarray:
    kept = np.asarray(keep, bool)
    if kept.shape != (group.count,):
        raise ValueError(f"Unit group {group.name!r} needs {group.count} values in `keep`, got shape {kept.shape}.")
    return kept
