"""Weights read back from Hugging Face directories of quantized layers, by NumPy alone.

Shape letters: O outputs, I inputs, G groups of inputs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def stored_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of the files of a directory, by name."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


def quantization_settings(directory: Path) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return json.loads((directory / "config.json").read_text("utf-8"))["quantization_config"]


def compressed_tensors_weight(tensors: Mapping[str, np.ndarray], layer: str, settings: Mapping[str, Any]) -> Any:
    """A layer of the format `pack-quantized` as a matrix (O, I), float32; None if it is not quantized."""
    if f"{layer}.weight_packed" not in tensors:
        return None
    scale, shape = tensors[f"{layer}.weight_scale"], tensors[f"{layer}.weight_shape"]
    groups = settings["config_groups"].values()
    weights = next(each["weights"] for each in groups if each["targets"] == ["Linear"] or layer in each["targets"])
    bits = weights["num_bits"]
    codes = _unpacked(tensors[f"{layer}.weight_packed"], int(shape[1]), bits).astype(np.float32)
    if weights["symmetric"]:
        zero_point = np.full(scale.shape, 2 ** (bits - 1), np.float32)
    else:
        packed = tensors[f"{layer}.weight_zero_point"]
        zero_point = _unpacked(packed.T, int(shape[0]), bits).T.astype(np.float32)
    size = int(shape[1]) // scale.shape[1]
    return (codes - np.repeat(zero_point, size, axis=1)) * np.repeat(scale.astype(np.float32), size, axis=1)


def gptq_weight(tensors: Mapping[str, np.ndarray], layer: str, settings: Mapping[str, Any]) -> Any:
    """A layer in GPTQ's layout as a matrix (O, I), float32; None if it is not quantized."""
    if f"{layer}.qweight" not in tensors:
        return None
    scales, groups = tensors[f"{layer}.scales"].astype(np.float32), tensors[f"{layer}.g_idx"]
    bits = settings["bits"]
    codes = _unpacked(tensors[f"{layer}.qweight"].T, len(groups), bits).T.astype(np.float32)
    zero_point = _unpacked(tensors[f"{layer}.qzeros"], scales.shape[1], bits).astype(np.float32) + 1
    return ((codes - zero_point[groups]) * scales[groups]).T


def _unpacked(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The first `count` codes of each row of 32-bit words, bit after bit, the lowest first."""
    stream = np.unpackbits(np.ascontiguousarray(words, "<i4").view(np.uint8), axis=-1, bitorder="little")
    codes = stream[:, : count * bits].reshape(len(words), count, bits)
    return codes @ (1 << np.arange(bits))
