"""Rounded weights, improved one at a time, and the scales that suit them best.

Shape letters: D inputs, R outputs, G groups of inputs, B inputs in a block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32

from jaxcompress._src.solvers.rows import row, rows, with_row, with_rows

RoundInput = Callable[[Any, Any], Any]
"""`(weights (R,), number of the input) -> (R,)`: the nearest weights that can be stored.

Inputs beyond D, which fill up the last block, are asked for, too; what is said about them is ignored.
"""


def coordinate_descent(
    weights: Float[Array, "D R"],
    targets: Float[Array, "D R"],
    hessian: Float[Array, "D D"],
    round_input: RoundInput,
    *,
    sweeps: int = 1,
    block_size: int = 32,
) -> tuple[Float32[Array, "D R"], Float32[Array, "D R"]]:
    """Lowers tr((T - W)ᵀ H (T - W)) over weights that can be stored, input after input.

    For input i, all others as they are, the best weights are w_i - (H (W - T))_i / H_ii; the nearest that can be stored
    are the best of these, so that no step makes it worse. Where `solve_columns` only looks ahead, this also makes up
    for what later inputs became.

    Args:
        weights: W, weights that can be stored.
        targets: T.
        hessian: H, symmetric, with a positive diagonal.
        round_input: for all outputs of one input.
        sweeps: over all inputs.
        block_size: B; inside a block every step sees the ones before, and the rest of the gradient follows in one
            matmul a block.

    Returns:
        The weights, and H (W - T) at them: what they lose is the sum of its products with W - T.

    Example:
        >>> H = jnp.array([[1.0, 0.9], [0.9, 1.0]])
        >>> rounded, _ = coordinate_descent(
        ...     jnp.zeros((2, 1)), jnp.array([[0.6], [0.6]]), H, lambda w, i: jnp.round(w), sweeps=2
        ... )
        >>> rounded.ravel().tolist()
        [1.0, 0.0]

    References:
        Behdin et al. 2023, "QuantEase: optimization-based quantization for language models", algorithm 2.
    """
    depth = weights.shape[0]
    weights, targets = weights.astype(jnp.float32), targets.astype(jnp.float32)
    if not weights.size or sweeps < 1:
        return weights, _product(hessian, weights - targets)
    block = min(block_size, depth)
    padding = -depth % block
    # Inputs that fill up the last block touch no others, and 0 is where they are.
    weights, targets = (jnp.pad(part, ((0, padding), (0, 0))) for part in (weights, targets))
    beyond = jnp.arange(depth + padding) >= depth
    hessian = jnp.pad(hessian, (0, padding)) + jnp.diag(beyond.astype(jnp.float32))

    def step(state: Any, start: Any) -> Any:
        weights, gradient = state
        before, slope = (rows(part, start, block) for part in state)
        part = rows(hessian, start, block)
        square = rows(part, start, block, axis=1)
        steps = 1 / jnp.diagonal(square)

        def one(i: Any, state: Any) -> Any:
            solved, slope = state
            old = row(solved, i)
            new = round_input(old - row(slope, i) * row(steps, i), start + i)
            if padding:
                new = jnp.where(start + i < depth, new, old)
            return with_row(solved, new, i), slope + row(square, i)[:, None] * (new - old)[None]

        solved, _ = jax.lax.fori_loop(0, block, one, (before, slope))
        gradient = gradient + _product(part.T, solved - before)
        return (with_rows(weights, solved, start), gradient), None

    def sweep(state: Any, _: Any) -> Any:
        return jax.lax.scan(step, state, block * jnp.arange(len(weights) // block))[0], None

    state = (weights, _product(hessian, weights - targets))
    (weights, gradient), _ = jax.lax.scan(sweep, state, length=sweeps)
    return weights[:depth], gradient[:depth]


def least_squares_scales(
    values: Float[Array, "D R"],
    targets: Float[Array, "D R"],
    hessian: Float[Array, "D D"],
    start: Float[Array, "G R"],
    *,
    damping: ArrayLike = 1e-4,
) -> Float32[Array, "G R"]:
    """The scales s, one for each group of D / G consecutive inputs and each output, that minimise the error.

    tr((T - s V)ᵀ H (T - s V)) + λ mean(diag) |s - start|², exactly: one system of G unknowns for each output.

    Args:
        values: V, what the codes stand for before scaling.
        targets: T.
        hessian: H.
        start: the scales as they are.
        damping: λ; holds what has no influence (a group of zeros) where it is.

    Returns:
        The scales; they may be negative. NaN for an output whose system rounding has made singular.

    Example:
        >>> values, targets = jnp.array([[1.0], [2.0]]), jnp.array([[2.0], [4.1]])
        >>> scales = least_squares_scales(values, targets, jnp.eye(2), jnp.ones((1, 1)))
        >>> round(scales.item(), 2)
        2.04
    """
    groups, width = start.shape
    size = values.shape[0] // groups
    values, start = values.astype(jnp.float32), start.astype(jnp.float32)

    def by_group(x: Any) -> Any:
        # A product with ones: what XLA fuses into a sum on the CPU is not vectorized.
        ones = jnp.ones(size, jnp.float32)
        return jnp.einsum("gsr,s->gr", x.reshape(groups, size, width), ones, precision=jax.lax.Precision.HIGHEST)

    def normal_row(_: Any, group: Any) -> Any:
        part, metric = (rows(each, group * size, size) for each in (values, hessian))
        return None, by_group(_product(metric.T, part) * values)

    _, normal = jax.lax.scan(normal_row, None, jnp.arange(groups))
    right = by_group(values * _product(hessian, targets.astype(jnp.float32)))
    normal, right = normal.transpose(2, 0, 1), right.T
    diagonal = jnp.diagonal(normal, axis1=1, axis2=2)
    hold = jnp.asarray(damping, jnp.float32) * diagonal.mean(axis=1) + jnp.finfo(jnp.float32).tiny
    normal = normal + hold[:, None, None] * jnp.eye(groups, dtype=jnp.float32)[None]
    right = right + hold[:, None] * start.T
    factor = jnp.linalg.cholesky(normal, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((factor, True), right[..., None])[..., 0].T


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
