"""What differs between BERT, RoBERTa, XLM-RoBERTa and DistilBERT: names of their parts, heads, settings."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxcompress._src.models.family import Head

_BERT_KEYS: Mapping[str, str] = MappingProxyType(
    {
        name: name
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "hidden_act",
            "layer_norm_eps",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "classifier_dropout",
            "initializer_range",
        )
    }
)
"""Field of a `BertConfig` -> its key in `config.json`."""

_DISTILBERT_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "max_position_embeddings": "max_position_embeddings",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "seq_classif_dropout",
        "initializer_range": "initializer_range",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What one `model_type` calls its parts, and which it has.

    Paths are those of Hugging Face Flax, without the prefix; those of a layer's parts begin at the layer.

    Attributes:
        title: in words, such as "BERT".
        prefix: first component of paths where there is a head.
        heads: by name.
        layers: path under which layers are numbered.
        query: dense layer.
        key: dense layer.
        value: dense layer.
        attention_output: dense layer.
        attention_norm: LayerNorm after the attention sublayer.
        ffn_input: dense layer.
        ffn_output: dense layer.
        ffn_norm: LayerNorm after the feed-forward sublayer.
        pooled_heads: heads whose model has `pooler/dense`, if the pooling is "cls".
        classifier: dense layers of the classifier; the last one has an output for each class.
        transform: dense layer of the masked language model head.
        transform_norm: LayerNorm behind it.
        decoder: the tied decoder, which some files have a second copy of.
        decoder_bias: parameter that is added to the logits.
        settings: field of a `BertConfig` -> its key in `config.json`.
        defaults: values of the fields that are not given.
        fixed: fields that can have no other value.
    """

    title: str
    prefix: str
    heads: Mapping[str, Head]
    layers: str = "encoder/layer"
    query: str = "attention/self/query"
    key: str = "attention/self/key"
    value: str = "attention/self/value"
    attention_output: str = "attention/output/dense"
    attention_norm: str = "attention/output/LayerNorm"
    ffn_input: str = "intermediate/dense"
    ffn_output: str = "output/dense"
    ffn_norm: str = "output/LayerNorm"
    pooled_heads: tuple[str, ...]
    classifier: tuple[str, ...]
    transform: str
    transform_norm: str
    decoder: str
    decoder_bias: str
    settings: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]

    @property
    def head_components(self) -> tuple[str, ...]:
        """First components of the paths that belong to heads, "qa_outputs" of question answering among them."""
        paths = ("pooler", *self.classifier, self.transform, self.transform_norm, self.decoder, "qa_outputs")
        return tuple(dict.fromkeys(path.split("/", 1)[0] for path in paths))


def _heads(name: str, *more_masked: str) -> Mapping[str, Head]:
    """The heads, with the names of classes that begin as given."""
    return MappingProxyType(
        {
            "encoder": Head(description="a plain encoder", answer="vector", architectures=(f"{name}Model",)),
            "sequence_classification": Head(
                description="a classifier",
                answer="classes",
                architectures=(f"{name}ForSequenceClassification",),
                outputs=("logits", "pooler_output"),
            ),
            "masked_lm": Head(
                description="a masked language model",
                answer="tokens",
                architectures=(f"{name}ForMaskedLM", *more_masked),
                outputs=("logits",),
            ),
        }
    )


BERT = Variant(
    title="BERT",
    prefix="bert",
    heads=_heads("Bert", "BertForPreTraining"),
    pooled_heads=("encoder", "sequence_classification"),
    classifier=("classifier",),
    transform="cls/predictions/transform/dense",
    transform_norm="cls/predictions/transform/LayerNorm",
    decoder="cls/predictions/decoder",
    decoder_bias="cls/predictions/bias",
    settings=_BERT_KEYS,
    defaults={"type_vocab_size": 2, "position_offset": 0},
    fixed={"position_offset": 0},
)
ROBERTA = Variant(
    title="RoBERTa",
    prefix="roberta",
    heads=_heads("Roberta"),
    pooled_heads=("encoder",),
    classifier=("classifier/dense", "classifier/out_proj"),
    transform="lm_head/dense",
    transform_norm="lm_head/layer_norm",
    decoder="lm_head/decoder",
    decoder_bias="lm_head/bias",
    settings=_BERT_KEYS,
    defaults={"type_vocab_size": 2, "position_offset": 2},
    fixed={},
)
XLM_ROBERTA = dataclasses.replace(ROBERTA, title="XLM-RoBERTa", heads=_heads("XLMRoberta"))
DISTILBERT = Variant(
    title="DistilBERT",
    prefix="distilbert",
    heads=_heads("DistilBert"),
    layers="transformer/layer",
    query="attention/q_lin",
    key="attention/k_lin",
    value="attention/v_lin",
    attention_output="attention/out_lin",
    attention_norm="sa_layer_norm",
    ffn_input="ffn/lin1",
    ffn_output="ffn/lin2",
    ffn_norm="output_layer_norm",
    pooled_heads=(),
    classifier=("pre_classifier", "classifier"),
    transform="vocab_transform",
    transform_norm="vocab_layer_norm",
    decoder="vocab_projector",
    decoder_bias="vocab_projector/bias",
    settings=_DISTILBERT_KEYS,
    defaults={"type_vocab_size": 0, "position_offset": 0, "classifier_dropout": 0.2},
    fixed={"type_vocab_size": 0, "position_offset": 0, "layer_norm_eps": 1e-12},
)
VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {"bert": BERT, "roberta": ROBERTA, "xlm-roberta": XLM_ROBERTA, "distilbert": DISTILBERT}
)
"""`model_type` of a config.json -> what is particular to it."""
