"""Names of tensors in Hugging Face files and paths of parameters, both ways.

A bare path is a parameter's path without the leading `bert/`: files spell the prefix or not, whatever the head.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

_Tensor = TypeVar("_Tensor")

HEAD_COMPONENTS = ("pooler", "classifier", "cls", "qa_outputs")
"""First components of the bare paths that belong to a head, not to the encoder."""

_LEGACY = {"gamma": "weight", "beta": "bias"}
_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def torch_name(path: str) -> str:
    """The name of a parameter in a PyTorch state dict.

    Example:
        >>> torch_name("bert/encoder/layer/0/output/LayerNorm/scale")
        'bert.encoder.layer.0.output.LayerNorm.weight'
    """
    *parents, leaf = path.split("/")
    return ".".join((*parents, _TORCH_LEAF.get(leaf, leaf)))


def bare_path(path: str) -> str:
    """A parameter's path without the leading `bert/`."""
    return path.removeprefix("bert/")


def path_of_torch_name(name: str) -> str:
    """The bare path of a tensor of a PyTorch state dict; `gamma` and `beta` are the scale and bias of a LayerNorm.

    Example:
        >>> path_of_torch_name("bert.encoder.layer.0.output.LayerNorm.gamma")
        'encoder/layer/0/output/LayerNorm/scale'
        >>> path_of_torch_name("classifier.weight")
        'classifier/kernel'
    """
    *parents, leaf = name.removeprefix("bert.").split(".")
    leaf = _LEGACY.get(leaf, leaf)
    if leaf == "weight":
        parent = parents[-1] if parents else ""
        leaf = "scale" if parent == "LayerNorm" else "embedding" if parent.endswith("_embeddings") else "kernel"
    return "/".join((*parents, leaf))


def by_bare_path(tensors: Iterable[tuple[str, str, _Tensor]]) -> Mapping[str, _Tensor]:
    """Tensors by bare path.

    Args:
        tensors: bare path, name in the file, tensor.

    Raises:
        ValueError: two names stand for one parameter.
    """
    found: dict[str, _Tensor] = {}
    names: dict[str, str] = {}
    for path, name, tensor in tensors:
        if path in found:
            raise ValueError(f"Tensors {names[path]!r} and {name!r} stand for the same parameter.")
        found[path], names[path] = tensor, name
    return found
