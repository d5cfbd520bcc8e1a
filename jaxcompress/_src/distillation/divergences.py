"""Distances between what a student and a teacher say, on arrays. Shape letters: n examples, positions; c classes."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Divergence: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""`(student, teacher) -> terms`, from log probabilities, class by class; their sum over the classes is the loss.

Each term depends on the two log probabilities of its class alone: what is summed may be a part of the vocabulary.
"""


def forward_kl(student: Float[Array, "*n c"], teacher: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """The terms of KL(teacher ‖ student) = Σ_k p_k (log p_k - log q_k), from log probabilities, in nats.

    It is large where the student misses what the teacher finds likely, so that the student covers all of it. Classes
    that the teacher rules out (log probability -inf) contribute 0.

    Args:
        student: log q.
        teacher: log p.

    Example:
        >>> log_p = jnp.log(jnp.array([0.5, 0.5]))
        >>> forward_kl(log_p, log_p)
        Array([0., 0.], dtype=float32)
    """
    return _relative_entropy(teacher, student)


def reverse_kl(student: Float[Array, "*n c"], teacher: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """The terms of KL(student ‖ teacher) = Σ_k q_k (log q_k - log p_k), from log probabilities, in nats.

    It is large where the student finds likely what the teacher does not, so that the student keeps to the teacher's
    main modes. Infinite where the teacher rules out a class that the student does not.

    Args:
        student: log q.
        teacher: log p.

    Example:
        >>> q, p = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
        >>> round(float(reverse_kl(jnp.log(q), jnp.log(p)).sum()), 4)
        0.1438

    References:
        Gu et al. 2024, "MiniLLM: knowledge distillation of large language models", section 2.1.
    """
    return _relative_entropy(student, teacher)


def jensen_shannon(*, beta: float = 0.5) -> Divergence:
    """The generalized Jensen-Shannon divergence β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q, in nats.

    p is the teacher, q the student. It is bounded (by log 2 for β = 1/2); divided by β it tends to the forward KL as β
    goes to 0, and divided by 1 - β to the reverse one as β goes to 1.

    Args:
        beta: weight of the teacher, in (0, 1).

    Returns:
        A `Divergence` for `soft_targets`.

    Raises:
        ValueError: `beta` out of range.

    Example:
        >>> q, p = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> round(float(jensen_shannon()(jnp.log(q), jnp.log(p)).sum()), 4)
        0.6931

    References:
        Agarwal et al. 2024, "On-policy distillation of language models: learning from self-generated mistakes" (GKD),
        equation 1.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"`beta` must be in (0, 1), got {beta}; its ends are `forward_kl` and `reverse_kl`.")

    def terms(student: jax.Array, teacher: jax.Array) -> jax.Array:
        mixture = beta * jnp.exp(teacher) + (1.0 - beta) * jnp.exp(student)
        log_mixture = jnp.log(jnp.where(mixture > 0, mixture, 1.0))
        return beta * _relative_entropy(teacher, log_mixture) + (1.0 - beta) * _relative_entropy(student, log_mixture)

    return terms


def class_divergence(
    student: Float[Array, "*n c"], teacher: Float[Array, "*n c"], divergence: Divergence = forward_kl
) -> Float[Array, "*n"]:
    """A divergence of softmax(teacher) and softmax(student), from logits, in nats.

    Example:
        >>> class_divergence(jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 1.0]]))
        Array([0.], dtype=float32)
    """
    return divergence(jax.nn.log_softmax(student, axis=-1), jax.nn.log_softmax(teacher, axis=-1)).sum(axis=-1)


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
