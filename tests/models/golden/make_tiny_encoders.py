"""Makes `tiny_roberta/` and `tiny_distilbert/`: files of two tiny models, and what transformers makes of fixed inputs.

Run first beside transformers 4.57.6 (the last with Flax classes), jax 0.10.2 and flax 0.12.8, and then beside
transformers 5.24.0 and torch 2.14.1:

    python tests/models/golden/make_tiny_encoders.py flax
    python tests/models/golden/make_tiny_encoders.py torch

`flax` draws the weights from NumPy's default_rng(0), in the sorted order of the Flax paths, and writes them with the
names and the orientation of PyTorch, by rules written out here, independent of the library. One file holds all heads.
`torch` reads that file by transformers, which must miss no tensor of any head. Each writes the outputs of its classes,
`flax.npz` and `torch.npz`; that XLM-RoBERTa is a RoBERTa with another name is checked on the way.

Positions of the RoBERTa begin at 4 (`pad_token_id` is 3), its layers have another activation than its decoder. Rows of
the inputs are padded at the end, and one of them at the beginning.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import transformers

HERE = Path(__file__).parent
LABELS = {"id2label": {"0": "bad", "1": "fair", "2": "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
SETTINGS: dict[str, dict[str, Any]] = {
    "roberta": {
        "architectures": ["RobertaForSequenceClassification"],
        "model_type": "roberta",
        "vocab_size": 31,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 37,
        "max_position_embeddings": 17,
        "type_vocab_size": 1,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 3,
        **LABELS,
    },
    "distilbert": {
        "architectures": ["DistilBertForSequenceClassification"],
        "model_type": "distilbert",
        "vocab_size": 31,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 37,
        "max_position_embeddings": 13,
        "sinusoidal_pos_embds": False,
        "activation": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "qa_dropout": 0.1,
        "seq_classif_dropout": 0.25,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "tie_weights_": True,
        **LABELS,
    },
}
CLASSES = {"encoder": "Model", "sequence_classification": "ForSequenceClassification", "masked_lm": "ForMaskedLM"}
NAMES = {"roberta": "Roberta", "distilbert": "DistilBert", "xlm-roberta": "XLMRoberta"}


def main() -> None:
    outputs = {"flax": flax_outputs, "torch": torch_outputs}[sys.argv[1]]
    for model_type, settings in SETTINGS.items():
        rng = np.random.default_rng(0)
        directory = HERE / f"tiny_{model_type}"
        directory.mkdir(exist_ok=True)
        inputs = _inputs(rng, settings)
        np.savez_compressed(
            directory / f"{sys.argv[1]}.npz",
            **{f"input/{name}": array for name, array in inputs.items()},
            **outputs(model_type, settings, inputs, rng, directory),
        )


def flax_outputs(
    model_type: str, settings: dict[str, Any], inputs: dict[str, np.ndarray], rng: np.random.Generator, directory: Path
) -> dict[str, Any]:
    """The outputs of the Flax classes, with the paths of their parameters; writes the files of the model."""
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict
    from safetensors.numpy import save_file

    config = transformers.AutoConfig.for_model(**settings)
    models = {
        head: getattr(transformers, f"Flax{NAMES[model_type]}{cls}")(config, seed=0, _do_init=True)
        for head, cls in CLASSES.items()
    }
    prefix = f"{model_type}/"
    shapes, paths = {}, {}
    for head, model in models.items():
        leaves = flatten_dict(model.params, sep="/")
        paths[head] = sorted(leaves)
        shapes |= {path if head != "encoder" else prefix + path: leaf.shape for path, leaf in leaves.items()}
    weights = {path: _draw(rng, path, shapes[path]) for path in sorted(shapes)}
    found = {}
    for head, model in models.items():
        names = {path: path if head != "encoder" else prefix + path for path in paths[head]}
        tree = unflatten_dict({path: weights[name] for path, name in names.items()}, sep="/")
        out = model(**inputs, params=tree, output_hidden_states=True, output_attentions=True)
        found |= _found(head, out)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tensors = dict(_torch_tensor(path, leaf) for path, leaf in weights.items())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    versions = {"transformers": transformers.__version__, "jax": jax.__version__}
    return found | {"paths": json.dumps(paths), "versions": json.dumps(versions)}


def torch_outputs(
    model_type: str, settings: dict[str, Any], inputs: dict[str, np.ndarray], rng: np.random.Generator, directory: Path
) -> dict[str, Any]:
    """The outputs of the PyTorch classes, of the files that `flax_outputs` wrote."""
    import torch

    del settings, rng
    tensors = {name: torch.tensor(array, dtype=torch.long) for name, array in inputs.items()}
    found = {}
    for head, cls in CLASSES.items():
        outputs = []
        for name in ("roberta", "xlm-roberta") if model_type == "roberta" else (model_type,):
            model, info = getattr(transformers, NAMES[name] + cls).from_pretrained(
                directory, output_loading_info=True, attn_implementation="eager"
            )
            assert not info["missing_keys"], info["missing_keys"]
            with torch.no_grad():
                out = model.eval()(**tensors, output_hidden_states=True, output_attentions=True)
            outputs.append(_found(head, out))
        for other in outputs[1:]:
            for key, value in outputs[0].items():
                np.testing.assert_array_equal(other[key], value, err_msg=key)
        found |= outputs[0]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return found | {"versions": json.dumps(versions)}


def _found(head: str, out: Any) -> dict[str, np.ndarray]:
    names = ["logits", "last_hidden_state", "pooler_output"]
    names += ["hidden_states", "attentions"] if head == "encoder" else []
    return {f"{head}/{name}": _array(out[name]) for name in names if name in out}


def _array(value: Any) -> np.ndarray:
    return np.stack([np.asarray(each) for each in value]) if isinstance(value, tuple) else np.asarray(value)


def _draw(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    # Wide enough that no part of the model is negligible in the outputs.
    center, spread = (1.0, 0.3) if path.endswith("/scale") else (0.0, 0.25)
    return (center + spread * rng.standard_normal(shape)).astype(np.float32)


def _inputs(rng: np.random.Generator, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    lengths, length = np.array([13, 4, 1, 8]), 13
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    mask[1] = mask[1, ::-1]
    ids = rng.integers(4, settings["vocab_size"], mask.shape, dtype=np.int32)
    return {"input_ids": np.where(mask > 0, ids, settings["pad_token_id"]).astype(np.int32), "attention_mask": mask}


def _torch_tensor(path: str, leaf: np.ndarray) -> tuple[str, np.ndarray]:
    name = path.replace("/", ".")
    if name.endswith(".kernel"):
        return name[: -len("kernel")] + "weight", np.ascontiguousarray(leaf.T)
    for ending in (".scale", ".embedding"):
        if name.endswith(ending):
            return name[: -len(ending)] + ".weight", leaf
    return name, leaf


if __name__ == "__main__":
    main()
