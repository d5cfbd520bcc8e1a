"""The keys and values of tokens that a decoder has read, so that it need not read them again.

Shape letters: B leading axes (a batch, usually), S places of the cache, K heads of keys and values, d their width.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

_LARGEST_CODE = 127.0


class DecoderConfig(Protocol):
    """What a cache must know of a config."""

    num_hidden_layers: int
    head_size: int
    max_position_embeddings: int

    @property
    def num_key_value_heads(self) -> tuple[int, ...]:
        """Of each layer."""
        ...


class Rows(NamedTuple):
    """Keys, or values, of the tokens of one layer: `codes * scale`.

    Attributes:
        codes: (B, S, K, d), floats; or int8.
        scale: (B, S, K), float32: of each token and head; None: the codes are the numbers.
    """

    codes: jax.Array
    scale: jax.Array | None

    def written(self, rows: jax.Array, start: jax.Array) -> "Rows":
        """With new rows, (B, L, K, d), from place `start` on; rounded to nearest where there is a scale."""
        axis = rows.ndim - 3
        if self.scale is None:
            return Rows(_placed(self.codes, rows, start, axis), None)
        codes, scale = _rounded(rows)
        return Rows(_placed(self.codes, codes, start, axis), _placed(self.scale, scale, start, axis))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "mask", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a decoder has read so far. Made by `init_cache`; a model takes one and gives one back.

    Attributes:
        keys: `Rows` of each layer; those of rotary models are rotated.
        values: `Rows` of each layer.
        mask: bool (B, S), where there is a token: not at padding, nor at places that are still free.
        length: int32, places that are taken: where the next tokens go.
    """

    keys: tuple[Rows, ...]
    values: tuple[Rows, ...]
    mask: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """Places, taken or free."""
        return self.mask.shape[-1]


def init_cache(
    config: DecoderConfig, batch: int | tuple[int, ...], capacity: int, *, bits: int | None = None, dtype: Any = None
) -> Cache:
    """A cache without tokens.

    Keys and values of a token take 2 x d numbers for each head of a layer. With 8 bits, each token's d numbers of a
    head are codes in [-127, 127] and one float32 scale, max |x| / 127; scores and sums are of codes, and scales
    multiply them afterwards.

    Args:
        config: of a decoder: `module.config`.
        batch: rows, or their leading axes.
        capacity: tokens of a row, prompt and continuation together.
        bits: None: floats; 8: int8.
        dtype: of floats; float32 by default.

    Returns:
        The cache, for `module.apply(..., cache=cache)`.

    Raises:
        ValueError: more places than the model has positions, or other bits.

    Example:
        >>> from jaxcompress.models import LlamaConfig
        >>> config = LlamaConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     intermediate_size=64,
        ... )
        >>> cache = init_cache(config, 3, 16)
        >>> cache.keys[0].codes.shape, int(cache.length)
        ((3, 16, 2, 8), 0)
    """
    if bits not in (None, 8):
        raise ValueError(f"`bits` of a cache must be 8 or None, got {bits}.")
    if not 1 <= capacity <= config.max_position_embeddings:
        raise ValueError(
            f"`capacity` must be between 1 and `max_position_embeddings`, {config.max_position_embeddings}, got "
            f"{capacity}."
        )
    shape = (*((batch,) if isinstance(batch, int) else batch), capacity)

    def rows(heads: int) -> Rows:
        full = (*shape, heads, config.head_size)
        if bits is None:
            return Rows(jnp.zeros(full, jnp.float32 if dtype is None else dtype), None)
        return Rows(jnp.zeros(full, jnp.int8), jnp.zeros(full[:-1], jnp.float32))

    # Of one another's own: a donated buffer may be given away once only.
    keys, values = (tuple(rows(heads) for heads in config.num_key_value_heads) for _ in range(2))
    return Cache(keys, values, jnp.zeros(shape, bool), jnp.zeros((), jnp.int32))


def _rounded(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = rows.astype(jnp.float32)
    scale = jnp.abs(rows).max(axis=-1) / _LARGEST_CODE
    codes = jnp.round(rows / jnp.where(scale > 0, scale, 1.0)[..., None])
    return codes.astype(jnp.int8), scale


def _placed(whole: jax.Array, part: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis)
