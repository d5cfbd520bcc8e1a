"""A long run: as many traces, compiled programs, live arrays and bytes at its end as at its beginning.

A toy of two layers, one trained in 4 bits by LSQ, takes 10,000 steps of `training.fit` with figures, checkpoints and
an evaluation. What the process holds is noted every 500 steps, after the first 1,000.

    python examples/benchmarks/long_run.py [--quick]

The last line is JSON: `traces` and `programs` of the step must be 1, `growth_mb` of resident memory about 0.
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress.distillation import hard_labels, make_train_step
from jaxcompress.quantization import QuantSpec, lsq
from jaxcompress.training import Checkpoints, fit, jsonl

TRACES = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    steps = 1000 if parser.parse_args().quick else 10_000
    init_state, step = make_train_step(
        apply,
        None,
        optax.adam(1e-3),
        losses={"labels": hard_labels()},
        transform=lsq(QuantSpec(bits=4)),
        transform_optimizer=optax.adam(1e-4),
    )
    rng = np.random.default_rng(0)
    params = {
        "first": jnp.asarray(rng.normal(size=(64, 256)) / 8),
        "last": jnp.asarray(rng.normal(size=(256, 10)) / 16),
    }
    params = {name: leaf.astype(jnp.float32) for name, leaf in params.items()}
    held: list[tuple[int, int]] = []

    def evaluate(state: Any) -> dict[str, float]:
        gc.collect()
        held.append((len(jax.live_arrays()), resident()))
        return {"arrays": held[-1][0]}

    with tempfile.TemporaryDirectory() as directory, Checkpoints(Path(directory, "checkpoints")) as checkpoints:
        _, figures = fit(
            init_state(params, key=jax.random.key(0)),
            lambda state, batch: step(state, None, batch),
            batches(),
            steps=steps,
            checkpoints=checkpoints,
            save_every=steps // 10,
            log_every=10,
            sinks=[jsonl(Path(directory, "log.jsonl"))],
            evaluate=evaluate,
            evaluate_every=steps // 20,
        )
    early, late = held[2], held[-1]
    found = {
        "steps": steps,
        "traces": len(TRACES),
        "programs": step._jitted._cache_size(),
        "arrays": [early[0], late[0]],
        "resident_mb": [round(early[1] / 1e6, 1), round(late[1] / 1e6, 1)],
        "growth_mb": round((late[1] - early[1]) / 1e6, 1),
        "loss": round(figures["loss"], 4),
    }
    print(json.dumps(found))


def apply(params: Any, batch: Any, *, key: jax.Array, train: bool) -> dict[str, jax.Array]:
    TRACES.append(train)
    return {"logits": jnp.tanh(batch["x"] @ params["first"]) @ params["last"]}


def batches() -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    while True:
        x = rng.normal(size=(32, 64)).astype(np.float32)
        yield {"x": x, "labels": x[:, :10].argmax(-1)}


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
