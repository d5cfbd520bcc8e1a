"""GPT-2 with each of its heads. Modules are named so that parameter paths are those of Hugging Face Flax.

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
from jaxcompress._src.models.dense import TiedEmbed, dense
from jaxcompress._src.models.gpt2.config import GPT2Config


class GPT2Model(nn.Module):
    """The decoder without a head.

    `module.apply({"params": params}, input_ids, attention_mask, ...)` returns a dict:

    - `last_hidden_state`: (B, L, D), normed.
    - `hidden_states`, if asked for: the embedding and the output of each layer, each (B, L, D), the last one normed.
    - `attentions` and `attention_scores`, if asked for: per layer, (B, H, L, S), float32, over the S tokens of the
      call, or places of the cache. Scores are taken before the softmax, and before what must not be seen is taken out.
    - `cache`, if one was given: with the tokens of this call.

    Kernels are (in, out), also where Hugging Face's Flax classes keep (out, in).

    Attributes:
        config: sizes and constants.
        dtype: of the computation. Softmax and the statistics of LayerNorm are float32 in any case.

    References:
        Radford et al. 2019, "Language models are unsupervised multitask learners". Parameter paths are those of
        `FlaxGPT2Model`.
    """

    config: GPT2Config
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(self.config.initializer_range)
        rows, positions, width = self.config.vocab_size, self.config.max_position_embeddings, self.config.hidden_size
        self.wte = TiedEmbed(rows, width, dtype=self.dtype, embedding_init=init)
        self.wpe = nn.Embed(positions, width, dtype=self.dtype, embedding_init=init)
        self.dropout = nn.Dropout(self.config.embd_pdrop)
        self.h = _Layers(self.config, self.dtype)
        self.ln_f = nn.LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype)

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
        embedded = self.dropout(self.wte(read.ids) + self.wpe(read.positions), deterministic=deterministic)
        states, attentions = self.h(embedded, read, writer, deterministic=deterministic)
        states[-1] = self.ln_f(states[-1])
        outputs: dict[str, Any] = {"last_hidden_state": states[-1], **writer.outputs(read)}
        if output_hidden_states:
            outputs["hidden_states"] = tuple(states)
        return outputs | (named_attentions(attentions) if output_attentions else {})

    def decode(self, hidden: jax.Array) -> jax.Array:
        """(B, L, D) to (B, L, vocab_size), through the transposed word embedding."""
        return self.wte.attend(hidden)


class GPT2ForCausalLM(nn.Module):
    """The decoder and the head of a language model: the word embedding, or a kernel of its own.

    Called as `GPT2Model` is, and with `logits`: "all" gives `logits`, (B, L, vocab_size), beside the outputs of
    `GPT2Model`; "last" those of the last place alone, (B, 1, vocab_size); "none" leaves them out.

    Attributes:
        config: sizes and constants.
        dtype: of the computation.

    Example:
        >>> config = GPT2Config(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> module = GPT2ForCausalLM(config)
        >>> input_ids = jnp.array([[2, 7, 9, 3]])
        >>> params = jax.jit(module.init)(jax.random.key(0), input_ids)["params"]
        >>> module.apply({"params": params}, input_ids)["logits"].shape
        (1, 4, 60)
    """

    config: GPT2Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids: ArrayLike, *args: Any, logits: LogitsAt = "all", **kwargs: Any) -> dict[str, Any]:
        """Runs the model; see `GPT2Model`."""
        check_head(self.config, "causal_lm")
        model = GPT2Model(self.config, self.dtype, name="transformer")
        outputs = model(input_ids, *args, **kwargs)
        hidden = selected(outputs["last_hidden_state"], logits)
        if hidden is None:
            return outputs
        if self.config.tie_word_embeddings:
            return {"logits": model.decode(hidden), **outputs}
        return {
            "logits": dense(self.config.vocab_size, self.config, self.dtype, name="lm_head", use_bias=False)(hidden),
            **outputs,
        }


class GPT2ForSequenceClassification(nn.Module):
    """The decoder and a classifier over the last token of each row.

    Called as `GPT2Model` is; returns `logits`, (B, num_labels), and `pooler_output`, (B, D), which the classifier
    reads, beside the outputs of `GPT2Model`.

    Attributes:
        config: sizes and constants.
        dtype: of the computation.
    """

    config: GPT2Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Runs the model; see `GPT2Model`."""
        check_head(self.config, "sequence_classification")
        model = GPT2Model(self.config, self.dtype, name="transformer")
        outputs = model(input_ids, attention_mask, *args, **kwargs)
        pooled = last_token(outputs["last_hidden_state"], attention_mask)
        score = dense(self.config.num_labels, self.config, self.dtype, name="score", use_bias=False)
        return {"logits": score(pooled), "pooler_output": pooled, **outputs}


def gpt2_module(config: GPT2Config, dtype: Any) -> nn.Module:
    """The module of `config.head`."""
    if config.head == "decoder":
        return GPT2Model(config, dtype)
    if config.head == "sequence_classification":
        return GPT2ForSequenceClassification(config, dtype)
    return GPT2ForCausalLM(config, dtype)


class _Layers(nn.Module):
    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, read: Reading, writer: CacheWriter, *, deterministic: bool
    ) -> tuple[list[jax.Array], list[Attention]]:
        """The input and the output of every layer, and what every layer attends to."""
        states, attentions, allowed = [hidden], [], read.allowed(None)
        for index in range(self.config.num_hidden_layers):
            layer = _Layer(self.config, index, self.dtype, name=str(index))
            hidden, attention = layer(hidden, allowed, writer, deterministic=deterministic)
            states.append(hidden)
            attentions.append(attention)
        return states, attentions


class _Layer(nn.Module):
    config: GPT2Config
    index: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, allowed: jax.Array, writer: CacheWriter, *, deterministic: bool
    ) -> tuple[jax.Array, Attention]:
        eps = self.config.layer_norm_eps
        attend = _Attention(self.config, self.config.num_attention_heads[self.index], self.dtype, name="attn")
        normed = nn.LayerNorm(epsilon=eps, dtype=self.dtype, name="ln_1")(hidden)
        context, attention = attend(normed, allowed, writer, deterministic=deterministic)
        hidden = hidden + context
        feed_forward = _FFN(self.config, self.config.intermediate_size[self.index], self.dtype, name="mlp")
        normed = nn.LayerNorm(epsilon=eps, dtype=self.dtype, name="ln_2")(hidden)
        return hidden + feed_forward(normed, deterministic=deterministic), attention


class _Attention(nn.Module):
    config: GPT2Config
    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, hidden: jax.Array, allowed: jax.Array, writer: CacheWriter, *, deterministic: bool
    ) -> tuple[jax.Array, Attention]:
        width = self.heads * self.config.head_size
        fused = dense(3 * width, self.config, self.dtype, name="c_attn")(hidden)
        query, key, value = (
            part.reshape(*part.shape[:-1], self.heads, self.config.head_size)
            for part in jnp.split(fused, (width, 2 * width), axis=-1)
        )
        keys, values = writer.layer(key, value)
        dropout = nn.Dropout(self.config.attn_pdrop, deterministic=deterministic)
        context, attention = attend(query, keys, values, allowed, dtype=self.dtype, dropout=dropout)
        output = dense(self.config.hidden_size, self.config, self.dtype, name="c_proj")(context)
        return nn.Dropout(self.config.resid_pdrop)(output, deterministic=deterministic), attention


class _FFN(nn.Module):
    config: GPT2Config
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, *, deterministic: bool) -> jax.Array:
        inner = ACTIVATIONS[self.config.hidden_act](dense(self.width, self.config, self.dtype, name="c_fc")(hidden))
        output = dense(self.config.hidden_size, self.config, self.dtype, name="c_proj")(inner)
        return nn.Dropout(self.config.resid_pdrop)(output, deterministic=deterministic)
