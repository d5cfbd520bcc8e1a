"""Scores that can be compared between layers."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.checks import check_finite, is_traced
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params

Norm = Literal["mean", "l2", "lamp"]


@on_auto_axes
def normalized_scores(scores: Params, *, by: Norm = "mean") -> Params:
    """Scores divided by the size of their own leaf's scores, for ranking in global scope.

    - "mean": s / mean(|s|);
    - "l2": s / ||s||, which also favours small leaves, by the root of their size;
    - "lamp": s_i² / Σ s_j² over the weights j of the leaf that are still there when i goes, in ascending order: the
      relative distortion of the layer. The best weight of a leaf scores 1, so that no layer is emptied before all
      others are down to one weight. Order within a leaf is kept.

    Args:
        scores: a partial tree; for "lamp" not negative.
        by: one of the three.

    Returns:
        A partial tree of float32 scores; a leaf of zeros stays zero.

    Raises:
        ValueError: an unknown `by`; NaN or Inf; with "lamp" a negative score. Names the leaf.

    Example:
        >>> normalized_scores({"w": jnp.array([1.0, 3.0])})
        {'w': Array([0.5, 1.5], dtype=float32)}
        >>> normalized_scores({"w": jnp.array([1.0, 2.0])}, by="lamp")["w"]
        Array([0.2, 1. ], dtype=float32)

    References:
        "lamp": Lee et al. 2021, "Layer-adaptive sparsity for the magnitude-based pruning", equation 3.
        "l2": Molchanov et al. 2017, "Pruning convolutional neural networks for resource
        efficient inference", section 2.2.
    """
    if by not in _NORMS:
        raise ValueError(f"`by` must be 'mean', 'l2' or 'lamp', got {by!r}.")

    def normalize(path: str, leaf: jax.Array) -> jax.Array:
        check_finite(path, leaf)
        if by == "lamp" and not is_traced(leaf) and bool((leaf < 0).any()):
            raise ValueError("`by='lamp'` needs scores that are not negative.")
        return _NORMS[by](leaf.astype(jnp.float32)) if leaf.size else leaf.astype(jnp.float32)

    return map_selected(normalize, scores)


def _by_mean(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    return scores / _not_zero(jnp.abs(scores).mean())


def _by_l2(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    # Scaled first: squares of small scores (Fisher) would vanish in float32.
    largest = _not_zero(jnp.abs(scores).max())
    return scores / largest / _not_zero(jnp.sqrt(jnp.square(scores / largest).sum()))


def _by_lamp(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    flat = scores.reshape(-1)
    squares = jnp.square(flat / _not_zero(flat.max()))
    # Among ties the highest index goes first, as in `masks_from_scores`.
    order = jnp.lexsort((-jnp.arange(flat.size), flat))
    ranked = squares[order]
    left = jax.lax.associative_scan(jnp.add, ranked, reverse=True)
    return jnp.zeros_like(flat).at[order].set(ranked / _not_zero(left)).reshape(scores.shape)


def _not_zero(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1.0)


_NORMS = {"mean": _by_mean, "l2": _by_l2, "lamp": _by_lamp}
