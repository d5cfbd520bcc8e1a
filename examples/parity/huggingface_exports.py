"""Compares models written as compressed-tensors with what transformers 5 loads from them, on random models.

Needs two environments. The one of jaxcompress writes directories, with token ids and the logits of `execute` on
compressed leaves; another, with PyTorch, transformers 5 and compressed-tensors, loads them. The last lines that it
prints are JSON: the largest absolute difference of the logits (or hidden states) of tokens that count, by model and by
how it is loaded: with compressed weights, or dequantized while loading.

    python examples/parity/huggingface_exports.py write FOLDER
    python-with-torch examples/parity/huggingface_exports.py read FOLDER
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "initializer_range": 0.3,
}
BERT = {name: size for name, size in LLAMA.items() if name != "num_key_value_heads"}
INT4, INT8, UINT4 = {"bits": 4, "group_size": 32}, {"bits": 8}, {"bits": 4, "group_size": 32, "symmetric": False}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "smollm2, int4 g32": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, {".*layers/.*/kernel": INT4}),
    "llama, int8 rows": ("LlamaConfig", LLAMA, {".*layers/.*/kernel": INT8}),
    "llama, uint4 g32": ("LlamaConfig", LLAMA, {".*layers/.*/kernel": UINT4}),
    "llama, mixed, head": (
        "LlamaConfig",
        LLAMA,
        {".*layers/.*self_attn.*/kernel": INT8, ".*layers/.*mlp.*/kernel": INT4, "lm_head/kernel": INT8},
    ),
    "qwen3, int4 g16": (
        "LlamaConfig",
        {**LLAMA, "model_type": "qwen3", "qk_norm": True},
        {".*layers/.*/kernel": {"bits": 4, "group_size": 16}},
    ),
    "bert, int4 g32": ("BertConfig", BERT, {".*layer/.*/kernel": INT4}),
    "bert classifier, int8 rows": (
        "BertConfig",
        {**BERT, "head": "sequence_classification"},
        {".*layer/.*/kernel": INT8},
    ),
    "bert masked lm, uint8 rows": (
        "BertConfig",
        {**BERT, "head": "masked_lm"},
        {".*layer/.*/kernel": {"bits": 8, "symmetric": False}},
    ),
    "distilbert, int4 g32": (
        "BertConfig",
        {**BERT, "model_type": "distilbert", "head": "sequence_classification"},
        {".*layer/.*/kernel": INT4},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"write": write, "read": read}[arguments.part](arguments.folder)


def write(folder: Path) -> None:
    import jax
    import jax.numpy as jnp

    import jaxcompress as jc

    rng = np.random.default_rng(0)
    ids, mask = rng.integers(1, 61, (3, 12)), np.ones((3, 12), np.int32)
    mask[0, 8:] = 0
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "inputs.npz", ids=ids, mask=mask)
    for name, (kind, settings, specs) in MODELS.items():
        module = jc.models.make_module(getattr(jc.models, kind)(**settings))
        params = jax.jit(module.init)(jax.random.key(1), jnp.asarray(ids))["params"]
        # Norms and biases begin at 1 and 0, where nobody would see that they are not read.
        params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), params)
        for pattern, options in specs.items():
            spec = jc.quantization.QuantSpec(**options)
            params, _ = jc.quantization.quantize(params, spec, select=jc.tree.by_path(pattern))
        info = jc.export.save_huggingface(
            folder / name, module, params, format="compressed-tensors", overwrite=True, max_shard_size="100KB"
        )
        run = jc.execute(lambda p, m=module: m.apply({"params": p}, ids, mask))
        outputs = run(params)
        np.save(folder / f"{name}.npy", outputs.get("logits", outputs["last_hidden_state"]))
        print(name, info.nbytes, "bytes", sorted({leaf.form for leaf in info.leaves.values()}))


def read(folder: Path) -> None:
    import torch
    import transformers
    from transformers.utils.quantization_config import CompressedTensorsConfig

    inputs = np.load(folder / "inputs.npz")
    ids, mask = (torch.from_numpy(inputs[name]).long() for name in ("ids", "mask"))
    differences = {}
    for name in MODELS:
        settings = json.loads((folder / name / "config.json").read_text())
        kind = getattr(transformers, settings["architectures"][0])
        wanted = torch.from_numpy(np.load(folder / f"{name}.npy"))
        ways: dict[str, dict[str, Any]] = {
            "compressed": {},
            "dequantized": {"quantization_config": CompressedTensorsConfig(dequantize=True)},
        }
        if "uint" in name:
            # Before weights are there, compressed-tensors (0.20.1) makes zero points in the shape of unpacked ones.
            del ways["compressed"]
        if len(settings["quantization_config"]["config_groups"]) > 1:
            # Dequantizing, transformers (5.24) takes one scheme for all layers.
            del ways["dequantized"]
        for how, options in ways.items():
            model, loading = kind.from_pretrained(folder / name, output_loading_info=True, **options)
            assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
            with torch.no_grad():
                outputs = model.eval()(ids, attention_mask=mask)
            logits = getattr(outputs, "logits", None)
            logits = outputs.last_hidden_state if logits is None else logits
            close = (logits - wanted).abs()
            close = close if logits.ndim == 2 else close[mask > 0]
            differences[f"{name}, {how}"] = float(close.max())
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(json.dumps(differences, indent=1))


if __name__ == "__main__":
    main()
