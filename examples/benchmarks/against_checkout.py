"""GPTQ, SparseGPT and a training step of this checkout and of another one, in one interleaved run.

Each checkout is a process of its own, pinned to one core; the calls run in turn. Quoted are medians of CPU seconds, of
calls whose programs are compiled already, and of the ratios of neighbours, ours to the other's.

    python examples/benchmarks/against_checkout.py --other CHECKOUT [--quick] [--repeats 7]

The other checkout must have the public functions that are called here. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="a checkout to compare with")
    parser.add_argument("--quick", action="store_true", help="small kernels, three repeats")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve(quick=arguments.quick)
        return
    if arguments.other is None:
        parser.error("--other: a checkout to compare with.")
    trees = {"ours": OURS, "other": arguments.other.resolve()}
    processes = {name: _start(tree, quick=arguments.quick) for name, tree in trees.items()}
    figures: dict[str, Any] = {}
    for task in TASKS:
        seconds: dict[str, list[float]] = {name: [] for name in trees}
        for number in range(1 + (3 if arguments.quick else arguments.repeats)):
            for name, process in processes.items():
                measured = _ask(process, task)
                if number:
                    seconds[name].append(measured)
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["other"], strict=True)]
        figures[task] = {name: round(statistics.median(each), 4) for name, each in seconds.items()}
        figures[task]["ratio"] = round(statistics.median(ratios), 3)
        print(task, json.dumps(figures[task]), flush=True)
    for process in processes.values():
        process.communicate("", timeout=60)
    print(json.dumps(figures))


def _start(tree: Path, *, quick: bool) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", *["--quick"] * quick]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(process: subprocess.Popen[str], task: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(task + "\n")
    process.stdin.flush()
    if not (line := process.stdout.readline()):
        raise SystemExit(f"A process ended in {task!r}.")
    return float(line)


def serve(*, quick: bool) -> None:
    """One call of a task for each line that names it, answered by its CPU seconds."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    tasks: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in tasks:
            tasks[name] = TASKS[name](quick)
        begun = time.process_time()
        tasks[name]()
        print(time.process_time() - begun, flush=True)


def one_shot(quick: bool) -> tuple[Any, Any, Any]:
    """A kernel, statistics of correlated inputs, and layouts."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxcompress as jc

    depth, width = (96, 64) if quick else (768, 3072)
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(depth, depth)) / depth**0.5 + 0.3 * np.eye(depth)
    x = jnp.asarray(rng.normal(size=(2 * depth, depth)) @ mixing, jnp.float32)
    params = {"kernel": jnp.asarray(rng.normal(size=(depth, width)) / depth**0.5, jnp.float32)}

    def apply(params: Any, x: Any) -> jax.Array:
        return x @ params["kernel"]

    return params, jc.calibration.input_statistics(apply, params, [(x,)]), jc.trace.layouts(apply, params, x)


def gptq(quick: bool) -> Callable[[], Any]:
    import jax

    import jaxcompress as jc

    params, statistics, layouts = one_shot(quick)
    spec = jc.quantization.QuantSpec(bits=4, group_size=32)

    def run() -> Any:
        return jax.block_until_ready(jc.quantization.gptq(params, statistics, spec, layouts=layouts)[0])

    return run


def sparsegpt(quick: bool, pattern: str | None = None) -> Callable[[], Any]:
    import jax

    import jaxcompress as jc

    params, statistics, layouts = one_shot(quick)
    options = {"sparsity": 0.5} if pattern is None else {"pattern": jc.pruning.n_of_m(2, 4)}

    def run() -> Any:
        return jax.block_until_ready(jc.pruning.sparsegpt(params, statistics, layouts=layouts, **options)[0])

    return run


def training(quick: bool) -> Callable[[], Any]:
    """A step that distils a BERT from itself, pruned 2:4 and with 4-bit weights."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxcompress as jc
    from jaxcompress.models import BertConfig, make_module

    layers, width = (1, 32) if quick else (6, 384)
    config = BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width
    )
    module = make_module(config)
    ids = jax.random.randint(jax.random.key(0), (4, 16) if quick else (16, 64), 0, 1000)
    params = jax.jit(module.init)(jax.random.key(1), ids)["params"]

    def apply(params: Any, batch: Any, **_: Any) -> Any:
        return {"logits": module.apply({"params": params}, batch["ids"])["last_hidden_state"]}

    layouts = jc.trace.layouts(lambda params, ids: apply(params, {"ids": ids}), params, ids)
    options = {"select": jc.tree.by_path("bert/encoder/.*/kernel|encoder/.*/kernel"), "layouts": layouts}
    transform = jc.chain(
        jc.pruning.gradual(
            schedule=jc.schedules.cubic(0.0, 0.5, begin=0, end=1000),
            every=10,
            pattern=jc.pruning.n_of_m(2, 4),
            **options,
        ),
        jc.quantization.quantization_aware(jc.quantization.QuantSpec(bits=4, group_size=32), **options),
    )
    losses = {"soft": jc.distillation.soft_targets(temperature=2.0, mask=None)}
    init_state, step = jc.distillation.make_train_step(
        apply, apply, optax.adamw(1e-4), losses=losses, transform=transform
    )
    state = [init_state(params, key=jax.random.key(2))]

    def run() -> None:
        for _ in range(2):
            state[0], metrics = step(state[0], params, {"ids": jnp.asarray(ids)})
        jax.block_until_ready((state[0], metrics))

    run()
    return run


TASKS: dict[str, Callable[[bool], Callable[[], Any]]] = {
    "gptq": gptq,
    "sparsegpt": sparsegpt,
    "sparsegpt, 2:4": lambda quick: sparsegpt(quick, "2:4"),
    "training": training,
}


if __name__ == "__main__":
    main()
