"""BERT with each of its heads.

Shape letters: B leading axes (a batch, usually; none is fine), L tokens, D hidden size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress._src.models.activations import ACTIVATIONS
from jaxcompress._src.models.bert.config import BertConfig
from jaxcompress._src.models.bert.layers import dense
from jaxcompress._src.models.bert.model import BertModel


class BertForSequenceClassification(nn.Module):
    """The encoder and a classifier over its pooled output.

    Called as `BertModel` is; returns `logits`, (B, num_labels), beside the outputs of `BertModel`.

    Attributes:
        config: sizes and constants.
        dtype: of the computation.
    """

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids: ArrayLike, *args: Any, deterministic: bool = True, **kwargs: Any) -> dict[str, Any]:
        """Runs the model; see `BertModel`."""
        _check_head(self.config, "sequence_classification")
        bert = BertModel(self.config, self.dtype, name="bert")
        outputs = bert(input_ids, *args, deterministic=deterministic, **kwargs)
        rate = self.config.classifier_dropout
        dropout = nn.Dropout(self.config.hidden_dropout_prob if rate is None else rate)
        pooled = dropout(outputs["pooler_output"], deterministic=deterministic)
        classifier = dense(self.config.num_labels, self.config, self.dtype, name="classifier")
        return {"logits": classifier(pooled), **outputs}


class BertForMaskedLM(nn.Module):
    """The encoder and the masked language model head, whose decoder is the word embedding.

    Called as `BertModel` is; returns `logits`, (B, L, vocab_size), beside the outputs of `BertModel`.

    Attributes:
        config: sizes and constants.
        dtype: of the computation.
    """

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids: ArrayLike, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Runs the model; see `BertModel`."""
        _check_head(self.config, "masked_lm")
        bert = BertModel(self.config, self.dtype, name="bert")
        outputs = bert(input_ids, *args, **kwargs)
        predictions = _MaskedLMHead(self.config, self.dtype, name="cls")
        return {"logits": predictions(outputs["last_hidden_state"], bert), **outputs}


def bert_module(config: BertConfig, dtype: Any) -> nn.Module:
    """The module of `config.head`."""
    if config.head == "encoder":
        return BertModel(config, dtype)
    if config.head == "sequence_classification":
        return BertForSequenceClassification(config, dtype)
    return BertForMaskedLM(config, dtype)


class _MaskedLMHead(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, bert: BertModel) -> jax.Array:
        return _Predictions(self.config, self.dtype, name="predictions")(hidden, bert)


class _Predictions(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, bert: BertModel) -> jax.Array:
        logits = bert.decode(_Transform(self.config, self.dtype, name="transform")(hidden))
        bias = self.param("bias", nn.initializers.zeros, (self.config.vocab_size,))
        return logits + jnp.broadcast_to(jnp.asarray(bias, self.dtype), logits.shape)


class _Transform(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        hidden = dense(self.config.hidden_size, self.config, self.dtype, name="dense")(hidden)
        hidden = ACTIVATIONS[self.config.hidden_act](hidden)
        return nn.LayerNorm(epsilon=self.config.layer_norm_eps, dtype=self.dtype, name="LayerNorm")(hidden)


def _check_head(config: BertConfig, head: str) -> None:
    if config.head != head:
        raise ValueError(f"`config.head` must be {head!r} here, got {config.head!r}; `make_module` picks the class.")
