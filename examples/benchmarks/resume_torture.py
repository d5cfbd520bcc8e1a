"""How a training run stands up to kills: whenever and however often it is killed, its end is the same to the bit.

A small run (one layer frozen in 4 bits, one trained in 4 bits by LSQ, noise from a key, Adam for weights and for step
sizes, batches drawn from a generator) saves every few steps. It is killed with SIGKILL at random moments, while it
computes, saves or removes, and is started again until it ends. State and log must then be those of a run that nothing
interrupted. One more run gets SIGTERM, and must save the step under way, and exit with status 143.

    python examples/benchmarks/resume_torture.py [--quick] [--kills N] [--seed N]

Needs `os.fork`. The last line is JSON; `differing` and `faults` must be 0.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.nnx  # noqa: F401  # what a save imports, once, before the forks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401

from jaxcompress.distillation import hard_labels, make_train_step
from jaxcompress.quantization import QuantSpec, lsq, quantize
from jaxcompress.training import Checkpoints, fit, jsonl
from jaxcompress.tree import by_path

# Nearly all the time goes into compilation, once for each start; nothing here is about fast programs.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
SAVE_EVERY = 5
FORK = multiprocessing.get_context("fork")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 kills, in seconds")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kills = 3 if arguments.quick else arguments.kills
    steps = 40 if arguments.quick else 300
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        whole, run, stopped = (Path(directory) / name for name in ("whole", "run", "stopped"))
        code, seconds = watched(whole, steps)
        assert code == 0
        differing, found = 0, []
        while len(found) < kills:
            # One in four dies on its way to the first step: while it starts, compiles or restores.
            early = len(found) % 4 == 3
            code, _ = watched(run, steps, signal.SIGKILL, rng.uniform(0, 2 * seconds / kills), early=early)
            if code == -signal.SIGKILL:
                found.append(last_step(run))
                print(f"killed; the last checkpoint is of step {found[-1]}", flush=True)
            else:
                # It ended before it was killed.
                differing += difference(whole, run) + (code != 0)
                shutil.rmtree(run)
        code, _ = watched(run, steps)
        differing += difference(whole, run) + (code != 0)
        status, _ = watched(stopped, steps, signal.SIGTERM, seconds / 3)
        saved = last_step(stopped)
        if not arguments.quick:
            code, _ = watched(stopped, steps)
            differing += difference(whole, stopped) + (code != 0)
    figures = {
        "steps": steps,
        "kills": len(found),
        "last checkpoints": found,
        "differing": differing,
        "sigterm status": status,
        "sigterm saved": saved,
        "faults": int(status != 128 + signal.SIGTERM) + int(not 0 < saved < steps),
    }
    print(json.dumps(figures))


def watched(
    folder: Path, steps: int, number: signal.Signals | None = None, seconds: float = 0.0, *, early: bool = False
) -> tuple[int | None, float]:
    """Runs in a process that gets a signal some seconds after its first step, or, if `early`, after its start.

    Returns:
        Exit code, and seconds from the first step to the end.
    """
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=train, args=(folder, steps, send))
    process.start()
    send.close()
    if not early:
        try:
            receive.recv()
        except EOFError:
            process.join()
            return process.exitcode, 0.0
    begun = time.monotonic()
    if number is not None:
        process.join(seconds)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)
    process.join()
    return process.exitcode, time.monotonic() - begun


def train(folder: Path, steps: int, send: Any) -> None:
    """Trains to the end, from wherever the folder has come to, and writes down the last state."""
    params = {
        "frozen": jnp.eye(8) / 2,
        "kernel": jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32),
    }
    params |= quantize(params, QuantSpec(bits=4), select=by_path("frozen"))[0]
    init_state, step = make_train_step(
        apply,
        None,
        optax.adam(1e-2),
        losses={"labels": hard_labels()},
        transform=lsq(QuantSpec(bits=4), select=by_path("kernel")),
        transform_optimizer=optax.adam(1e-3),
    )
    told = False

    def noted(state: Any, batch: Any) -> Any:
        nonlocal told
        result = step(state, None, batch)
        if not told:
            send.send(True)
            told = True
        # Slow steps have room for moments; what is computed does not depend on it.
        time.sleep(0.01)
        return result

    with Checkpoints(folder / "checkpoints", config={"bits": 4}, keep_best=1) as checkpoints:
        state, _ = fit(
            init_state(params, key=jax.random.key(0)),
            noted,
            batches(),
            steps=steps,
            checkpoints=checkpoints,
            save_every=SAVE_EVERY,
            log_every=SAVE_EVERY,
            sinks=[jsonl(folder / "log.jsonl")],
        )
    leaves = [jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
              for x in jax.tree.leaves(state)]  # fmt: skip
    (folder / "state").write_bytes(b"".join(np.asarray(leaf).tobytes() for leaf in leaves))


def apply(params: Any, batch: Any, *, key: jax.Array, train: bool) -> dict[str, jax.Array]:
    noise = jax.random.normal(key, batch["x"].shape) if train else 0.0
    return {"logits": jnp.tanh((batch["x"] + noise) @ params["frozen"]) @ params["kernel"]}


def batches() -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    while True:
        yield {"x": rng.normal(size=(16, 8)).astype(np.float32), "labels": rng.integers(0, 4, 16)}


def last_step(folder: Path) -> int:
    """Of the checkpoints that are whole, by their names alone: this process must not start JAX."""
    path = folder / "checkpoints"
    return max((int(name) for name in os.listdir(path) if name.isdigit()), default=0) if path.exists() else 0


def difference(whole: Path, run: Path) -> int:
    """How many of state and log are not the same."""
    return sum((whole / name).read_bytes() != (run / name).read_bytes() for name in ("state", "log.jsonl"))


if __name__ == "__main__":
    main()
