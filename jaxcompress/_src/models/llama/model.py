"""Llama with each of its heads. Modules are named so that parameter paths are those of Hugging Face Flax.

Shape letters: B leading axes (a batch, usually; none is fine), L tokens, D hidden size, H heads.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress._src.models.activations import ACTIVATIONS
from jaxcompress._src.models.decoder.attention import Attention, CacheWriter, Reading, attend, reading
from jaxcompress._src.models.decoder.cache import Cache
from jaxcompress._src.models.decoder.heads import LogitsAt, check_head, last_token, named_attentions, selected
from jaxcompress._src.models.decoder.rotary import rotated, rotation
from jaxcompress._src.models.dense import RowMatmul, TiedEmbed, dense
from jaxcompress._src.models.llama.config import LlamaConfig


class LlamaModel(nn.Module):
    """The decoder without a head.

    `module.apply({"params": params}, input_ids, attention_mask, ...)` returns a dict:

    - `last_hidden_state`: (B, L, D), normed.
    - `hidden_states`, if asked for: the embedding and the output of each layer, each (B, L, D), the last one normed.
    - `attentions` and `attention_scores`, if asked for: per layer, (B, H, L, S), float32, over the S tokens of the
      call, or places of the cache. Scores are taken before the softmax, and before what must not be seen is taken out.
    - `cache`, if one was given: with the tokens of this call.

    Attributes:
        config: sizes and constants.
        dtype: of the computation. Softmax, norms and rotations are computed in float32 in any case.

    References:
        Touvron et al. 2023, https://arxiv.org/abs/2302.13971. Parameter paths are those of `FlaxLlamaModel`.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(self.config.initializer_range)
        rows, width = self.config.vocab_size, self.config.hidden_size
        self.embed_tokens = TiedEmbed(rows, width, dtype=self.dtype, embedding_init=init)
        self.layers = _Layers(self.config, self.dtype)
        self.norm = _Norm(self.config.rms_norm_eps, self.dtype)

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        *,
        cache: Cache | None = None,
        deterministic: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> dict[str, Any]:
        """Runs the model.

        Args:
            input_ids: (B, L), integers.
            attention_mask: (B, L); above 0 where there is a token; padding may be on either side. All tokens, if not
                given.
            position_ids: (B, L); by default tokens are counted, without padding, after those of the cache.
            cache: of `init_cache`, or of the call before; the tokens are those that follow.
            deterministic: no dropout. Otherwise give `rngs={"dropout": key}`.
            output_hidden_states: return `hidden_states`.
            output_attentions: return `attentions` and `attention_scores`.

        Raises:
            ValueError: shapes differ, or there are more tokens than positions or than free places of the cache.
        """
        read = reading(input_ids, attention_mask, position_ids, cache, self.config.max_position_embeddings)
        writer = CacheWriter(cache, read.start)
        states, attentions = self.layers(self.embed_tokens(read.ids), read, writer, deterministic=deterministic)
        states[-1] = self.norm(states[-1])
        outputs: dict[str, Any] = {"last_hidden_state": states[-1], **writer.outputs(read)}
        if output_hidden_states:
            outputs["hidden_states"] = tuple(states)
        return outputs | (named_attentions(attentions) if output_attentions else {})

    def decode(self, hidden: jax.Array) -> jax.Array:
        """(B, L, D) to (B, L, vocab_size), through the transposed word embedding."""
        return self.embed_tokens.attend(hidden)


class LlamaForCausalLM(nn.Module):
    """The decoder and the head of a language model: the word embedding, or a kernel of its own.

    Called as `LlamaModel` is, and with `logits`: "all" gives `logits`, (B, L, vocab_size), beside the outputs of
    `LlamaModel`; "last" those of the last place alone, (B, 1, vocab_size); "none" leaves them out.

    Attributes:
        config: sizes and constants.
        dtype: of the computation.

    Example:
        >>> config = LlamaConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        ... )
        >>> module = LlamaForCausalLM(config)
        >>> input_ids = jnp.array([[2, 7, 9, 3]])
        >>> params = jax.jit(module.init)(jax.random.key(0), input_ids)["params"]
        >>> module.apply({"params": params}, input_ids)["logits"].shape
        (1, 4, 60)
    """

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids: ArrayLike, *args: Any, logits: LogitsAt = "all", **kwargs: Any) -> dict[str, Any]:
        """Runs the model; see `LlamaModel`."""
        check_head(self.config, "causal_lm")
        model = LlamaModel(self.config, self.dtype, name="model")
        outputs = model(input_ids, *args, **kwargs)
        hidden = selected(outputs["last_hidden_state"], logits)
        if hidden is None:
            return outputs
        if self.config.tie_word_embeddings:
            return {"logits": model.decode(hidden), **outputs}
        head = dense(self.config.vocab_size, self.config, self.dtype, name="lm_head", use_bias=False)
        return {"logits": head(hidden), **outputs}


class LlamaForSequenceClassification(nn.Module):
    """The decoder and a classifier over the last token of each row.

    Called as `LlamaModel` is; returns `logits`, (B, num_labels), and `pooler_output`, (B, D), which the classifier
    reads, beside the outputs of `LlamaModel`.

    Attributes:
        config: sizes and constants.
        dtype: of the computation.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Runs the model; see `LlamaModel`."""
        check_head(self.config, "sequence_classification")
        model = LlamaModel(self.config, self.dtype, name="model")
        outputs = model(input_ids, attention_mask, *args, **kwargs)
        pooled = last_token(outputs["last_hidden_state"], attention_mask)
        score = dense(self.config.num_labels, self.config, self.dtype, name="score", use_bias=False)
        return {"logits": score(pooled), "pooler_output": pooled, **outputs}


def llama_module(config: LlamaConfig, dtype: Any) -> nn.Module:
    """The module of `config.head`."""
    if config.head == "decoder":
        return LlamaModel(config, dtype)
    if config.head == "sequence_classification":
        return LlamaForSequenceClassification(config, dtype)
    return LlamaForCausalLM(config, dtype)


class _Layers(nn.Module):
    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, read: Reading, writer: CacheWriter, *, deterministic: bool
    ) -> tuple[list[jax.Array], list[Attention]]:
        """The input and the output of every layer, and what every layer attends to."""
        states, attentions = [hidden], []
        turned = rotation(read.positions, self.config.head_size, self.config.rope_theta, self.config.rope_scaling)
        allowed = {window: read.allowed(window) for window in set(self.config.sliding_window)}
        for index, window in enumerate(self.config.sliding_window):
            layer = _Layer(self.config, index, self.dtype, name=str(index))
            hidden, attention = layer(hidden, turned, allowed[window], writer, deterministic=deterministic)
            states.append(hidden)
            attentions.append(attention)
        return states, attentions


class _Layer(nn.Module):
    config: LlamaConfig
    index: int
    dtype: Any

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        turned: tuple[jax.Array, jax.Array],
        allowed: jax.Array,
        writer: CacheWriter,
        *,
        deterministic: bool,
    ) -> tuple[jax.Array, Attention]:
        normed = _Norm(self.config.rms_norm_eps, self.dtype, name="input_layernorm")(hidden)
        attend = _Attention(self.config, self.index, self.dtype, name="self_attn")
        context, attention = attend(normed, turned, allowed, writer, deterministic=deterministic)
        hidden = hidden + context
        normed = _Norm(self.config.rms_norm_eps, self.dtype, name="post_attention_layernorm")(hidden)
        return hidden + _FFN(self.config, self.config.intermediate_size[self.index], self.dtype, name="mlp")(
            normed
        ), attention


class _Attention(nn.Module):
    config: LlamaConfig
    index: int
    dtype: Any

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        turned: tuple[jax.Array, jax.Array],
        allowed: jax.Array,
        writer: CacheWriter,
        *,
        deterministic: bool,
    ) -> tuple[jax.Array, Attention]:
        queries, heads = self.config.num_attention_heads[self.index], self.config.num_key_value_heads[self.index]
        matmul = RowMatmul()
        query, key = self._project("q", hidden, queries, matmul), self._project("k", hidden, heads, matmul)
        value = self._project("v", hidden, heads, matmul)
        if self.config.qk_norm:
            query = _Norm(self.config.rms_norm_eps, self.dtype, name="q_norm")(query)
            key = _Norm(self.config.rms_norm_eps, self.dtype, name="k_norm")(key)
        keys, values = writer.layer(rotated(key, turned), value)
        dropout = nn.Dropout(self.config.attention_dropout, deterministic=deterministic)
        query = rotated(query, turned)
        context, attention = attend(query, keys, values, allowed, dtype=self.dtype, dropout=dropout)
        width, bias = self.config.hidden_size, self.config.output_bias
        return dense(width, self.config, self.dtype, name="o_proj", use_bias=bias)(context), attention

    def _project(self, name: str, hidden: jax.Array, heads: int, matmul: RowMatmul) -> jax.Array:
        size, bias = self.config.head_size, self.config.qkv_bias
        kernel = dense(heads * size, self.config, self.dtype, name=f"{name}_proj", use_bias=bias, matmul=matmul)
        return kernel(hidden).reshape(*hidden.shape[:-1], heads, size)


class _FFN(nn.Module):
    config: LlamaConfig
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        matmul = RowMatmul()
        gate, up = (
            dense(self.width, self.config, self.dtype, name=name, use_bias=self.config.mlp_bias, matmul=matmul)(hidden)
            for name in ("gate_proj", "up_proj")
        )
        width, bias = self.config.hidden_size, self.config.mlp_bias
        down = dense(width, self.config, self.dtype, name="down_proj", use_bias=bias)
        return down(ACTIVATIONS[self.config.hidden_act](gate) * up)


class _Norm(nn.Module):
    """x / sqrt(mean x² + eps) * weight, in float32."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, (hidden.shape[-1],))
        wide = hidden.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        return (normed * jnp.broadcast_to(jnp.asarray(weight, jnp.float32), normed.shape)).astype(self.dtype)
