"""Between `BertConfig` and the settings of a Hugging Face `config.json`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcompress._src.models.bert.config import MOST_LAYERS, BertConfig

SUPPORTED_MODEL_TYPES = ("bert",)

_OWN_KEY = "jaxcompress"
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_OPTIONAL = (
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_act",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
)
_UNSUPPORTED = {  # settings under which BERT computes something else, and the only value we compute
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
_TIED = "tie_word_embeddings"  # matters to a masked language model only
_HEADS = {
    "BertModel": "encoder",
    "BertForSequenceClassification": "sequence_classification",
    "BertForMaskedLM": "masked_lm",
    "BertForPreTraining": "masked_lm",
}
_ARCHITECTURES = {
    "encoder": "BertModel",
    "sequence_classification": "BertForSequenceClassification",
    "masked_lm": "BertForMaskedLM",
}
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


def config_from_huggingface(settings: Mapping[str, Any], *, head: str | None = None) -> BertConfig:
    """The config that the settings of a Hugging Face `config.json` describe.

    What Hugging Face has no key for stands in a mapping under the key `jaxcompress`: `pooling` ("mean"), `head_size`
    (where it is not `hidden_size / num_attention_heads`), and the per-layer lists `num_attention_heads` and
    `intermediate_size` (where they are not uniform). `pruned_heads`, as transformers 4 wrote it, is understood too.

    Args:
        settings: the parsed `config.json`.
        head: "encoder", "sequence_classification" or "masked_lm"; by default, what `architectures` says.

    Raises:
        ValueError: another model type, an unsupported setting, a missing size, or no known architecture.

    Example:
        >>> settings = {
        ...     "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 60, "hidden_size": 32,
        ...     "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 0,
        ... }
        >>> config = config_from_huggingface(settings)
        >>> config.head, config.num_attention_heads, config.extra
        ('encoder', (4, 4), {'pad_token_id': 0})
        >>> config_to_huggingface(config)["num_attention_heads"]
        4
    """
    _check_supported(settings)
    head = head if head is not None else _head(settings.get("architectures"))
    if head == "masked_lm" and not settings.get(_TIED, True):
        raise ValueError(f"`{_TIED}` is False; only a decoder tied to the word embedding is supported.")
    labels = _id2label(settings.get("id2label"))
    known = {*_REQUIRED, *_OPTIONAL, *_UNSUPPORTED, *_DERIVED, _TIED}
    return BertConfig(
        head=head,  # pyright: ignore[reportArgumentType]  # checked by BertConfig
        num_labels=len(labels) or settings.get("num_labels", 2),
        id2label=() if labels == _placeholders(len(labels)) else labels,
        extra={name: value for name, value in settings.items() if name not in known},
        **{name: settings[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
        **_layer_sizes(settings),
        **{name: settings[name] for name in _OPTIONAL if name in settings},
    )


def config_to_huggingface(config: BertConfig) -> dict[str, Any]:
    """The settings of a Hugging Face `config.json`, from which `config_from_huggingface` makes the same config.

    For sizes that are not uniform, the keys of Hugging Face hold the largest: it then refuses the weights, loudly.

    Args:
        config: any config.

    Returns:
        What `json.dump` can write. Always with `id2label` for a classifier, so that transformers knows `num_labels`.
    """
    settings: dict[str, Any] = {
        **config.extra,
        "architectures": [_ARCHITECTURES[config.head]],
        "model_type": "bert",
        **{name: getattr(config, name) for name in (*_REQUIRED, *_OPTIONAL)},
        "num_attention_heads": max(config.num_attention_heads),
        "intermediate_size": max(config.intermediate_size),
    }
    labels = config.id2label
    if config.head == "sequence_classification":
        labels = labels or _placeholders(config.num_labels)
    if labels:
        settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    elif config.num_labels != 2:
        settings["num_labels"] = config.num_labels
    if own := _own_settings(config):
        settings[_OWN_KEY] = own
    return settings


def read_config(directory: str | os.PathLike[str], *, head: str | None = None) -> BertConfig:
    """The config that `config.json` in a Hugging Face directory describes.

    Args:
        directory: where the file is.
        head: as in `config_from_huggingface`.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not JSON, or as `config_from_huggingface`; the message names the file.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no config.json in {str(directory)!r}: it is not a saved model.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{str(path)!r} is not JSON: {err}.") from err
    if not isinstance(settings, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, found {type(settings).__name__}.")
    try:
        return config_from_huggingface(settings, head=head)
    except ValueError as err:
        raise ValueError(f"In {str(path)!r}: {err}") from err


def _check_supported(settings: Mapping[str, Any]) -> None:
    if (model_type := settings.get("model_type")) not in SUPPORTED_MODEL_TYPES:
        raise ValueError(f"`model_type` is {model_type!r}; supported: {', '.join(map(repr, SUPPORTED_MODEL_TYPES))}.")
    for name, supported in _UNSUPPORTED.items():
        if settings.get(name, supported) != supported:
            raise ValueError(f"`{name}` is {settings[name]!r}; only {supported!r} is supported.")
    if absent := [name for name in _REQUIRED if name not in settings]:
        raise ValueError(f"these sizes are missing: {', '.join(absent)}.")
    for name in _REQUIRED:
        least = 0 if name in ("num_attention_heads", "intermediate_size") else 1
        most = MOST_LAYERS if name == "num_hidden_layers" else 2**31 - 1
        found = settings[name]
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
            raise ValueError(f"`{name}` must be an int in [{least}, {most}], got {found!r:.80}.")
    for name in (_OWN_KEY, "pruned_heads"):
        if not isinstance(settings.get(name) or {}, Mapping):
            raise ValueError(f"`{name}` must be a mapping, got {settings[name]!r:.80}.")


def _head(architectures: Any) -> str:
    if not isinstance(architectures or [], list):
        raise ValueError(f"`architectures` must be a list of names, got {architectures!r:.80}.")
    for name in architectures or ():
        if isinstance(name, str) and name in _HEADS:
            return _HEADS[name]
    raise ValueError(f"`architectures` is {architectures!r}; known: {', '.join(_HEADS)}. Or say which with `head=`.")


def _layer_sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    own, hidden, heads = settings.get(_OWN_KEY) or {}, settings["hidden_size"], settings["num_attention_heads"]
    sizes = {"num_attention_heads": heads, "intermediate_size": settings["intermediate_size"]}
    if pruned := settings.get("pruned_heads"):
        if not heads or not all(isinstance(indices, list) for indices in pruned.values()):
            raise ValueError(f"`pruned_heads` must map layers to lists of heads, got {pruned!r:.80}.")
        sizes["head_size"] = hidden // heads
        layers = range(settings["num_hidden_layers"])
        sizes["num_attention_heads"] = tuple(heads - len(pruned.get(str(i), ())) for i in layers)
    names = ("num_attention_heads", "intermediate_size", "head_size", "pooling")
    return sizes | {name: own[name] for name in names if name in own}


def _own_settings(config: BertConfig) -> dict[str, Any]:
    own: dict[str, Any] = {}
    for name in ("num_attention_heads", "intermediate_size"):
        if len(set(getattr(config, name))) > 1:
            own[name] = list(getattr(config, name))
    if "num_attention_heads" in own or config.head_size * config.num_attention_heads[0] != config.hidden_size:
        own["head_size"] = config.head_size
    if config.pooling != "cls":
        own["pooling"] = config.pooling
    return own


def _id2label(labels: Any) -> tuple[str, ...]:
    if not labels:
        return ()
    try:
        by_index = {int(index): str(label) for index, label in labels.items()}
    except (AttributeError, ValueError) as err:
        raise ValueError(f"`id2label` must map class indices to names, got {labels!r}.") from err
    if sorted(by_index) != list(range(len(by_index))):
        raise ValueError(f"`id2label` must number the classes from 0 without gaps, got {sorted(by_index)}.")
    return tuple(by_index[index] for index in range(len(by_index)))


def _placeholders(count: int) -> tuple[str, ...]:
    """The names that transformers gives to classes without a name."""
    return tuple(f"LABEL_{i}" for i in range(count))
