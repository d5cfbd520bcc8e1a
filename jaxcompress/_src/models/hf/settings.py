"""What the `config.json` of every family of Hugging Face says in the same way: heads and labels."""

from collections.abc import Mapping
from typing import Any

from jaxcompress._src.models.family import Head


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
