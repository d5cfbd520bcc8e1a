"""What is particular to files of GPT-2: buffers, tensors stored twice, and shapes that transformers cannot load."""

from collections.abc import Mapping

from jaxcompress._src.models.gpt2.config import GPT2Config
from jaxcompress._src.models.hf.checks import check_layers, uneven_layers, without_tied_head
from jaxcompress._src.models.hf.names import StoredTensor


def check_tensors(tensors: Mapping[str, StoredTensor], config: GPT2Config) -> dict[str, StoredTensor]:
    """Drops the second copy of a tied word embedding, and the causal masks of old files.

    Raises:
        ValueError: there are more or fewer layers than `config` says, or a tied head differs from the embedding.
    """
    buffers = ("/attn/bias", "/attn/masked_bias")
    weights = {path: tensor for path, tensor in tensors.items() if not path.endswith(buffers)}
    check_layers(weights, r"h/(\d+)/", config.num_hidden_layers, "n_layer")
    return without_tied_head(weights, "wte/embedding") if config.tie_word_embeddings else weights


def unloadable(config: GPT2Config) -> str:
    """Why transformers cannot load a shape: its heads make up `n_embd`, and all layers are alike."""
    heads = config.num_attention_heads
    reasons = uneven_layers({"heads": heads, "FFN columns": config.intermediate_size})
    if not reasons and heads[0] * config.head_size != config.hidden_size:
        inner = f"{heads[0]} heads of {config.head_size} make up {heads[0] * config.head_size}"
        reasons.append(f"in every layer {inner}, not `hidden_size`, {config.hidden_size}")
    return "; ".join(reasons)
