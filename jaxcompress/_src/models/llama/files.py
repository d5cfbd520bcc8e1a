"""What is particular to files of Llamas: tensors stored twice, and shapes that transformers cannot load."""

from collections.abc import Mapping

from jaxcompress._src.models.hf.checks import check_layers, uneven_layers, without_tied_head
from jaxcompress._src.models.hf.names import StoredTensor
from jaxcompress._src.models.llama.config import LlamaConfig


def check_tensors(tensors: Mapping[str, StoredTensor], config: LlamaConfig) -> dict[str, StoredTensor]:
    """Drops the second copy of a tied word embedding, and frequencies, which are no weights.

    Raises:
        ValueError: there are more or fewer layers than `config` says, or a tied head differs from the embedding.
    """
    weights = {path: tensor for path, tensor in tensors.items() if not path.endswith("rotary_emb/inv_freq")}
    check_layers(weights, r"layers/(\d+)/", config.num_hidden_layers, "num_hidden_layers")
    return without_tied_head(weights, "embed_tokens/embedding") if config.tie_word_embeddings else weights


def unloadable(config: LlamaConfig) -> str:
    """Why transformers cannot load a shape: its layers are all alike, and its biases those of the model type."""
    sizes = {"heads": config.num_attention_heads, "FFN columns": config.intermediate_size}
    return "; ".join([*uneven_layers(sizes), *_foreign(config)])


def _foreign(config: LlamaConfig) -> list[str]:
    """What the model type does not have."""
    biases = (config.qkv_bias, config.output_bias, config.mlp_bias)
    possible = {
        "llama": [(a, a, m) for a in (False, True) for m in (False, True)],
        "mistral": [(False, False, False)],
        "qwen2": [(True, False, False)],
        "qwen3": [(a, a, False) for a in (False, True)],
    }[config.model_type]
    windows = {window for window in config.sliding_window if window is not None}
    reasons = []
    if biases not in possible:
        reasons.append(f"a {config.model_type!r} has no such biases: (qkv, output, FFN) = {biases}")
    if config.qk_norm != (config.model_type == "qwen3"):
        reasons.append(f"a {config.model_type!r} {'has' if config.model_type == 'qwen3' else 'has no'} `qk_norm`")
    if len(windows) > 1 or (windows and config.model_type == "llama"):
        reasons.append(f"a {config.model_type!r} has no sliding windows {sorted(windows)}")
    if config.model_type == "mistral" and len(set(config.sliding_window)) > 1:
        reasons.append("a 'mistral' has one sliding window for all layers")
    return reasons
