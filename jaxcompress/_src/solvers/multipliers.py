"""Multipliers that ascend where everything else descends."""

import jax
from jaxtyping import Array, Float


def augmented_lagrangian(
    distance: Float[Array, ""], linear: Float[Array, ""], quadratic: Float[Array, ""]
) -> Float[Array, ""]:
    """λ1 d + λ2 d², whose gradient in λ1 and λ2 is reversed: minimising it, they grow until d = 0.

    Example:
        >>> import jax.numpy as jnp
        >>> gradient = jax.grad(augmented_lagrangian, argnums=(0, 1, 2))(*jnp.float32([0.5, 1.0, 2.0]))
        >>> [float(part) for part in gradient]
        [3.0, -0.5, -0.25]
    """
    return ascending(linear) * distance + ascending(quadratic) * distance**2


def ascending(multiplier: Float[Array, ""]) -> Float[Array, ""]:
    """The same number, with the opposite gradient: minimising makes it ascend."""
    return 2 * jax.lax.stop_gradient(multiplier) - multiplier
