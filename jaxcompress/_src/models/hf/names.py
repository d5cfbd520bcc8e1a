"""Tensors in files of Hugging Face and parameters of ours: names and orientation, both ways."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_LEGACY_LEAF = {"gamma": "weight", "beta": "bias"}


class Parameter(NamedTuple):
    """A parameter and its tensor in PyTorch files.

    Attributes:
        shape: of the parameter.
        tensor: name in a state dict.
        transposed: whether the parameter is the transpose of the tensor: `nn.Linear` keeps (out, in).
        flax_transposed: the same of Hugging Face's Flax files, whose GPT-2 alone keeps (out, in).
    """

    shape: tuple[int, ...]
    tensor: str
    transposed: bool = False
    flax_transposed: bool = False


class StoredTensor(NamedTuple):
    """A tensor as it lies in a file.

    Attributes:
        name: in the file.
        array: in the orientation of the file.
        transposed: whether the parameter is the transpose.
    """

    name: str
    array: np.ndarray
    transposed: bool

    def parameter(self) -> np.ndarray:
        """The array in the orientation of the parameter."""
        return self.array.T if self.transposed else self.array


def flax_parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameter]:
    """The parameters of a family whose paths are those of Hugging Face Flax.

    Args:
        shapes: by path.

    Example:
        >>> flax_parameters({"bert/pooler/dense/kernel": (4, 4)})["bert/pooler/dense/kernel"][:3]
        ((4, 4), 'bert.pooler.dense.weight', True)
    """
    return {path: Parameter(shape, torch_name(path), path.endswith("/kernel")) for path, shape in shapes.items()}


def torch_name(path: str) -> str:
    """The name that a parameter of Hugging Face Flax has in a PyTorch state dict.

    Example:
        >>> torch_name("bert/encoder/layer/0/output/LayerNorm/scale")
        'bert.encoder.layer.0.output.LayerNorm.weight'
    """
    *parents, leaf = path.split("/")
    return ".".join((*parents, _TORCH_LEAF.get(leaf, leaf)))


def bare_name(name: str, prefix: str) -> str:
    """The name of a tensor without the family's prefix; `gamma` and `beta`, once those of norms, by today's name.

    Example:
        >>> bare_name("bert.encoder.layer.0.output.LayerNorm.gamma", "bert")
        'encoder.layer.0.output.LayerNorm.weight'
    """
    *parents, leaf = name.removeprefix(f"{prefix}.").split(".")
    return ".".join((*parents, _LEGACY_LEAF.get(leaf, leaf)))


def bare_path(path: str, prefix: str) -> str:
    """A parameter's path without the family's prefix."""
    return path.removeprefix(f"{prefix}/")
