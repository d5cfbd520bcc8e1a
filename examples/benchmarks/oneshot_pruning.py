"""SparseGPT of one kernel: seconds to compile, and seconds to run against the same algorithm in PyTorch.

The PyTorch column is a plain implementation of the paper's algorithm 1 (float32, blocks of 128, damping 0.01), written
below; it runs in the same process, on the same cores, in turn with ours, so that a machine whose speed drifts slows
both. Quoted are medians, and the median of the ratios of neighbours. Without torch that column says so.

    python examples/benchmarks/oneshot_pruning.py [--quick]
"""

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from one_kernel import drawn_layer, output_error, seconds_of

from jaxcompress import pruning
from jaxcompress.calibration import InputStatistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small kernel and few repeats")
    parser.add_argument("--inputs", type=int, default=768)
    parser.add_argument("--outputs", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    depth, width = (96, 160) if arguments.quick else (arguments.inputs, arguments.outputs)
    repeats = 3 if arguments.quick else arguments.repeats
    weights, gram, rows = drawn_layer(depth, width)
    figures: dict[str, Any] = {"inputs": depth, "outputs": width, "repeats": repeats, "cores": os.cpu_count()}
    for name, options in (("unstructured", {"sparsity": 0.5}), ("2:4", {"pattern": pruning.n_of_m(2, 4)})):
        ours, compile_seconds, compile_cpu_seconds = _ours(weights, gram, rows, options)
        theirs = _theirs(weights, gram, rows, name) if importlib.util.find_spec("torch") else None
        times = np.array([[seconds_of(ours), seconds_of(theirs)] for _ in range(repeats)])
        figures[name] = {
            "compile_s": round(compile_seconds, 2),
            # What it took of the processor: on a busy machine the clock says more about the neighbours.
            "compile_cpu_s": round(compile_cpu_seconds, 2),
            "run_s": round(float(np.median(times[:, 0])), 3),
            "torch_s": round(float(np.median(times[:, 1])), 3) if theirs else "torch is not installed",
            "ratio": round(float(np.median(times[:, 0] / times[:, 1])), 3) if theirs else None,
            "error": round(output_error(ours(), weights, gram), 4),
            "torch_error": round(output_error(theirs(), weights, gram), 4) if theirs else None,
        }
    print(json.dumps(figures))


def _ours(
    weights: np.ndarray, gram: np.ndarray, rows: int, options: dict[str, Any]
) -> tuple[Callable[[], np.ndarray], float, float]:
    params = {"kernel": jnp.asarray(weights)}
    statistics = {"kernel": InputStatistics(count=jnp.float32(rows), gram=jnp.asarray(gram))}

    def run() -> np.ndarray:
        pruned, _ = pruning.sparsegpt(params, statistics, **options)
        return np.asarray(jax.block_until_ready(pruned["kernel"]))

    used = time.process_time()
    first = seconds_of(run)
    used = time.process_time() - used
    return run, first - seconds_of(run), used


def _theirs(weights: np.ndarray, gram: np.ndarray, rows: int, name: str) -> Callable[[], np.ndarray]:
    import torch

    kernel, hessian = torch.from_numpy(weights.T.copy()), torch.from_numpy(gram) * (2.0 / rows)
    return lambda: _sparsegpt_in_torch(torch, kernel, hessian, n_of_m=name != "unstructured").numpy().T


def _sparsegpt_in_torch(torch: Any, kernel: Any, hessian: Any, *, n_of_m: bool, block: int = 128) -> Any:
    """Algorithm 1 of the paper on a weight (out, in); 2:4, or half of each block."""
    weights, columns = kernel.clone(), kernel.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        own, square = weights[:, start:end].clone(), upper[start:end, start:end]
        errors, solved, scale = torch.zeros_like(own), torch.zeros_like(own), square.diagonal()
        dropped = torch.zeros_like(own, dtype=torch.bool)
        if not n_of_m:
            scores = (own / scale) ** 2
            dropped = scores <= torch.sort(scores.flatten())[0][int(scores.numel() * 0.5)]
        for i in range(end - start):
            if n_of_m and i % 4 == 0:
                scores = (own[:, i : i + 4] / scale[i : i + 4]) ** 2
                dropped.scatter_(1, i + torch.topk(scores, 2, dim=1, largest=False)[1], True)
            solved[:, i] = torch.where(dropped[:, i], 0.0, own[:, i])
            errors[:, i] = (own[:, i] - solved[:, i]) / scale[i]
            own[:, i:] -= errors[:, i : i + 1] @ square[i : i + 1, i:]
        weights[:, start:end] = solved
        weights[:, end:] -= errors @ upper[start:end, end:]
    return weights


if __name__ == "__main__":
    main()
