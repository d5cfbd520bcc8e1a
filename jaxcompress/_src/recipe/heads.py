"""What a model gives besides hidden states, by its head: what is evaluated, and what a distillation can compare."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxcompress._src.recipe.steps import Training

SentencePooling: TypeAlias = Literal["mean", "first"]
"""How an encoder's hidden states become one vector: their mean over the mask, or the state of the first token."""

SENTENCE_VECTOR = "sentence_vector"

_COMPARED: Mapping[str, Mapping[str, str]] = {  # by head: the output that each loss compares
    "encoder": {"pooled": SENTENCE_VECTOR, "hidden": "hidden_states"},
    "sequence_classification": {
        "soft_targets": "logits",
        "pooled": "pooler_output",
        "hidden": "hidden_states",
        "hard_labels": "logits",
    },
    "masked_lm": {"soft_targets": "logits", "hidden": "hidden_states"},
}
_NAMES = {
    "encoder": "a plain encoder",
    "sequence_classification": "a classifier",
    "masked_lm": "a masked language model",
}


def head_of(module: nn.Module) -> str:
    """The head that the module's config names."""
    return module.config.head  # pyright: ignore[reportAttributeAccessIssue]


def described(head: str) -> str:
    """The head in words."""
    return _NAMES[head]


def with_sentence_vector(
    module: nn.Module, outputs: Mapping[str, Any], attention_mask: Any, pooling: SentencePooling
) -> dict[str, Any]:
    """The outputs of a model; those of a plain encoder with the vector by which sentences are compared."""
    if head_of(module) != "encoder":
        return dict(outputs)
    hidden = outputs["last_hidden_state"]
    if pooling == "first":
        return {**outputs, SENTENCE_VECTOR: hidden[:, 0]}
    weights = (jnp.asarray(attention_mask) > 0).astype(jnp.float32)[..., None]
    mean = (hidden * weights).sum(axis=-2) / jnp.maximum(weights.sum(axis=-2), 1.0)
    return {**outputs, SENTENCE_VECTOR: mean.astype(hidden.dtype)}


def compared_output(loss: str, head: str) -> str:
    """The output that a loss of `Training` compares."""
    return _COMPARED[head][loss]


def possible_losses(training: Training, head: str) -> tuple[Training, tuple[str, ...]]:
    """`training` without the losses that a model of this head has no outputs for, and their names.

    Raises:
        ValueError: no loss is left; names those that are possible.
    """
    asked = [name for name in ("soft_targets", "pooled", "hidden", "hard_labels") if getattr(training, name)]
    left_out = tuple(name for name in asked if name not in _COMPARED[head])
    if len(left_out) == len(asked):
        raise ValueError(
            f"{_NAMES[head]} has nothing that `{'` and `'.join(left_out)}` could compare; give a weight to "
            f"`{'` or `'.join(_COMPARED[head])}`."
        )
    return dataclasses.replace(training, **dict.fromkeys(left_out, 0.0)), left_out


def evaluated(module: nn.Module, outputs: Mapping[str, Any], attention_mask: Any) -> dict[str, jax.Array]:
    """What `predict` keeps of the outputs: nothing that grows with the vocabulary."""
    if head_of(module) != "masked_lm":
        names = ("logits", "pooler_output", SENTENCE_VECTOR)
        return {name: outputs[name] for name in names if name in outputs}
    tokens = outputs["logits"].argmax(-1).astype(jnp.int32)
    return {"token": jnp.where(jnp.asarray(attention_mask) > 0, tokens, -1)}
