"""Losses on hidden states: what happens inside the models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.distillation.divergences import cosine_distance, mean_squared, unit_vectors
from jaxcompress._src.distillation.outputs import (
    LossFn,
    Outputs,
    as_float32,
    masked_sum,
    named,
    position_mask,
    same_shape,
    zero_masked,
)


def hidden_states(
    *,
    pairs: Sequence[tuple[int, int]] | None,
    output: str = "hidden_states",
    mask: str | None = "attention_mask",
    normalize: bool = False,
    projections: str | None = None,
) -> LossFn:
    """Mean over the features of (student - teacher)², summed over unmasked positions and over pairs of layers.

    Args:
        pairs: (student layer, teacher layer), such as `layer_map` gives: places in the output, which is a sequence of
            states or an array with a leading layer axis. None: the output is one array itself (a pooled vector, say).
        output: its name in the outputs of both; states are (batch, positions, features) or (batch, features), any float
            dtype; the arithmetic is float32.
        mask: entry of the batch, (batch, positions), nonzero where positions count; used only for states with
            positions. None: nothing is padded.
        normalize: compare directions: every vector is first divided by its length.
        projections: name of a *student* output that holds one (student features, teacher features) matrix per pair, for
            models of different widths. The student's `apply` returns them out of its own parameters, so that they
            are trained.

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
    pairs: Sequence[tuple[int, int]] | None,
    output: str = "hidden_states",
    mask: str | None = "attention_mask",
    projections: str | None = None,
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


def _state_loss(
    distance: Callable[[jax.Array, jax.Array], jax.Array],
    pairs: Sequence[tuple[int, int]] | None,
    output: str,
    mask: str | None,
    projections: str | None,
) -> LossFn:
    if pairs is not None and not pairs:
        raise ValueError("`pairs` needs at least one (student layer, teacher layer).")

    def loss(student: Outputs, teacher: Outputs, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        ours = _states(student, output, None if pairs is None else [s for s, _ in pairs], "student")
        theirs = _states(teacher, output, None if pairs is None else [t for _, t in pairs], "teacher")
        if projections is not None:
            ours = _projected(ours, named(student, projections, "student"))
        total, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
        for one, other in zip(ours, theirs, strict=True):
            s, t = same_shape(one, other, output)
            keep = position_mask(batch, mask, s.shape[:-1])
            part, number = masked_sum(distance(zero_masked(s, keep), zero_masked(t, keep)), keep)
            total, count = total + part, count + number
        return total, count

    return loss


def _states(outputs: Outputs, output: str, layers: list[int] | None, owner: str) -> list[Any]:
    states = named(outputs, output, owner)
    if layers is None:
        return [states]
    missing = [layer for layer in layers if not -len(states) <= layer < len(states)]
    if missing:
        # An index beyond the end of an array would silently give its last layer.
        raise ValueError(f"The {owner}'s {output!r} has {len(states)} entries; there is none at {missing}.")
    return [states[layer] for layer in layers]


def _projected(states: list[Any], matrices: Any) -> list[jax.Array]:
    if len(matrices) != len(states):
        raise ValueError(f"{len(states)} pairs need as many projections, got {len(matrices)}.")
    return [as_float32(state) @ as_float32(matrix) for state, matrix in zip(states, matrices, strict=True)]
