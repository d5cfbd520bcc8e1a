"""Bytes and CPU seconds of every coder of small integers, for each million codes of weights.

The codes are those of the kernels of one MiniLM layer (4 bits in groups of 32; 16 shared values; 8 shared values after
pruning to a tenth by magnitude), and of a matrix like the first of LeNet-300-100, pruned to 4 %: its nonzeros gather in
the middle of the image, and in some units more than in others. Rates vary with what else the machine does; bytes don't.

    python examples/benchmarks/coders.py FILE [--layer 2]

FILE is a safetensors file of a BERT with Hugging Face names. The last line printed is JSON.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxcompress._src.coding.codes import Coder, decode_codes, encode_codes
from jaxcompress.clustering import CodebookSpec, cluster
from jaxcompress.quantization import QuantSpec, quantize

WRITTEN = [coder for coder in Coder if coder is not Coder.GAPS]
Arrays = list[tuple[np.ndarray, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="MiniLM as safetensors")
    parser.add_argument("--layer", type=int, default=2)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name, arrays in data(arguments.weights, arguments.layer):
        results[name] = {coder.name: measure(arrays, coder) for coder in WRITTEN}
        results[name]["chosen"] = measure(arrays, None)
        results[name]["entropy"] = {"bytes": round(sum(map(entropy_bytes, arrays)) / millions(arrays))}
    for name, coders in results.items():
        for coder, figures in coders.items():
            seconds = "".join(f"{figures[key]:9.2f} s" for key in ("encode", "decode") if key in figures)
            print(f"{name:27}{coder:10}{figures['bytes']:9,}{seconds}")
    print(json.dumps(results))


def data(path: Path, layer: int) -> Iterator[tuple[str, Arrays]]:
    tensors = {
        name: jnp.asarray(np.asarray(tensor, np.float32).T)
        for name, tensor in load_file(path).items()
        if f"layer.{layer}." in name and tensor.ndim == 2
    }
    kernels = {f"{at}": {"kernel": tensor} for at, tensor in enumerate(tensors.values())}
    pruned = {at: {"kernel": tenth(leaf["kernel"])} for at, leaf in kernels.items()}
    yield "MiniLM, 4 bits", codes_of(quantize(kernels, QuantSpec(bits=4, group_size=32))[0])
    yield "MiniLM, 16 values", codes_of(cluster(kernels, CodebookSpec(values=16))[0])
    yield "MiniLM, a tenth, 8 values", codes_of(cluster(pruned, CodebookSpec(values=8))[0])
    yield "LeNet-like, 4 %, 8 values", [(lenet_like(), 3)]


def codes_of(tree: Any) -> Arrays:
    leaves = [leaf["kernel"] for leaf in tree.values()]
    codes = [np.asarray(leaf.codes()).astype(np.int64) for leaf in leaves]
    return [(array - min(array.min(), 0), leaf.bits) for array, leaf in zip(codes, leaves, strict=True)]


def tenth(weights: Any) -> Any:
    return jnp.where(jnp.abs(weights) > jnp.quantile(jnp.abs(weights), 0.9), weights, 0.0)


def lenet_like() -> np.ndarray:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-14:14, -14:14] / 7.0
    pixels = np.exp(-(x**2 + y**2) / 2).ravel()
    rates = np.outer(pixels, rng.lognormal(0, 1, 300))
    kept = rng.random(rates.shape) < np.minimum(0.04 * rates / rates.mean(), 1)
    return np.where(kept, rng.choice(np.arange(1, 8), rates.shape, p=np.array([5, 15, 25, 10, 25, 15, 5]) / 100), 0)


def measure(arrays: Arrays, coder: Coder | None) -> dict[str, float]:
    began = time.process_time()
    encoded = [encode_codes(codes, bits=bits, coder=coder) for codes, bits in arrays]
    middle = time.process_time()
    for data, (codes, bits) in zip(encoded, arrays, strict=True):
        np.testing.assert_array_equal(decode_codes(data, codes.shape, bits=bits), codes)
    ended = time.process_time()
    count = millions(arrays)
    return {
        "bytes": round(sum(map(len, encoded)) / count),
        "encode": (middle - began) / count,
        "decode": (ended - middle) / count,
    }


def entropy_bytes(array: tuple[np.ndarray, int]) -> float:
    shares = np.bincount(array[0].ravel()) / array[0].size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum() * array[0].size / 8)


def millions(arrays: Arrays) -> float:
    return sum(codes.size for codes, _ in arrays) / 1e6


if __name__ == "__main__":
    main()
