"""What is particular to files of BERT and its variants: tensors stored twice, shapes that transformers cannot load."""

import re
from collections.abc import Mapping

import numpy as np

from jaxcompress._src.models.bert.config import BertConfig
from jaxcompress._src.models.hf.names import StoredTensor

_WORDS = "embeddings/word_embeddings/embedding"


def check_tensors(tensors: Mapping[str, StoredTensor], config: BertConfig) -> dict[str, StoredTensor]:
    """Drops the second copies of the word embedding and of the output bias that PyTorch files may have.

    Args:
        tensors: by path without the prefix; those of no parameter by their name.
        config: of the model.

    Raises:
        ValueError: there are more or fewer layers than `config` says, or the decoder is not tied to the embedding.
    """
    _check_layers(tensors, config)
    weights, decoder = dict(tensors), config.variant.decoder
    stored = [weights.pop(f"{decoder}/{leaf}", None) for leaf in ("weight", "kernel")]
    if (bias := weights.pop(f"{decoder}/bias", None)) is not None:
        weights.setdefault(config.variant.decoder_bias, bias)
    if config.head == "masked_lm" and _WORDS in weights:
        # In PyTorch the decoder has the embedding's orientation, in Flax it is the transpose.
        for tensor, transposed in zip(stored, (False, True), strict=True):
            if tensor is None:
                continue
            if not np.array_equal(tensor.array.T if transposed else tensor.array, weights[_WORDS].array):
                raise ValueError(
                    f"Tensor {tensor.name!r} differs from {weights[_WORDS].name!r}; only a tied decoder is supported."
                )
    return weights


def _check_layers(tensors: Mapping[str, StoredTensor], config: BertConfig) -> None:
    names = {}
    for path, tensor in tensors.items():
        if match := re.match(rf"{config.variant.layers}/(\d+)/", path):
            names.setdefault(int(match[1]), tensor.name)
    if names and max(names) + 1 != config.num_hidden_layers:
        key = config.variant.settings["num_hidden_layers"]
        raise ValueError(
            f"the last layer is that of tensor {names[max(names)]!r}, so there are {max(names) + 1} layers; "
            f"expected {config.num_hidden_layers}, by `{key}` of config.json."
        )


def unloadable(config: BertConfig) -> str:
    """Why transformers cannot load a shape: its query, key and value are `hidden_size` wide, and all layers alike."""
    heads, widths = config.num_attention_heads, config.intermediate_size
    sizes = {"numbers of heads": heads, "FFN widths": widths}
    reasons = [f"{name} differ: {_by_layer(each)}" for name, each in sizes.items() if len(set(each)) > 1]
    if not reasons and heads[0] * config.head_size != config.hidden_size:
        inner = f"{heads[0]} heads of {config.head_size} make up {heads[0] * config.head_size}"
        reasons.append(f"in every layer {inner}, not `hidden_size`, {config.hidden_size}")
    if not reasons and not widths[0]:
        reasons.append("no layer has FFN columns")
    return "; ".join(reasons)


def _by_layer(sizes: tuple[int, ...]) -> str:
    return ", ".join(f"{size} in layer {layer}" for layer, size in enumerate(sizes))
