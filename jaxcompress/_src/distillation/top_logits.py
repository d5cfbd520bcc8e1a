"""The most likely classes of a teacher, and all others as one. Shape letters: n positions; k classes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress._src.distillation.deferred_logits import (
    Logits,
    logits_of,
    logits_top_k,
    looked_up,
    softened,
    without_masked,
)
from jaxcompress._src.distillation.divergences import Divergence, forward_kl
from jaxcompress._src.distillation.outputs import LossFn, Outputs, masked_sum, named, position_mask, zero_masked


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("log_probabilities", "indices", "log_rest"),
    meta_fields=("classes", "temperature"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopLogits:
    """What is kept of softmax(logits / temperature): Σ exp(log_probabilities) + exp(log_rest) = 1.

    Attributes:
        log_probabilities: (*n, k), descending, float32.
        indices: (*n, k), the classes; integers.
        log_rest: (*n,), logarithm of what all other classes have together; -inf without others.
        classes: size of the vocabulary.
        temperature: of the softmax.
    """

    log_probabilities: Any
    indices: Any
    log_rest: Any
    classes: int
    temperature: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits in full."""
        return (*self.indices.shape[:-1], self.classes)

    def __jax_array__(self) -> jax.Array:
        """Raises an error: the other classes are not known."""
        raise TypeError("Only the most likely classes of these logits are known: `top_k_targets` takes them.")


def top_logits(logits: Logits, k: int, *, temperature: float = 1.0) -> TopLogits:
    """The k most likely classes of logits, and the rest's mass, which is summed, not found as a difference from 1.

    Example:
        >>> top = top_logits(jnp.log(jnp.array([[0.1, 0.6, 0.1, 0.2]])), 2)
        >>> top.indices.tolist(), round(float(jnp.exp(top.log_rest[0])), 4)
        ([[1, 3]], 0.2)
    """
    logits = softened(logits, temperature)
    _, indices = logits_top_k(logits, k)
    picked, others, _ = looked_up(logits, indices)
    picked, rest = _log_probabilities(picked, others)
    return TopLogits(
        log_probabilities=picked, indices=indices, log_rest=rest, classes=logits.shape[-1], temperature=temperature
    )


def top_k_targets(
    *,
    temperature: float = 1.0,
    divergence: Divergence = forward_kl,
    rest: Literal["bucket", "renormalize"] = "bucket",
    output: str = "logits",
    mask: str | None = "attention_mask",
) -> LossFn:
    """T² · D(teacher, student) from the teacher's k most likely classes, as `write_teacher_outputs` keeps them.

    With "bucket", D compares distributions over k + 1 classes: the k, and all others together, whose probability is
    known exactly in both. Its KL is at most that over all classes, and equal to it where k is all of them. With
    "renormalize", D compares what both say among the k alone: nothing keeps the student from finding others likely.

    Args:
        temperature: T > 0, that of the cache: the mass of the others at another one is not known.
        divergence: D, as in `soft_targets`.
        rest: "bucket" or "renormalize".
        output: name of the student's logits, (batch, classes) or (batch, positions, classes), which may be
            `deferred_logits`, and of the teacher's most likely ones.
        mask: entry of the batch, (batch, positions), nonzero where positions count. None: nothing is padded.

    Returns:
        A `LossFn`.

    Raises:
        ValueError: an unknown `rest`, a temperature that is not positive; when called: a missing output or mask, shapes
            or vocabularies that differ, a cache of another temperature.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = {"logits": top_logits(jnp.log(jnp.array([[0.5, 0.3, 0.1, 0.1]])), 2)}
        >>> total, count = top_k_targets()({"logits": jnp.zeros((1, 4))}, teacher, {})
        >>> round(float(total), 4), float(count)  # .5 log(.5 / .25) + .3 log(.3 / .25) + .2 log(.2 / .5)
        (0.218, 1.0)
    """
    if not temperature > 0.0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    if rest not in ("bucket", "renormalize"):
        raise ValueError(f"`rest` must be 'bucket' or 'renormalize', got {rest!r}.")

    def loss(student: Outputs, teacher: Outputs, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        logits, top = logits_of(student, output, "student"), named(teacher, output, "teacher")
        _check_top(top, logits, output, temperature)
        keep = position_mask(batch, mask, logits.shape[:-1])
        logits = softened(without_masked(logits, keep), temperature)
        classes = jnp.where(keep[..., None], top.indices, 0).astype(jnp.int32)
        known, known_rest = zero_masked(top.log_probabilities, keep), jnp.where(keep, top.log_rest, 0.0)
        picked, others, _ = looked_up(logits, classes)
        if rest == "bucket":
            said, said_rest = _log_probabilities(picked, others)
            known, said = (_beside(*each) for each in ((known, known_rest), (said, said_rest)))
        else:
            known, said = jax.nn.log_softmax(known, axis=-1), jax.nn.log_softmax(picked, axis=-1)
        return masked_sum(temperature**2 * divergence(said, known).sum(axis=-1), keep)

    return loss


def _log_probabilities(picked: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the classes that were looked up, and of all others, from what `looked_up` gives."""
    normalizer = jax.nn.logsumexp(_beside(picked, others), axis=-1)
    return picked - normalizer[..., None], others - normalizer


def _beside(picked: jax.Array, others: jax.Array) -> jax.Array:
    return jnp.concatenate([picked, others[..., None]], axis=-1)


def _check_top(top: Any, logits: Logits, output: str, temperature: float) -> None:
    if not isinstance(top, TopLogits):
        raise ValueError(
            f"The teacher's {output!r} must be its most likely classes, as `write_teacher_outputs` keeps them, got "
            f"{type(top).__name__}; `soft_targets` takes logits in full."
        )
    if top.shape != logits.shape:
        raise ValueError(f"{output!r} has shape {logits.shape} in the student and {top.shape} in the teacher.")
    if top.temperature != temperature:
        raise ValueError(f"`temperature` is {temperature}, and the teacher's outputs were kept at {top.temperature}.")
