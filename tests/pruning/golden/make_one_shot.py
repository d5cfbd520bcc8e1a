"""Makes `one_shot.npz`: SparseGPT, Wanda and n:m masks as llm-compressor computes them, on small random layers.

Run with llmcompressor 0.14.0.1 (`pip install --no-deps`), beside torch 2.13.0, transformers and loguru:

    python tests/pruning/golden/make_one_shot.py

The two modules are loaded from their files, because the package's `__init__` imports far more than they need. Inputs
are given as (rows, 1, features), so that the reference's number of samples is the number of rows. Weights are stored
in torch orientation, (out, in), as the reference has them.
"""

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

HERE = Path(__file__).parent
SHAPES = {"wide": (24, 40), "tall": (40, 24)}


def main() -> None:
    torch.set_num_threads(1)
    sparsegpt, wanda = (_load(name) for name in ("sparsegpt/sgpt_sparsify.py", "wanda/wanda_sparsify.py"))
    rng = np.random.default_rng(0)
    arrays, cases = {}, []
    for layer in _layers(rng):
        arrays |= {f"{layer['name']}/weight": layer["weight"], f"{layer['name']}/inputs": layer["inputs"]}
        for method, sparsity, n, m, block in _settings(layer["name"]):
            name = f"{layer['name']}/{method}/{sparsity}/{n}:{m}/{block}"
            module = torch.nn.Linear(*layer["weight"].shape[::-1], bias=False)
            module.weight.data = torch.from_numpy(layer["weight"].copy())
            x = torch.from_numpy(layer["inputs"])[:, None]
            if method == "wanda":
                scalars, _ = wanda.accumulate_row_scalars(x, module, wanda.make_empty_row_scalars(module), 0)
                pruned = wanda.sparsify_weight(module, {module: scalars}, sparsity, n, m)
            else:
                hessian, _ = sparsegpt.accumulate_hessian(x, module, sparsegpt.make_empty_hessian(module), 0)
                _, pruned = sparsegpt.sparsify_weight(module, {module: hessian}, sparsity, n, m, block, 0.01, False)
            arrays[f"{name}/pruned"] = pruned.detach().numpy()
            cases.append([layer["name"], method, sparsity, n, m, block])
    versions = {name: importlib.metadata.version(name) for name in ("llmcompressor", "torch")}
    np.savez_compressed(HERE / "one_shot.npz", **arrays, cases=json.dumps(cases), versions=json.dumps(versions))


def _load(name: str) -> ModuleType:
    file = importlib.metadata.distribution("llmcompressor").locate_file(f"llmcompressor/modifiers/pruning/{name}")
    spec = importlib.util.spec_from_file_location(Path(str(file)).stem, str(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _layers(rng: np.random.Generator) -> list[dict]:
    layers = []
    for name, (rows, columns) in SHAPES.items():
        mixing = rng.normal(size=(columns, columns)) / np.sqrt(columns)
        layers.append(_layer(name, rng.normal(size=(rows, columns)), rng.normal(size=(96, columns)) @ mixing))
    # Small integers: many equal scores.
    weight = rng.integers(-3, 4, size=(24, 40))
    layers.append(_layer("ties", weight, np.concatenate([np.eye(40), -np.eye(40)])))
    # Fewer rows than inputs, and inputs that are always 0.
    inputs = rng.normal(size=(12, 40))
    inputs[:, [3, 17, 18]] = 0
    layers.append(_layer("singular", rng.normal(size=(24, 40)), inputs))
    return layers


def _layer(name: str, weight: np.ndarray, inputs: np.ndarray) -> dict:
    return {"name": name, "weight": weight.astype(np.float32), "inputs": inputs.astype(np.float32)}


def _settings(layer: str) -> list[tuple]:
    unstructured = [(method, s, 0, 0, 16) for method in ("wanda", "sparsegpt") for s in (0.5, 0.7)]
    # `topk` breaks ties as it likes: no n:m where scores tie.
    patterns = [] if layer == "ties" else [(method, 0.5, 2, 4, 16) for method in ("wanda", "sparsegpt")]
    return [*unstructured, *patterns, *([] if layer == "ties" else [("sparsegpt", 0.5, 0, 0, 128)])]


if __name__ == "__main__":
    main()
