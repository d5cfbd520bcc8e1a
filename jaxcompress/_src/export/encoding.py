"""What formats of Hugging Face directories have in common: kernels of linear layers become several tensors each."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxcompress._src.export.info import CannotHoldError, ExportedLeaf
from jaxcompress._src.models.hf.names import Parameter
from jaxcompress._src.models.hf.write import TensorToWrite


class EncodedLeaves(NamedTuple):
    """Compressed leaves in one format.

    Attributes:
        tensors: by name in the file.
        leaves: what was done, by path.
        refusals: path -> why a leaf cannot be held.
        settings: `quantization_config` of config.json.
    """

    tensors: Mapping[str, TensorToWrite]
    leaves: Mapping[str, ExportedLeaf]
    refusals: Mapping[str, str]
    settings: Mapping[str, Any]


def linear_layer(path: str, parameter: Parameter) -> str:
    """The name in PyTorch of the layer whose kernel a leaf is.

    Raises:
        CannotHoldError: it is no kernel.
    """
    if not path.endswith("/kernel"):
        raise CannotHoldError("only kernels of linear layers are quantized there")
    return parameter.tensor.removesuffix(".weight")


def written(array: np.ndarray) -> TensorToWrite:
    """A tensor that is there already."""
    return TensorToWrite(array.nbytes, lambda: array)


def form(bits: int, group_size: int | None, symmetric: bool) -> str:
    """Such as `int4 g32`, as `describe` of a leaf has it."""
    blocks = "per-channel" if group_size is None else f"g{group_size}"
    return f"{'int' if symmetric else 'uint'}{bits} {blocks}"
