"""Quantized matmuls and a compressing train step on a GPU or a TPU: XLA's and our kernels against dense bfloat16.

Decoding (1 to 16 tokens) and prefill (2048) run through a chain of square layers that exceeds every cache, each variant
compiled, in turns within one run. `xla` is `jaxcompress.execute`; `kernel` are the kernels of
`jaxcompress/_src/execution/kernels`, which nothing uses until this script shows that they are right and faster: `error`
is that of one layer, relative to float64. A variant that fails is reported by its error, and the rest goes on.

    python examples/benchmarks/device.py [--quick] [--minutes 9]

`--quick` runs on any machine, small and with the kernels interpreted: it shows that the script works, and no speed.
What the minutes don't suffice for is listed. The last line printed is JSON.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from step_overhead import steppers

import jaxcompress as jc
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.execution.kernels import mosaic_gpu, tpu
from jaxcompress.arrays import QuantizedArray
from jaxcompress.quantization import QuantSpec, quantize_inputs

BF16 = jnp.dtype("bfloat16")
GROUP = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, kernels interpreted")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case is begun after these")
    arguments = parser.parse_args()
    quick, end = arguments.quick, time.monotonic() + 60 * arguments.minutes
    cases = [(256, 3)] if quick else [(size, rows) for size in (4096, 8192) for rows in (1, 4, 16)] + [(4096, 2048)]
    figures: dict[str, Any] = {}
    left_out = []
    for size, rows in cases:
        name = f"{size} x {size}, {rows} tokens"
        if time.monotonic() > end:
            left_out.append(name)
            continue
        figures[name] = matmuls(size, rows, quick=quick)
        print(name, json.dumps(figures[name]), flush=True)
    if time.monotonic() > end:
        left_out.append("train step")
    else:
        figures["train step"] = train_step(quick=quick)
        print("train step", json.dumps(figures["train step"]), flush=True)
    device = jax.devices()[0].device_kind
    print(json.dumps({"device": device, "cases": figures, "left_out": left_out, "quick": quick}))


def matmuls(size: int, rows: int, *, quick: bool) -> dict[str, Any]:
    """Times of the chain relative to dense bfloat16, and errors of one layer."""
    # A gigabyte of dense weights for few tokens; for many, the weights hardly matter.
    layers = 1 if quick else max(2, (2**30 if rows < 64 else 2**28) // (2 * size * size))
    x = jax.random.normal(jax.random.key(0), (rows, size), BF16)
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, Any] = {}
    for name, (make, multiply) in variants(quick).items():
        try:
            keys = jax.random.split(jax.random.key(1), layers)
            weights = [make(key, size) for key in keys]
            chain = jax.jit(functools.partial(_chain, multiply))
            jax.block_until_ready(chain(weights, x))
            one = np.asarray(jax.jit(multiply)(x, weights[0]), np.float64)
            wanted = np.asarray(x, np.float64) @ np.asarray(_values(weights[0]), np.float64)
            error = np.linalg.norm(one - wanted) / np.linalg.norm(wanted)
        except Exception as err:  # of any kind: this may be the first time that a kernel is compiled
            found[name] = {"failed": f"{type(err).__name__}: {str(err).splitlines()[0][:200] if str(err) else ''}"}
            continue
        runs[name] = lambda chain=chain, weights=weights: jax.block_until_ready(chain(weights, x))
        found[name] = {"error": float(f"{error:.2g}")}
    for name, ratio in _ratios(runs, 1 if quick else 20).items():
        found[name]["ratio"] = ratio
    return found


def variants(quick: bool) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """By name: how a weight is made of a key and a size, and how inputs are multiplied with it. The first is dense."""
    by_xla = jc.execute(lambda weight, x: x @ weight)

    def xla(x: jax.Array, weight: Any) -> jax.Array:
        return by_xla(weight, x)

    table = {
        "dense": (_dense, jnp.matmul),
        "int8 xla": (_int8, xla),
        "int4 xla": (_int4, xla),
        "int4 g128 xla": (functools.partial(_int4, group=GROUP), xla),
        "w8a8 xla": (_w8a8, xla),
    }
    modules = {"tpu": tpu, "gpu": mosaic_gpu}
    backend = jax.default_backend()
    for name, module in modules.items() if quick else [(backend, modules[backend])] if backend in modules else []:
        options = {"interpret": _interpreted(name)} if quick else {}
        table |= {
            f"int8 {name} kernel": (_int8, functools.partial(_by_int8, module, options)),
            f"int4 {name} kernel": (_int4, functools.partial(_by_int4, module, options)),
            f"int4 g128 {name} kernel": (
                functools.partial(_int4, group=GROUP),
                functools.partial(_by_int4, module, options),
            ),
        }
        if name == "tpu":
            table["w8a8 tpu kernel"] = (_w8a8, functools.partial(_by_w8a8, options))
    return table


def train_step(*, quick: bool) -> dict[str, Any]:
    """A distillation step of MiniLM with pruning and fake quantization, relative to the plain one."""
    plain, compressing, shape = steppers(quick=quick, rows=8 if quick else 256, tokens=64)
    ratios = _ratios({"plain": plain, "prune and fake-quantize": compressing}, 1 if quick else 20)
    return {"ratio": ratios["prune and fake-quantize"], "rows": shape[0], "tokens": shape[1]}


def _chain(multiply: Callable[..., Any], weights: list[Any], x: jax.Array) -> jax.Array:
    for weight in weights:
        x = multiply(x, weight)
    return x


def _dense(key: jax.Array, size: int) -> jax.Array:
    return jax.random.normal(key, (size, size), BF16) / BF16.type(size**0.5)


def _int8(key: jax.Array, size: int) -> QuantizedArray:
    codes = jax.random.randint(key, (size, size), -127, 128, jnp.int8)
    return QuantizedArray(data=codes, scale=jnp.full((1, size), 1 / (73 * size**0.5)), dtype=BF16)


def _int4(key: jax.Array, size: int, group: int | None = None) -> QuantizedArray:
    stored = jax.random.bits(key, (size // 2, size), jnp.uint8)
    data = PackedArray(data=stored, bits=4, signed=True, axis=-2, width=size)
    steps = jnp.full((1 if group is None else size // group, size), 1 / (4.6 * size**0.5))
    return QuantizedArray(data=data, scale=steps, dtype=BF16)


def _w8a8(key: jax.Array, size: int) -> Any:
    return quantize_inputs({"w": _int8(key, size)}, QuantSpec(bits=8))[0]["w"]


def _by_int8(module: Any, options: dict[str, Any], x: jax.Array, weight: Any) -> jax.Array:
    return module.int8_matmul(x, weight.data, weight.scale, **options)


def _by_int4(module: Any, options: dict[str, Any], x: jax.Array, weight: Any) -> jax.Array:
    return module.int4_matmul(x, weight.data.data, weight.scale, **options)


def _by_w8a8(options: dict[str, Any], x: jax.Array, weight: Any) -> jax.Array:
    codes = weight.inputs.codes(x, (1,), None, None)
    return tpu.w8a8_matmul(codes.data, codes.scale.astype(x.dtype), weight.weight.data, weight.weight.scale, **options)


def _interpreted(backend: str) -> Any:
    if backend == "tpu":
        return True
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def _values(weight: Any) -> Any:
    return jc.materialize(weight).astype(jnp.float32)


def _ratios(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians of the ratios of neighbours to the first."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
    first = np.array(next(iter(times.values())))
    return {name: round(float(np.median(np.array(each) / first)), 3) for name, each in times.items()}


if __name__ == "__main__":
    main()
