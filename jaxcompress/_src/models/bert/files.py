"""What is particular to files of BERT and its variants: tensors stored twice, shapes that transformers cannot load."""

from collections.abc import Mapping

from jaxcompress._src.models.bert.config import BertConfig
from jaxcompress._src.models.bert.parameters import head_shapes
from jaxcompress._src.models.hf.checks import check_layers, without_tied_head
from jaxcompress._src.models.hf.names import StoredTensor, flax_parameters
from jaxcompress._src.models.leaves import listed

_WORDS = "embeddings/word_embeddings/embedding"


def check_tensors(tensors: Mapping[str, StoredTensor], config: BertConfig) -> dict[str, StoredTensor]:
    """Drops the second copies of the word embedding and of the output bias that PyTorch files may have.

    Args:
        tensors: by path without the prefix; those of no parameter by their name.
        config: of the model.

    Raises:
        ValueError: there are more or fewer layers than `config` says, the head is there in part, or the decoder is not
            tied to the embedding.
    """
    weights, variant = dict(tensors), config.variant
    check_layers(weights, rf"{variant.layers}/(\d+)/", config.num_hidden_layers, variant.settings["num_hidden_layers"])
    if (bias := weights.pop(f"{variant.decoder}/bias", None)) is not None:
        weights.setdefault(variant.decoder_bias, bias)
    _check_whole_head(weights, config)
    return without_tied_head(weights, _WORDS, head=variant.decoder) if config.head == "masked_lm" else weights


def _check_whole_head(weights: Mapping[str, StoredTensor], config: BertConfig) -> None:
    """A head that is there in part is damaged, not new, even if whole layers of it are missing."""
    head = {path: name for path, (_, name, *_) in flax_parameters(head_shapes(config)).items()}
    missing = [name for path, name in head.items() if path not in weights]
    if 0 < len(missing) < len(head):
        raise ValueError(f"missing tensors: {listed(missing)}.")


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
