"""Makes `gptq.npz`: GPTQ as llm-compressor and as AutoGPTQ compute it, on small random layers that are not square.

Run with llmcompressor 0.14.0.1 and auto-gptq 0.7.1 (`pip install --no-deps` both), beside torch 2.13.0,
compressed-tensors 0.20.0, transformers and loguru:

    python tests/quantization/golden/make_gptq.py

llm-compressor has scales from the weights as they were (static groups), in either order of the inputs; AutoGPTQ also
has groups whose scales are those of the updated weights, and the MSE grid. AutoGPTQ looks at weights that the current
block has not updated yet, so its blocks are as long as its groups. Both are imported without the `__init__` of their
packages, which import far more. Inputs are given as (rows, 1, features), so that the references' number of
samples is the number of rows. Weights are stored in torch orientation, (out, in).
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams

HERE = Path(__file__).parent
SHAPES = {"wide": (14, 48), "tall": (32, 24), "odd": (9, 36)}


def main() -> None:
    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda: None
    auto = _module("auto-gptq", "auto_gptq/quantization", "gptq")
    compressor = _module("llmcompressor", "llmcompressor/modifiers/gptq", "gptq_quantize")
    arrays, cases = {}, []
    for layer in _layers(np.random.default_rng(0)):
        arrays |= {f"{layer['name']}/weight": layer["weight"], f"{layer['name']}/inputs": layer["inputs"]}
        for case in _settings(layer["name"], layer["weight"].shape[1]):
            source, bits, group, symmetric, order, groups, mse, block = case
            solve = _by_llm_compressor(compressor) if source == "llm-compressor" else _by_auto_gptq(auto)
            weight, inputs = torch.from_numpy(layer["weight"].copy()), torch.from_numpy(layer["inputs"])
            found = solve(weight, inputs, bits, group, symmetric, order, groups, mse, block)
            name = "/".join(map(str, (layer["name"], *case)))
            arrays[name] = found.detach().numpy()
            cases.append([layer["name"], *case])
    versions = {name: importlib.metadata.version(name) for name in ("llmcompressor", "auto-gptq", "torch")}
    np.savez_compressed(HERE / "gptq.npz", **arrays, cases=json.dumps(cases), versions=json.dumps(versions))


def _settings(layer: str, columns: int) -> list[tuple]:
    """(source, bits, group, symmetric, order, groups, mse, block)."""
    small, large = columns // 4, columns // 2
    settings = [
        ("llm-compressor", 4, small, True, "natural", "static", False, 128),
        ("llm-compressor", 4, small, True, "activation", "static", False, 16),
        ("llm-compressor", 3, large, False, "activation", "static", False, 128),
        ("llm-compressor", 2, small, False, "activation", "static", False, 16),
        ("llm-compressor", 4, None, False, "natural", "static", False, 16),
        ("AutoGPTQ", 4, small, True, "natural", "updated", False, small),
        ("AutoGPTQ", 3, small, False, "natural", "updated", False, small),
        ("AutoGPTQ", 2, large, False, "natural", "updated", True, large),
        ("AutoGPTQ", 4, small, True, "activation", "static", True, 128),
        ("AutoGPTQ", 3, None, True, "activation", "static", False, 128),
    ]
    # Each one is compiled: the other layers have every third or so.
    return settings if layer == "tall" else settings[1:9:2] if layer == "wide" else settings[2:9:3]


def _by_llm_compressor(module: ModuleType):
    def solve(weight, inputs, bits, group, symmetric, order, groups, mse, block):
        del groups, mse
        arguments = QuantizationArgs(
            num_bits=bits,
            symmetric=symmetric,
            strategy="channel" if group is None else "group",
            group_size=group,
            actorder="weight" if order == "activation" else None,
        )
        # As AutoGPTQ: weights of inputs that are always 0 have no part in the ranges.
        weight[:, (inputs == 0).all(0)] = 0
        blocks = weight.reshape(len(weight), -1, group or weight.shape[1])
        scale, zero_point = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
        hessian = 2 * inputs.T @ inputs / len(inputs)
        solved, _, fell_back = module.quantize_weight(
            weight[None],
            hessian[None],
            scale[None],
            zero_point[None],
            None,
            arguments,
            blocksize=block,
            percdamp=0.01,
        )
        assert not bool(fell_back.any())
        return solved[0]

    return solve


def _by_auto_gptq(module: ModuleType):
    def solve(weight, inputs, bits, group, symmetric, order, groups, mse, block):
        linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
        linear.weight.data = weight
        method = module.GPTQ(linear)
        method.quantizer.configure(bits, perchannel=True, sym=symmetric, mse=mse)
        method.add_batch(inputs[:, None], None)
        method.fasterquant(
            blocksize=block,
            percdamp=0.01,
            group_size=-1 if group is None else group,
            actorder=order == "activation",
            static_groups=groups == "static" and group is not None,
        )
        return linear.weight.data

    return solve


def _module(distribution: str, folder: str, name: str) -> ModuleType:
    files, at = importlib.metadata.distribution(distribution), ""
    for part in folder.split("/"):
        at = f"{at}/{part}".strip("/")
        package = ModuleType(at.replace("/", "."))
        package.__path__ = [str(files.locate_file(at))]
        sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.{name}")


def _layers(rng: np.random.Generator) -> list[dict]:
    layers = []
    for name, (rows, columns) in SHAPES.items():
        mixing = rng.normal(size=(columns, columns)) / np.sqrt(columns)
        inputs = rng.normal(size=(64, columns)) @ mixing
        if name == "wide":
            inputs[:, [5, 30]] = 0
        layers.append(
            {
                "name": name,
                "weight": rng.normal(size=(rows, columns)).astype(np.float32),
                "inputs": inputs.astype(np.float32),
            }
        )
    return layers


if __name__ == "__main__":
    main()
