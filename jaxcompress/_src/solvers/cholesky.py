"""Cholesky factors of matrices that may be singular: damped, and damped more until it succeeds.

Shape letters: D rows and columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32, Int32

_TRIES = 16

# Up to this size a triangular solve is not much slower than two matmuls and the copies around them, and it compiles in
# half of the time.
_SMALL = 384


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
        >>> result = damped_cholesky(singular, 0.0)
        >>> bool(jnp.isfinite(result.factor).all()), result.retries.item() > 0
        (True, True)
    """
    matrix = matrix.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(matrix)) if matrix.shape[0] else jnp.float32(0.0)
    unit = jnp.where(mean > 0, mean, 1.0) * jnp.eye(matrix.shape[0], dtype=jnp.float32)

    def failed(state: DampedFactor) -> Bool[Array, ""]:
        # Factors of float32 numbers are far from the largest: their sum is finite if all of them are.
        return (state.retries < 0) | (~jnp.isfinite(state.factor.sum()) & (state.retries < _TRIES))

    def attempt(state: DampedFactor) -> DampedFactor:
        more = jnp.where(state.damping > 0, 10 * state.damping, 1e-6)
        share = jnp.where(state.retries < 0, state.damping, more)
        factor = jnp.linalg.cholesky(matrix + share * unit, symmetrize_input=False)
        return DampedFactor(factor, share, state.retries + 1)

    # The first attempt, too, is made in the loop: it is compiled once.
    start = DampedFactor(jnp.zeros_like(matrix), jnp.asarray(damping, jnp.float32), jnp.int32(-1))
    return jax.lax.while_loop(failed, attempt, start)


def inverse_factor(matrix: Float[Array, "D D"], damping: ArrayLike) -> DampedFactor:
    """The upper U with Uᵀ U = (A + λ mean(diag A) I)⁻¹: what optimal-brain updates read, column by column.

    With the rows and columns in reverse order, A = L Lᵀ becomes A = R Rᵀ with an upper R, and U = R⁻¹: one
    factorization and one triangular inverse, where factoring the inverse takes two and squares the condition twice.

    Args:
        matrix: as for `damped_cholesky`.
        damping: λ to begin with, as for `damped_cholesky`.

    Example:
        >>> import numpy as np
        >>> A = jnp.array([[2.0, 1.0], [1.0, 3.0]])
        >>> U = inverse_factor(A, 0.0).factor
        >>> np.allclose(U.T @ U, np.linalg.inv(A), atol=1e-6), U[1, 0].item()
        (True, 0.0)
    """
    lower = damped_cholesky(matrix[::-1, ::-1], damping)
    return lower._replace(factor=_lower_inverse(lower.factor)[::-1, ::-1])


def _lower_inverse(lower: Float32[Array, "D D"]) -> Float32[Array, "D D"]:
    """The inverse of a lower triangle, from blocks on its diagonal that double.

    Two thirds of the work of a solve for the unit matrix, all but a little of it in matmuls.
    """
    depth = lower.shape[0]
    if not depth:
        return lower
    count = 1
    while -(-depth // count) > _SMALL:
        count *= 2
    size = -(-depth // count)
    # Beyond the last row stands a unit matrix.
    whole = jnp.pad(lower, (0, count * size - depth)) + jnp.diag(jnp.arange(count * size) >= depth).astype(jnp.float32)
    blocks = _on_diagonal(whole, count)
    units = jnp.broadcast_to(jnp.eye(size, dtype=jnp.float32), blocks.shape)
    blocks = jax.lax.platform_dependent(blocks, units, cpu=_solved_in_turn, default=_solved)
    while count > 1:
        count //= 2
        first, last = blocks[::2], blocks[1::2]
        below = -_product(last, _product(_on_diagonal(whole, count)[:, size:, :size], first))
        left, right = jnp.concatenate([first, below], axis=1), jnp.pad(last, ((0, 0), (size, 0), (0, 0)))
        blocks, size = jnp.concatenate([left, right], axis=2), 2 * size
    return blocks[0, :depth, :depth]


def _on_diagonal(matrix: Float32[Array, "D D"], count: int) -> Float32[Array, "N B B"]:
    """The blocks along the diagonal."""
    size = matrix.shape[0] // count
    blocks = matrix.reshape(count, size, count, size).transpose(0, 2, 1, 3)
    return blocks.reshape(count * count, size, size)[:: count + 1]


def _solved(lower: Float32[Array, "N B B"], right: Float32[Array, "N B B"]) -> Float32[Array, "N B B"]:
    return jax.scipy.linalg.solve_triangular(lower, right, lower=True)


def _solved_in_turn(lower: Float32[Array, "N B B"], right: Float32[Array, "N B B"]) -> Float32[Array, "N B B"]:
    # On the CPU, batches are shared out among the very threads that the programs of several devices run on: all of them
    # then wait for one another.
    return jax.lax.map(lambda block: _solved(block[0][None], block[1][None])[0], (lower, right))


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
