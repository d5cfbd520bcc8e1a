"""What a BERT, or one of its variants, is: its sizes, layer by layer, its head, and its constants."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args, no_type_check

from jaxcompress._src.models.activations import ACTIVATIONS
from jaxcompress._src.models.bert.variants import VARIANTS, Variant
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

Pooling: TypeAlias = Literal["cls", "mean"]


# Annotations say what the fields are, not what may be given: ints for tuples, and anything a JSON file may hold, which
# `__post_init__` checks itself. So the run-time checks of the tests are off here.
@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes and constants of a BERT, RoBERTa, XLM-RoBERTa or DistilBERT whose layers may differ.

    Attention of layer i works in `num_attention_heads[i] * head_size` dimensions, which need not be `hidden_size`.

    Attributes:
        vocab_size: rows of the word embedding.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of layers.
        num_attention_heads: heads of each layer; an int is repeated for every layer. With 0 heads, the attention
            sublayer is bias, residual and norm.
        intermediate_size: FFN width of each layer; an int is repeated for every layer. 0 works as 0 heads do.
        head_size: width of one head. If not given, `hidden_size` over the heads, which must be the same everywhere.
        max_position_embeddings: rows of the position embedding.
        position_offset: position of the first token. If not given 0, and for a RoBERTa 2 (`pad_token_id + 1` in files):
            its positions are counted over the tokens of `attention_mask`, and padding has the one before the first.
        type_vocab_size: rows of the token type embedding. If not given 2, and for a DistilBERT, which has none, 0.
        hidden_act: `gelu` (exact, erf), `gelu_new` or `gelu_pytorch_tanh` (tanh), `relu` or `silu`.
        layer_norm_eps: added to the variance in every LayerNorm; of a DistilBERT always 1e-12.
        hidden_dropout_prob: dropout on embeddings and sublayer outputs.
        attention_probs_dropout_prob: dropout on attention probabilities.
        classifier_dropout: dropout before the classifier; `None` is `hidden_dropout_prob`, and for a DistilBERT .2.
        initializer_range: standard deviation of new kernels and embeddings.
        head: `encoder`, `sequence_classification` or `masked_lm`.
        num_labels: outputs of the classifier.
        pooling: what the classifier reads. `cls`: the first token's hidden state, of BERT tanh of a dense layer on it
            (the pooler). `mean`: the mean of the last hidden state over the mask, without a pooler (sentence encoders).
        id2label: name of each class by its index; empty for no names.
        model_type: `bert`, `roberta`, `xlm-roberta` or `distilbert`.
        extra: settings of a `config.json` that play no part in the computation; kept for the way back.

    Raises:
        ValueError: a value is out of range; the message names the argument and the value.

    Example:
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=(64, 48)
        ... )
        >>> config.num_attention_heads, config.intermediate_size, config.head_size
        ((4, 4), (64, 48), 8)
        >>> roberta = dataclasses.replace(config, model_type="roberta", max_position_embeddings=514, position_offset=2)
        >>> roberta.max_tokens
        512

    References:
        Devlin et al. 2018, https://arxiv.org/abs/1810.04805. RoBERTa: Liu et al. 2019,
        https://arxiv.org/abs/1907.11692. XLM-RoBERTa: Conneau et al. 2019, https://arxiv.org/abs/1911.02116.
        DistilBERT: Sanh et al. 2019, https://arxiv.org/abs/1910.01108.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: tuple[int, ...]
    intermediate_size: tuple[int, ...]
    # Of the Nones below, the object that exists has ints.
    head_size: int = None  # pyright: ignore[reportAssignmentType]
    max_position_embeddings: int = 512
    position_offset: int = None  # pyright: ignore[reportAssignmentType]
    type_vocab_size: int = None  # pyright: ignore[reportAssignmentType]
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    head: str = "encoder"
    num_labels: int = 2
    pooling: Pooling = "cls"
    id2label: tuple[str, ...] = ()
    model_type: str = "bert"
    # Out of the hash, because modules that hold the config are hashed, and a dict is not hashable.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_choice("model_type", self.model_type, tuple(VARIANTS))
        for name, value in self.variant.defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "num_labels"):
            check_count(name, getattr(self, name), minimum=1)
        check_count("type_vocab_size", self.type_vocab_size, minimum=min(1, self.variant.defaults["type_vocab_size"]))
        check_count("position_offset", self.position_offset, minimum=min(1, self.variant.defaults["position_offset"]))
        if self.max_position_embeddings <= self.position_offset:
            raise ValueError(
                f"`max_position_embeddings` must be above `position_offset`, {self.position_offset}, got "
                f"{self.max_position_embeddings}."
            )
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"`num_hidden_layers` must be at most {MOST_LAYERS}, got {self.num_hidden_layers}.")
        for name in ("num_attention_heads", "intermediate_size"):
            object.__setattr__(self, name, per_layer(name, getattr(self, name), self.num_hidden_layers))
        if self.head_size is None:
            object.__setattr__(self, "head_size", default_head_size(self.hidden_size, self.num_attention_heads))
        check_count("head_size", self.head_size, minimum=1)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            object.__setattr__(self, name, probability(name, getattr(self, name)))
        for name in ("layer_norm_eps", "initializer_range"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))
        check_choice("hidden_act", self.hidden_act, tuple(ACTIVATIONS))
        check_choice("head", self.head, tuple(self.variant.heads))
        check_choice("pooling", self.pooling, get_args(Pooling))
        for name, value in self.variant.fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` of a {self.variant.title} is {value}, got {getattr(self, name)!r}.")
        object.__setattr__(self, "id2label", label_names(self.id2label, self.num_labels))
        object.__setattr__(self, "extra", dict(self.extra))

    @property
    def variant(self) -> Variant:
        """The names of the parts."""
        return VARIANTS[self.model_type]

    @property
    def has_pooler(self) -> bool:
        """Whether there is a `pooler/dense` layer: not for mean pooling, nor where no head reads it."""
        return self.pooling == "cls" and self.head in self.variant.pooled_heads

    @property
    def max_tokens(self) -> int:
        """Most tokens that a text may have."""
        return self.max_position_embeddings - self.position_offset
