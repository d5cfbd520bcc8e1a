"""What a Llama is: its sizes, layer by layer, its head, its constants, and what its relatives do otherwise."""

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
from jaxcompress._src.models.decoder.rotary import RopeScaling
from jaxcompress._src.models.family import Head

MODEL_TYPES: Mapping[str, str] = MappingProxyType(
    {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
)
"""`model_type` -> how the classes of Hugging Face begin."""


def heads_of(name: str) -> dict[str, Head]:
    """The heads of a model whose classes begin with `name`."""
    return decoder_heads(f"{name}Model", f"{name}ForCausalLM", f"{name}ForSequenceClassification")


HEADS = heads_of("Llama")


# Annotations say what the fields are, not what may be given; `__post_init__` checks that. So the run-time checks of the
# tests are off here.
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of a Llama whose layers may differ, and of its relatives.

    Heads of keys and values serve as many queries each as `num_attention_heads / num_key_value_heads`, the same in all
    layers that have heads (grouped-query attention).

    Attributes:
        vocab_size: rows of the word embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of layers.
        num_attention_heads: query heads of each layer; an int is repeated for every layer. With 0 heads, the layer has
            no attention.
        num_key_value_heads: heads of keys and values of each layer; by default as many as query heads.
        intermediate_size: FFN width of each layer; an int is repeated for every layer. With 0, the layer has no FFN.
        head_size: width of one head. If not given, `hidden_size` over the heads, which must be the same everywhere.
        max_position_embeddings: tokens that the model may read.
        hidden_act: `silu`, `gelu`, `gelu_new` (tanh), `gelu_pytorch_tanh` (the same) or `relu`.
        rms_norm_eps: added to the mean square in every norm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched; None: not at all.
        sliding_window: of each layer, how many of the last tokens it sees, its own included; an int is repeated for
            every layer; None: all.
        qkv_bias: whether queries, keys and values have biases.
        output_bias: whether the output of attention has a bias.
        mlp_bias: whether the FFN has biases.
        qk_norm: whether queries and keys are normed, head by head, before they are rotated (Qwen 3).
        tie_word_embeddings: whether the head of a language model is the word embedding.
        attention_dropout: dropout on attention probabilities.
        initializer_range: standard deviation of new kernels and embeddings.
        head: `decoder`, `causal_lm` or `sequence_classification`.
        num_labels: outputs of the classifier, which reads the last token.
        id2label: name of each class by its index; empty for no names.
        model_type: `llama`, `mistral`, `qwen2` or `qwen3`: how files call the model; nothing is computed by it.
        extra: settings of a `config.json` that play no part in the computation; kept for the way back.

    Raises:
        ValueError: a value is out of range; the message names the argument and the value.

    Example:
        >>> config = LlamaConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        ...     intermediate_size=(64, 48),
        ... )
        >>> config.num_key_value_heads, config.intermediate_size, config.head_size
        ((2, 2), (64, 48), 8)

    References:
        Touvron et al. 2023, https://arxiv.org/abs/2302.13971; Jiang et al. 2023, "Mistral 7B"; Yang et al. 2024 and
        2025, "Qwen2" and "Qwen3".
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: tuple[int, ...]
    intermediate_size: tuple[int, ...]
    num_key_value_heads: tuple[int, ...] = None  # pyright: ignore[reportAssignmentType]  # as `head_size`
    head_size: int = None  # pyright: ignore[reportAssignmentType]  # an int as soon as the object exists
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: tuple[int | None, ...] = None  # pyright: ignore[reportAssignmentType]  # a tuple, too
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    head: str = "causal_lm"
    num_labels: int = 2
    id2label: tuple[str, ...] = ()
    model_type: str = "llama"
    # Out of the hash, because modules that hold the config are hashed, and a dict is not hashable.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "num_labels"):
            check_count(name, getattr(self, name), minimum=1)
        layers = self.num_hidden_layers
        if layers > MOST_LAYERS:
            raise ValueError(f"`num_hidden_layers` must be at most {MOST_LAYERS}, got {layers}.")
        self._set("num_attention_heads", per_layer("num_attention_heads", self.num_attention_heads, layers))
        shared = self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads
        self._set("num_key_value_heads", per_layer("num_key_value_heads", shared, layers))
        self._set("intermediate_size", per_layer("intermediate_size", self.intermediate_size, layers))
        self._check_groups()
        if self.head_size is None:
            self._set("head_size", default_head_size(self.hidden_size, self.num_attention_heads))
        check_count("head_size", self.head_size, minimum=2)
        if self.head_size % 2:
            raise ValueError(f"`head_size` must be even, for rotary positions, got {self.head_size}.")
        self._set("sliding_window", _windows(self.sliding_window, layers))
        self._set("attention_dropout", probability("attention_dropout", self.attention_dropout))
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            self._set(name, positive(name, getattr(self, name)))
        for name in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"):
            check_choice(name, getattr(self, name), (False, True))
        check_choice("hidden_act", self.hidden_act, tuple(ACTIVATIONS))
        check_choice("head", self.head, tuple(HEADS))
        check_choice("model_type", self.model_type, tuple(MODEL_TYPES))
        self._set("id2label", label_names(self.id2label, self.num_labels))
        self._set("extra", dict(self.extra))

    @property
    def queries_per_key(self) -> int:
        """Queries that a head of keys and values serves, 1 where there are no heads."""
        return next((q // k for q, k in zip(self.num_attention_heads, self.num_key_value_heads, strict=True) if k), 1)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_groups(self) -> None:
        pairs = zip(self.num_attention_heads, self.num_key_value_heads, strict=True)
        for layer, (queries, keys) in enumerate(pairs):
            if queries != keys * self.queries_per_key:
                raise ValueError(
                    f"`num_attention_heads` must be the same multiple of `num_key_value_heads` in every layer, got "
                    f"{queries} and {keys} in layer {layer}, where {self.queries_per_key} queries share a key."
                )


def _windows(value: Any, layers: int) -> tuple[int | None, ...]:
    windows = tuple(value) if isinstance(value, (tuple, list)) else (value,) * layers
    if len(windows) != layers:
        raise ValueError(f"`sliding_window` must have one entry for each of {layers} layers, got {len(windows)}.")
    for window in windows:
        if window is not None:
            check_count("sliding_window", window, minimum=1)
    return windows
