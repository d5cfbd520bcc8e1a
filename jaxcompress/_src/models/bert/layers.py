"""The body of BERT: embeddings and layers. Modules are named so that parameter paths are those of Hugging Face Flax.

Shape letters: B leading axes (a batch, usually), L tokens, D hidden size, H heads.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress._src.models.activations import ACTIVATIONS
from jaxcompress._src.models.bert.config import BertConfig


class Attention(NamedTuple):
    """What the heads of one layer attend to; float32, (B, H, L, L), before dropout.

    Attributes:
        scores: before the softmax, and before masked positions are taken out.
        probabilities: after both.
    """

    scores: jax.Array
    probabilities: jax.Array


def dense(features: int, config: BertConfig, dtype: Any, *, name: str | None = None) -> nn.Dense:
    """A dense layer with BERT's initialisation, which, unlike Flax's default, accepts 0 inputs."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


class Embeddings(nn.Module):
    """Sum of the word, position and token type embeddings, normalised."""

    config: BertConfig
    dtype: Any

    def setup(self) -> None:
        self.word_embeddings = self._embed(self.config.vocab_size)
        self.position_embeddings = self._embed(self.config.max_position_embeddings)
        self.token_type_embeddings = self._embed(self.config.type_vocab_size)
        self.LayerNorm = nn.LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, *, deterministic: bool
    ) -> jax.Array:
        """(B, L) ids to (B, L, D)."""
        embedded = self.word_embeddings(input_ids)
        embedded = embedded + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embedded), deterministic=deterministic)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """(B, L, D) to (B, L, vocab_size): the tied decoder."""
        return self.word_embeddings.attend(hidden)

    def _embed(self, rows: int) -> nn.Embed:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Embed(rows, self.config.hidden_size, dtype=self.dtype, embedding_init=init)


class Encoder(nn.Module):
    """All layers. The path component `layer` is a module of its own in Hugging Face Flax, and so it is here."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array | None, *, deterministic: bool
    ) -> tuple[tuple[jax.Array, ...], tuple[Attention, ...]]:
        """(B, L, D) to the input and the output of every layer, and what every layer attends to."""
        return _Layers(self.config, self.dtype, name="layer")(hidden, bias, deterministic=deterministic)


class _Layers(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array | None, *, deterministic: bool
    ) -> tuple[tuple[jax.Array, ...], tuple[Attention, ...]]:
        states, attentions = [hidden], []
        sizes = zip(self.config.num_attention_heads, self.config.intermediate_size, strict=True)
        for index, (heads, width) in enumerate(sizes):
            layer = _Layer(self.config, heads, width, self.dtype, name=str(index))
            hidden, attention = layer(hidden, bias, deterministic=deterministic)
            states.append(hidden)
            attentions.append(attention)
        return tuple(states), tuple(attentions)


class _Layer(nn.Module):
    config: BertConfig
    heads: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array | None, *, deterministic: bool
    ) -> tuple[jax.Array, Attention]:
        attend = _Attention(self.config, self.heads, self.dtype, name="attention")
        hidden, attention = attend(hidden, bias, deterministic=deterministic)
        inner = _Intermediate(self.config, self.width, self.dtype, name="intermediate")(hidden)
        output = _Output(self.config, self.dtype, name="output")
        return output(inner, hidden, deterministic=deterministic), attention


class _Attention(nn.Module):
    config: BertConfig
    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array | None, *, deterministic: bool
    ) -> tuple[jax.Array, Attention]:
        attend = _SelfAttention(self.config, self.heads, self.dtype, name="self")
        context, attention = attend(hidden, bias, deterministic=deterministic)
        output = _Output(self.config, self.dtype, name="output")
        return output(context, hidden, deterministic=deterministic), attention


class _SelfAttention(nn.Module):
    config: BertConfig
    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array | None, *, deterministic: bool
    ) -> tuple[jax.Array, Attention]:
        query, key, value = (self._project(name, hidden) for name in ("query", "key", "value"))
        # Scores and softmax are float32 whatever the dtype: bfloat16 has 8 bits, too few for a sum over many tokens.
        scores = jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32)
        scores = scores * self.config.head_size**-0.5
        probabilities = jax.nn.softmax(scores if bias is None else scores + bias)
        dropout = nn.Dropout(self.config.attention_probs_dropout_prob)
        weights = dropout(probabilities.astype(self.dtype), deterministic=deterministic)
        context = jnp.einsum("...hqk,...khd->...qhd", weights, value)
        width = self.heads * self.config.head_size
        return context.reshape(*context.shape[:-2], width), Attention(scores, probabilities)

    def _project(self, name: str, hidden: jax.Array) -> jax.Array:
        projected = dense(self.heads * self.config.head_size, self.config, self.dtype, name=name)(hidden)
        return projected.reshape(*projected.shape[:-1], self.heads, self.config.head_size)


class _Intermediate(nn.Module):
    config: BertConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.hidden_act](dense(self.width, self.config, self.dtype, name="dense")(hidden))


class _Output(nn.Module):
    """The end of both sublayers: dense, dropout, residual, norm."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, inner: jax.Array, residual: jax.Array, *, deterministic: bool) -> jax.Array:
        output = dense(self.config.hidden_size, self.config, self.dtype, name="dense")(inner)
        output = nn.Dropout(self.config.hidden_dropout_prob)(output, deterministic=deterministic)
        return nn.LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype, name="LayerNorm")(output + residual)
