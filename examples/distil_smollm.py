"""SmolLM2-135M with 20 of its 30 layers, distilled on Brown text from outputs of the whole model that are on disk.

1. Layers are taken out one by one, each time the one without which KL(whole || rest) is least on training text.
2. The whole model runs once over windows of the training text; its most likely tokens are kept on disk.
3. The student, which starts with the weights of the layers that are left, learns these distributions; the whole model
   is no longer needed. Training is saved every so often, and the same command goes on from there.

All of it has a budget of processor time, 120 minutes by default (an hour of two cores): a share goes to step 2, and as
many steps of training are planned as fit into the rest. KL to the whole model in nats a token, with its standard error,
and perplexity are those of 8 windows of 256 tokens of files that are held out; on the way, of windows of the training
files that are not trained on.

    python examples/distil_smollm.py [--quick] [--cpu-minutes 120] [--out DIRECTORY]

The last line is JSON.
"""

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from smollm2 import Distance, Task, calibration, load_task, windows
from workbench import note

import jaxcompress as jc
from jaxcompress.distillation import (
    deferred_logits,
    make_train_step,
    read_teacher_outputs,
    select_layers,
    top_k_targets,
    write_teacher_outputs,
)
from jaxcompress.models import resized
from jaxcompress.training import Checkpoints, console, fit, jsonl

LAYERS = r"model/layers/(\d+)/.*"
TEACHER_SHARE = 0.28
"""Of the time: each window is then learned from about once. With 2.5 passes the training loss was .25, where KL was .58
on windows that were not trained on."""
Batch = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    if arguments.out is None:
        with tempfile.TemporaryDirectory() as directory:
            run(arguments, Path(directory))
    else:
        arguments.out.mkdir(parents=True, exist_ok=True)
        run(arguments, arguments.out)


def run(arguments: argparse.Namespace, out: Path) -> None:
    quick = arguments.quick
    clock = Clock(out / "clock.json", 60 * arguments.cpu_minutes)
    task = load_task()
    ids = calibration(task, 0, rows=1 if quick else 2, length=32 if quick else 128)
    removed = functools.partial(least_needed_removed, task, ids, arguments.layers, at_once=10 if quick else 1)
    layers = stored(out / "layers.json", removed)
    note(f"layers {layers} after {clock.save() / 60:.1f} minutes")
    untaught = select_layers(task.params, LAYERS, layers)
    module = resized(task.module, untaught)

    validation, batches = training_text(task, rows=2, length=64 if quick else 256)
    batches = batches[: 5 if quick else None]
    written = stored(out / "batches.json", lambda: teacher_outputs(out / "teacher", task, batches, clock))
    note(f"{written} batches of teacher outputs after {clock.save() / 60:.1f} minutes")
    batches = batches[:written]

    def outputs() -> Iterator[Batch]:
        while True:
            yield from read_teacher_outputs(out / "teacher", batches, params=task.params)

    distance = Distance(task, validation)
    steps = 10 if quick else stored(out / "steps.json", lambda: steps_in_time(module, untaught, outputs(), clock))
    init_state, step = train_step(module, steps, arguments.learning_rate)
    every = steps if quick else max(1, steps // 5)

    def evaluate(state: Any) -> dict[str, float]:
        figures = distance(state.params, module)
        return {f"validation {name}": value for name, value in figures.items()} | {"minutes": clock.save() / 60}

    config = {"layers": layers, "batches": written, "steps": steps, "learning rate": arguments.learning_rate}
    with Checkpoints(out / "checkpoints", config=config, keep_last=1) as checkpoints:
        state, _ = fit(
            init_state(untaught, key=jax.random.key(0)),
            lambda state, batch: step(state, None, batch),
            outputs(),
            steps=steps,
            checkpoints=checkpoints,
            save_every=every,
            log_every=max(1, steps // 40),
            sinks=[console(), jsonl(out / "log.jsonl")],
            evaluate=evaluate,
            evaluate_every=every,
        )
    minutes = clock.save() / 60
    rows, length = (2, 64) if quick else (8, 256)
    distance = Distance(task, windows(task.held_out, rows=rows, length=length))
    results = {"whole": distance(task.params), "untaught": distance(untaught, module)}
    results |= {"distilled": distance(state.params, module)}
    closed = 1 - results["distilled"]["kl"] / results["untaught"]["kl"]
    for name, figures in results.items():
        print(f"{name:12} KL {figures['kl']:.3f} +- {figures['kl_error']:.3f}   perplexity {figures['perplexity']:.1f}")
    figures = {"layers": layers, "batches": written, "steps": steps, "cpu_minutes": minutes, "gap_closed": closed}
    print(json.dumps({"quick": quick, **figures, "results": results}))


class Clock:
    """Processor time of this run, and of those that it continues.

    Args:
        path: a file that keeps it.
        budget: seconds.
    """

    def __init__(self, path: Path, budget: float) -> None:
        self.budget = budget
        self._path, self._before = path, json.loads(path.read_text()) if path.exists() else 0.0

    def spent(self) -> float:
        """Seconds."""
        return self._before + time.process_time()

    def save(self) -> float:
        """Seconds, which the file keeps."""
        self._path.write_text(json.dumps(self.spent()))
        return self.spent()


def stored(path: Path, compute: Callable[[], Any]) -> Any:
    """What was computed by the run that is continued, or is now."""
    if not path.exists():
        path.write_text(json.dumps(compute()))
    return json.loads(path.read_text())


def least_needed_removed(task: Task, ids: np.ndarray, count: int, *, at_once: int = 1) -> list[int]:
    """The layers that are left when, one after another, that goes without which the output changes least.

    A layer whose two output kernels are zero hands on what it reads: one compiled program tries them all.

    Args:
        task: with the whole model.
        ids: (rows, tokens) of training text.
        count: of layers to keep.
        at_once: how many go before all are tried again.
    """

    @jax.jit
    def log_probabilities(params: Any, gates: jax.Array) -> jax.Array:
        def gated(path: Any, leaf: jax.Array) -> jax.Array:
            keys = [key.key for key in path]
            return leaf * gates[int(keys[2])] if {"o_proj", "down_proj"} & set(keys) else leaf

        hidden, table = last_states(task.module, jax.tree_util.tree_map_with_path(gated, params), ids)
        return jax.nn.log_softmax(narrow_dot(hidden, table, (2,), (1,)))

    @jax.jit
    def divergence(params: Any, gates: jax.Array, whole: jax.Array) -> jax.Array:
        return (jnp.exp(whole) * (whole - log_probabilities(params, gates))).sum(-1).mean()

    gates = np.ones(task.module.config.num_hidden_layers, np.float32)
    whole = log_probabilities(task.params, gates)
    while (left := np.flatnonzero(gates)).size > count:
        changes = []
        for layer in left:
            fewer = np.where(np.arange(len(gates)) == layer, np.float32(0), gates)
            changes.append(float(divergence(task.params, fewer, whole)))
        least = np.argsort(changes)[: min(at_once, left.size - count)]
        note(f"without {left[least].tolist()}: KL {[round(changes[place], 3) for place in least]}")
        gates[left[least]] = 0
    return np.flatnonzero(gates).tolist()


def training_text(task: Task, *, rows: int, length: int, validation: int = 4) -> tuple[np.ndarray, list[Batch]]:
    """Windows of the training text that are not trained on, and the others in batches, in random order."""
    whole = task.train[: len(task.train) // length * length].reshape(-1, length)
    shuffled = np.random.default_rng(0).permutation(whole)
    held_back, rest = shuffled[:validation], shuffled[validation:]
    return held_back, [{"input_ids": part} for part in rest[: len(rest) // rows * rows].reshape(-1, rows, length)]


def last_states(module: Any, params: Any, ids: Any) -> tuple[jax.Array, jax.Array]:
    """What the head reads, and its weights, the table of the embeddings; both in bfloat16."""
    with nn.intercept_methods(_with_narrow_products):
        hidden = module.apply({"params": params}, ids, logits="none")["last_hidden_state"]
    return hidden.astype(jnp.bfloat16), params["model"]["embed_tokens"]["embedding"].astype(jnp.bfloat16)


def model_apply(module: Any) -> Any:
    """`(params, batch, *, key, train) -> outputs`, whose logits are never there in full."""

    def apply(params: Any, batch: Batch, *, key: Any, train: bool) -> dict[str, Any]:
        del key, train
        hidden, table = last_states(module, params, batch["input_ids"])
        return {"logits": deferred_logits(hidden, table, tied=True, block_size=4096)}

    return apply


def teacher_outputs(directory: Path, task: Task, batches: list[Batch], clock: Clock) -> int:
    """Writes outputs of the whole model until its share of the time is over; how many batches there are."""
    until = clock.spent() + TEACHER_SHARE * clock.budget
    in_time = itertools.takewhile(lambda batch: clock.spent() < until, batches)
    return write_teacher_outputs(directory, model_apply(task.module), task.params, in_time, top_k=128)


def train_step(module: Any, steps: int, learning_rate: float) -> Any:
    """Initial state and step. The table of the embeddings, which is the head, too, stays that of the whole model."""
    rate = optax.schedules.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 20), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))
    return make_train_step(
        model_apply(module),
        None,
        optimizer,
        losses={"soft": top_k_targets(mask=None)},
        trainable=jc.tree.exclude(jc.tree.by_path("model/embed_tokens/.*")),
        metrics={},
    )


def steps_in_time(module: Any, params: Any, outputs: Iterator[Batch], clock: Clock) -> int:
    """How many steps fit into the time that is left, by the time that some take."""
    init_state, step = train_step(module, 100, 1e-4)
    state, begun = init_state(params, key=jax.random.key(0)), 0.0
    for number in range(6):
        begun = time.process_time() if number == 2 else begun
        state, metrics = step(state, None, next(outputs))
        jax.block_until_ready(metrics)
    seconds = (time.process_time() - begun) / 4
    # What is left pays for compiling once more, evaluations and checkpoints, too.
    steps = max(8, int(0.9 * (clock.budget - clock.spent()) / seconds))
    note(f"{seconds:.2f} s a step: {steps} steps")
    return steps


def narrow_dot(a: jax.Array, b: jax.Array, axes_of_a: tuple[int, ...], axes_of_b: tuple[int, ...]) -> jax.Array:
    """A product that reads bfloat16 and adds up in float32.

    Where a processor has such products (AMX), they are three times as fast as those of float32. Those of a module of
    dtype bfloat16 are not, whose results are bfloat16: XLA then computes in float32.
    """
    a, b = (each.astype(jnp.bfloat16) for each in (a, b))
    return jax.lax.dot_general(a, b, ((axes_of_a, axes_of_b), ((), ())), preferred_element_type=jnp.float32)


def _with_narrow_products(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Calls a method of a module; if it is that of a dense layer, with `_product`."""
    if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
        return _product(*args, context.module.get_variable("params", "kernel"))
    return call(*args, **kwargs)


@jax.custom_vjp
def _product(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return narrow_dot(inputs, kernel, (inputs.ndim - 1,), (0,))


def _product_forward(inputs: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return _product(inputs, kernel), (inputs, kernel)


def _product_backward(operands: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = operands
    of_inputs = narrow_dot(cotangent, kernel, (cotangent.ndim - 1,), (1,))
    rows = cotangent.reshape(-1, kernel.shape[1])
    # By itself XLA would not turn the inputs around but multiply them as they lie, which is slow: a loop, here of two
    # turns, has its operands laid out in order.
    columns = inputs.reshape(-1, kernel.shape[0]).astype(jnp.bfloat16).T.reshape(2, -1, len(rows))
    of_kernel = jax.lax.map(lambda part: narrow_dot(part, rows, (1,), (0,)), columns)
    return of_inputs, of_kernel.reshape(kernel.shape)


_product.defvjp(_product_forward, _product_backward)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short windows and ten steps")
    parser.add_argument("--cpu-minutes", type=float, default=120.0)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, help="outputs of the teacher and checkpoints; by default temporary")
    return parser.parse_args()


if __name__ == "__main__":
    main()
