"""What tensors in files must agree with: numbers of layers, heads tied to the embedding, what transformers can load."""

import re
from collections.abc import Mapping

import numpy as np

from jaxcompress._src.models.hf.names import StoredTensor


def check_layers(tensors: Mapping[str, StoredTensor], pattern: str, layers: int, option: str) -> None:
    """Checks that a file has as many layers as its config says.

    Args:
        tensors: by path.
        pattern: of paths, from their beginning; its group is the number of the layer.
        layers: by the config.
        option: of the config that says so.

    Raises:
        ValueError: it has not; names a tensor of the last layer.
    """
    names: dict[int, str] = {}
    for path, tensor in tensors.items():
        if match := re.match(pattern, path):
            names.setdefault(int(match[1]), tensor.name)
    if names and max(names) + 1 != layers:
        raise ValueError(
            f"the last layer is that of tensor {names[max(names)]!r}, so there are {max(names) + 1} layers; "
            f"expected {layers}, by `{option}` of config.json."
        )


def without_tied_head(
    tensors: Mapping[str, StoredTensor], embedding: str, *, head: str = "lm_head"
) -> dict[str, StoredTensor]:
    """The tensors without the copy of the word embedding that files may have as the head.

    Args:
        tensors: by path.
        embedding: path of the word embedding.
        head: path of the dense layer that copies it.

    Raises:
        ValueError: the head differs from the embedding, though the config ties them.
    """
    weights = dict(tensors)
    stored = [weights.pop(f"{head}/{leaf}", None) for leaf in ("weight", "kernel")]
    if embedding in weights:
        # In PyTorch the head has the embedding's orientation, in Flax it is the transpose.
        for tensor, transposed in zip(stored, (False, True), strict=True):
            if tensor is None:
                continue
            if not np.array_equal(tensor.array.T if transposed else tensor.array, weights[embedding].array):
                raise ValueError(
                    f"tensor {tensor.name!r} differs from {weights[embedding].name!r}, to which `tie_word_embeddings` "
                    "of config.json ties it."
                )
    return weights


def uneven_layers(sizes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Why transformers cannot load layers that are not alike, or have nothing in them.

    Args:
        sizes: of what, in words -> the number in each layer.
    """
    uneven = {name: list(each) for name, each in sizes.items() if len(set(each)) > 1}
    reasons = [f"numbers of {name} differ from layer to layer: {each}" for name, each in uneven.items()]
    return reasons or [f"no layer has {name}" for name, each in sizes.items() if not each[0]]
