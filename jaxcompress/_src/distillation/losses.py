"""Losses on logits, and how often student and teacher agree."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress._src.distillation.deferred_logits import (
    logits_argmax,
    logits_cross_entropy,
    logits_divergence,
    logits_of,
    logits_pair,
    softened,
    without_masked,
)
from jaxcompress._src.distillation.divergences import (
    Divergence,
    bernoulli_cross_entropy,
    bernoulli_kl,
    forward_kl,
)
from jaxcompress._src.distillation.outputs import (
    LossFn,
    Outputs,
    as_float32,
    masked_sum,
    named,
    output_pair,
    position_mask,
    zero_masked,
)
from jaxcompress._src.distillation.top_logits import TopLogits


def soft_targets(
    *,
    temperature: float = 1.0,
    divergence: Divergence = forward_kl,
    output: str = "logits",
    mask: str | None = "attention_mask",
) -> LossFn:
    """T² · D(softmax(teacher / T), softmax(student / T)), summed over examples (or unmasked positions).

    The factor T² keeps the gradient's size, which falls with 1 / T², comparable to that of hard labels. Every real
    position counts, in a causal language model, too: there, position t says what both expect at t + 1.

    Args:
        temperature: T > 0; higher shows more of the order among unlikely classes.
        divergence: D: `forward_kl`, KL(teacher ‖ student); `reverse_kl`; `jensen_shannon(beta=...)`; or a function of
            log probabilities like them.
        output: name of the logits in the outputs, (batch, classes) or (batch, positions, classes), any float dtype;
            the arithmetic is float32. Those of a large vocabulary may be `deferred_logits`.
        mask: entry of the batch, (batch, positions), nonzero where positions count; used only for logits with
            positions. None: nothing is padded.

    Returns:
        A `LossFn`.

    Raises:
        ValueError: a temperature that is not positive; when called: a missing output or mask, shapes that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = {"logits": jnp.array([[1.0, 0.0], [0.0, 3.0]])}
        >>> soft_targets(temperature=2.0)(logits, logits, {})
        (Array(0., dtype=float32), Array(2., dtype=float32))

    References:
        Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", section 2.
    """
    _check_temperature(temperature)

    def loss(student: Outputs, teacher: Outputs, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        s, t = logits_pair(student, teacher, output)
        keep = position_mask(batch, mask, s.shape[:-1])
        s, t = (softened(without_masked(logits, keep), temperature) for logits in (s, t))
        return masked_sum(temperature**2 * logits_divergence(s, t, divergence), keep)

    return loss


def hard_labels(
    *, output: str = "logits", labels: str = "labels", smoothing: float = 0.0, ignore: int = -100
) -> LossFn:
    """Cross entropy of the student's logits against integer labels, summed over the labels that count.

    Args:
        output: name of the logits, (batch, classes) or (batch, positions, classes).
        labels: entry of the batch: integers of the shape of the logits without the last axis. For a masked language
            model, the tokens that were masked, and `ignore` elsewhere. For a causal one, see `next_token_labels`.
        smoothing: share of the target spread evenly over all classes, in [0, 1].
        ignore: the label that counts for nothing.

    Returns:
        A `LossFn`; it does not look at the teacher. A label outside the classes gives NaN.

    Raises:
        ValueError: `smoothing` out of range; when called: a missing entry, shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = {"labels": jnp.array([1, -100])}
        >>> total, count = hard_labels()({"logits": jnp.zeros((2, 4))}, {}, batch)
        >>> round(float(total), 4), float(count)
        (1.3863, 1.0)
    """
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"`smoothing` must be in [0, 1], got {smoothing}.")

    def loss(student: Outputs, _: Outputs, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(student, output, "student")
        target = jnp.asarray(named(batch, labels, "batch"))
        _check_labels(labels, target.shape, logits.shape[:-1])
        if not jnp.issubdtype(target.dtype, jnp.integer):
            raise ValueError(f"{labels!r} must be classes, integers, got {target.dtype}.")
        keep = target != ignore
        logits, target = without_masked(logits, keep), jnp.where(keep, target, 0)
        terms = logits_cross_entropy(logits, target, smoothing=smoothing)
        return masked_sum(terms, keep)

    return loss


def next_token_labels(
    *,
    output: str = "logits",
    labels: str = "input_ids",
    mask: str | None = "attention_mask",
    smoothing: float = 0.0,
    ignore: int = -100,
) -> LossFn:
    """Cross entropy of a causal language model: the logits at position t against the token at t + 1.

    Args:
        output: name of the logits, (batch, positions, classes).
        labels: entry of the batch, (batch, positions): the tokens as the model reads them, not shifted.
        mask: entry of the batch, (batch, positions): t counts where t and t + 1 are real. None: nothing is padded.
        smoothing: share of the target spread evenly over all classes, in [0, 1].
        ignore: the label that counts for nothing, such as that of the tokens of a prompt.

    Returns:
        A `LossFn`; it does not look at the teacher, and exp(sum / count) is the perplexity. A label outside the classes
        gives NaN.

    Raises:
        ValueError: `smoothing` out of range; when called: a missing entry, shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = {"input_ids": jnp.array([[3, 1, 0]]), "attention_mask": jnp.array([[1, 1, 0]])}
        >>> total, count = next_token_labels()({"logits": jnp.zeros((1, 3, 4))}, {}, batch)
        >>> round(float(total), 4), float(count)
        (1.3863, 1.0)
    """
    cross_entropy_loss = hard_labels(output=output, smoothing=smoothing, ignore=ignore)

    def loss(student: Outputs, teacher: Outputs, batch: Mapping[str, Any]) -> tuple[ArrayLike, ArrayLike]:
        tokens = jnp.asarray(named(batch, labels, "batch"))
        if tokens.ndim != 2:
            raise ValueError(f"{labels!r} must have shape (batch, positions), got {tokens.shape}.")
        real = position_mask(batch, mask, tokens.shape)
        following = jnp.where(real[:, :-1] & real[:, 1:], tokens[:, 1:], ignore)
        return cross_entropy_loss(
            student, teacher, {"labels": jnp.pad(following, ((0, 0), (0, 1)), constant_values=ignore)}
        )

    return loss


def binary_targets(*, temperature: float = 1.0, output: str = "logits", mask: str | None = "attention_mask") -> LossFn:
    """T² · KL(Bernoulli(σ(teacher / T)) ‖ Bernoulli(σ(student / T))), summed over examples and labels (multi-label).

    Args:
        temperature: T > 0.
        output: name of the logits, (batch, labels) or (batch, positions, labels).
        mask: entry of the batch that says which rows count; None: all.

    Returns:
        A `LossFn`; every (example, label) counts once.

    Raises:
        ValueError: as in `soft_targets`.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = {"logits": jnp.array([[0.0, 2.0]])}, {"logits": jnp.array([[1.0, 2.0]])}
        >>> total, count = binary_targets()(student, teacher, {})
        >>> round(float(total), 4), float(count)
        (0.1109, 2.0)
    """
    _check_temperature(temperature)

    def loss(student: Outputs, teacher: Outputs, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        s, t = output_pair(student, teacher, output)
        keep = position_mask(batch, mask, s.shape[:-1])
        s, t = zero_masked(s, keep), zero_masked(t, keep)
        terms = temperature**2 * bernoulli_kl(s / temperature, t / temperature)
        return masked_sum(terms, jnp.broadcast_to(keep[..., None], terms.shape))

    return loss


def binary_labels(*, output: str = "logits", labels: str = "labels", ignore: int = -100) -> LossFn:
    """Sigmoid cross entropy of the student's logits against multi-label targets, summed over those that count.

    Args:
        output: name of the logits, (..., labels).
        labels: entry of the batch, of the shape of the logits: 0, 1 or a probability.
        ignore: the target that counts for nothing.

    Returns:
        A `LossFn`; it does not look at the teacher, and every (example, label) counts once.

    Raises:
        ValueError: when called: a missing entry, shapes that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> batch = {"labels": jnp.array([[1, 0, -100]])}
        >>> total, count = binary_labels()({"logits": jnp.zeros((1, 3))}, {}, batch)
        >>> round(float(total), 4), float(count)
        (1.3863, 2.0)
    """

    def loss(student: Outputs, _: Outputs, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        logits = as_float32(named(student, output, "student"))
        target = jnp.asarray(named(batch, labels, "batch"))
        _check_labels(labels, target.shape, logits.shape)
        keep = target != ignore
        target = jnp.where(keep, target, 0).astype(logits.dtype)
        return masked_sum(bernoulli_cross_entropy(jnp.where(keep, logits, 0.0), target), keep)

    return loss


def argmax_agreement(*, output: str = "logits", mask: str | None = "attention_mask") -> LossFn:
    """How often student and teacher name the same class first; a figure to watch, without a gradient.

    Args:
        output: name of the logits, (batch, classes) or (batch, positions, classes).
        mask: entry of the batch that says which rows count; None: all.

    Returns:
        A function like a `LossFn`; its quotient is in [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = {"logits": jnp.array([[0.0, 1.0], [0.0, 1.0]])}, {"logits": jnp.eye(2)}
        >>> argmax_agreement()(student, teacher, {})
        (Array(1., dtype=float32), Array(2., dtype=float32))
    """

    def figure(student: Outputs, teacher: Outputs, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        t = named(teacher, output, "teacher")
        if isinstance(t, TopLogits):
            s, choice = logits_of(student, output, "student"), jnp.asarray(t.indices)[..., 0]
        else:
            s, t = logits_pair(student, teacher, output)
            choice = logits_argmax(t)
        same = logits_argmax(s) == choice
        return masked_sum(same.astype(jnp.float32), position_mask(batch, mask, same.shape))

    return figure


def _check_temperature(temperature: float) -> None:
    if not temperature > 0.0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")


def _check_labels(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"{name!r} must have shape {expected} to fit the logits, got {shape}.")
