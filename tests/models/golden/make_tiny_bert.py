"""Makes `tiny_bert.npz` and `tiny_bert/`: outputs of Hugging Face's Flax BERT on fixed random weights.

Run with transformers 4.57.6, the last line with Flax classes, beside jax 0.10.2 and flax 0.12.8:

    python tests/models/golden/make_tiny_bert.py

The weights come from NumPy's default_rng(0), in the sorted order of the Flax paths, so that any machine makes the same.
One file holds all heads (as that of a BertForPreTraining plus a classifier would); its tensors are named and oriented
as PyTorch does, by rules written out here, independent of the library.
"""

import json
from pathlib import Path

import jax
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

HERE = Path(__file__).parent
SETTINGS = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "id2label": {"0": "bad", "1": "fair", "2": "good"},
    "label2id": {"bad": 0, "fair": 1, "good": 2},
}
CLASSES = {
    "encoder": transformers.FlaxBertModel,
    "sequence_classification": transformers.FlaxBertForSequenceClassification,
    "masked_lm": transformers.FlaxBertForMaskedLM,
}


def main() -> None:
    rng = np.random.default_rng(0)
    config = transformers.BertConfig(**SETTINGS)
    models = {head: cls(config, seed=0, _do_init=True) for head, cls in CLASSES.items()}
    paths = {head: sorted(flatten_dict(model.params, sep="/")) for head, model in models.items()}
    shapes = {}
    for model in models.values():
        for path, leaf in flatten_dict(model.params, sep="/").items():
            shapes[path.removeprefix("bert/")] = leaf.shape
    weights = {path: _draw(rng, path, shapes[path]) for path in sorted(shapes)}
    inputs = _inputs(rng)
    outputs = {}
    for head, model in models.items():
        tree = unflatten_dict({path: weights[path.removeprefix("bert/")] for path in paths[head]}, sep="/")
        out = model(**inputs, params=tree, output_hidden_states=True, output_attentions=True)
        for name in ("logits", "last_hidden_state", "pooler_output"):
            if name in out:
                outputs[f"{head}/{name}"] = np.asarray(out[name])
        if head == "encoder":
            outputs["encoder/hidden_states"] = np.stack(out["hidden_states"])
            outputs["encoder/attentions"] = np.stack(out["attentions"])
    versions = {"transformers": transformers.__version__, "jax": jax.__version__}
    np.savez_compressed(
        HERE / "tiny_bert.npz",
        **{f"input/{name}": array for name, array in inputs.items()},
        **outputs,
        paths=json.dumps(paths),
        versions=json.dumps(versions),
    )
    directory = HERE / "tiny_bert"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
    save_file(dict(_torch(path, leaf) for path, leaf in weights.items()), directory / "model.safetensors")


def _draw(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    # Wide enough that no part of the model is negligible in the outputs.
    center, spread = (1.0, 0.3) if path.endswith("/scale") else (0.0, 0.25)
    return (center + spread * rng.standard_normal(shape)).astype(np.float32)


def _inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    lengths, length = np.array([11, 4, 1, 8]), 11
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    return {
        "input_ids": rng.integers(1, 60, mask.shape, dtype=np.int32) * mask,
        "attention_mask": mask,
        "token_type_ids": (np.arange(length) >= 3).astype(np.int32) * mask,
        "position_ids": np.broadcast_to(np.arange(length, dtype=np.int32)[::-1] + 5, mask.shape).copy(),
    }


def _torch(path: str, leaf: np.ndarray) -> tuple[str, np.ndarray]:
    if not path.startswith(("cls/", "classifier/")):
        path = f"bert/{path}"
    name = path.replace("/", ".")
    if name.endswith(".kernel"):
        return name[: -len("kernel")] + "weight", np.ascontiguousarray(leaf.T)
    for ending in (".scale", ".embedding"):
        if name.endswith(ending):
            return name[: -len(ending)] + ".weight", leaf
    return name, leaf


if __name__ == "__main__":
    main()
