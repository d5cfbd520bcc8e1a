"""Distances between what a student and a teacher say, on arrays. Shape letters: n examples, positions; c classes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def kl_divergence(student: Float[Array, "*n c"], teacher: Float[Array, "*n c"]) -> Float[Array, "*n"]:
    """KL(softmax(teacher) ‖ softmax(student)) from logits, in nats.

    Classes that the teacher rules out (logit -inf) contribute 0.

    Example:
        >>> kl_divergence(jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 1.0]]))
        Array([0.], dtype=float32)
    """
    log_p, log_q = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(student, axis=-1)
    return _relative_entropy(log_p, log_q).sum(axis=-1)


def bernoulli_kl(student: Float[Array, "*n c"], teacher: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """KL(Bernoulli(σ(teacher)) ‖ Bernoulli(σ(student))) from logits, one for each label, in nats."""
    yes = _relative_entropy(jax.nn.log_sigmoid(teacher), jax.nn.log_sigmoid(student))
    no = _relative_entropy(jax.nn.log_sigmoid(-teacher), jax.nn.log_sigmoid(-student))
    return yes + no


def cross_entropy(
    logits: Float[Array, "*n c"], labels: Int[Array, "*n"], *, smoothing: float = 0.0
) -> Float[Array, "*n"]:
    """-Σ_k y_k log softmax(logits)_k with y = (1 - smoothing) onehot(label) + smoothing / c, in nats.

    Args:
        logits: unnormalised.
        labels: in [0, c); others give NaN.
        smoothing: static, in [0, 1].
    """
    log_q = jax.nn.log_softmax(logits, axis=-1)
    # Negative labels would count from the end.
    labels = jnp.where(labels < 0, logits.shape[-1], labels)
    hit = -jnp.take_along_axis(log_q, labels[..., None], axis=-1, mode="fill")[..., 0]
    # Without smoothing, ruled-out classes (logit -inf) must not enter as 0 * inf.
    return (1.0 - smoothing) * hit - smoothing * log_q.mean(axis=-1) if smoothing else hit


def bernoulli_cross_entropy(logits: Float[Array, "*n c"], targets: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """-t log σ(x) - (1 - t) log σ(-x), one for each label, in nats; targets in [0, 1]."""
    return -targets * jax.nn.log_sigmoid(logits) - (1.0 - targets) * jax.nn.log_sigmoid(-logits)


def mean_squared(student: Float[Array, "*n c"], teacher: Float[Array, "*n c"]) -> Float[Array, "*n"]:
    """Mean over the features of (student - teacher)²."""
    return jnp.square(student - teacher).mean(axis=-1)


def cosine_distance(student: Float[Array, "*n c"], teacher: Float[Array, "*n c"]) -> Float[Array, "*n"]:
    """1 - cos(student, teacher); 1 where one of them is zero."""
    return 1.0 - (unit_vectors(student) * unit_vectors(teacher)).sum(axis=-1)


def unit_vectors(x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """Each vector x / max(|x|, 1e-6): of length 1; zeros stay zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-12))


def _relative_entropy(log_p: Float[Array, "*n"], log_q: Float[Array, "*n"]) -> Float[Array, "*n"]:
    # 0 log 0 = 0: both logarithms may be -inf where p is 0.
    p = jnp.exp(log_p)
    return p * (jnp.where(p > 0, log_p, 0.0) - jnp.where(p > 0, log_q, 0.0))
