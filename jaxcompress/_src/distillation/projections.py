"""Maps from the features of a narrow student to those of its teacher."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Fit: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""`(student rows, teacher rows) -> matrix`: (n, student features), (n, teacher features); masked rows are zeros."""


def least_squares(*, ridge: float = 1e-4) -> Fit:
    """The linear map W that brings the student's states closest to the teacher's, fitted anew on each batch.

    W = (SᵀS + λ I)⁻¹ SᵀT with λ = ridge · tr(SᵀS) / features of the student, from all real positions of the batch. It
    is a constant for the gradient, needs no parameters, and ignores what a linear map can undo: rotations and scales.
    With `micro_batches` it is fitted on each of them. Give a batch many more positions than the student has features,
    or the map fits anything.

    Args:
        ridge: share of the mean diagonal of SᵀS that is added to it, above 0.

    Returns:
        What `hidden_states` and `cosine_states` take as `projections`.

    Raises:
        ValueError: `ridge` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> student = jax.random.normal(jax.random.key(0), (50, 2))
        >>> mixing = jnp.array([[1.0, 0.5, 2.0], [0.5, 3.0, 1.0]])
        >>> least_squares(ridge=1e-6)(student, student @ mixing).round(2).tolist()
        [[1.0, 0.5, 2.0], [0.5, 3.0, 1.0]]
    """
    if not ridge > 0.0:
        raise ValueError(f"`ridge` must be positive, got {ridge}.")

    def fit(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(
            _ridge_regression(jax.lax.stop_gradient(student), jax.lax.stop_gradient(teacher), ridge)
        )

    return fit


def _ridge_regression(S: Float[Array, "n s"], T: Float[Array, "n t"], ridge: float) -> Float[Array, "s t"]:
    gram = S.T @ S
    # Without a real position all is zero, and so is the map.
    shift = jnp.maximum(ridge * jnp.trace(gram) / S.shape[1], jnp.finfo(gram.dtype).tiny)
    factor = jax.scipy.linalg.cho_factor(gram + shift * jnp.eye(S.shape[1], dtype=gram.dtype))
    return jax.scipy.linalg.cho_solve(factor, S.T @ T)
