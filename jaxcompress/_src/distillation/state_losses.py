"""Losses on hidden states: what happens inside the models."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.distillation.divergences import class_divergence, cosine_distance, mean_squared, unit_vectors
from jaxcompress._src.distillation.outputs import (
    LossFn,
    Outputs,
    as_float32,
    masked_sum,
    named,
    position_mask,
    zero_masked,
)
from jaxcompress._src.distillation.pairs import ClosestLayers, Pairs, pair_loss
from jaxcompress._src.distillation.projections import Fit


def hidden_states(
    *,
    pairs: Pairs,
    output: str = "hidden_states",
    mask: str | None = "attention_mask",
    normalize: bool = False,
    projections: str | Fit | None = None,
) -> LossFn:
    """Mean over the features of (student - teacher)², summed over unmasked positions and over pairs of layers.

    Args:
        pairs: (student layer, teacher layer), such as `layer_map` gives: places in the output, which is a sequence of
            states or an array with a leading layer axis. `ClosestLayers` chooses them at each step. None: the output is
            one array itself (a pooled vector, say).
        output: its name in the outputs of both; states are (batch, positions, features) or (batch, features), any float
            dtype; the arithmetic is float32.
        mask: entry of the batch, (batch, positions), nonzero where positions count; used only for states with
            positions. None: nothing is padded.
        normalize: compare directions: every vector is first divided by its length.
        projections: for models of different widths: name of a *student* output that holds one (student features,
            teacher features) matrix for each pair (with `ClosestLayers`, for each student layer), which the student's
            `apply` returns out of its own parameters, so that they are trained; or `least_squares()`, which fits one.

    Returns:
        A `LossFn`; the count is positions x pairs, so the loss is the mean over pairs.

    Raises:
        ValueError: no pairs; when called: a missing output or mask, a layer that does not exist, widths that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = {"hidden_states": jnp.zeros((3, 2, 4))}, {"hidden_states": jnp.ones((5, 2, 4))}
        >>> hidden_states(pairs=[(0, 0), (2, 4)])(student, teacher, {})
        (Array(4., dtype=float32), Array(4., dtype=float32))

    References:
        Jiao et al. 2020, "TinyBERT", section 3 (projections, embeddings included); Sun et al. 2019, "Patient knowledge
        distillation" (normalize; there the sum over the features, here the mean).
    """

    def distance(s: jax.Array, t: jax.Array) -> jax.Array:
        return mean_squared(unit_vectors(s), unit_vectors(t)) if normalize else mean_squared(s, t)

    return _state_loss(distance, pairs, output, mask, projections)


def cosine_states(
    *,
    pairs: Pairs,
    output: str = "hidden_states",
    mask: str | None = "attention_mask",
    projections: str | Fit | None = None,
) -> LossFn:
    """1 - cos(student, teacher), summed over unmasked positions and over pairs of layers.

    Args:
        pairs: as in `hidden_states`.
        output: as in `hidden_states`.
        mask: as in `hidden_states`.
        projections: as in `hidden_states`.

    Returns:
        A `LossFn`; the count is positions x pairs.

    Raises:
        ValueError: as in `hidden_states`.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = {"pooled": jnp.array([[1.0, 0.0]])}, {"pooled": jnp.array([[0.0, 2.0]])}
        >>> cosine_states(pairs=None, output="pooled")(student, teacher, {})
        (Array(1., dtype=float32), Array(1., dtype=float32))

    References:
        Sanh et al. 2019, "DistilBERT", section 3.
    """
    return _state_loss(cosine_distance, pairs, output, mask, projections)


def batch_similarities(
    *, output: str = "sentence_vector", mask: str | None = None, temperature: float | None = None
) -> LossFn:
    """How the examples of a batch relate: cosines of all pairs of vectors, the student's against the teacher's.

    Without a temperature, (cos(s_i, s_j) - cos(t_i, t_j))² summed over i ≠ j. With one, KL(softmax_j(cos(t_i, t_j) / T)
    ‖ softmax_j(cos(s_i, s_j) / T)) over j ≠ i, summed over i. Widths may differ, and need no projection.

    Args:
        output: name of one vector for each example, (batch, features), in the outputs of both.
        mask: entry of the batch, (batch,), nonzero where an example counts. None: all.
        temperature: T > 0, such as 0.05; None for squared differences.

    Returns:
        A `LossFn`; the count is the number of pairs, or that of examples with a temperature. An example is compared
        with those of its own micro-batch.

    Raises:
        ValueError: `temperature` is not positive; when called: a missing output or mask, shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = {"sentence_vector": jnp.eye(2)}, {"sentence_vector": jnp.ones((2, 5))}
        >>> total, count = batch_similarities()(student, teacher, {})
        >>> round(float(total), 4), float(count)
        (2.0, 2.0)

    References:
        Tung and Mori 2019, "Similarity-preserving knowledge distillation"; Fang et al. 2021, "SEED: self-supervised
        distillation" (temperature).
    """
    if temperature is not None and not temperature > 0.0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")

    def loss(student: Outputs, teacher: Outputs, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        s, t = as_float32(named(student, output, "student")), as_float32(named(teacher, output, "teacher"))
        if not s.ndim == t.ndim == 2 or len(s) != len(t):
            raise ValueError(
                f"{output!r} must hold one vector for each example, (batch, features), got {s.shape} from the student "
                f"and {t.shape} from the teacher."
            )
        keep = jnp.ones(len(s), bool) if mask is None else jnp.asarray(named(batch, mask, "batch")).astype(bool)
        if keep.shape != s.shape[:1]:
            raise ValueError(f"The mask {mask!r} has shape {keep.shape}, the examples have {s.shape[:1]}.")
        others = keep[:, None] & keep[None, :] & ~jnp.eye(len(s), dtype=bool)
        s, t = _cosines(zero_masked(s, keep)), _cosines(zero_masked(t, keep))
        if temperature is None:
            return masked_sum(jnp.square(s - t), others)
        least = jnp.finfo(jnp.float32).min
        s, t = (jnp.where(others, x / temperature, least) for x in (s, t))
        return masked_sum(class_divergence(s, t), others.any(axis=1))

    return loss


def _state_loss(
    distance: Callable[[jax.Array, jax.Array], jax.Array],
    pairs: Pairs,
    output: str,
    mask: str | None,
    projections: str | Fit | None,
) -> LossFn:
    def compare(s: jax.Array, t: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        if s.shape[:-1] != t.shape[:-1]:
            raise ValueError(f"{output!r} has the shapes {s.shape} and {t.shape}, which differ in more than features.")
        keep = position_mask(batch, mask, s.shape[:-1])
        s, t = zero_masked(s, keep), zero_masked(t, keep)
        if callable(projections):
            s = s @ projections(s.reshape(-1, s.shape[-1]), t.reshape(-1, t.shape[-1]))
        return masked_sum(distance(s, t), keep)

    def project(states: list[Any], student: Outputs) -> list[Any]:
        if not isinstance(projections, str):
            return states
        matrices = named(student, projections, "student")
        if len(matrices) != len(states):
            layers = "student layers" if isinstance(pairs, ClosestLayers) else "pairs"
            raise ValueError(f"{len(states)} {layers} need as many projections, got {len(matrices)}.")
        return [as_float32(state) @ as_float32(matrix) for state, matrix in zip(states, matrices, strict=True)]

    return pair_loss(pairs, output, compare, project=project, equal_shapes=not callable(projections))


def _cosines(vectors: jax.Array) -> jax.Array:
    units = unit_vectors(vectors)
    return units @ units.T
