"""Least squares with given zeros: the best values of the kept weights.

Shape letters: D inputs, R outputs, K the largest number of kept inputs of one output.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32


@functools.partial(jax.jit, static_argnames=("most", "batch_size"))
def masked_least_squares(
    weights: Float[Array, "D R"],
    hessian: Float[Array, "D D"],
    mask: Bool[Array, "D R"],
    *,
    most: int,
    batch_size: int = 32,
) -> Float32[Array, "D R"]:
    """Argmin over W' of tr((W - W')ᵀ H (W - W')), with W' = 0 where the mask is not set.

    Every output r has a system of its own, over its kept inputs K_r: H[K_r, K_r] w'_r = (H w_r)[K_r]. It is gathered
    and factored exactly; smaller ones are filled up with the identity.

    Args:
        weights: W.
        hessian: H, positive definite.
        mask: True = kept.
        most: K; at least the largest number of kept inputs of one output.
        batch_size: outputs at once; each takes K² floats.

    Returns:
        W'. NaN for an output whose system is not positive definite.

    Example:
        >>> H = jnp.array([[1.0, 0.5], [0.5, 1.0]])
        >>> masked_least_squares(jnp.ones((2, 1)), H, jnp.array([[True], [False]]), most=1).tolist()
        [[1.5], [0.0]]

    References:
        Hassibi and Stork 1992, "Second order derivatives for network pruning: optimal brain surgeon": the update for
        many weights at once.
    """
    depth = weights.shape[0]
    hessian = hessian.astype(jnp.float32)
    wanted = jnp.matmul(hessian, weights.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

    def solve(parts: tuple[Bool[Array, " D"], Float32[Array, " D"]]) -> Float32[Array, " D"]:
        mask, target = parts
        places = jnp.nonzero(mask, size=most, fill_value=depth)[0]
        real = places < depth
        return jnp.zeros(depth, jnp.float32).at[places].set(_solve(hessian, places, real, target), mode="drop")

    if not most:
        return jnp.zeros_like(wanted)
    return jax.lax.map(solve, (mask.T, wanted.T), batch_size=batch_size).T


def _solve(
    hessian: Float32[Array, "D D"], places: Int32[Array, " K"], real: Bool[Array, " K"], target: Float32[Array, " D"]
) -> Float32[Array, " K"]:
    system = hessian.at[places[:, None], places[None]].get(mode="clip")
    system = jnp.where(real[:, None] & real[None], system, jnp.eye(len(places), dtype=jnp.float32))
    right = jnp.where(real, target.at[places].get(mode="clip"), 0.0)
    factor = jnp.linalg.cholesky(system, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((factor, True), right)
