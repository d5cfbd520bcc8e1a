"""The encoder of BERT and its variants with its pooling, and what goes in and comes out.

Shape letters: B leading axes (a batch, usually; none is fine), L tokens, D hidden size, H heads.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress._src.models.bert.config import BertConfig, Pooling
from jaxcompress._src.models.bert.layers import Attention, Embeddings, Encoder
from jaxcompress._src.models.dense import dense


class BertModel(nn.Module):
    """The encoder, with the pooling that the config asks for.

    `module.apply({"params": params}, input_ids, attention_mask, ...)` returns a dict:

    - `last_hidden_state`: (B, L, D).
    - `pooler_output`: (B, D), what a classifier reads: of `pooling="cls"` the first token, through the pooler if there
      is one; the mean over the mask of `pooling="mean"`. Absent for a masked language model.
    - `hidden_states`, if asked for: the embedding output and the output of each layer, each (B, L, D).
    - `attentions` and `attention_scores`, if asked for: per layer, (B, H, L, L), float32, before dropout. Scores are
      taken before the softmax and before masked positions are taken out.

    Attributes:
        config: sizes and constants.
        dtype: of the computation. Softmax and the statistics of LayerNorm are float32 in any case.

    Example:
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        ... )
        >>> module = BertModel(config)
        >>> input_ids = jnp.array([[2, 7, 9, 3]])
        >>> params = jax.jit(module.init)(jax.random.key(0), input_ids)["params"]
        >>> outputs = module.apply({"params": params}, input_ids)
        >>> outputs["last_hidden_state"].shape, outputs["pooler_output"].shape
        ((1, 4, 32), (1, 32))

    References:
        Devlin et al. 2018, https://arxiv.org/abs/1810.04805. Parameter paths are those of `FlaxBertModel`.
    """

    config: BertConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config, self.dtype)
        if self.config.has_pooler:
            self.pooler = _Pooler(self.config, self.dtype)

    @nn.compact
    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        *,
        deterministic: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> dict[str, Any]:
        """Runs the model.

        Args:
            input_ids: (B, L), integers.
            attention_mask: (B, L); above 0 where there is a token. All tokens, if not given.
            token_type_ids: (B, L); zeros, if not given. A DistilBERT has none.
            position_ids: (B, L), rows of the position embedding. If not given 0 to L - 1; of a RoBERTa counted from
                `position_offset` over the tokens of `attention_mask`.
            deterministic: no dropout. Otherwise give `rngs={"dropout": key}`.
            output_hidden_states: return `hidden_states`.
            output_attentions: return `attentions` and `attention_scores`.

        Raises:
            ValueError: shapes differ, there are more tokens than positions, or token types are given to a model that
                has none.
        """
        ids, mask, types, positions = _inputs(self.config, input_ids, attention_mask, token_type_ids, position_ids)
        embedded = self.embeddings(ids, types, positions, deterministic=deterministic)
        encoder = Encoder(self.config, self.dtype, name=self.config.variant.layers.split("/")[0])
        states, attentions = encoder(embedded, _attention_bias(mask), deterministic=deterministic)
        outputs: dict[str, Any] = {"last_hidden_state": states[-1], **self._pool(states[-1], mask)}
        if output_hidden_states:
            outputs["hidden_states"] = states
        return outputs | (_named(attentions) if output_attentions else {})

    def decode(self, hidden: jax.Array) -> jax.Array:
        """(B, L, D) to (B, L, vocab_size), through the transposed word embedding."""
        return self.embeddings.attend(hidden)

    def _pool(self, hidden: jax.Array, attention_mask: jax.Array | None) -> dict[str, jax.Array]:
        if self.config.head == "masked_lm":
            return {}
        if self.config.has_pooler:
            return {"pooler_output": self.pooler(hidden)}
        return {"pooler_output": _pooled(self.config.pooling, hidden, attention_mask)}


class _Pooler(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        return jnp.tanh(dense(self.config.hidden_size, self.config, self.dtype, name="dense")(hidden[..., 0, :]))


def _inputs(
    config: BertConfig, input_ids: ArrayLike, *others: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Ids, mask, types and positions as arrays of one shape, with their defaults."""
    ids = jnp.asarray(input_ids)
    mask, types, positions = (None if other is None else jnp.asarray(other) for other in others)
    for name, other in (("attention_mask", mask), ("token_type_ids", types), ("position_ids", positions)):
        if other is not None and other.shape != ids.shape:
            raise ValueError(f"`{name}` must have the shape of `input_ids`, {ids.shape}, got {other.shape}.")
    if types is not None and not config.type_vocab_size:
        raise ValueError(f"A {config.variant.title} has no token types: leave out `token_type_ids`.")
    if positions is None:
        positions = _positions(config, ids, mask)
    return ids, mask, jnp.zeros_like(ids) if types is None else types, positions


def _positions(config: BertConfig, ids: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    length, offset = ids.shape[-1], config.position_offset
    if length > config.max_tokens:
        reserved = f", of which the first {offset} are not for tokens" if offset else ""
        raise ValueError(
            f"`input_ids` has {length} tokens; `max_position_embeddings` is {config.max_position_embeddings}{reserved}."
        )
    if attention_mask is None or not offset:
        return jax.lax.broadcasted_iota(jnp.int32, ids.shape, ids.ndim - 1) + offset
    tokens = (attention_mask > 0).astype(jnp.int32)
    return tokens * tokens.cumsum(axis=-1) + (offset - 1)


def _attention_bias(attention_mask: jax.Array | None) -> jax.Array | None:
    """(B, L) to (B, 1, 1, L): 0 for tokens; elsewhere finite, so that a row without any token is not NaN."""
    if attention_mask is None:
        return None
    return jnp.where(attention_mask > 0, 0.0, jnp.finfo(jnp.float32).min)[..., None, None, :]


def _pooled(pooling: Pooling, hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    return hidden[..., 0, :] if pooling == "cls" else _masked_mean(hidden, attention_mask)


def _masked_mean(hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    if attention_mask is None:
        return hidden.mean(axis=-2, dtype=jnp.float32).astype(hidden.dtype)
    weights = (attention_mask > 0).astype(jnp.float32)[..., None]
    total = (hidden * weights).sum(axis=-2)
    return (total / jnp.maximum(weights.sum(axis=-2), 1.0)).astype(hidden.dtype)


def _named(attentions: tuple[Attention, ...]) -> dict[str, tuple[jax.Array, ...]]:
    return {
        "attentions": tuple(attention.probabilities for attention in attentions),
        "attention_scores": tuple(attention.scores for attention in attentions),
    }
