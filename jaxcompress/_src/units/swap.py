"""Swapping kept units for removed ones of the same group, by the whole Fisher matrix."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcompress._src.meshes import on_auto_axes


@on_auto_axes
def swap_units(keep: Mapping[str, Any], gradients: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Makes (1 - m)^T F (1 - m) smaller in every group, at the same number of kept units m.

    F = G^T G / N is the group's block of the Fisher information of the gates. A diagonal score does not see that two
    removed units did the same work. Starting from `keep`, the best swap of a kept and a removed unit is made as long
    as one helps.

    Args:
        keep: name -> bool (count,), from `select_units`.
        gradients: name -> G, (examples, count), from `gate_gradients`. Groups without an entry stay.

    Returns:
        The new `keep`.

    Raises:
        ValueError: gradients of the wrong shape, or with NaN or Inf; names the group.

    Example:
        >>> import jax.numpy as jnp
        >>> gradients = {"g": jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.9], [0.0, 0.0, 0.4]])}
        >>> swap_units({"g": [True, False, False]}, gradients)
        {'g': array([False,  True, False])}

    References:
        Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", section 4.2.
    """
    matrices = fisher_matrix(gradients)
    return {
        name: _swapped(name, np.array(mask, bool), matrices[name]) if name in matrices else np.array(mask, bool)
        for name, mask in keep.items()
    }


@on_auto_axes
def fisher_matrix(gradients: Mapping[str, Any]) -> dict[str, Any]:
    """G^T G / N of each group: its block of the Fisher information.

    Example:
        >>> fisher_matrix({"rows": np.array([[1.0, -2.0], [3.0, -4.0]])})["rows"].tolist()
        [[5.0, -7.0], [-7.0, 10.0]]
    """
    return {name: g.T @ g / len(g) for name, g in gradients.items()}


def _swapped(name: str, mask: np.ndarray, matrix: Any) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (len(mask), len(mask)):
        raise ValueError(f"The gradients of {name!r} are of {len(matrix)} units; `keep` has {len(mask)}.")
    # With NaN no change ever compares as too small to make, and the search would not end.
    if not np.isfinite(matrix).all():
        raise ValueError(f"The gradients of {name!r} hold NaN or Inf.")
    diagonal = np.diag(matrix)
    tolerance = 1e-12 * max(float(np.abs(diagonal).max(initial=0.0)), 1e-300)
    pull = matrix @ ~mask
    while True:
        inside, outside = np.flatnonzero(mask), np.flatnonzero(~mask)
        if not len(inside) or not len(outside):
            return mask
        # Bringing o back and removing i instead changes the sum by this much.
        back, away = diagonal[outside] - 2 * pull[outside], diagonal[inside] + 2 * pull[inside]
        change = back[:, None] + away[None, :] - 2 * matrix[np.ix_(outside, inside)]
        place = np.unravel_index(np.argmin(change), change.shape)
        if change[place] >= -tolerance:
            return mask
        returning, leaving = outside[place[0]], inside[place[1]]
        mask[returning], mask[leaving] = True, False
        pull += matrix[:, leaving] - matrix[:, returning]
