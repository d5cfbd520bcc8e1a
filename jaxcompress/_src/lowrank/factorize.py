"""The best approximation of a matrix by one of lower rank, in a norm that inputs and outputs weight.

Shape letters: S stack entries, D inputs, R outputs, K = min(D, R), k the rank.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int32

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.solvers.cholesky import damped_cholesky

Whitening = Literal["eigen", "cholesky"]
"""How the square root of XᵀX is taken; see `root_of_gram`."""

_HIGHEST = jax.lax.Precision.HIGHEST
_LEAST_SHARE = 1e-6


class Directions(NamedTuple):
    """All directions of a factorization, the most important first.

    Attributes:
        values: (S, K), singular values of the weighted matrices; to drop one costs its square.
        outputs: (S, R, K), orthonormal columns V of the weighted outputs.
        scale: (S, R), what the outputs were weighted with.
    """

    values: Float32[Array, "S K"]
    outputs: Float32[Array, "S R K"]
    scale: Float32[Array, "S R"]


class Root(NamedTuple):
    """A with Aᵀ A = XᵀX, damped perhaps.

    Attributes:
        matrix: A, (S, D, D).
        damping: (S,), share of the mean diagonal that was added.
        retries: (S,), how often the damping had to grow.
    """

    matrix: Float32[Array, "S D D"]
    damping: Float32[Array, " S"]
    retries: Int32[Array, " S"]


@on_auto_axes
@functools.partial(jax.jit, static_argnames="whitening")
def root_of_gram(gram: Float[Array, "S D D"], damping: ArrayLike, *, whitening: Whitening) -> Root:
    """A square root of XᵀX + λ mean(diag) I.

    - "cholesky": the transposed Cholesky factor; λ grows tenfold until it exists.
    - "eigen": Λ^½ Qᵀ of the eigenvalues and eigenvectors. It needs no damping: negative eigenvalues, which are
      rounding errors, count as 0.

    Args:
        gram: XᵀX.
        damping: λ, at least 0.
        whitening: which one.
    """

    def by_cholesky(matrix: Float[Array, "D D"]) -> tuple[Array, Array, Array]:
        factored = damped_cholesky(matrix, damping)
        return factored.factor.T, factored.damping, factored.retries

    def by_eigen(matrix: Float[Array, "D D"]) -> tuple[Array, Array, Array]:
        matrix = matrix.astype(jnp.float32)
        mean = jnp.diagonal(matrix).sum() / max(matrix.shape[0], 1)
        values, vectors = jnp.linalg.eigh(matrix)
        values = jnp.maximum(values, 0.0) + damping * mean
        return jnp.sqrt(values)[:, None] * vectors.T, jnp.float32(damping), jnp.int32(0)

    return Root(*jax.lax.map(by_eigen if whitening == "eigen" else by_cholesky, gram))


@on_auto_axes
@jax.jit
def directions(
    weights: Float[Array, "S D R"],
    inputs: Float[Array, "S D D"] | Float[Array, "S D"] | None = None,
    outputs: Float[Array, "S R"] | None = None,
) -> Directions:
    """The singular value decomposition of A W B.

    Args:
        weights: W.
        inputs: A, or the squares of its diagonal: what the inputs weigh. None: 1 each.
        outputs: the squares of the diagonal B: what the outputs weigh, with a floor of 1e-6 of their mean, because B is
            inverted. None: 1 each.

    References:
        Wang et al. 2024, "SVD-LLM: truncation-aware singular value decomposition for large language model compression",
        section 3.1: with Aᵀ A = XᵀX, to drop a singular value σ changes the outputs by σ² exactly.
    """
    scale = output_scale(weights, outputs)
    weighted = apply_norm(weights, inputs, scale)
    _, values, vectors = jnp.linalg.svd(weighted, full_matrices=False)
    return Directions(values, vectors.mT, scale)


def output_scale(weights: Float[Array, "S D R"], outputs: Float[Array, "S R"] | None) -> Float32[Array, "S R"]:
    """The diagonal of B, from the squares of it or None."""
    if outputs is None:
        return jnp.ones((weights.shape[0], weights.shape[2]), jnp.float32)
    mean = jnp.mean(outputs, axis=-1, keepdims=True)
    floor = jnp.where(mean > 0, _LEAST_SHARE * mean, 1.0)
    return jnp.sqrt(jnp.maximum(outputs.astype(jnp.float32), floor))


def apply_norm(
    weights: Float[Array, "S D R"],
    inputs: Float[Array, "S D D"] | Float[Array, "S D"] | None,
    scale: Float[Array, "S R"],
) -> Float32[Array, "S D R"]:
    """A W B."""
    weighted = weights.astype(jnp.float32) * scale[:, None]
    if inputs is None:
        return weighted
    if inputs.ndim == 2:
        return jnp.sqrt(inputs.astype(jnp.float32))[..., None] * weighted
    return jnp.matmul(inputs, weighted, precision=_HIGHEST)


@on_auto_axes
@functools.partial(jax.jit, static_argnames="rank")
def truncate(
    weights: Float[Array, "S D R"], basis: Directions, *, rank: int
) -> tuple[Float32[Array, "S D k"], Float32[Array, "S R k"]]:
    """The factors of W' = W B V Vᵀ B⁻¹, with V the first k directions: the closest matrix of that rank.

    The weights of the inputs are in V already: nothing that may be singular is inverted. The columns of both factors
    have equal norms, pair by pair.

    Args:
        weights: W.
        basis: from `directions`.
        rank: k, at most K.

    Example:
        >>> W = jnp.array([[[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
        >>> left, right = truncate(W, directions(W), rank=1)
        >>> (left @ right.mT).round(4).tolist()
        [[[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]
    """
    leading = basis.outputs[..., :rank]
    left = jnp.matmul(weights.astype(jnp.float32), basis.scale[..., None] * leading, precision=_HIGHEST)
    right = leading / basis.scale[..., None]
    norms = [jnp.linalg.norm(factor, axis=1, keepdims=True) for factor in (left, right)]
    balance = jnp.sqrt(norms[0]) / jnp.sqrt(norms[1])
    balance = jnp.where(jnp.isfinite(balance) & (balance > 0), balance, 1.0)
    return left / balance, right * balance
