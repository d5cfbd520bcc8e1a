"""Between `BertConfig` and the settings of a Hugging Face `config.json`."""

from collections.abc import Mapping
from typing import Any

from jaxcompress._src.models.bert.config import BertConfig
from jaxcompress._src.models.bert.variants import VARIANTS
from jaxcompress._src.models.config_checks import check_count
from jaxcompress._src.models.hf.settings import (
    DERIVED,
    OWN_KEY,
    check_mapping,
    check_sizes,
    check_supported,
    head_by_architecture,
    label_options,
    label_settings,
    uneven_sizes,
)

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_UNSUPPORTED = {  # settings under which a model computes something else, and the only value we compute
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
_TIED = "tie_word_embeddings"  # matters to a masked language model only
_PAD = "pad_token_id"  # of a RoBERTa: positions begin behind it; of the others without any part
_PRUNED = "pruned_heads"
_UNEVEN = ("num_attention_heads", "intermediate_size")


def bert_config(settings: Mapping[str, Any], head: str | None) -> BertConfig:
    """The config that the settings of a Hugging Face `config.json` describe.

    What Hugging Face has no key for stands in a mapping under the key `jaxcompress`: `pooling` ("mean"), `head_size`
    (where it is not `hidden_size / num_attention_heads`), and the per-layer lists `num_attention_heads` and
    `intermediate_size` (where they are not uniform). `pruned_heads`, as transformers 4 wrote it, is understood too.
    Positions of a RoBERTa begin at `pad_token_id + 1`. A DistilBERT has other keys, such as `dim` for `hidden_size`.

    Args:
        settings: the parsed `config.json`.
        head: "encoder", "sequence_classification" or "masked_lm"; None: what `architectures` says.

    Raises:
        ValueError: an unsupported setting, a missing size, or no known architecture.

    Example:
        >>> settings = {
        ...     "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 60, "hidden_size": 32,
        ...     "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 0,
        ... }
        >>> config = bert_config(settings, None)
        >>> config.head, config.num_attention_heads, config.extra
        ('encoder', (4, 4), {'pad_token_id': 0})
        >>> bert_settings(config)["num_attention_heads"]
        4
    """
    model_type = settings["model_type"]
    variant = VARIANTS[model_type]
    check_supported(settings, _UNSUPPORTED)
    keys = {name: variant.settings[name] for name in _SIZES}
    zero = tuple(keys[name] for name in _UNEVEN)
    check_sizes(settings, tuple(keys.values()), layers=keys["num_hidden_layers"], may_be_zero=zero)
    check_mapping(_PRUNED, settings.get(_PRUNED))
    head = head if head is not None else head_by_architecture(settings.get("architectures"), variant.heads)
    if head == "masked_lm" and not settings.get(_TIED, True):
        raise ValueError(f"`{_TIED}` is False; only a decoder tied to the word embedding is supported.")
    fields = {name: settings[key] for name, key in variant.settings.items() if key in settings}
    known = {*variant.settings.values(), *_UNSUPPORTED, *DERIVED, _TIED, _PRUNED}
    if "position_offset" not in variant.fixed:
        fields["position_offset"] = _position_offset(settings.get(_PAD, variant.defaults["position_offset"] - 1))
        known.add(_PAD)
    return BertConfig(
        model_type=model_type,
        head=head,
        extra={name: value for name, value in settings.items() if name not in known},
        **(fields | _layer_sizes(settings, fields)),
        **label_options(settings),
    )


def bert_settings(config: BertConfig) -> dict[str, Any]:
    """The settings of a Hugging Face `config.json`, from which `bert_config` makes the same config.

    For sizes that are not uniform, the keys of Hugging Face hold the largest: it then refuses the weights, loudly.

    Args:
        config: any config.

    Returns:
        What `json.dump` can write. Always with `id2label` for a classifier, so that transformers knows `num_labels`.
    """
    variant = config.variant
    fields = {name: getattr(config, name) for name in variant.settings}
    fields |= {name: max(fields[name]) for name in _UNEVEN}
    settings: dict[str, Any] = {
        **config.extra,
        "architectures": [variant.heads[config.head].architectures[0]],
        "model_type": config.model_type,
        **{key: fields[name] for name, key in variant.settings.items()},
        **label_settings(config),
    }
    if "position_offset" not in variant.fixed:
        settings[_PAD] = config.position_offset - 1
    ours: dict[str, Any] = {**uneven_sizes(config, _UNEVEN)}
    if "num_attention_heads" in ours or config.head_size * config.num_attention_heads[0] != config.hidden_size:
        ours["head_size"] = config.head_size
    if config.pooling != "cls":
        ours["pooling"] = config.pooling
    return settings | ({OWN_KEY: ours} if ours else {})


def _position_offset(pad_token_id: Any) -> int:
    check_count(_PAD, pad_token_id, minimum=0)
    return pad_token_id + 1


def _layer_sizes(settings: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    ours, heads = settings.get(OWN_KEY) or {}, fields["num_attention_heads"]
    sizes: dict[str, Any] = {}
    if pruned := settings.get(_PRUNED):
        if not heads or not all(isinstance(indices, list) for indices in pruned.values()):
            raise ValueError(f"`{_PRUNED}` must map layers to lists of heads, got {pruned!r:.80}.")
        sizes["head_size"] = fields["hidden_size"] // heads
        layers = range(fields["num_hidden_layers"])
        sizes["num_attention_heads"] = tuple(heads - len(pruned.get(str(i), ())) for i in layers)
    return sizes | {name: ours[name] for name in (*_UNEVEN, "head_size", "pooling") if name in ours}
