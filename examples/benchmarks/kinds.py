"""Time of a BERT of MiniLM's size with every kind of compressed leaf, over the dense model in the same run.

Weights are random: time depends on shapes and kinds alone. All kernels of the encoder are compressed. Wall-clock time
and CPU time of `jax.jit`, in turns, medians; two threads, if the process is pinned to two cores.

    python examples/benchmarks/kinds.py [--quick] [--tokens 8x64 32x128 1x1] [--kinds "int4 g32" ...] [--repeats 15]

The last line printed is JSON.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxcompress as jc
from jaxcompress import arrays, clustering, lowrank, pruning, quantization, structured
from jaxcompress._src.execution.kernels.processor import instruction_sets
from jaxcompress._src.report.table import Table, format_table
from jaxcompress.models import BertConfig, make_module, resized, unit_groups

KERNELS = jc.tree.by_path("encoder/.*kernel")


def _rounded(**spec: Any) -> Callable[[Any], Any]:
    return lambda params: quantization.quantize(params, quantization.QuantSpec(**spec), select=KERNELS)[0]


def _int8_inputs(params: Any) -> Any:
    return quantization.quantize_inputs(params, quantization.QuantSpec(bits=8), select=KERNELS)[0]


def _pruned(pattern: Any = None, sparsity: float | None = None) -> Callable[[Any], Any]:
    def prune(params: Any) -> Any:
        extra = {} if pattern is None else {"pattern": pattern}
        return pruning.magnitude(params, sparsity=sparsity, select=KERNELS, **extra)[0]

    return prune


def _stored_sparse(pattern: tuple[int, int] | None) -> Callable[[Any], Any]:
    def store(params: Any) -> Any:
        def leaf(selected: bool, kernel: Any) -> Any:
            return arrays.sparsify(kernel, kernel != 0, pattern=pattern, axis=0) if selected else kernel

        return jax.tree.map(leaf, KERNELS(params), params)

    return store


def _clustered(params: Any) -> Any:
    return clustering.cluster(params, clustering.CodebookSpec(values=16), select=KERNELS)[0]


def _additive(params: Any) -> Any:
    def leaf(selected: bool, kernel: Any) -> Any:
        if not selected:
            return kernel
        codes = jax.random.randint(jax.random.key(0), (kernel.shape[0] // 8, kernel.shape[1], 2), 0, 256, jnp.uint8)
        table = jax.random.normal(jax.random.key(1), (1, 1, 2, 256, 8)) / 16
        return arrays.AdditiveCodebookArray(data=codes, table=table, dtype=kernel.dtype, axis=-2, width=kernel.shape[0])

    return jax.tree.map(leaf, KERNELS(params), params)


def _low_rank(params: Any) -> Any:
    return lowrank.svd(params, rank=lowrank.parameter_share(0.5), select=KERNELS)[0]


def _through(*steps: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda params: functools.reduce(lambda tree, step: step(tree), steps, params)


KINDS: dict[str, Callable[[Any], Any]] = {
    "int8": _rounded(bits=8),
    "int8, inputs int8": _through(_rounded(bits=8), _int8_inputs),
    "int8 g32": _rounded(bits=8, group_size=32),
    "int4 g32": _rounded(bits=4, group_size=32, scale_dtype="bfloat16"),
    "int4 g32, inputs int8": _through(_rounded(bits=4, group_size=32, scale_dtype="bfloat16"), _int8_inputs),
    "uint4 g32": _rounded(bits=4, group_size=32, symmetric=False),
    "int3 g32": _rounded(bits=3, group_size=32),
    "int2 g32": _rounded(bits=2, group_size=32),
    "1 bit": _rounded(bits=1, group_size=32),
    "nf4 g64": _rounded(format="nf4", group_size=64),
    "2:4": _through(_pruned(pruning.n_of_m(2, 4)), _stored_sparse((2, 4))),
    "bit mask 60 %": _through(_pruned(sparsity=0.6), _stored_sparse(None)),
    "int4 2:4": _through(
        _pruned(pruning.n_of_m(2, 4)), _stored_sparse((2, 4)), _rounded(bits=4, group_size=32, scale_dtype="bfloat16")
    ),
    "int4 bit mask 60 %": _through(
        _pruned(sparsity=0.6), _stored_sparse(None), _rounded(bits=4, group_size=32, scale_dtype="bfloat16")
    ),
    "16 values": _clustered,
    "2 tables of 256x8": _additive,
    "low rank 50 %": _low_rank,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small encoder, three kinds, few repeats")
    parser.add_argument("--tokens", nargs="+", default=["8x64", "32x128"], help="batch x length")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, *SHRUNK], help="default: all")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    quick = arguments.quick
    config = BertConfig(
        vocab_size=2000,
        hidden_size=96 if quick else 384,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=3 if quick else 12,
        intermediate_size=384 if quick else 1536,
    )
    module = make_module(config)
    ids = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(1), ids)["params"]
    names = arguments.kinds or ([*KINDS][:3] if quick else [*KINDS, *SHRUNK])
    models = {"dense": (module, params)}
    for name in names:
        models[name] = SHRUNK[name](module, params) if name in SHRUNK else (module, KINDS[name](params))
    figures: dict[str, dict[str, tuple[float, float]]] = {}
    for tokens in arguments.tokens:
        batch, length = map(int, tokens.split("x"))
        ids = jax.random.randint(jax.random.key(0), (batch, length), 0, config.vocab_size)
        runs = {name: functools.partial(_compiled(module), tree, ids) for name, (module, tree) in models.items()}
        figures[tokens] = ratios(runs, repeats=4 if quick else arguments.repeats)
    rows = [
        (name, *(f"{wall:.2f} [{cpu:.2f}]" for wall, cpu in (figures[tokens][name] for tokens in figures)))
        for name in models
    ]
    print(format_table(Table(("kind", *(f"{tokens}: wall [CPU]" for tokens in figures)), rows)))
    print(json.dumps({"instructions": instruction_sets(), "ratios": figures}))


def _compiled(module: Any) -> Callable[..., Any]:
    return jax.jit(jc.execute(lambda params, ids: module.apply({"params": params}, ids)["last_hidden_state"]))


def _halved(module: Any, params: Any) -> tuple[Any, Any]:
    groups, encoder = unit_groups(module.config), jc.tree.by_path("encoder/.*")
    scores = structured.magnitude_unit_scores(params, groups)
    costs = structured.parameter_costs(params, select=encoder)
    small = structured.shrink(
        params, groups, structured.select_units(scores, groups, params, sparsity=0.5, costs=costs, rule="group").keep
    )
    return resized(module, small), small


def _halved_in_int8(module: Any, params: Any) -> tuple[Any, Any]:
    module, params = _halved(module, params)
    return module, KINDS["int8, inputs int8"](params)


SHRUNK = {"half of heads and columns": _halved, "half, int8, inputs int8": _halved_in_int8}


def ratios(runs: dict[str, Callable[[], Any]], *, repeats: int) -> dict[str, tuple[float, float]]:
    """Wall-clock and CPU time over those of the first run; medians of what the rounds give."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            times[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    baseline = next(iter(times.values()))

    def median(name: str, clock: int) -> float:
        return statistics.median(own[clock] / base[clock] for own, base in zip(times[name], baseline, strict=True))

    return {name: (median(name, 0), median(name, 1)) for name in times}


if __name__ == "__main__":
    main()
