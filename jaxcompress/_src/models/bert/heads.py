"""BERT and its variants with each of their heads.

Shape letters: B leading axes (a batch, usually; none is fine), L tokens, D hidden size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress._src.models.activations import ACTIVATIONS
from jaxcompress._src.models.bert.config import BertConfig
from jaxcompress._src.models.bert.layers import norm
from jaxcompress._src.models.bert.model import BertModel
from jaxcompress._src.models.dense import dense


class BertForSequenceClassification(nn.Module):
    """The encoder and a classifier over its pooled output.

    Called as `BertModel` is; returns `logits`, (B, num_labels), beside the outputs of `BertModel`. `pooler_output` is
    what the last layer of the classifier reads, after the one that a RoBERTa or a DistilBERT has before it.

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
        model = BertModel(self.config, self.dtype, name=self.config.variant.prefix)
        outputs = model(input_ids, *args, deterministic=deterministic, **kwargs)
        pooled = outputs["pooler_output"]
        if self.config.model_type in ("roberta", "xlm-roberta"):
            classifier = _RobertaClassifier(self.config, self.dtype, name="classifier")
            logits, pooled = classifier(pooled, deterministic=deterministic)
        else:
            if self.config.model_type == "distilbert":
                pooled = nn.relu(dense(self.config.hidden_size, self.config, self.dtype, name="pre_classifier")(pooled))
            dropped = _classifier_dropout(self.config)(pooled, deterministic=deterministic)
            logits = dense(self.config.num_labels, self.config, self.dtype, name="classifier")(dropped)
        return {"logits": logits, **outputs, "pooler_output": pooled}


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
        model = BertModel(self.config, self.dtype, name=self.config.variant.prefix)
        outputs = model(input_ids, *args, **kwargs)
        hidden = outputs["last_hidden_state"]
        if self.config.model_type == "distilbert":
            hidden = _transform(hidden, self.config, self.dtype, names=("vocab_transform", "vocab_layer_norm"))
            logits = _Bias(self.config, self.dtype, name="vocab_projector")(model.decode(hidden))
        else:
            head = _BertPredictions if self.config.model_type == "bert" else _RobertaPredictions
            logits = head(self.config, self.dtype, name=self.config.variant.decoder.split("/")[0])(hidden, model)
        return {"logits": logits, **outputs}


def bert_module(config: BertConfig, dtype: Any) -> nn.Module:
    """The module of `config.head`."""
    if config.head == "encoder":
        return BertModel(config, dtype)
    if config.head == "sequence_classification":
        return BertForSequenceClassification(config, dtype)
    return BertForMaskedLM(config, dtype)


class _RobertaClassifier(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, pooled: jax.Array, *, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        """(B, D) to the logits, and to what the last layer reads."""
        dropout = _classifier_dropout(self.config)
        hidden = dropout(pooled, deterministic=deterministic)
        hidden = jnp.tanh(dense(self.config.hidden_size, self.config, self.dtype, name="dense")(hidden))
        project = dense(self.config.num_labels, self.config, self.dtype, name="out_proj")
        return project(dropout(hidden, deterministic=deterministic)), hidden


def _classifier_dropout(config: BertConfig) -> nn.Dropout:
    rate = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if rate is None else rate)


class _BertPredictions(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, model: BertModel) -> jax.Array:
        return _Predictions(self.config, self.dtype, name="predictions")(hidden, model)


class _Predictions(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, model: BertModel) -> jax.Array:
        logits = model.decode(_BertTransform(self.config, self.dtype, name="transform")(hidden))
        return _with_bias(self, logits)


class _BertTransform(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        return _transform(hidden, self.config, self.dtype, names=("dense", "LayerNorm"))


class _RobertaPredictions(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, model: BertModel) -> jax.Array:
        # The activation is not that of the layers, whatever `hidden_act` says.
        hidden = _transform(hidden, self.config, self.dtype, names=("dense", "layer_norm"), activation="gelu")
        return _with_bias(self, model.decode(hidden))


class _Bias(nn.Module):
    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, logits: jax.Array) -> jax.Array:
        return _with_bias(self, logits)


def _transform(
    hidden: jax.Array, config: BertConfig, dtype: Any, *, names: tuple[str, str], activation: str | None = None
) -> jax.Array:
    """What a masked language model does with hidden states before they are decoded: dense, activation, norm."""
    hidden = dense(config.hidden_size, config, dtype, name=names[0])(hidden)
    hidden = ACTIVATIONS[activation or config.hidden_act](hidden)
    return norm(config, dtype, name=names[1])(hidden)


def _with_bias(module: "_Predictions | _RobertaPredictions | _Bias", logits: jax.Array) -> jax.Array:
    bias = module.param("bias", nn.initializers.zeros, (module.config.vocab_size,))
    return logits + jnp.broadcast_to(jnp.asarray(bias, module.dtype), logits.shape)


def _check_head(config: BertConfig, head: str) -> None:
    if config.head != head:
        raise ValueError(f"`config.head` must be {head!r} here, got {config.head!r}; `make_module` picks the class.")
