"""What the `config.json` of every family of Hugging Face says in the same way: heads and labels."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxcompress._src.models.config_checks import MOST_LAYERS
from jaxcompress._src.models.family import Head

OWN_KEY = "jaxcompress"
"""The key of a `config.json` under which stands what Hugging Face has none for."""


def head_by_architecture(architectures: Any, heads: Mapping[str, Head]) -> str:
    """The name of the head that `architectures` names.

    Raises:
        ValueError: it is no list, or names none of them.
    """
    if not isinstance(architectures or [], list):
        raise ValueError(f"`architectures` must be a list of names, got {architectures!r:.80}.")
    known = {architecture: name for name, head in heads.items() for architecture in head.architectures}
    for name in architectures or ():
        if isinstance(name, str) and name in known:
            return known[name]
    raise ValueError(f"`architectures` is {architectures!r}; known: {', '.join(known)}. Or say which with `head=`.")


def read_labels(labels: Any) -> tuple[str, ...]:
    """The names of the classes that `id2label` maps from their indices; empty without any.

    Raises:
        ValueError: it is no such mapping, or leaves out a class.
    """
    if not labels:
        return ()
    try:
        by_index = {int(index): str(label) for index, label in labels.items()}
    except (AttributeError, ValueError) as err:
        raise ValueError(f"`id2label` must map class indices to names, got {labels!r}.") from err
    if sorted(by_index) != list(range(len(by_index))):
        raise ValueError(f"`id2label` must number the classes from 0 without gaps, got {sorted(by_index)}.")
    return tuple(by_index[index] for index in range(len(by_index)))


def placeholder_labels(count: int) -> tuple[str, ...]:
    """The names that transformers gives to classes without a name."""
    return tuple(f"LABEL_{i}" for i in range(count))


DERIVED = (  # made from the config, or from the weights, whenever they are written
    "architectures",
    "model_type",
    "num_labels",
    "id2label",
    "label2id",
    "torch_dtype",
    "dtype",
    OWN_KEY,
)
"""Keys of a `config.json` that say nothing which a config does not know."""


def label_settings(config: Any) -> dict[str, Any]:
    """The labels of a config as a `config.json` has them; a classifier always has some, from which its size is read."""
    labels = config.id2label
    if config.head == "sequence_classification":
        labels = labels or placeholder_labels(config.num_labels)
    if labels:
        return {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    return {"num_labels": config.num_labels} if config.num_labels != 2 else {}


def label_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`num_labels` and `id2label` of a config, from a `config.json`."""
    labels = read_labels(settings.get("id2label"))
    names = () if labels == placeholder_labels(len(labels)) else labels
    return {"num_labels": len(labels) or settings.get("num_labels", 2), "id2label": names}


def check_sizes(settings: Mapping[str, Any], names: Sequence[str], *, layers: str, may_be_zero: Sequence[str]) -> None:
    """Raises where sizes are missing or out of range, and where what is ours is no mapping.

    Args:
        settings: the parsed `config.json`.
        names: of the sizes.
        layers: name of the number of layers.
        may_be_zero: names of sizes that may be 0.
    """
    if absent := [name for name in names if name not in settings]:
        raise ValueError(f"these sizes are missing: {', '.join(absent)}.")
    for name in names:
        least = 0 if name in may_be_zero else 1
        most = MOST_LAYERS if name == layers else 2**31 - 1
        value = settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"`{name}` must be an int in [{least}, {most}], got {value!r:.80}.")
    check_mapping(OWN_KEY, settings.get(OWN_KEY))


def check_mapping(name: str, value: Any) -> None:
    """Raises where a setting is no mapping, nor empty."""
    if not isinstance(value or {}, Mapping):
        raise ValueError(f"`{name}` must be a mapping, got {value!r:.80}.")


def check_supported(settings: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raises where a setting asks for what we do not compute; `supported` holds the only value that we do."""
    for name, value in supported.items():
        if settings.get(name, value) != value:
            raise ValueError(f"`{name}` is {settings[name]!r}; only {value!r} is supported.")


def uneven_sizes(config: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """The sizes that are not the same in all layers, for which `config.json` has no key but ours."""
    return {name: list(getattr(config, name)) for name in names if len(set(getattr(config, name))) > 1}
