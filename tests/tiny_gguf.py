"""GGUF files of a tiny Llama, as llama.cpp's converter writes them."""

import gguf
import numpy as np
from golden_weights import weights

from jaxcompress._src.models.families import family_of
from jaxcompress.models import LlamaConfig

TOKENS = ["<|end|>", "<|pad|>", *"abcdefghij", "Ġ", "ab", "Ġab", "1", "2"]
LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope_theta=1000.0,
    tie_word_embeddings=True,
)


def gguf_tensors(config):
    """Of PyTorch, by name."""
    parameters = family_of(config).parameters(config).values()
    return weights({each.tensor: each.shape[::-1] if each.transposed else each.shape for each in parameters})


def _interleaved(rows, heads):
    """As llama.cpp wants queries and keys, whose features 2i and 2i + 1 turn together."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write_gguf(path, arrays, kinds, changes=()):
    """The file; `kinds` are formats by the end of a name."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    for change in changes:
        change(writer)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    names |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(2) for theirs, ours in LLAMA.items()}
    stored = {}
    for name, array in arrays.items():
        parent, _, leaf = name.rpartition(".")
        heads = {"q_proj": 4, "k_proj": 2}.get(parent.rpartition(".")[2])
        array = array if heads is None else _interleaved(array, heads)
        kind = next((kind for end, kind in kinds.items() if parent.endswith(end)), gguf.GGMLQuantizationType.F32)
        data = gguf.quants.quantize(array, kind)
        writer.add_tensor(f"{names[parent]}.{leaf}", data, raw_dtype=kind)
        stored[name] = gguf.quants.dequantize(data, kind)
        if heads is not None:
            stored[name] = np.concatenate(
                [part[np.r_[0 : len(part) : 2, 1 : len(part) : 2]] for part in np.split(stored[name], heads)]
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
