"""The compiled CPU kernels against `jax.jit` float32: one token, sparse weights, and int8 products of many rows.

Variants take turns within each round, so that other work on the machine meets all of them; figures are medians over the
rounds of ratios to float32 of the same round, by the clock and (in brackets) in CPU time. The processor and the
instruction sets are stated, since figures depend on both; `taskset` pins the process. The last line is JSON.

    python examples/benchmarks/cpu_kernels.py [--quick] [--rounds 15] [--instructions avx2 ...]
"""

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress import arrays, quantization
from jaxcompress._src.execution.kernels.native import library
from jaxcompress._src.execution.kernels.native.matmul import WeightOnlyFormat, integer_matmul, weight_only_matmul

GROUP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller, with fewer rounds")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--instructions", nargs="*", default=None, choices=library.INSTRUCTION_SETS)
    options = parser.parse_args()
    if library.why_missing() is not None:
        raise SystemExit(f"nothing to measure: {library.why_missing()}")
    best = library.INSTRUCTION_SETS.index(library.instruction_set())
    sets = options.instructions or list(library.INSTRUCTION_SETS[1 : best + 1]) or ["portable"]
    rounds = options.rounds or (5 if options.quick else 15)
    print(f"{_processor()}, {os.cpu_count()} cores, best set {library.instruction_set()}")
    ratios = {}
    wide = 1024 if options.quick else 4096
    for width, depth, repeats in ((wide, 3, 1), (768, 3, 20)):
        ratios |= _measure(f"decode {depth} x 1x{width}x{width}", _decoding(width, depth), sets, rounds, repeats)
    for rows in (1, 16):
        ratios |= _measure(f"sparse {rows}x{wide}x{wide}", _sparse(rows, wide), sets, rounds, 1)
    sizes = [(64, 384, 1536)] if options.quick else [(64, 768, 3072), (512, 384, 1536), (512, 1536, 384)]
    for rows, inputs, outputs in sizes:
        ratios |= _measure(f"int8 {rows}x{inputs}x{outputs}", _integers(rows, inputs, outputs), sets, rounds, 3)
    print(json.dumps({"processor": _processor(), "wall_ratio_to_float32": ratios}))


def _decoding(width: int, depth: int) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, width)), jnp.float32)
    codes = [rng.integers(-128, 128, size=(width, width)).astype(np.int8) for _ in range(depth)]
    by_output = jnp.full((1, width), 1 / 74 / np.sqrt(width), jnp.float32)
    by_group = jnp.full((width // GROUP, width), 1 / 4.6 / np.sqrt(width), jnp.float32)
    packed = [jnp.asarray(c.view(np.uint8)[::2]) for c in codes]
    table = WeightOnlyFormat(bits=4, signed=False, levels=tuple(np.linspace(-1, 1, 16).tolist()))
    storages = {
        "8 bits": (WeightOnlyFormat(), [(jnp.asarray(c), by_output) for c in codes]),
        "4 bits g32": (WeightOnlyFormat(bits=4), [(c, by_group) for c in packed]),
        "4 bits g32 levels": (table, [(c, by_group) for c in packed]),
    }
    for name, (storage, layers) in list(storages.items()):
        transposed = WeightOnlyFormat(bits=storage.bits, signed=storage.signed, levels=storage.levels, out_major=True)
        storages[f"{name} [out, in]"] = transposed, [(c.T.copy(), s.T.copy()) for c, s in layers]
    dense = [jnp.asarray(c, jnp.float32) / 74 / np.sqrt(width) for c in codes]
    runs = {"float32": functools.partial(jax.jit(lambda x, ws: functools.reduce(jnp.matmul, ws, x)), x, dense)}
    for name, (storage, layers) in storages.items():
        runs[name] = functools.partial(jax.jit(_stack(storage)), x, layers)
    return runs


def _stack(storage: WeightOnlyFormat) -> Callable[..., jax.Array]:
    def stack(x: jax.Array, layers: list[Any]) -> jax.Array:
        for codes, scale in layers:
            x = weight_only_matmul(x, codes, scale, storage=storage)
        return x

    return stack


def _sparse(rows: int, width: int) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
    w = rng.normal(size=(width, width)).astype(np.float32)
    runs = np.abs(w).reshape(-1, 4, width)
    of_runs = (runs.argsort(1).argsort(1) >= 2).reshape(w.shape)
    masked = arrays.sparsify(jnp.asarray(w), jnp.asarray(rng.random(w.shape) < 0.4))
    patterned = arrays.sparsify(jnp.asarray(w), jnp.asarray(of_runs), pattern=(2, 4), axis=0)
    weights = {"bit mask": masked, "2:4": patterned}
    spec = quantization.QuantSpec(bits=4, group_size=GROUP, scale_dtype="bfloat16")
    weights |= {f"int4 {name}": quantization.quantize({"w": leaf}, spec)[0]["w"] for name, leaf in weights.items()}
    dense = {"float32": functools.partial(jax.jit(jnp.matmul), x, jnp.asarray(w))}
    product = jax.jit(jc.execute(lambda w, x: x @ w))
    return dense | {name: functools.partial(product, leaf, x) for name, leaf in weights.items()}


def _integers(rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-128, 128, size=(rows, inputs)), jnp.int8)
    w = jnp.asarray(rng.integers(-128, 128, size=(inputs, outputs)), jnp.int8)
    xla = jax.jit(functools.partial(jax.lax.dot, preferred_element_type=jnp.int32))
    return {
        "float32": functools.partial(jax.jit(jnp.matmul), x.astype(jnp.float32), w.astype(jnp.float32)),
        "XLA int8": functools.partial(xla, x, w),
        "int8": functools.partial(jax.jit(integer_matmul), x, w),
        "int8 [out, in]": functools.partial(jax.jit(functools.partial(integer_matmul, out_major=True)), x, w.T.copy()),
    }


def _measure(
    title: str, runs: dict[str, Callable[[], Any]], sets: list[str], rounds: int, repeats: int
) -> dict[str, float]:
    variants = {("", name): run for name, run in runs.items() if name in ("float32", "XLA int8")}
    variants |= {(s, name): run for name, run in runs.items() if ("", name) not in variants for s in sets}
    walls: dict[Any, list[float]] = {key: [] for key in variants}
    cpus: dict[Any, list[float]] = {key: [] for key in variants}
    for _ in range(rounds + 1):
        for (instructions, name), run in variants.items():
            with library.limited_to(instructions or library.INSTRUCTION_SETS[-1]):
                jax.block_until_ready(run())
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(repeats):
                    jax.block_until_ready(run())
                walls[instructions, name].append(time.perf_counter() - wall)
                cpus[instructions, name].append(time.process_time() - cpu)
    base, base_cpu = (np.asarray(times["", "float32"][1:]) for times in (walls, cpus))
    print(f"{title}: float32 takes {np.median(base) / repeats * 1e3:.3f} ms")
    ratios = {}
    for instructions, name in variants:
        ratio = float(np.median(np.asarray(walls[instructions, name][1:]) / base))
        cpu = float(np.median(cpus[instructions, name][1:]) / np.median(base_cpu))
        print(f"  {name:26} {instructions:12} {ratio:.2f} [{cpu:.2f}]")
        ratios[f"{title}, {name}{instructions and ', ' + instructions}"] = round(ratio, 3)
    return ratios


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
