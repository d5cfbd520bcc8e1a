"""What heads of decoders read.

Shape letters: B leading axes (a batch, usually), L tokens, D hidden size.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress._src.models.decoder.attention import Attention
from jaxcompress._src.models.family import Head

LogitsAt: TypeAlias = Literal["all", "last", "none"]
"""The places whose logits a language model gives."""


def selected(hidden: jax.Array, logits: LogitsAt) -> jax.Array | None:
    """The hidden states of the places whose logits are wanted."""
    if logits not in get_args(LogitsAt):
        raise ValueError(f"`logits` must be one of {', '.join(map(repr, get_args(LogitsAt)))}, got {logits!r}.")
    if logits == "none":
        return None
    return hidden[..., -1:, :] if logits == "last" else hidden


def last_token(hidden: jax.Array, attention_mask: ArrayLike | None) -> jax.Array:
    """(B, L, D) to (B, D): the state of the last token that is no padding; of the last place where there is none."""
    if attention_mask is None:
        return hidden[..., -1, :]
    present = jnp.asarray(attention_mask) > 0
    places = jnp.arange(present.shape[-1])
    last = jnp.where(present.any(axis=-1), jnp.where(present, places, 0).max(axis=-1), present.shape[-1] - 1)
    return jnp.take_along_axis(hidden, last[..., None, None], axis=-2)[..., 0, :]


def decoder_heads(plain: str, language_model: str, classifier: str) -> dict[str, Head]:
    """The heads of a family of decoders, given the names of their classes in Hugging Face."""
    return {
        "decoder": Head(description="a plain decoder", answer="vector", architectures=(plain,)),
        "causal_lm": Head(
            description="a causal language model",
            answer="tokens",
            architectures=(language_model,),
            outputs=("logits",),
            causal=True,
        ),
        "sequence_classification": Head(
            description="a classifier",
            answer="classes",
            architectures=(classifier,),
            outputs=("logits", "pooler_output"),
        ),
    }


def named_attentions(attentions: Sequence[Attention]) -> dict[str, tuple[jax.Array, ...]]:
    """What the layers attend to, as a model's outputs name it."""
    return {
        "attentions": tuple(attention.probabilities for attention in attentions),
        "attention_scores": tuple(attention.scores for attention in attentions),
    }


def check_head(config: Any, head: str) -> None:
    """Raises where a module is not that of its config's head."""
    if config.head != head:
        raise ValueError(f"`config.head` must be {head!r} here, got {config.head!r}; `make_module` picks the class.")
