"""What a job on a pod looks like: a GPT-2 is distilled into half of its layers and pruned meanwhile, on many devices.

The same script runs on one device, on all of one machine, and on a pod, where every host starts it: processes find each
other by `jax.distributed.initialize`. Weights are split over the mesh axes `fsdp` and `tensor` by rules on their paths,
rows over `data` and `fsdp`; all that the step holds (moments, masks, scores) lies where its weight does. A checkpoint
is written every so many steps while training goes on; SIGTERM, which a machine that is taken away gets, writes one
more, and the same command goes on from it. At the end, the pruned student is saved as sparse arrays.

    python examples/tpu_job.py --quick                              # one process, small, random weights and tokens
    python examples/tpu_job.py --quick --processes 2 --devices 4    # two processes of four CPU devices each
    python examples/tpu_job.py --model DIR --tokens FILE.npy --out DIR --data 2 --fsdp 8 --tensor 2   # on each host

`--model` is a Hugging Face directory of a GPT-2, `--tokens` a NumPy file of token ids in one row, as any tokenizer
gives. The last line is JSON.
"""

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.models import GPT2Config, from_pretrained, make_module
from jaxcompress.training import Checkpoints, console, fit, jsonl, tensorboard

# By the end of its path: how a weight is split. What no rule names is on every device.
RULES = {
    "c_attn/kernel": PartitionSpec("fsdp", "tensor"),
    "c_fc/kernel": PartitionSpec("fsdp", "tensor"),
    "c_proj/kernel": PartitionSpec("tensor", "fsdp"),
    "wte/embedding": PartitionSpec("tensor", "fsdp"),
}
BATCH = PartitionSpec(("data", "fsdp"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few steps")
    parser.add_argument("--model", type=Path, help="directory of the teacher; by default one of random weights")
    parser.add_argument("--tokens", type=Path, help="token ids (.npy); by default random ones")
    parser.add_argument("--out", type=Path, help="checkpoints, logs and the student; by default a temporary directory")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--rows", type=int, default=None, help="of a batch, on all devices together")
    parser.add_argument("--length", type=int, default=None, help="tokens of a row")
    parser.add_argument("--data", type=int, default=None, help="size of the mesh axis; by default what is left over")
    parser.add_argument("--fsdp", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--processes", type=int, help="starts as many processes on this machine, for trying it out")
    parser.add_argument("--devices", type=int, default=4, help="CPU devices of each of these processes")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is None:
        with tempfile.TemporaryDirectory() as directory:
            sys.exit(start(arguments, Path(directory)))
    sys.exit(start(arguments, arguments.out))


def start(arguments: argparse.Namespace, out: Path) -> int:
    """Runs in this process, or in several that it starts; the exit status."""
    if arguments.processes is None or arguments.process is not None:
        if arguments.process is not None:
            jax.distributed.initialize(arguments.address, arguments.processes, arguments.process)
        elif os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("TPU_WORKER_HOSTNAMES", "").count(","):
            jax.distributed.initialize()
        run(arguments, out)
        return 0
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--out", str(out), "--address", address]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(arguments.devices)}
    processes = [
        subprocess.Popen([*command, "--process", str(number)], env=environment) for number in range(arguments.processes)
    ]
    try:
        return max(process.wait() for process in processes)
    finally:
        for process in processes:
            process.kill()


def run(arguments: argparse.Namespace, out: Path) -> None:
    quick = arguments.quick
    steps = arguments.steps or (6 if quick else 10_000)
    rows, length = arguments.rows or (8 if quick else 64), arguments.length or (16 if quick else 512)
    grid = mesh(arguments)
    module, teacher = read_teacher(arguments.model, quick=quick)
    tokens = read_tokens(arguments.tokens, module.config.vocab_size)
    layers = list(range(0, module.config.num_hidden_layers, 2))
    student = jc.distillation.select_layers(teacher, r"transformer/h/(\d+)/.*", layers)
    small = make_module(resized_config(module.config, layers))
    teacher, student = placed(teacher, grid), placed(student, grid)

    transform = jc.pruning.gradual(
        schedule=jc.schedules.cubic(0.0, arguments.sparsity, begin=0, end=max(1, steps // 2)),
        every=max(1, steps // 100),
        select=jc.tree.by_path(r".*/h/.*/kernel"),
    )
    rate = optax.schedules.warmup_cosine_decay_schedule(0.0, 1e-3 if quick else 3e-4, max(1, steps // 20), steps)
    init_state, step = jc.distillation.make_train_step(
        model_apply(small),
        model_apply(module),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01)),
        losses={
            "soft": jc.distillation.soft_targets(temperature=2.0),
            "next": (0.1, jc.distillation.next_token_labels(mask="attention_mask")),
        },
        transform=transform,
    )
    # All that makes this run what it is: a checkpoint of another one is refused.
    config = {
        "model": str(arguments.model), "tokens": str(arguments.tokens), "layers": layers, "steps": steps,
        "rows": rows, "length": length, "sparsity": arguments.sparsity,
    }  # fmt: skip
    sinks = [console(), jsonl(out / "log.jsonl"), tensorboard(out / "tensorboard")]
    with Checkpoints(out / "checkpoints", config=config, keep_last=2, keep_best=1) as checkpoints:
        begun = max(checkpoints.steps(), default=0)
        state, figures = fit(
            init_state(student, key=jax.random.key(0)),
            lambda state, batch: step(state, teacher, batch),
            batches(tokens, grid, rows=rows, length=length),
            steps=steps,
            checkpoints=checkpoints,
            save_every=max(1, steps // 3 if quick else 1000),
            log_every=max(1, steps // 6 if quick else 100),
            sinks=sinks,
        )
    # Sparse arrays are made from whole weights, on every host the same.
    params, transform_state = multihost_utils.process_allgather((state.params, state.transform_state), tiled=True)
    pruned = transform.finalize(jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, transform_state))
    jc.checkpoint.save(out / "student", pruned, overwrite=True)
    if jax.process_index() == 0:
        found = {"devices": jax.device_count(), "processes": jax.process_count(), "from step": begun, "steps": steps}
        print(json.dumps(found | figures | {"student sparsity": jc.report.size_report(pruned).total.sparsity}))


def mesh(arguments: argparse.Namespace) -> Mesh:
    """All devices, on axes for data, weights (fsdp) and both (tensor); one device has all axes of size 1."""
    count = jax.device_count()
    fsdp, tensor = (arguments.fsdp, arguments.tensor) if count > 1 else (1, 1)
    data = arguments.data or max(1, count // (fsdp * tensor))
    if data * fsdp * tensor != count:
        sys.exit(f"--data {data} x --fsdp {fsdp} x --tensor {tensor} are not the {count} devices that there are.")
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def placed(params: Any, grid: Mesh) -> Any:
    """Every weight on its devices; each process reads the parts of its own."""

    def place(path: Any, leaf: Any) -> jax.Array:
        name = "/".join(str(key.key) for key in path)
        array = np.asarray(leaf)
        rule = next((rule for end, rule in RULES.items() if name.endswith(end)), PartitionSpec())
        # An axis that the mesh does not divide, such as 50,257 words, stays whole.
        axes = [axis if axis and array.shape[at] % grid.shape[axis] == 0 else None for at, axis in enumerate(rule)]
        spec = PartitionSpec(*axes)
        return jax.make_array_from_callback(array.shape, NamedSharding(grid, spec), lambda index: array[index])

    return jax.tree_util.tree_map_with_path(place, params)


def read_teacher(path: Path | None, *, quick: bool) -> tuple[Any, Any]:
    if path is not None:
        return from_pretrained(path)
    sizes = (128, 32, 2, 2) if quick else (50_304, 768, 12, 12)
    config = GPT2Config(
        vocab_size=sizes[0], hidden_size=sizes[1], num_hidden_layers=sizes[2], num_attention_heads=sizes[3],
        max_position_embeddings=64 if quick else 1024, head="causal_lm",
    )  # fmt: skip
    module = make_module(config)
    return module, jax.jit(module.init)(jax.random.key(1), jnp.ones((1, 4), jnp.int32))["params"]


def resized_config(config: GPT2Config, layers: list[int]) -> GPT2Config:
    return dataclasses.replace(
        config,
        num_hidden_layers=len(layers),
        num_attention_heads=tuple(config.num_attention_heads[at] for at in layers),
        intermediate_size=tuple(config.intermediate_size[at] for at in layers),
    )


def read_tokens(path: Path | None, vocabulary: int) -> np.ndarray:
    if path is not None:
        return np.load(path, mmap_mode="r")
    return np.random.default_rng(0).integers(0, vocabulary, 100_000)


def model_apply(module: Any) -> Any:
    def apply(params: Any, batch: Any, *, key: Any, train: bool) -> dict[str, jax.Array]:
        del key, train
        return {"logits": module.apply({"params": params}, batch["input_ids"])["logits"]}

    return apply


def batches(tokens: np.ndarray, grid: Mesh, *, rows: int, length: int) -> Iterator[dict[str, jax.Array]]:
    """Rows from random places, the same in all processes; each process makes the part that its devices have."""
    sharding, rng = NamedSharding(grid, BATCH), np.random.default_rng(0)
    mask = jax.make_array_from_callback((rows, length), sharding, lambda index: np.ones((rows, length), int)[index])
    while True:
        starts = rng.integers(0, len(tokens) - length, rows)

        def part(index: Any, starts: np.ndarray = starts) -> np.ndarray:
            return np.stack([tokens[at : at + length] for at in starts[index[0]]]).astype(np.int32)

        yield {"input_ids": jax.make_array_from_callback((rows, length), sharding, part), "attention_mask": mask}


if __name__ == "__main__":
    main()
