"""Losses on attention, and on relations between positions. Shape letters: B batch, H heads, L positions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.distillation.divergences import class_divergence
from jaxcompress._src.distillation.outputs import LossFn, masked_sum, position_mask
from jaxcompress._src.distillation.pairs import Pairs, pair_loss


def attention_probabilities(*, pairs: Pairs, output: str = "attentions", mask: str | None = "attention_mask") -> LossFn:
    """KL(teacher ‖ student) of where each position looks, summed over heads, real queries and pairs of layers.

    Rows are distributions over the real keys: what a model gives to masked ones is left out, and the rest is divided by
    its sum. Probabilities below the smallest normal float32 count as that.

    Args:
        pairs: (student layer, teacher layer): places in the output, which is a sequence of arrays or an array with a
            leading layer axis. `ClosestLayers` chooses them at each step. None: the output is one array itself.
        output: name of the probabilities in the outputs of both, (B, H, L, L) with keys last, any float dtype.
        mask: entry of the batch, (B, L), nonzero where positions count, as queries and as keys. None: nothing is padded
            (and queries and keys may differ in number).

    Returns:
        A `LossFn`; the count is heads x queries x pairs. For squared differences of probabilities, see
        `attention_scores(output="attentions")`; for different numbers of heads, `relations`.

    Raises:
        ValueError: no pairs; when called: a missing output or mask, a layer that does not exist, shapes that differ.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.full((1, 1, 2, 2), 0.5), jnp.array([[[[0.5, 0.5], [1.0, 0.0]]]])
        >>> loss = attention_probabilities(pairs=None)
        >>> total, count = loss({"attentions": student}, {"attentions": teacher}, {"attention_mask": jnp.ones((1, 2))})
        >>> round(float(total), 4), float(count)
        (0.6931, 2.0)

    References:
        Wang et al. 2020, "MiniLM: deep self-attention distillation", equation 2 (of the last layers, pairs [(-1, -1)]).
    """

    def compare(s: jax.Array, t: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        queries, keys = _attention_masks(batch, mask, s.shape, output)
        counted = queries & keys
        s, t = (jnp.log(jnp.maximum(jnp.where(counted, x, 1.0), jnp.finfo(x.dtype).tiny)) for x in (s, t))
        return _row_divergence(s, t, queries, keys)

    return pair_loss(pairs, output, compare)


def attention_scores(*, pairs: Pairs, output: str = "attention_scores", mask: str | None = "attention_mask") -> LossFn:
    """Mean of (student - teacher)² over the scores before the softmax, of real queries and keys.

    Scores of the teacher at or below -100 do not count: by such numbers models hide keys, padding or later ones.

    Args:
        pairs: as in `attention_probabilities`.
        output: name of the scores (or of probabilities) in the outputs of both, (B, H, L, L) with keys last.
        mask: as in `attention_probabilities`.

    Returns:
        A `LossFn`; the count is the number of (head, query, key) that count, over all pairs.

    Raises:
        ValueError: as in `attention_probabilities`.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = jnp.zeros((1, 1, 2, 2)), jnp.array([[[[3.0, -jnp.inf], [1.0, 0.0]]]])
        >>> attention_scores(pairs=None, mask=None)({"attention_scores": student}, {"attention_scores": teacher}, {})
        (Array(10., dtype=float32), Array(3., dtype=float32))

    References:
        Jiao et al. 2020, "TinyBERT", equation 7; its code sets scores <= -100 of either model to 0, and counts them.
    """

    def compare(s: jax.Array, t: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        queries, keys = _attention_masks(batch, mask, s.shape, output)
        counted = queries & keys & ~(t <= -100.0)
        s, t = (jnp.where(counted, x, 0.0) for x in (s, t))
        return masked_sum(jnp.square(s - t), counted)

    return pair_loss(pairs, output, compare)


def relations(*, pairs: Pairs, heads: int, output: str, mask: str | None = "attention_mask") -> LossFn:
    """KL(teacher ‖ student) of softmax(R Rᵀ / √d), how alike the positions are by their queries, keys or values R.

    R is split into `heads` relation heads of width d: (B, L, heads · d). So student and teacher may differ in width and
    in attention heads. A loss for each of queries, keys and values makes MiniLMv2.

    Args:
        pairs: as in `attention_probabilities`. MiniLM takes the last layer of both, [(-1, -1)]; MiniLMv2 a layer of the
            upper middle of large teachers.
        heads: number of relation heads; it divides the widths of both models. More than attention has is finer (48 for
            a base model).
        output: name of the vectors in the outputs of both: (B, L, features), or with several axes of features, such as
            (B, L, H, features).
        mask: as in `attention_probabilities`.

    Returns:
        A `LossFn`; the count is relation heads x real positions x pairs.

    Raises:
        ValueError: `heads` below 1; when called: as in `attention_probabilities`, or a width that `heads` does not
            divide.

    Example:
        >>> import jax.numpy as jnp
        >>> student, teacher = {"values": jnp.ones((1, 2, 6))}, {"values": jnp.ones((1, 2, 12))}
        >>> batch = {"attention_mask": jnp.array([[1, 1]])}
        >>> relations(pairs=None, heads=3, output="values")(student, teacher, batch)
        (Array(0., dtype=float32), Array(6., dtype=float32))

    References:
        Wang et al. 2020, "MiniLM", equation 4 (values); Wang et al. 2021, "MiniLMv2: multi-head self-attention relation
        distillation", equations 1 to 4.
    """
    if heads < 1:
        raise ValueError(f"`heads` must be at least 1, got {heads}.")

    def compare(s: jax.Array, t: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        if min(s.ndim, t.ndim) < 3 or s.shape[:2] != t.shape[:2]:
            raise ValueError(
                f"{output!r} must have shape (batch, positions, features...) in both models, got {s.shape} from the "
                f"student and {t.shape} from the teacher."
            )
        real = position_mask(batch, mask, s.shape[:2])
        s, t = (_relation_scores(x, real, heads, output) for x in (s, t))
        return _row_divergence(s, t, real[:, None, :, None], real[:, None, None, :])

    return pair_loss(pairs, output, compare, equal_shapes=False)


def _attention_masks(
    batch: Mapping[str, Any], mask: str | None, shape: tuple[int, ...], output: str
) -> tuple[jax.Array, jax.Array]:
    """Which queries and which keys are real, as (B, 1, L, 1) and (B, 1, 1, L)."""
    if len(shape) != 4:
        raise ValueError(f"{output!r} must have shape (batch, heads, queries, keys), got {shape}.")
    if mask is None:
        return jnp.ones((1, 1, shape[2], 1), bool), jnp.ones((1, 1, 1, shape[3]), bool)
    if shape[2] != shape[3]:
        raise ValueError(
            f"{output!r} has {shape[2]} queries and {shape[3]} keys; the mask {mask!r} is for equal numbers of them."
        )
    real = position_mask(batch, mask, (shape[0], shape[3]))
    return real[:, None, :, None], real[:, None, None, :]


def _relation_scores(vectors: jax.Array, real: jax.Array, heads: int, output: str) -> jax.Array:
    """R Rᵀ / √d for each head, (B, heads, L, L)."""
    vectors = vectors.reshape(*vectors.shape[:2], -1)
    width = vectors.shape[-1]
    if width % heads:
        raise ValueError(f"`heads` is {heads}, which does not divide the width {width} of {output!r}.")
    vectors = jnp.where(real[..., None], vectors, 0.0).reshape(*vectors.shape[:2], heads, -1)
    return jnp.einsum("bqhd,bkhd->bhqk", vectors, vectors) * vectors.shape[-1] ** -0.5


def _row_divergence(s: jax.Array, t: jax.Array, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL of the softmaxes over real keys, summed over real queries, and their number."""
    s, t = (jnp.where(keys, x, jnp.finfo(x.dtype).min) for x in (s, t))
    terms = class_divergence(s, t)
    return masked_sum(terms, jnp.broadcast_to(queries[..., 0], terms.shape))
