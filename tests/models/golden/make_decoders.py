"""Makes `decoders.npz` and `decoders.json`: outputs of Hugging Face's PyTorch decoders on fixed random weights.

Run with torch 2.14.1 and transformers 5.24.0:

    python tests/models/golden/make_decoders.py

Weights come from NumPy in the order of their names (`golden_weights.py`), so that any machine makes the same, and only
outputs are kept.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from golden_weights import weights  # noqa: E402

TINY = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.02,
}
TINY_GPT2 = {
    "vocab_size": 37,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

MODELS = {
    "llama": ("LlamaForCausalLM", {**TINY, "rope_theta": 1000.0}),
    "llama_tied_biased": (
        "LlamaForCausalLM",
        {**TINY, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ),
    "llama_wide_heads": ("LlamaForCausalLM", {**TINY, "head_dim": 10, "num_key_value_heads": 4}),
    "llama_linear": ("LlamaForCausalLM", {**TINY, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama_llama3": ("LlamaForCausalLM", {**TINY, "rope_scaling": LLAMA3}),
    "llama_yarn": ("LlamaForCausalLM", {**TINY, "rope_scaling": YARN}),
    "llama_plain": ("LlamaModel", TINY),
    "llama_classifier": (
        "LlamaForSequenceClassification",
        {**TINY, "id2label": {"0": "bad", "1": "fair", "2": "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}},
    ),
    "mistral": ("MistralForCausalLM", {**TINY, "sliding_window": 4}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**TINY, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**TINY, "head_dim": 8, "rope_theta": 5000.0}),
    "gpt2": ("GPT2LMHeadModel", TINY_GPT2),
    "gpt2_wide": ("GPT2LMHeadModel", {**TINY_GPT2, "n_inner": 30, "activation_function": "gelu"}),
    "gpt2_plain": ("GPT2Model", TINY_GPT2),
    "gpt2_classifier": ("GPT2ForSequenceClassification", {**TINY_GPT2, "num_labels": 3}),
}


def main() -> None:
    ids = np.random.default_rng(1).integers(1, 37, (3, 11))
    mask = np.ones_like(ids)
    mask[1, 7:], mask[2, :4] = 0, 0
    ids = np.where(mask, ids, 0)
    arrays, settings = {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}, {}
    for name, (architecture, options) in MODELS.items():
        cls = getattr(transformers, architecture)
        model = cls(cls.config_class(**options, attn_implementation="eager")).eval()
        state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        tied = "lm_head.weight" in state and model.config.tie_word_embeddings
        state = {key: shape for key, shape in state.items() if not (tied and key == "lm_head.weight")}
        drawn = weights(state)
        model.load_state_dict({key: torch.tensor(value) for key, value in drawn.items()}, strict=False)
        model.tie_weights()
        # Left padding keeps positions only if they are given.
        positions = np.maximum(mask.cumsum(-1) - 1, 0)
        with torch.no_grad():
            outputs = model(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                position_ids=torch.tensor(positions),
                output_hidden_states=True,
            )
        arrays[f"{name}/hidden"] = outputs.hidden_states[2].numpy()
        plain = architecture.endswith("Model") and "LMHead" not in architecture
        arrays[f"{name}/outputs"] = (outputs[0] if plain else outputs.logits).numpy()
        settings[name] = {
            "config": {**options, "architectures": [architecture], "model_type": model.config.model_type},
            "written": json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [architecture]},
            "shapes": state,
        }
    np.savez_compressed(HERE / "decoders.npz", **arrays)
    (HERE / "decoders.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
