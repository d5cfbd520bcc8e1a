"""What one-shot methods minimise: the weights to come close to, and the matrix that measures how close.

Shape letters: D inputs, R outputs.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float32, Int32

from jaxcompress.solvers._cholesky import damped_cholesky
from jaxcompress.solvers._outputs import dense_targets


class Problem(NamedTuple):
    """Minimise tr((W - W')ᵀ H (W - W')) over allowed W'.

    Attributes:
        targets: W, (D, R); zeros for dead inputs.
        hessian: H, (D, D): XᵀX / N times 2, with a diagonal of their own for dead inputs; not damped.
        dead: (D,), inputs that are 0 in every row.
    """

    targets: Float32[Array, "D R"]
    hessian: Float32[Array, "D D"]
    dead: Bool[Array, " D"]


class Damped(NamedTuple):
    """A Hessian that can be factored.

    Attributes:
        hessian: H + λ mean(diag H) I.
        damping: λ.
        retries: how often λ had to grow.
    """

    hessian: Float32[Array, "D D"]
    damping: Float32[Array, ""]
    retries: Int32[Array, ""]


def problem(
    weights: Float32[Array, "D R"],
    gram: Float32[Array, "D D"],
    cross: Float32[Array, "D D"] | None,
    count: Float32[Array, ""],
    damping: ArrayLike,
    *,
    dead_diagonal: float | None = None,
) -> Problem:
    """The problem of one matrix.

    Args:
        weights: in the dense model.
        gram: XᵀX.
        cross: YᵀX, Y the inputs in the dense model; None: the dense outputs are X W.
        count: number of rows.
        damping: for the targets, where there is `cross`.
        dead_diagonal: for dead inputs; None: the mean over the others.
    """
    hessian = gram * (2.0 / count)
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    mean = jnp.where(dead.all(), 1.0, diagonal.sum() / jnp.maximum((~dead).sum(), 1))
    # Without a diagonal of its own, a dead input would let nothing be factored.
    hessian = hessian + jnp.diag(jnp.where(dead, mean if dead_diagonal is None else dead_diagonal, 0.0))
    if cross is not None:
        weights = dense_targets(weights, hessian, cross * (2.0 / count), damping)
    return Problem(jnp.where(dead[:, None], 0.0, weights), hessian, dead)


def damped(hessian: Float32[Array, "D D"], damping: ArrayLike) -> Damped:
    """H with as much on its diagonal as it takes."""
    found = damped_cholesky(hessian, damping)
    mean = jnp.diagonal(hessian).mean()
    added = found.damping * mean * jnp.eye(hessian.shape[0], dtype=jnp.float32)
    return Damped(hessian + added, found.damping, found.retries)
