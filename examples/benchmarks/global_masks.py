"""Global magnitude masks of a tree of BERT-base's shapes (110 M weights): exact count, time, memory.

Times are ratios within one run: to one pass of `sum(|x|)` over the same tree, to concatenating and `np.partition`, to
concatenating and `jnp.sort`, and to concatenating and `np.sort` (which, on processors with AVX-512, NumPy sorts with
vector instructions). Quoted are medians of repeats that take turns (`jnp.sort` runs once). Memory beyond weights and
masks is told twice, in bytes per weight: by XLA's own analysis of the compiled program, and by the peak resident size
of a fresh process.

    python examples/benchmarks/global_masks.py [--quick]
"""

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.pruning.masks import magnitude_masks
from jaxcompress.models import BertConfig, make_module

SPARSITY = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few repeats")
    parser.add_argument("--sparsity", type=float, default=SPARSITY)
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(resident(arguments.quick, arguments.sparsity)))
        return
    params = weights(quick=arguments.quick)
    repeats = arguments.repeats or (2 if arguments.quick else 3)
    figures = {**timings(params, arguments.sparsity, repeats), **memory(arguments)}
    print(table(figures))
    print(json.dumps(figures))


def weights(*, quick: bool) -> Any:
    """The kernels and tables of BERT, normal with a spread of their own per leaf."""
    width, layers = (64, 2) if quick else (768, 12)
    module = make_module(
        BertConfig(
            vocab_size=30522,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            head="encoder",
        )
    )
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = np.float32(rng.uniform(0.02, 0.06))
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(draw, shapes)


def compiled(params: Any, sparsity: float) -> Any:
    return jax.jit(functools.partial(magnitude_masks, sparsity=sparsity, scope="global")).lower(params).compile()


def timings(params: Any, sparsity: float, repeats: int) -> dict[str, Any]:
    chosen = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim >= 2]
    total = sum(leaf.size for leaf in chosen)
    begun = time.perf_counter()
    ours = compiled(params, sparsity)
    compile_seconds = time.perf_counter() - begun
    one_pass = jax.jit(lambda leaves: sum(jnp.abs(leaf).sum() for leaf in leaves))
    host = [np.asarray(leaf) for leaf in chosen]
    dropped = round(sparsity * total)

    def partition() -> None:
        everything = np.abs(np.concatenate([leaf.reshape(-1) for leaf in host]))
        threshold = np.partition(everything, dropped)[dropped]
        [np.abs(leaf) >= threshold for leaf in host]

    def sort() -> None:
        everything = np.abs(np.concatenate([leaf.reshape(-1) for leaf in host]))
        everything.sort()
        [np.abs(leaf) >= everything[dropped] for leaf in host]

    @jax.jit
    def device_sort(leaves: list[jax.Array]) -> list[jax.Array]:
        everything = jnp.sort(jnp.abs(jnp.concatenate([leaf.reshape(-1) for leaf in leaves])))
        return [jnp.abs(leaf) >= everything[dropped] for leaf in leaves]

    contest: dict[str, Callable[[], Any]] = {
        "pass": lambda: one_pass(chosen),
        "masks": lambda: ours(params),
        "partition": partition,
        "np_sort": sort,
        "jnp_sort": lambda: device_sort(chosen),
    }
    for name in ("pass", "masks"):
        jax.block_until_ready(contest[name]())
    seconds: dict[str, list[float]] = {name: [] for name in contest}
    for repeat in range(repeats):
        for name, run in contest.items():
            if name == "jnp_sort" and repeat:
                continue  # it takes a minute
            seconds[name] += [_seconds(run) for _ in range({"pass": 5, "masks": 2}.get(name, 1))]
    median = {name: statistics.median(times) for name, times in seconds.items()}
    masks = jax.tree.leaves(ours(params))
    return {
        "weights": total,
        "leaves": len(chosen),
        "count_is_exact": sum(int((~np.asarray(mask)).sum()) for mask in masks) == dropped,
        "pass_ms": round(1000 * median["pass"], 1),
        "masks_ms": round(1000 * median["masks"], 1),
        "passes": round(median["masks"] / median["pass"], 1),
        "partition_passes": round(median["partition"] / median["pass"], 1),
        "np_sort_passes": round(median["np_sort"] / median["pass"], 1),
        "jnp_sort_passes": round(median["jnp_sort"] / median["pass"], 1),
        "faster_than_partition": round(median["partition"] / median["masks"], 2),
        "faster_than_np_sort": round(median["np_sort"] / median["masks"], 2),
        "faster_than_jnp_sort": round(median["jnp_sort"] / median["masks"], 2),
        "compile_seconds": round(compile_seconds, 1),
        "temporary_bytes_per_weight": round(ours.memory_analysis().temp_size_in_bytes / total, 3),
    }


def memory(arguments: argparse.Namespace) -> dict[str, float | None]:
    """What a fresh process needs at most while it makes the masks, beyond weights and masks."""
    command = [sys.executable, __file__, "--peak", "--sparsity", str(arguments.sparsity)]
    done = subprocess.run([*command, *(["--quick"] * arguments.quick)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def resident(quick: bool, sparsity: float) -> dict[str, float | None]:
    """Peak of the resident size, from the moment that weights and the compiled program are there. Linux only."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return {"resident_bytes_per_weight": None}
    params = weights(quick=quick)
    ours = compiled(params, sparsity)
    gc.collect()
    reset.write_text("5")
    before = _kibibytes(status, "VmRSS")
    masks = jax.block_until_ready(ours(params))
    peak = _kibibytes(status, "VmHWM")
    total = sum(mask.size for mask in jax.tree.leaves(masks))
    return {"resident_bytes_per_weight": round((1024 * (peak - before) - total) / total, 3)}


def _kibibytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def table(figures: dict[str, Any]) -> str:
    wanted = {
        "passes": "at most 45",
        "faster_than_partition": "at least 2",
        "faster_than_jnp_sort": "at least 10",
        "faster_than_np_sort": "(as vectorized as the processor allows)",
        "temporary_bytes_per_weight": "below 0.3",
        "resident_bytes_per_weight": "below 0.3",
        "count_is_exact": "True",
    }
    return "\n".join(f"{name:30} {figures[name]!s:>10}   wanted: {goal}" for name, goal in wanted.items())


def _seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
