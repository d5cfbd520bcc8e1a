"""Causal attention, over what a call is given and what the cache holds.

Shape letters: B leading axes (a batch, usually), L tokens of the call, S tokens that can be attended to, K heads of
keys and values, G queries for each of them, d width of a head.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress._src.models.decoder.cache import Cache, Rows
from jaxcompress._src.tree.checks import is_traced


class Attention(NamedTuple):
    """What the heads of one layer attend to; float32, (B, K * G, L, S).

    Attributes:
        scores: before the softmax, and before what must not be seen is taken out.
        probabilities: after both, and before dropout.
    """

    scores: jax.Array
    probabilities: jax.Array


class Reading(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
        ids: (B, L).
        positions: int32 (B, L), counted over tokens that are no padding.
        mask: bool (B, S), where there is a token.
        start: int32, the place of the first token of the call among the S.
    """

    ids: jax.Array
    positions: jax.Array
    mask: jax.Array
    start: jax.Array

    def allowed(self, window: int | None) -> jax.Array:
        """(B, 1, L, S): a token sees itself and those before, of these the last `window`."""
        shape = (self.ids.shape[-1], self.mask.shape[-1])
        distance = self.start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        distance = distance - jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        tokens = self.mask[..., None, :]
        return (tokens & jnp.broadcast_to(seen, (*tokens.shape[:-2], *shape)))[..., None, :, :]


def reading(
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    position_ids: ArrayLike | None,
    cache: Cache | None,
    most: int,
) -> Reading:
    """The tokens of a call, checked, after those of the cache.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), above 0 where there is a token; by default everywhere.
        position_ids: (B, L); by default counted over the tokens, from those of the cache on.
        cache: what was read before.
        most: positions of the model.

    Raises:
        ValueError: shapes differ, or there are more tokens than positions, or than places that are free.
    """
    ids = jnp.asarray(input_ids)
    mask, positions = (None if other is None else jnp.asarray(other) for other in (attention_mask, position_ids))
    for name, other in (("attention_mask", mask), ("position_ids", positions)):
        if other is not None and other.shape != ids.shape:
            raise ValueError(f"`{name}` must have the shape of `input_ids`, {ids.shape}, got {other.shape}.")
    if ids.shape[-1] > most:
        raise ValueError(f"`input_ids` has {ids.shape[-1]} tokens; `max_position_embeddings` is {most}.")
    present = jnp.ones(ids.shape, bool) if mask is None else mask > 0
    counted = jnp.cumsum(present, axis=-1, dtype=jnp.int32)
    start = jnp.zeros((), jnp.int32)
    if cache is not None:
        _check_room(ids, cache)
        counted = counted + cache.mask.sum(axis=-1, keepdims=True, dtype=jnp.int32)
        start = cache.length
        present = jax.lax.dynamic_update_slice_in_dim(cache.mask, present, start, cache.mask.ndim - 1)
    if positions is None:
        # Padding on the left stands at position 0.
        positions = jnp.maximum(counted - 1, 0)
    return Reading(ids, positions, present, start)


def attend(
    query: jax.Array,
    keys: Rows,
    values: Rows,
    allowed: jax.Array,
    *,
    dtype: Any,
    dropout: Any = lambda weights: weights,
) -> tuple[jax.Array, Attention]:
    """Softmax attention with the scale d ** -0.5; heads of keys and values may serve several queries each.

    Args:
        query: (B, L, K * G, d).
        keys: of S tokens.
        values: of S tokens.
        allowed: bool, (B, 1, L, S).
        dtype: of the sum over values.
        dropout: of the probabilities.

    Returns:
        (B, L, K * G * d), and what was attended to.
    """
    heads, width = keys.codes.shape[-2:]
    groups = query.shape[-2] // heads if heads else 1
    *leading, length, _, _ = query.shape
    grouped = query.reshape(*leading, length, heads, groups, width)
    # Heads in front of tokens, and all queries of a head of keys in one matrix: XLA on a CPU takes half as long,
    # forward and backward, as for the same sums with the axes left where they are.
    grouped = jnp.moveaxis(grouped, -4, -2).reshape(*leading, heads, groups * length, width)
    # Scores and softmax are float32 whatever the dtype: bfloat16 has 8 bits, too few for a sum over many tokens.
    codes = keys.codes if keys.scale is None else keys.codes.astype(dtype)
    scores = jnp.matmul(grouped, jnp.moveaxis(codes, -3, -1), preferred_element_type=jnp.float32)
    scores = scores.reshape(*leading, heads, groups, length, codes.shape[-3])
    scores = _scaled(scores, keys.scale) * width**-0.5
    seen = allowed[..., None, :, :]
    # Finite, so that a row of padding, which sees nothing, is not NaN.
    probabilities = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min))
    weights = _scaled(dropout(probabilities), values.scale).astype(dtype)
    codes = values.codes if values.scale is None else values.codes.astype(dtype)
    weights = weights.reshape(*leading, heads, groups * length, codes.shape[-3])
    context = jnp.matmul(weights, jnp.swapaxes(codes, -3, -2)).reshape(*leading, heads, groups, length, width)
    context = jnp.moveaxis(context, -2, -4).reshape(*leading, length, query.shape[-2] * width)
    named = (part.reshape(*part.shape[:-4], query.shape[-2], *part.shape[-2:]) for part in (scores, probabilities))
    return context, Attention(*named)


@dataclasses.dataclass
class CacheWriter:
    """The cache of a call while it goes from layer to layer; without one, keys and values are those of the call."""

    cache: Cache | None
    start: jax.Array

    def __post_init__(self) -> None:
        """Begins before the first layer."""
        self._keys: list[Rows] = []
        self._values: list[Rows] = []

    def layer(self, keys: jax.Array, values: jax.Array) -> tuple[Rows, Rows]:
        """What the next layer attends to, given its keys and values of this call, (B, L, K, d)."""
        if self.cache is None:
            return Rows(keys, None), Rows(values, None)
        number = len(self._keys)
        self._keys.append(self.cache.keys[number].written(keys, self.start))
        self._values.append(self.cache.values[number].written(values, self.start))
        return self._keys[-1], self._values[-1]

    def outputs(self, read: Reading) -> dict[str, Cache]:
        """The entry `cache` of a model's outputs, if it was given one."""
        if self.cache is None:
            return {}
        taken = self.cache.length + read.ids.shape[-1]
        return {"cache": Cache(tuple(self._keys), tuple(self._values), read.mask, taken)}


def _scaled(numbers: jax.Array, scale: jax.Array | None) -> jax.Array:
    """(B, K, G, L, S) times (B, S, K)."""
    return numbers if scale is None else numbers * jnp.swapaxes(scale, -1, -2)[..., None, None, :]


def _check_room(ids: jax.Array, cache: Cache) -> None:
    if cache.mask.shape[:-1] != ids.shape[:-1]:
        raise ValueError(f"The cache is of rows {cache.mask.shape[:-1]}, `input_ids` of {ids.shape[:-1]}.")
    # What is compiled does not know how many places are taken; a cache that is full would lose its last tokens.
    taken = 0 if is_traced(cache.length) else int(cache.length)
    if taken + ids.shape[-1] > cache.capacity:
        raise ValueError(
            f"The cache has {cache.capacity} places, of which {taken} are taken: {ids.shape[-1]} more tokens do not "
            "fit. Give `init_cache` a larger `capacity`."
        )
