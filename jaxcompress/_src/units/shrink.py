"""Taking units out: by zeros first, then for good."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.types import Params, is_compressed
from jaxcompress._src.units.group import UnitGroup, UnitSlices, check_groups
from jaxcompress._src.units.slices import spread_units, unit_masks


@on_auto_axes
def shrink(params: Params, groups: Sequence[UnitGroup], keep: Mapping[str, Any]) -> Params:
    """Takes the units that are not kept out of the arrays: the tree becomes physically smaller.

    The function stays that of the masked parameters (`mask_units`), up to rounding, wherever a removed unit contributes
    nothing once its gated slices are zero: heads, columns, neurons, sublayers. Hidden features are different, because
    a norm then averages over fewer features. A leaf that belongs to one unit and has no axis to shrink, such as the
    bias of an output that stays, becomes zero.

    Args:
        params: plain leaves where a group has slices.
        groups: the units; their slices may nest, but not cut one another.
        keep: name of a group -> bool (count,). Groups without an entry keep everything.

    Returns:
        A tree of the same structure with smaller arrays; kept weights are bit-identical.
        `models.resized(module, params)` is the module of a family that runs it.

    Raises:
        ValueError: `keep` names no group, or has the wrong length; whatever `check_groups` finds; a leaf is
            compressed.

    Example:
        >>> slices = (UnitSlices(path="up", axis=1), UnitSlices(path="down", axis=0, gated=True))
        >>> group = UnitGroup(name="columns", count=3, slices=slices)
        >>> params = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 5))}
        >>> small = shrink(params, [group], {"columns": [True, False, True]})
        >>> small["up"].shape, small["down"].shape
        ((2, 2), (2, 5))
    """
    check_keep(params, groups, keep)
    owners: dict[str, list[tuple[UnitSlices, np.ndarray]]] = {}
    for group in groups:
        for part in group.slices if group.name in keep else ():
            owners.setdefault(part.path, []).append((part, np.asarray(keep[group.name], bool)))

    def remove(path: str, leaf: Any) -> Any:
        parts = owners.get(path, ())
        if parts and is_compressed(leaf):
            raise ValueError(f"Leaf {path!r} is compressed: remove units before quantizing, or `materialize` first.")
        if any(part.axis is None and not mask[part.unit] for part, mask in parts):
            leaf = jnp.zeros_like(leaf)
        for axis in sorted({part.axis for part, _ in parts if part.axis is not None}):
            along = [spread_units(part, mask, leaf.shape[axis]) for part, mask in parts if part.axis == axis]
            stays = np.logical_and.reduce(along)
            if not stays.all():
                leaf = jnp.take(leaf, np.flatnonzero(stays), axis=axis)
        return leaf

    return map_with_path(remove, params)


@on_auto_axes
def mask_units(params: Params, groups: Sequence[UnitGroup], keep: Mapping[str, Any]) -> Params:
    """Zeros in the gated slices of the units that are not kept, at the same shapes: what `shrink` will compute.

    Args:
        params: plain leaves where a group has gated slices.
        groups: the units.
        keep: name of a group -> bool (count,). Groups without an entry keep everything.

    Example:
        >>> group = UnitGroup(name="columns", count=2, slices=(UnitSlices(path="down", axis=0, gated=True),))
        >>> mask_units({"down": jnp.ones((2, 2))}, [group], {"columns": [True, False]})["down"]
        Array([[1., 1.],
               [0., 0.]], dtype=float32)
    """
    check_keep(params, groups, keep)
    masks = unit_masks(params, groups, keep, gated_only=True)

    def mask(path: str, leaf: Any) -> Any:
        return leaf if path not in masks else jnp.where(masks[path], leaf, jnp.zeros((), leaf.dtype))

    return map_with_path(mask, params)


def check_keep(params: Params, groups: Sequence[UnitGroup], keep: Mapping[str, Any]) -> None:
    """Checks groups against parameters, and `keep` against groups."""
    check_groups(groups, params)
    counts = {group.name: group.count for group in groups}
    for name, mask in keep.items():
        if name not in counts:
            raise ValueError(f"`keep` names the unit group {name!r}; the groups are {', '.join(counts) or 'none'}.")
        if np.shape(mask) != (counts[name],):
            raise ValueError(f"`keep[{name!r}]` needs {counts[name]} values, got shape {np.shape(mask)}.")
        # Numbers of units, say, would be taken for True.
        if not np.isin(np.asarray(mask), (0, 1)).all():
            raise ValueError(f"`keep[{name!r}]` must hold True and False, got {np.asarray(mask).tolist()}.")
