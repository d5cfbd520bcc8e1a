"""What one-shot methods minimise: the weights to come close to, and the matrix that measures how close.

Shape letters: D inputs, R outputs.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float32, Int32

from jaxcompress._src.solvers.cholesky import damped_cholesky
from jaxcompress._src.solvers.outputs import dense_targets


class Problem(NamedTuple):
    """Minimise tr((W - W')ᵀ H (W - W')) over allowed W'.

    Attributes:
        targets: W, (D, R).
        hessian: H, (D, D): XᵀX / N times 2, with a diagonal of their own for unseen inputs; not damped.
        unseen: (D,), inputs that are 0 in every row.
    """

    targets: Float32[Array, "D R"]
    hessian: Float32[Array, "D D"]
    unseen: Bool[Array, " D"]


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


def check_damping(damping: float, ridge: float) -> None:
    """Raises for what no problem can be solved with."""
    if not damping >= 0:
        raise ValueError(f"`damping` must be at least 0, got {damping}.")
    if not ridge >= 0:
        raise ValueError(f"`ridge` must not be negative, got {ridge}.")


def problem(
    weights: Float32[Array, "D R"],
    gram: Float32[Array, "D D"],
    cross: Float32[Array, "D D"] | None,
    count: Float32[Array, ""],
    ridge: ArrayLike,
    *,
    zero_unseen: bool = False,
) -> Problem:
    """The problem of one matrix.

    Inputs that are 0 in every row get a diagonal of their own: nothing makes up for them, they make up for nothing,
    and they matter as much as the others do on average, since calibration does not know.

    Args:
        weights: in the dense model.
        gram: XᵀX.
        cross: YᵀX, Y the inputs in the dense model; None: the dense outputs are X W.
        count: number of rows; 0 counts as 1.
        ridge: how much the targets are held to `weights`, where there is `cross`; see `dense_targets`.
        zero_unseen: the rule of the public implementations instead: their weights are 0, and 1 stands on the diagonal.
    """
    per_row = 2.0 / jnp.where(count > 0, count, 1.0)
    hessian = gram * per_row
    diagonal = jnp.diagonal(hessian)
    unseen = diagonal == 0
    mean = jnp.where(unseen.all(), 1.0, diagonal.sum() / jnp.maximum((~unseen).sum(), 1))
    hessian = hessian + jnp.diag(jnp.where(unseen, 1.0 if zero_unseen else mean, 0.0))
    targets = weights
    if cross is not None:
        targets = dense_targets(weights, hessian, cross * per_row, ridge)
    # The least squares of what is not seen are 0: that is no evidence.
    return Problem(jnp.where(unseen[:, None], 0.0 if zero_unseen else weights, targets), hessian, unseen)


def damped(hessian: Float32[Array, "D D"], damping: ArrayLike) -> Damped:
    """H with as much on its diagonal as it takes."""
    factored = damped_cholesky(hessian, damping)
    mean = jnp.diagonal(hessian).mean()
    added = factored.damping * mean * jnp.eye(hessian.shape[0], dtype=jnp.float32)
    return Damped(hessian + added, factored.damping, factored.retries)
