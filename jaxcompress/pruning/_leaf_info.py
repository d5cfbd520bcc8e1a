"""What a one-shot method did to a leaf."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafInfo:
    """What happened to one leaf. Errors are relative: ||X W - X W'|| / ||X W|| over the calibration rows.

    Attributes:
        sparsity: share of zeros.
        error_before: with the same zeros and all other weights as they were; None without "gram" statistics.
        error: with the new weights; likewise.
        damping: share of the mean diagonal that was added to X'X; None where nothing is inverted.
        retries: how often the damping had to grow; above 0 the matrix was singular beyond the damping asked for.
        dead_inputs: number of inputs that are 0 in every row (all their weights may go).
    """

    sparsity: float
    error_before: float | None = None
    error: float | None = None
    damping: float | None = None
    retries: int = 0
    dead_inputs: int = 0


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
