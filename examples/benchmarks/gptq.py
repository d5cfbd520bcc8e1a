"""GPTQ of two kernels: seconds to compile, and seconds to run against the same algorithm in PyTorch; and of a MiniLM.

The PyTorch column is a plain implementation of the paper's algorithm 1 (float32, blocks of 128, damping 0.01, groups of
32 whose scales come from the updated weights, 4 bits), written below; it runs in the same process, on the same cores,
in turn with ours, so that a machine whose speed drifts slows both. Quoted are medians, and the median of the ratios of
neighbours. "run" is the algorithm; "call" is `quantization.gptq`, which also measures the errors of rounding to nearest
and of its own result. Without torch that column says so. The MiniLM is the packaged one, with 128 samples of 64 random
tokens, statistics and compilation included.

    python examples/benchmarks/gptq.py [--quick]

The last line is JSON.
"""

import argparse
import functools
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

import jaxcompress as jc
from jaxcompress import quantization
from jaxcompress._src.recipe.assets import MINILM, fetch
from jaxcompress._src.solvers.cholesky import inverse_factor
from jaxcompress._src.solvers.columns import solve_groups
from jaxcompress.calibration import InputStatistics
from jaxcompress.models import from_pretrained
from jaxcompress.quantization import QuantSpec

SPEC = QuantSpec(bits=4, group_size=32, convention="full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small kernels, few repeats, no MiniLM")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    sizes = ((96, 160), (160, 96)) if arguments.quick else ((768, 3072), (3072, 768))
    repeats = 3 if arguments.quick else arguments.repeats
    figures: dict[str, Any] = {"repeats": repeats, "cores": os.cpu_count()}
    for depth, width in sizes:
        figures[f"{depth}x{width}"] = _kernel(depth, width, repeats)
        print(json.dumps(figures), flush=True)
    if not arguments.quick:
        figures["minilm"] = _minilm()
    print(json.dumps(figures))


def _kernel(depth: int, width: int, repeats: int) -> dict[str, Any]:
    weights, gram, rows = drawn_layer(depth, width)
    params = {"kernel": jnp.asarray(weights)}
    statistics = {"kernel": InputStatistics(count=jnp.float32(rows), gram=jnp.asarray(gram))}
    # As published, in natural order; "default" is what a call without options does: searched ranges, two rounds behind.
    options: dict[str, Any] = {"order": "natural", "group_scales": "updated", "range_search": None, "refine": 0}

    def call() -> Any:
        return jax.block_until_ready(quantization.gptq(params, statistics, SPEC, **options))

    used = time.process_time()
    compiling = seconds_of(call)
    used = time.process_time() - used
    run = functools.partial(_algorithm, params["kernel"], statistics["kernel"].gram * (2.0 / rows))
    jax.block_until_ready(run())
    theirs = _theirs(weights, gram, rows) if importlib.util.find_spec("torch") else None
    times = np.array([[seconds_of(lambda: jax.block_until_ready(run())), seconds_of(theirs)] for _ in range(repeats)])
    again = seconds_of(call)
    found, info = call()

    def default() -> Any:
        return jax.block_until_ready(quantization.gptq(params, statistics, SPEC))

    _, best = default()
    return {
        "default_call_s": round(float(np.median([seconds_of(default) for _ in range(max(repeats // 2, 1))])), 3),
        "default_error": round(best["kernel"].error or 0.0, 4),
        "compile_s": round(compiling - again, 2),
        # What it took of the processor: on a busy machine the clock says more about the neighbours.
        "compile_cpu_s": round(used, 2),
        "call_s": round(again, 3),
        "run_s": round(float(np.median(times[:, 0])), 3),
        "torch_s": round(float(np.median(times[:, 1])), 3) if theirs else "torch is not installed",
        "times_faster": round(float(np.median(times[:, 1] / times[:, 0])), 2) if theirs else None,
        "error": round(info["kernel"].error, 4),
        "error_rtn": round(info["kernel"].error_before, 4),
        "torch_error": round(output_error(theirs(), weights, gram), 4) if theirs else None,
        "same_codes_as_torch": _same(found["kernel"].materialize(), theirs()) if theirs else None,
    }


@jax.jit
def _algorithm(weights: jax.Array, hessian: jax.Array) -> tuple[jax.Array, Any]:
    """What the PyTorch function does: factor and columns, scales of the updated groups."""
    factor = inverse_factor(hessian, 0.01).factor

    def start(w: jax.Array, _: Any) -> jax.Array:
        largest = jnp.abs(w).max(axis=0) / 7.5
        return jnp.where(largest > 0, largest, 1.0)

    def column(w: jax.Array, scale: jax.Array, _: Any) -> jax.Array:
        return jnp.clip(jnp.round(w / scale), -8, 7) * scale

    return solve_groups(weights, factor, quantize_column=column, start_group=start, group_size=32)


def _theirs(weights: np.ndarray, gram: np.ndarray, rows: int) -> Callable[[], np.ndarray]:
    import torch

    kernel, hessian = torch.from_numpy(weights.T.copy()), torch.from_numpy(gram) * (2.0 / rows)
    return lambda: _gptq_in_torch(torch, kernel, hessian).numpy().T


def _gptq_in_torch(torch: Any, kernel: Any, hessian: Any, *, block: int = 128, group: int = 32) -> Any:
    """Algorithm 1 of the paper on a weight (out, in)."""
    weights, columns = kernel.clone(), kernel.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        own, square = weights[:, start:end].clone(), upper[start:end, start:end]
        errors, solved, scale = torch.zeros_like(own), torch.zeros_like(own), None
        for i in range(end - start):
            if i % group == 0:
                scale = own[:, i : i + group].abs().amax(1) / 7.5
            found = torch.clamp(torch.round(own[:, i] / scale), -8, 7) * scale
            errors[:, i] = (own[:, i] - found) / square[i, i]
            solved[:, i] = found
            own[:, i:] -= errors[:, i : i + 1] @ square[i : i + 1, i:]
        weights[:, start:end] = solved
        weights[:, end:] -= errors @ upper[start:end, end:]
    return weights


def _minilm() -> dict[str, Any]:
    """Seconds from the model to its rounded kernels, everything included."""
    module, params = from_pretrained(fetch(MINILM, note=print))
    ids = np.random.default_rng(0).integers(1000, 30000, size=(4, 32, 64)).astype(np.int32)
    begun, used = time.perf_counter(), time.process_time()
    _, info = quantization.reconstruct(
        lambda params, ids: module.apply({"params": params}, ids)["last_hidden_state"],
        jax.tree.map(jnp.asarray, params),
        [(batch,) for batch in ids],
        SPEC,
        targets="weights",
        bias=False,
        range_search=None,
        refine=0,
        select=jc.tree.by_path(".*encoder/.*/kernel"),
    )
    seconds, cpu = time.perf_counter() - begun, time.process_time() - used
    return {"kernels": len(info), "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def _same(ours: Any, theirs: np.ndarray) -> float:
    """The share of equal weights: where a weight lies half-way, the order of additions decides, and what follows."""
    return round(float(np.isclose(np.asarray(ours), theirs, rtol=1e-4, atol=1e-5).mean()), 4)


if __name__ == "__main__":
    main()
