"""The body of BERT and its variants: embeddings and layers, with the parameter paths of Hugging Face Flax.

Shape letters: B leading axes (a batch, usually), L tokens, D hidden size, H heads.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcompress._src.models.activations import ACTIVATIONS
from jaxcompress._src.models.bert.config import BertConfig
from jaxcompress._src.models.dense import RowMatmul, TiedEmbed, dense


class Attention(NamedTuple):
    """What the heads of one layer attend to; float32, (B, H, L, L), before dropout.

    Attributes:
        scores: before the softmax, and before masked positions are taken out.
        probabilities: after both.
    """

    scores: jax.Array
    probabilities: jax.Array


def norm(config: BertConfig, dtype: Any, *, name: str | None = None) -> nn.LayerNorm:
    """A LayerNorm with the constant of the config."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, name=name)


class Embeddings(nn.Module):
    """Sum of the word, position and, where there are any, token type embeddings, normalised."""

    config: BertConfig
    dtype: Any

    def setup(self) -> None:
        self.word_embeddings = self._embed(self.config.vocab_size)
        self.position_embeddings = self._embed(self.config.max_position_embeddings)
        if self.config.type_vocab_size:
            self.token_type_embeddings = self._embed(self.config.type_vocab_size)
        self.LayerNorm = norm(self.config, self.dtype)
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob)

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, position_ids: jax.Array, *, deterministic: bool
    ) -> jax.Array:
        """(B, L) ids to (B, L, D)."""
        embedded = self.word_embeddings(input_ids)
        if self.config.type_vocab_size:
            embedded = embedded + self.token_type_embeddings(token_type_ids)
        embedded = embedded + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embedded), deterministic=deterministic)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """(B, L, D) to (B, L, vocab_size): the tied decoder."""
        return self.word_embeddings.attend(hidden)

    def _embed(self, rows: int) -> TiedEmbed:
        init = nn.initializers.normal(self.config.initializer_range)
        return TiedEmbed(rows, self.config.hidden_size, dtype=self.dtype, embedding_init=init)


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
        make = _DistilBertLayer if self.config.model_type == "distilbert" else _BertLayer
        for index, (heads, width) in enumerate(sizes):
            layer = make(self.config, heads, width, self.dtype, name=str(index))
            hidden, attention = layer(hidden, bias, deterministic=deterministic)
            states.append(hidden)
            attentions.append(attention)
        return tuple(states), tuple(attentions)


class _BertLayer(nn.Module):
    config: BertConfig
    heads: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array | None, *, deterministic: bool
    ) -> tuple[jax.Array, Attention]:
        attend = _BertAttention(self.config, self.heads, self.dtype, name="attention")
        hidden, attention = attend(hidden, bias, deterministic=deterministic)
        inner = _BertIntermediate(self.config, self.width, self.dtype, name="intermediate")(hidden)
        output = _BertOutput(self.config, self.dtype, name="output")
        return output(inner, hidden, deterministic=deterministic), attention


class _BertAttention(nn.Module):
    config: BertConfig
    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array | None, *, deterministic: bool
    ) -> tuple[jax.Array, Attention]:
        attend = _BertSelfAttention(self.config, self.heads, self.dtype, name="self")
        context, attention = attend(hidden, bias, deterministic=deterministic)
        output = _BertOutput(self.config, self.dtype, name="output")
        return output(context, hidden, deterministic=deterministic), attention


class _BertSelfAttention(nn.Module):
    config: BertConfig
    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array | None, *, deterministic: bool
    ) -> tuple[jax.Array, Attention]:
        names = ("query", "key", "value")
        return _attend(hidden, bias, self.config, self.heads, self.dtype, names=names, deterministic=deterministic)


class _BertIntermediate(nn.Module):
    config: BertConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.hidden_act](dense(self.width, self.config, self.dtype, name="dense")(hidden))


class _BertOutput(nn.Module):
    """The end of both sublayers: dense, dropout, residual, norm."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, inner: jax.Array, residual: jax.Array, *, deterministic: bool) -> jax.Array:
        output = dense(self.config.hidden_size, self.config, self.dtype, name="dense")(inner)
        output = nn.Dropout(self.config.hidden_dropout_prob)(output, deterministic=deterministic)
        return norm(self.config, self.dtype, name="LayerNorm")(output + residual)


class _DistilBertLayer(nn.Module):
    config: BertConfig
    heads: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array | None, *, deterministic: bool
    ) -> tuple[jax.Array, Attention]:
        attend = _DistilBertAttention(self.config, self.heads, self.dtype, name="attention")
        context, attention = attend(hidden, bias, deterministic=deterministic)
        hidden = norm(self.config, self.dtype, name="sa_layer_norm")(context + hidden)
        output = _DistilBertFFN(self.config, self.width, self.dtype, name="ffn")(hidden, deterministic=deterministic)
        return norm(self.config, self.dtype, name="output_layer_norm")(output + hidden), attention


class _DistilBertAttention(nn.Module):
    config: BertConfig
    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, bias: jax.Array | None, *, deterministic: bool
    ) -> tuple[jax.Array, Attention]:
        names = ("q_lin", "k_lin", "v_lin")
        context, attention = _attend(
            hidden, bias, self.config, self.heads, self.dtype, names=names, deterministic=deterministic
        )
        # Unlike BERT, DistilBERT has no dropout here.
        return dense(self.config.hidden_size, self.config, self.dtype, name="out_lin")(context), attention


class _DistilBertFFN(nn.Module):
    config: BertConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, *, deterministic: bool) -> jax.Array:
        inner = ACTIVATIONS[self.config.hidden_act](dense(self.width, self.config, self.dtype, name="lin1")(hidden))
        output = dense(self.config.hidden_size, self.config, self.dtype, name="lin2")(inner)
        return nn.Dropout(self.config.hidden_dropout_prob)(output, deterministic=deterministic)


def _attend(
    hidden: jax.Array,
    bias: jax.Array | None,
    config: BertConfig,
    heads: int,
    dtype: Any,
    *,
    names: tuple[str, str, str],
    deterministic: bool,
) -> tuple[jax.Array, Attention]:
    """Self-attention up to its output layer, (B, L, D) to (B, L, H * head_size): called inside of a compact module.

    Args:
        hidden: (B, L, D).
        bias: (B, 1, 1, L), added to the scores.
        config: sizes and constants.
        heads: of this layer.
        dtype: of the computation.
        names: of the projections of query, key and value.
        deterministic: no dropout.
    """
    width = heads * config.head_size
    matmul = RowMatmul()
    projections = (dense(width, config, dtype, name=name, matmul=matmul)(hidden) for name in names)
    # Heads in front of tokens: XLA on a CPU multiplies such matrices faster than with the axes left where they are.
    query, key, value = (jnp.swapaxes(x.reshape(*x.shape[:-1], heads, config.head_size), -3, -2) for x in projections)
    # Scores and softmax are float32 whatever the dtype: bfloat16 has 8 bits, too few for a sum over many tokens.
    scores = jnp.matmul(query, jnp.swapaxes(key, -2, -1), preferred_element_type=jnp.float32)
    scores = scores * config.head_size**-0.5
    probabilities = jax.nn.softmax(scores if bias is None else scores + bias)
    dropout = nn.Dropout(config.attention_probs_dropout_prob)
    weights = dropout(probabilities.astype(dtype), deterministic=deterministic)
    context = jnp.swapaxes(jnp.matmul(weights, value), -3, -2)
    return context.reshape(*context.shape[:-2], width), Attention(scores, probabilities)
