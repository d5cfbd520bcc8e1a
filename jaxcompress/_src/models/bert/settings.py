"""Between `BertConfig` and the settings of a Hugging Face `config.json`."""

from collections.abc import Mapping
from typing import Any

from jaxcompress._src.models.bert.config import BertConfig
from jaxcompress._src.models.bert.variants import VARIANTS
from jaxcompress._src.models.config_checks import MOST_LAYERS, check_count
from jaxcompress._src.models.hf.settings import head_by_architecture, placeholder_labels, read_labels

_OWN_KEY = "jaxcompress"
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_UNSUPPORTED = {  # settings under which a model computes something else, and the only value we compute
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
_TIED = "tie_word_embeddings"  # matters to a masked language model only
_PAD = "pad_token_id"  # of a RoBERTa: positions begin behind it; of the others without any part
_DERIVED = (  # made from the config, or from the weights, whenever they are written
    "architectures",
    "model_type",
    "num_labels",
    "id2label",
    "label2id",
    "pruned_heads",
    "torch_dtype",
    "dtype",
    _OWN_KEY,
)


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
    _check_supported(settings, variant.settings)
    head = head if head is not None else head_by_architecture(settings.get("architectures"), variant.heads)
    if head == "masked_lm" and not settings.get(_TIED, True):
        raise ValueError(f"`{_TIED}` is False; only a decoder tied to the word embedding is supported.")
    labels = read_labels(settings.get("id2label"))
    fields = {name: settings[key] for name, key in variant.settings.items() if key in settings}
    known = {*variant.settings.values(), *_UNSUPPORTED, *_DERIVED, _TIED}
    if "position_offset" not in variant.fixed:
        fields["position_offset"] = _position_offset(settings.get(_PAD, variant.defaults["position_offset"] - 1))
        known.add(_PAD)
    return BertConfig(
        model_type=model_type,
        head=head,
        num_labels=len(labels) or settings.get("num_labels", 2),
        id2label=() if labels == placeholder_labels(len(labels)) else labels,
        extra={name: value for name, value in settings.items() if name not in known},
        **fields | _layer_sizes(settings, fields),
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
    fields |= {name: max(fields[name]) for name in ("num_attention_heads", "intermediate_size")}
    settings: dict[str, Any] = {
        **config.extra,
        "architectures": [variant.heads[config.head].architectures[0]],
        "model_type": config.model_type,
        **{key: fields[name] for name, key in variant.settings.items()},
    }
    if "position_offset" not in variant.fixed:
        settings[_PAD] = config.position_offset - 1
    labels = config.id2label
    if config.head == "sequence_classification":
        labels = labels or placeholder_labels(config.num_labels)
    if labels:
        settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    elif config.num_labels != 2:
        settings["num_labels"] = config.num_labels
    if extra := _own_settings(config):
        settings[_OWN_KEY] = extra
    return settings


def _check_supported(settings: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    for name, supported in _UNSUPPORTED.items():
        if settings.get(name, supported) != supported:
            raise ValueError(f"`{name}` is {settings[name]!r}; only {supported!r} is supported.")
    if absent := [keys[name] for name in _REQUIRED if keys[name] not in settings]:
        raise ValueError(f"these sizes are missing: {', '.join(absent)}.")
    for name in _REQUIRED:
        least = 0 if name in ("num_attention_heads", "intermediate_size") else 1
        most = MOST_LAYERS if name == "num_hidden_layers" else 2**31 - 1
        value = settings[keys[name]]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"`{keys[name]}` must be an int in [{least}, {most}], got {value!r:.80}.")
    for name in (_OWN_KEY, "pruned_heads"):
        if not isinstance(settings.get(name) or {}, Mapping):
            raise ValueError(f"`{name}` must be a mapping, got {settings[name]!r:.80}.")


def _position_offset(pad_token_id: Any) -> int:
    check_count(_PAD, pad_token_id, minimum=0)
    return pad_token_id + 1


def _layer_sizes(settings: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    extra, hidden, heads = settings.get(_OWN_KEY) or {}, fields["hidden_size"], fields["num_attention_heads"]
    sizes: dict[str, Any] = {}
    if pruned := settings.get("pruned_heads"):
        if not heads or not all(isinstance(indices, list) for indices in pruned.values()):
            raise ValueError(f"`pruned_heads` must map layers to lists of heads, got {pruned!r:.80}.")
        sizes["head_size"] = hidden // heads
        layers = range(fields["num_hidden_layers"])
        sizes["num_attention_heads"] = tuple(heads - len(pruned.get(str(i), ())) for i in layers)
    names = ("num_attention_heads", "intermediate_size", "head_size", "pooling")
    return sizes | {name: extra[name] for name in names if name in extra}


def _own_settings(config: BertConfig) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    for name in ("num_attention_heads", "intermediate_size"):
        if len(set(getattr(config, name))) > 1:
            extra[name] = list(getattr(config, name))
    if "num_attention_heads" in extra or config.head_size * config.num_attention_heads[0] != config.hidden_size:
        extra["head_size"] = config.head_size
    if config.pooling != "cls":
        extra["pooling"] = config.pooling
    return extra
