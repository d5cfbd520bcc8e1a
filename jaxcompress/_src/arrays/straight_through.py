"""One value forward, another one's gradient backward."""

from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Float


@jax.custom_jvp
def straight_through(rounded: Float[ArrayLike, "..."], x: Float[ArrayLike, "..."]) -> Any:
    """`rounded`, with the gradient of `x`.

    Unlike `x + stop_gradient(rounded - x)` it is exactly `rounded`, also where `x` is not finite, and costs nothing.

    Args:
        rounded: the value.
        x: of the same shape and dtype; gets the gradient unchanged.

    Returns:
        `rounded`.

    Example:
        >>> import jax.numpy as jnp
        >>> float(jax.grad(lambda x: 3 * straight_through(jnp.round(x), x))(1.7))
        3.0

    References:
        Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013.
    """
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    # Not `primals[0]`, whose derivative the derivative of this rule would take.
    return straight_through(*primals), tangents[1]
