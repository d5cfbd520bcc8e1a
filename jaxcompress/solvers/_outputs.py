"""How close the outputs of changed weights are, and which weights come closest.

Shape letters: S stack entries, D inputs, R outputs.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32

from jaxcompress.solvers._cholesky import damped_cholesky


def output_error(
    gram: Float[Array, "S D D"], weights: Float[Array, "S D R"], changed: Float[Array, "S D R"]
) -> Float32[Array, ""]:
    """sqrt(tr(ΔᵀGΔ) / tr(WᵀGW)), Δ = W - W'; 0 where W has no output at all."""

    def energy(matrix: Float[Array, "S D R"]) -> Float32[Array, ""]:
        matrix = matrix.astype(jnp.float32)
        outputs = jnp.einsum("sij,sjr->sir", gram, matrix, precision=jax.lax.Precision.HIGHEST)
        # Rounding can make a sum of squares that is nearly 0 negative.
        return jnp.maximum(jnp.sum(matrix * outputs), 0.0)

    total = energy(weights)
    lost = energy(weights.astype(jnp.float32) - changed.astype(jnp.float32))
    return jnp.where(total > 0, jnp.sqrt(lost / jnp.where(total > 0, total, 1.0)), 0.0)


def dense_targets(
    weights: Float32[Array, "D R"], hessian: Float32[Array, "D D"], cross: Float32[Array, "D D"], damping: ArrayLike
) -> Float32[Array, "D R"]:
    """The weights whose outputs on the new inputs X come closest to the dense ones, Y W: W + H⁻¹ (XᵀY - XᵀX) W.

    Args:
        weights: W.
        hessian: XᵀX, on any scale.
        cross: YᵀX, on the same scale.
        damping: λ; with a large one the weights stay W.
    """
    factor = damped_cholesky(hessian, damping).factor
    gap = jnp.matmul(cross.T - hessian, weights, precision=jax.lax.Precision.HIGHEST)
    return weights + jax.scipy.linalg.cho_solve((factor, True), gap)
