"""Compares GPT-2, Llama and Mistral with Hugging Face's Flax classes, on random models that those write as msgpack.

Needs transformers 4.57, the last line with Flax classes. Those ignore `rope_theta` and a Llama's `tie_word_embeddings`,
and their window shows one token more than PyTorch's: no model here has any of the three, which are compared with
PyTorch in `tests/models/test_decoder_golden.py`. The last line printed is JSON: the largest absolute difference of the
logits of tokens that count, by model.

    python examples/parity/hf_flax_decoders.py
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import transformers

from jaxcompress.models import from_pretrained

SIZES = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = {**SIZES, "intermediate_size": 40, "max_position_embeddings": 64, "initializer_range": 0.3}
GPT2 = {"vocab_size": 61, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "FlaxGPT2LMHeadModel", GPT2),
    "gpt2, wide": (
        "GPT2Config",
        "FlaxGPT2LMHeadModel",
        {**GPT2, "n_inner": 56, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "llama": ("LlamaConfig", "FlaxLlamaForCausalLM", LLAMA),
    "llama, grouped": (
        "LlamaConfig",
        "FlaxLlamaForCausalLM",
        {**LLAMA, "num_key_value_heads": 2},
    ),
    "mistral, grouped": (
        "MistralConfig",
        "FlaxMistralForCausalLM",
        {**LLAMA, "num_key_value_heads": 2, "sliding_window": 64},
    ),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
        raise SystemExit(f"transformers {transformers.__version__} has no Flax classes: install 4.57.")
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(1, 61, (3, 12)), np.ones((3, 12), np.int32)
    mask[0, 8:], mask[1, :3] = 0, 0
    print(json.dumps({name: difference(*model, ids, mask) for name, model in MODELS.items()}))


def difference(config: str, kind: str, settings: dict[str, Any], ids: np.ndarray, mask: np.ndarray) -> float:
    theirs = getattr(transformers, kind)(getattr(transformers, config)(**settings), seed=1)
    # Norms and biases begin at 1 and 0, where nobody would see that they are not read.
    rng = np.random.default_rng(2)
    theirs.params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), theirs.params)
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
    wanted = theirs(ids, attention_mask=mask, position_ids=positions).logits
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        assert (Path(directory) / "flax_model.msgpack").exists()
        module, params = from_pretrained(Path(directory))
    outputs = module.apply({"params": params}, ids, mask)["logits"]
    return float(np.abs(np.asarray(outputs) - np.asarray(wanted))[mask > 0].max())


if __name__ == "__main__":
    main()
