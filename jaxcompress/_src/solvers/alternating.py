"""Choosing zeros and values together: alternating directions between least squares and the allowed masks.

Shape letters: D inputs, R outputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32

KeepMask = Callable[[Any], Any]
"""`scores (D, R) -> bool (D, R)`: the mask that keeps the highest scores that the pattern allows."""


def alternating_mask(
    weights: Float[Array, "D R"],
    hessian: Float[Array, "D D"],
    keep: KeepMask,
    *,
    iterations: int = 40,
    penalty: ArrayLike = 0.1,
    growth: ArrayLike = 1.1,
) -> Bool[Array, "D R"]:
    """A mask for which tr((W - W')ᵀ H (W - W')) can be made small by the best W' under it.

    In coordinates where H has a diagonal of ones, splits W' into a free copy A and a masked one M, with multipliers V
    and a penalty ρ that grows by `growth` at every iteration:

        A = (H + ρI)⁻¹ (H W - V + ρ M);  M = keep(|A + V/ρ|) (A + V/ρ);  V = V + ρ (A - M).

    Args:
        weights: W.
        hessian: H, positive definite.
        keep: the projection's mask; it gets |A + V/ρ|.
        iterations: each costs two matmuls (D, D) x (D, R) and one call of `keep`.
        penalty: the first ρ.
        growth: at least 1.

    Returns:
        The last mask.

    Example:
        >>> H = jnp.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> W = jnp.array([[1.0], [0.9], [1.1]])
        >>> alternating_mask(W, H, lambda scores: scores >= jnp.sort(scores, axis=0)[1:2]).ravel().tolist()
        [True, False, True]

    References:
        Meng et al. 2024, "ALPS: improved optimization for highly sparse one-shot pruning for large language models",
        equations 3 to 5. The penalty grows at a fixed rate here, not by the changes of the support.
    """
    scale = jnp.sqrt(jnp.diagonal(hessian)).astype(jnp.float32)[:, None]
    values, vectors = jnp.linalg.eigh(hessian.astype(jnp.float32) / scale / scale.T)
    dense = weights.astype(jnp.float32) * scale
    turned = _product(vectors.T, dense)
    wanted = values[:, None] * turned

    # In the eigenbasis of H: one product there and one back.
    def step(state: Any, _: None) -> Any:
        masked, multipliers, rho = state
        right = wanted + _product(vectors.T, rho * masked - multipliers)
        free = _product(vectors, right / (values + rho)[:, None])
        moved = free + multipliers / rho
        masked = jnp.where(keep(jnp.abs(moved)), moved, 0.0)
        return (masked, multipliers + rho * (free - masked), rho * growth), None

    start = (dense, jnp.zeros_like(dense), jnp.asarray(penalty, jnp.float32))
    masked = jax.lax.scan(step, start, length=iterations)[0][0]
    # Once more by rank: a kept weight may be exactly 0.
    return keep(jnp.abs(masked))


def _product(left: Float32[Array, "N K"], right: Float32[Array, "K M"]) -> Float32[Array, "N M"]:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
