"""Cholesky factors of matrices that may be singular: damped, and damped more until it succeeds.

Shape letters: D rows and columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32, Int32

_TRIES = 16


class DampedFactor(NamedTuple):
    """A triangular factor and what it took.

    Attributes:
        factor: (D, D).
        damping: scalar, the share of the mean diagonal that was added.
        retries: scalar int32, how often the damping had to grow.
    """

    factor: Float32[Array, "D D"]
    damping: Float32[Array, ""]
    retries: Int32[Array, ""]


def damped_cholesky(matrix: Float[Array, "D D"], damping: ArrayLike) -> DampedFactor:
    """The lower L with L Lᵀ = A + λ mean(diag A) I, the first λ of `damping`, 10 `damping`, ... for which it exists.

    Args:
        matrix: symmetric, at least positive semidefinite up to rounding. Zeros everywhere are treated as if the mean
            of the diagonal were 1.
        damping: at least 0; from 0 the first step goes to 1e-6.

    Returns:
        The factor and the λ used. If none of 16 sufficed (NaN or Inf in the matrix), the factor is not finite.

    Example:
        >>> singular = jnp.array([[1.0, 1.0], [1.0, 1.0]])
        >>> found = damped_cholesky(singular, 0.0)
        >>> bool(jnp.isfinite(found.factor).all()), found.retries.item() > 0
        (True, True)
    """
    matrix = matrix.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(matrix)) if matrix.shape[0] else jnp.float32(0.0)
    unit = jnp.where(mean > 0, mean, 1.0) * jnp.eye(matrix.shape[0], dtype=jnp.float32)

    def attempt(share: Float32[Array, ""]) -> Float32[Array, "D D"]:
        return jnp.linalg.cholesky(matrix + share * unit, symmetrize_input=False)

    def failed(state: DampedFactor) -> Bool[Array, ""]:
        return ~jnp.isfinite(state.factor).all() & (state.retries < _TRIES)

    def retry(state: DampedFactor) -> DampedFactor:
        share = jnp.where(state.damping > 0, 10 * state.damping, 1e-6)
        return DampedFactor(attempt(share), share, state.retries + 1)

    start = jnp.asarray(damping, jnp.float32)
    return jax.lax.while_loop(failed, retry, DampedFactor(attempt(start), start, jnp.zeros((), jnp.int32)))


def inverse_factor(matrix: Float[Array, "D D"], damping: ArrayLike) -> DampedFactor:
    """The upper U with Uᵀ U = (A + λ mean(diag A) I)⁻¹: what optimal-brain updates read, column by column.

    With the rows and columns in reverse order, A = L Lᵀ becomes A = R Rᵀ with an upper R, and U = R⁻¹: one
    factorization and one triangular solve, where factoring the inverse takes two and squares the condition twice.

    Args:
        matrix: as for `damped_cholesky`.
        damping: likewise.

    Example:
        >>> import numpy as np
        >>> A = jnp.array([[2.0, 1.0], [1.0, 3.0]])
        >>> U = inverse_factor(A, 0.0).factor
        >>> np.allclose(U.T @ U, np.linalg.inv(A), atol=1e-6), U[1, 0].item()
        (True, 0.0)
    """
    lower = damped_cholesky(matrix[::-1, ::-1], damping)
    eye = jnp.eye(matrix.shape[0], dtype=jnp.float32)
    inverse = jax.scipy.linalg.solve_triangular(lower.factor, eye, lower=True)
    return lower._replace(factor=inverse[::-1, ::-1])
