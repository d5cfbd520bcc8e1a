"""What a model gives besides hidden states, by its head: what is evaluated, and what a distillation can compare."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxcompress._src.models.families import head_of
from jaxcompress._src.models.family import Head
from jaxcompress._src.models.hf.companions import SentencePooling
from jaxcompress._src.recipe.steps import Training

SENTENCE_VECTOR = "sentence_vector"

_OUTPUTS: Mapping[str, str] = {  # by loss of `Training`: the output that it compares
    "soft_targets": "logits",
    "pooled": "pooler_output",
    "hidden": "hidden_states",
    "hard_labels": "logits",
}


def compared_outputs(head: Head) -> dict[str, str]:
    """The losses of `Training` that a model of this head has an output for, and the output that each compares."""
    outputs = _OUTPUTS if head.answer != "vector" else {**_OUTPUTS, "pooled": SENTENCE_VECTOR}
    possible = {"hidden_states", SENTENCE_VECTOR, *head.outputs}
    return {
        loss: output
        for loss, output in outputs.items()
        if output in possible and (loss != "hard_labels" or head.answer == "classes")
    }


def with_sentence_vector(
    module: nn.Module, outputs: Mapping[str, Any], attention_mask: Any, pooling: SentencePooling
) -> dict[str, Any]:
    """The outputs of a model; those of a plain encoder with the vector by which sentences are compared."""
    if head_of(module).answer != "vector":
        return dict(outputs)
    hidden = outputs["last_hidden_state"]
    if pooling == "first":
        return {**outputs, SENTENCE_VECTOR: hidden[:, 0]}
    weights = (jnp.asarray(attention_mask) > 0).astype(jnp.float32)[..., None]
    mean = (hidden * weights).sum(axis=-2) / jnp.maximum(weights.sum(axis=-2), 1.0)
    return {**outputs, SENTENCE_VECTOR: mean.astype(hidden.dtype)}


def possible_losses(training: Training, head: Head) -> tuple[Training, tuple[str, ...]]:
    """`training` without the losses that a model of this head has no outputs for, and their names.

    Raises:
        ValueError: no loss is left; names those that are possible.
    """
    possible = compared_outputs(head)
    asked = [name for name in _OUTPUTS if getattr(training, name)]
    left_out = tuple(name for name in asked if name not in possible)
    if len(left_out) == len(asked):
        raise ValueError(
            f"{head.description} has nothing that `{'` and `'.join(left_out)}` could compare; give a weight to "
            f"`{'` or `'.join(possible)}`."
        )
    return dataclasses.replace(training, **dict.fromkeys(left_out, 0.0)), left_out


def evaluated(module: nn.Module, outputs: Mapping[str, Any], attention_mask: Any) -> dict[str, jax.Array]:
    """What `predict` keeps of the outputs: nothing that grows with the vocabulary."""
    if head_of(module).answer != "tokens":
        names = ("logits", "pooler_output", SENTENCE_VECTOR)
        return {name: outputs[name] for name in names if name in outputs}
    tokens = outputs["logits"].argmax(-1).astype(jnp.int32)
    return {"token": jnp.where(jnp.asarray(attention_mask) > 0, tokens, -1)}
