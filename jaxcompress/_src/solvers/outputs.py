"""How close the outputs of changed weights are, and which weights come closest.

Shape letters: S stack entries, D inputs, R outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32

from jaxcompress._src.solvers.cholesky import damped_cholesky


@functools.partial(jax.jit, inline=True)
def unit_of(values: Float[Array, "..."]) -> Float32[Array, ""]:
    """A power of two near the largest magnitude: divided by it, squares neither overflow nor vanish, exactly.

    1 where all values are 0, or one is not finite; between 2^-100 and 2^100.

    Example:
        >>> unit_of(jnp.array([-5e-21, 3e-21])) == 2.0**-67
        Array(True, dtype=bool)
    """
    largest = jnp.abs(values.astype(jnp.float32)).max(initial=0)
    known = (largest > 0) & jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(known, largest, 1.0))
    return jnp.where(known, jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -100, 100)), 1.0)


def not_worse(
    weights: Float[Array, "D R"],
    plain: Float[Array, "D R"],
    targets: Float[Array, "D R"],
    hessian: Float[Array, "D D"],
) -> Float[Array, "D R"]:
    """Output by output, the better of two: `plain` where `found` has the larger error, or NaN.

    Where the inputs are linearly dependent, what makes up for errors may run away along directions that nothing holds,
    and is then cut off by the range of the codes.

    Example:
        >>> not_worse(jnp.array([[3.0, 1.0]]), jnp.array([[2.0, 2.0]]), jnp.ones((1, 2)), jnp.eye(1)).tolist()
        [[2.0, 1.0]]
    """
    unit = unit_of(targets)

    def loss(weights: Float[Array, "D R"]) -> Float32[Array, " R"]:
        gap = (weights - targets) / unit
        return jnp.sum(gap * jnp.matmul(hessian, gap, precision=jax.lax.Precision.HIGHEST), axis=0)

    return jnp.where((loss(weights) <= loss(plain))[None], weights, plain)


def output_error(
    gram: Float[Array, "S D D"], weights: Float[Array, "S D R"], changed: Float[Array, "S D R"]
) -> Float32[Array, ""]:
    """sqrt(tr(ΔᵀGΔ) / tr(WᵀGW)), Δ = W - W'; 0 where W has no output at all."""

    def energy(matrix: Float[Array, "S D R"]) -> Float32[Array, ""]:
        matrix = matrix.astype(jnp.float32) / unit
        outputs = jnp.einsum("sij,sjr->sir", gram, matrix, precision=jax.lax.Precision.HIGHEST)
        # Rounding can make a sum of squares that is nearly 0 negative.
        return jnp.maximum(jnp.sum(matrix * outputs), 0.0)

    unit, gram = unit_of(weights), gram / unit_of(gram)
    total = energy(weights)
    lost = energy(weights.astype(jnp.float32) - changed.astype(jnp.float32))
    return jnp.where(total > 0, jnp.sqrt(lost / jnp.where(total > 0, total, 1.0)), 0.0)


def output_errors(
    gram: Float[Array, "S D D"], weights: Float[Array, "S D R"], changed: Float[Array, "S D R"], *, groups: int = 1
) -> Float32[Array, " entries"]:
    """`output_error` of each stack entry, which has `groups` matrices one after another.

    Example:
        >>> w = jnp.array([[[3.0]], [[4.0]], [[1.0]], [[0.0]]])
        >>> output_errors(jnp.ones((4, 1, 1)), w, w.at[:2].set(0.0), groups=2).tolist()
        [1.0, 0.0]
    """
    entries = weights.shape[0] // groups
    parts = [part.reshape(entries, groups, *part.shape[1:]) for part in (gram, weights, changed)]
    return jax.vmap(output_error)(*parts)


def dense_targets(
    weights: Float32[Array, "D R"], hessian: Float32[Array, "D D"], cross: Float32[Array, "D D"], ridge: ArrayLike
) -> Float32[Array, "D R"]:
    """The weights whose outputs on the new inputs X come closest to the dense ones, Y W.

    They are W + (H + λ I)⁻¹ (XᵀY - H) W, with H = XᵀX and λ = ridge mean(diag H).

    Args:
        weights: W.
        hessian: XᵀX, on any scale.
        cross: YᵀX, on the same scale.
        ridge: how much the weights are held to W; grows tenfold until H + λ I can be factored.
    """
    factor = damped_cholesky(hessian, ridge).factor
    gap = jnp.matmul(cross.T - hessian, weights, precision=jax.lax.Precision.HIGHEST)
    return weights + jax.scipy.linalg.cho_solve((factor, True), gap)
