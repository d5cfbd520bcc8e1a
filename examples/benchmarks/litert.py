"""MiniLM's encoder as LiteRT files against `jax.jit` in float32: wall and CPU time, in turns within one run, and sizes.

8 x 64 tokens, random weights (time depends on shapes alone). Errors are relative to `jax.jit` of the uncompressed
model, and to `execute` of the same leaves. Ratios depend on the instruction set: say it with them.

    python examples/benchmarks/litert.py [--quick] [--repeats 15] [--threads 2]

The last line printed is JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ai_edge_litert.interpreter import Interpreter

import jaxcompress as jc
from jaxcompress._src.execution.kernels.processor import instruction_sets
from jaxcompress.export import LitertInfo, save_litert
from jaxcompress.models import BertConfig, make_module
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small encoder and few repeats")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    quick = arguments.quick
    config = BertConfig(
        vocab_size=2000 if quick else 30522,
        hidden_size=96 if quick else 384,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=3 if quick else 12,
        intermediate_size=384 if quick else 1536,
        pooling="mean",
    )
    module = make_module(config)
    ids = jax.random.randint(jax.random.key(0), (8, 64), 0, config.vocab_size)
    inputs = (ids, jnp.ones_like(ids))
    params = jax.jit(module.init)(jax.random.key(1), ids)["params"]

    def apply(params: Any, ids: Any, mask: Any) -> Any:
        return module.apply({"params": params}, ids, mask)["pooler_output"]

    layouts = jc.trace.layouts(apply, params, *inputs)
    int8 = quantize(params, QuantSpec(bits=8), layouts=layouts)[0]
    kernels = jc.tree.by_path(".*/kernel")
    trees = {
        "float32": (params, {}),
        "int8": (int8, {}),
        "int8, inputs marked": (quantize_inputs(int8, QuantSpec(bits=8), select=kernels)[0], {}),
        "int8, float32 inputs": (int8, {"round_inputs": False}),
        "int4 g32": (quantize(params, QuantSpec(bits=4, group_size=32), layouts=layouts)[0], {}),
    }
    jitted = jax.jit(apply)
    dense = np.asarray(jitted(params, *inputs))
    runs: dict[str, Callable[[], Any]] = {"jax.jit": lambda: jax.block_until_ready(jitted(params, *inputs))}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (tree, options)) in enumerate(trees.items()):
            begun = time.perf_counter()
            info = save_litert(Path(folder) / f"{number}.tflite", apply, tree, *inputs, **options)
            seconds = time.perf_counter() - begun
            runs[name] = _runner(info, inputs, arguments.threads)
            found, ours = runs[name](), np.asarray(jax.jit(jc.execute(apply))(tree, *inputs))
            figures[name] = {
                "megabytes": round(info.nbytes / 1e6, 2),
                "seconds_to_write": round(seconds, 1),
                "error": float(f"{_relative(found, dense):.2g}"),
                "error_to_execute": float(f"{_relative(found, ours):.2g}"),
            }
        times = _times(runs, 3 if quick else arguments.repeats)
    for name, each in figures.items():
        wall, cpu = (np.median(times[name][:, i] / times["jax.jit"][:, i]) for i in (0, 1))
        each |= {"wall": round(float(wall), 3), "cpu": round(float(cpu), 3)}
        print(name, json.dumps(each))
    print(
        json.dumps(
            {"ratios": figures, "instructions": instruction_sets(), "threads": arguments.threads, "quick": quick}
        )
    )


def _runner(info: LitertInfo, inputs: tuple[Any, ...], threads: int) -> Callable[[], np.ndarray]:
    run = Interpreter(model_path=str(info.path), num_threads=threads).get_signature_runner()
    arrays = dict(zip(info.inputs, map(np.asarray, inputs), strict=True))
    return lambda: run(**arrays)[info.outputs[0]]


def _times(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """(repeats, wall and CPU seconds) by name, in turns; each call after one that is not timed."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            run()
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: np.array(each) for name, each in times.items()}


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


if __name__ == "__main__":
    main()
