"""What a GPT-2 is: its sizes, layer by layer, its head, and its constants."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, no_type_check

from jaxcompress._src.models.activations import ACTIVATIONS
from jaxcompress._src.models.config_checks import (
    MOST_LAYERS,
    check_choice,
    check_count,
    default_head_size,
    label_names,
    per_layer,
    positive,
    probability,
)
from jaxcompress._src.models.decoder.heads import decoder_heads
from jaxcompress._src.models.family import Head

HEADS: Mapping[str, Head] = MappingProxyType(
    decoder_heads("GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification")
)


# Annotations say what the fields are, not what may be given; `__post_init__` checks that. So the run-time checks of the
# tests are off here.
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Sizes and constants of a GPT-2 whose layers may differ.

    Attention of layer i works in `num_attention_heads[i] * head_size` dimensions, which need not be `hidden_size`.

    Attributes:
        vocab_size: rows of the word embedding.
        hidden_size: width of the residual stream; `n_embd` in files.
        num_hidden_layers: number of layers; `n_layer` in files.
        num_attention_heads: heads of each layer; an int is repeated for every layer; `n_head` in files. With 0 heads,
            the attention sublayer is its output bias.
        intermediate_size: FFN width of each layer, 4 x `hidden_size` by default; `n_inner` in files. With 0, the FFN is
            its output bias.
        head_size: width of one head. If not given, `hidden_size` over the heads, which must be the same everywhere.
        max_position_embeddings: rows of the position embedding; `n_positions` in files.
        hidden_act: `gelu_new` (tanh), `gelu_pytorch_tanh` (the same), `gelu` (exact), `relu` or `silu`;
            `activation_function` in files.
        layer_norm_eps: added to the variance in every LayerNorm; `layer_norm_epsilon` in files.
        resid_pdrop: dropout on sublayer outputs.
        embd_pdrop: dropout on embeddings.
        attn_pdrop: dropout on attention probabilities.
        tie_word_embeddings: whether the head of a language model is the word embedding.
        initializer_range: standard deviation of new kernels and embeddings.
        head: `decoder`, `causal_lm` or `sequence_classification`.
        num_labels: outputs of the classifier, which reads the last token.
        id2label: name of each class by its index; empty for no names.
        extra: settings of a `config.json` that play no part in the computation; kept for the way back.

    Raises:
        ValueError: a value is out of range; the message names the argument and the value.

    Example:
        >>> config = GPT2Config(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> config.num_attention_heads, config.intermediate_size, config.head_size
        ((4, 4), (128, 128), 8)

    References:
        Radford et al. 2019, "Language models are unsupervised multitask learners".
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: tuple[int, ...]
    intermediate_size: tuple[int, ...] = None  # pyright: ignore[reportAssignmentType]  # as `head_size`
    head_size: int = None  # pyright: ignore[reportAssignmentType]  # an int as soon as the object exists
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    head: str = "causal_lm"
    num_labels: int = 2
    id2label: tuple[str, ...] = ()
    # Out of the hash, because modules that hold the config are hashed, and a dict is not hashable.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "num_labels"):
            check_count(name, getattr(self, name), minimum=1)
        layers = self.num_hidden_layers
        if layers > MOST_LAYERS:
            raise ValueError(f"`num_hidden_layers` must be at most {MOST_LAYERS}, got {layers}.")
        width = 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size
        self._set("intermediate_size", per_layer("intermediate_size", width, layers))
        self._set("num_attention_heads", per_layer("num_attention_heads", self.num_attention_heads, layers))
        if self.head_size is None:
            self._set("head_size", default_head_size(self.hidden_size, self.num_attention_heads))
        check_count("head_size", self.head_size, minimum=1)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            self._set(name, probability(name, getattr(self, name)))
        for name in ("layer_norm_eps", "initializer_range"):
            self._set(name, positive(name, getattr(self, name)))
        check_choice("tie_word_embeddings", self.tie_word_embeddings, (False, True))
        check_choice("hidden_act", self.hidden_act, tuple(ACTIVATIONS))
        check_choice("head", self.head, tuple(HEADS))
        self._set("id2label", label_names(self.id2label, self.num_labels))
        self._set("extra", dict(self.extra))

    @property
    def num_key_value_heads(self) -> tuple[int, ...]:
        """Heads of keys and values of each layer, which a cache holds: one for each query."""
        return self.num_attention_heads

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
