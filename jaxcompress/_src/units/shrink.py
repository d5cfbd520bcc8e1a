"""Taking units out: by zeros first, then for good."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.types import Params
from jaxcompress._src.units.group import UnitGroup, check_groups
from jaxcompress._src.units.slicing import remove_units, unit_masks


@on_auto_axes
def shrink(params: Params, groups: Sequence[UnitGroup], keep: Mapping[str, Any]) -> Params:
    """Takes the units that are not kept out of the arrays: the tree becomes physically smaller.

    The function stays that of the masked parameters (`mask_units`), up to rounding, wherever a removed unit contributes
    nothing once its gated slices are zero: heads, columns, neurons, sublayers. Hidden features are different, because
    a norm then averages over fewer features.

    Args:
        params: plain leaves where a group has slices.
        groups: the units; their slices may nest, but not cut one another.
        keep: name of a group -> bool (count,). Groups without an entry keep everything.

    Returns:
        A tree of the same structure with smaller arrays; kept weights are bit-identical. For a BERT,
        `models.resized(module, params)` is the module that runs it.

    Raises:
        ValueError: `keep` names no group, or has the wrong length; whatever `units.check_groups` finds; a leaf is
            compressed.

    Example:
        >>> from jaxcompress._src.units.group import UnitSlices
        >>> slices = (UnitSlices(path="up", axis=1), UnitSlices(path="down", axis=0, gated=True))
        >>> group = UnitGroup(name="columns", count=3, slices=slices)
        >>> params = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 5))}
        >>> small = shrink(params, [group], {"columns": [True, False, True]})
        >>> small["up"].shape, small["down"].shape
        ((2, 2), (2, 5))
    """
    check_keep(params, groups, keep)
    return remove_units(params, groups, keep)


@on_auto_axes
def mask_units(params: Params, groups: Sequence[UnitGroup], keep: Mapping[str, Any]) -> Params:
    """Zeros in the gated slices of the units that are not kept, at the same shapes: what `shrink` will compute.

    Args:
        params: plain leaves where a group has gated slices.
        groups: as for `shrink`.
        keep: as for `shrink`.

    Example:
        >>> from jaxcompress._src.units.group import UnitSlices
        >>> group = UnitGroup(name="columns", count=2, slices=(UnitSlices(path="down", axis=0, gated=True),))
        >>> mask_units({"down": jnp.ones((2, 2))}, [group], {"columns": [True, False]})["down"]
        Array([[1., 1.],
               [0., 0.]], dtype=float32)
    """
    check_keep(params, groups, keep)
    gated = [group_of_gated for group in groups if (group_of_gated := _gated(group)) is not None]
    masks = unit_masks(params, gated, keep)

    def mask(path: str, leaf: Any) -> Any:
        return leaf if path not in masks else jnp.where(masks[path], leaf, jnp.zeros((), leaf.dtype))

    return map_with_path(mask, params)


def check_keep(params: Params, groups: Sequence[UnitGroup], keep: Mapping[str, Any]) -> None:
    """Checks groups against parameters, and `keep` against groups."""
    check_entries(params, groups, keep)
    for name, kept in keep.items():
        # Numbers of units, say, would be taken for True.
        if not np.isin(np.asarray(kept), (0, 1)).all():
            raise ValueError(f"`keep[{name!r}]` must hold True and False, got {np.asarray(kept).tolist()}.")


def check_entries(params: Params, groups: Sequence[UnitGroup], keep: Mapping[str, Any]) -> None:
    """Checks groups against parameters, and that there is one entry for each unit."""
    check_groups(groups, params)
    counts = {group.name: group.count for group in groups}
    for name, kept in keep.items():
        if name not in counts:
            raise ValueError(f"`keep` names the unit group {name!r}; the groups are {', '.join(counts) or 'none'}.")
        if np.shape(kept) != (counts[name],):
            raise ValueError(f"`keep[{name!r}]` needs {counts[name]} values, got shape {np.shape(kept)}.")


def _gated(group: UnitGroup) -> UnitGroup | None:
    return UnitGroup(name=group.name, count=group.count, slices=group.gated) if group.gated else None
