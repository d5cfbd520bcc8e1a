"""One distillation step against PyTorch, eagerly, and against a JAX step written by hand, in one interleaved run.

A model of random weights is distilled from another one of its sizes: the teacher's forward pass, the student's forward
and backward pass, the divergence of the logits at temperature 2, AdamW on every weight. "bert" is MiniLM's size with 32
sentences of 64 tokens, "smollm2" SmolLM2-135M's with one row of 256. Each contestant is a process of its own with the
same number of threads; the steps run in turn, so that a machine whose speed drifts slows all. Quoted are medians of
seconds and of the ratios of neighbours.

    python examples/benchmarks/against_pytorch.py --torch PYTHON [--size bert] [--quick] [--repeats 15] [--cores 2]

PYTHON is the interpreter of an environment with torch and transformers. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

CONTESTANTS = ("ours", "by hand", "torch")
BERT = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SHAPES = {"bert": (32, 64), "smollm2": (1, 256)}
RATE, TEMPERATURE = 1e-4, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="Python with torch and transformers")
    parser.add_argument("--size", choices=sorted(SHAPES), default="bert")
    parser.add_argument("--quick", action="store_true", help="two layers, three repeats")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cores", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve(arguments)
        return
    if not arguments.torch:
        parser.error("--torch: the interpreter of an environment with torch and transformers.")
    processes = {name: _start(name, arguments) for name in CONTESTANTS}
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(2 + (3 if arguments.quick else arguments.repeats)):
        for name, process in processes.items():
            seconds = _step(process, name)
            if number >= 2:
                times[name].append(seconds)
    for process in processes.values():
        process.communicate("", timeout=60)
    figures: dict[str, Any] = {"size": arguments.size, "shape": SHAPES[arguments.size], "cores": arguments.cores}
    figures["seconds"] = {name: round(statistics.median(each), 4) for name, each in times.items()}
    for other in CONTESTANTS[1:]:
        ratios = [a / b for a, b in zip(times["ours"], times[other], strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        figures[f"ours_to_{other.replace(' ', '_')}"] = [round(each, 3) for each in (*quarters,)]
    print(json.dumps(figures))


def _start(name: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    python = arguments.torch if name == "torch" else sys.executable
    command = [python, __file__, "--child", name, "--size", arguments.size, "--cores", str(arguments.cores)]
    process = subprocess.Popen(
        command + ["--quick"] * arguments.quick, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"The process of {name!r} ended before its first step.")
    return process


def _step(process: subprocess.Popen[str], name: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"The process of {name!r} ended in a step.")
    return float(line)


def serve(arguments: argparse.Namespace) -> None:
    """One step for each line that is read, answered by its seconds."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-arguments.cores :]))
    layers = {"num_hidden_layers": 2} if arguments.quick else {}
    sizes = (BERT if arguments.size == "bert" else SMOLLM2) | layers
    make = {"ours": ours, "by hand": by_hand, "torch": by_torch}[arguments.child]
    step = make(arguments.size, sizes, SHAPES[arguments.size])
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        step()
        print(time.perf_counter() - begun, flush=True)


def ours(size: str, sizes: dict[str, Any], shape: tuple[int, int]) -> Callable[[], None]:
    import jax
    import optax

    import jaxcompress as jc

    apply, student, teacher, ids = _in_jax(size, sizes, shape)
    init_state, step = jc.distillation.make_train_step(
        lambda params, batch, **_: apply(params, batch["input_ids"]),
        lambda params, batch, **_: apply(params, batch["input_ids"]),
        optax.adamw(RATE),
        losses={"soft": jc.distillation.soft_targets(temperature=TEMPERATURE, mask=None)},
    )
    state = [init_state(student, key=jax.random.key(2))]

    def run() -> None:
        state[0], metrics = step(state[0], teacher, {"input_ids": ids})
        jax.block_until_ready((state[0], metrics))

    return run


def by_hand(size: str, sizes: dict[str, Any], shape: tuple[int, int]) -> Callable[[], None]:
    import functools

    import jax
    import optax

    apply, student, teacher, ids = _in_jax(size, sizes, shape)
    optimizer = optax.adamw(RATE)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, memory: Any, teacher: Any, ids: Any) -> Any:
        target = jax.nn.log_softmax(apply(teacher, ids)["logits"] / TEMPERATURE)

        def loss(params: Any) -> jax.Array:
            own = jax.nn.log_softmax(apply(params, ids)["logits"] / TEMPERATURE)
            return TEMPERATURE**2 * (jax.numpy.exp(target) * (target - own)).sum(-1).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, memory = optimizer.update(gradients, memory, params)
        return optax.apply_updates(params, updates), memory, value

    state = [(student, optimizer.init(student))]

    def run() -> None:
        *rest, value = step(*state[0], teacher, ids)
        state[0] = tuple(rest)
        jax.block_until_ready((rest, value))

    return run


def _in_jax(size: str, sizes: dict[str, Any], shape: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    import jax

    from jaxcompress.models import BertConfig, LlamaConfig, make_module

    if size == "bert":
        config: Any = BertConfig(head="sequence_classification", hidden_dropout_prob=0.0, **sizes)
    else:
        config = LlamaConfig(**sizes)
    module = make_module(config)
    ids = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    student, teacher = (jax.jit(module.init)(jax.random.key(seed), ids)["params"] for seed in (1, 2))
    return (lambda params, ids: module.apply({"params": params}, ids)), student, teacher, ids


def by_torch(size: str, sizes: dict[str, Any], shape: tuple[int, int]) -> Callable[[], None]:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else torch.get_num_threads())
    config: Any = BertConfig(**sizes) if size == "bert" else LlamaConfig(**sizes)
    make: Any = BertForSequenceClassification if size == "bert" else LlamaForCausalLM
    student, teacher = make(config).eval(), make(config).eval()  # without dropout, as the others
    options = {} if size == "bert" else {"use_cache": False}
    ids = torch.randint(0, config.vocab_size, shape)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=1e-4)

    def run() -> None:
        with torch.no_grad():
            target = torch.log_softmax(teacher(ids, **options).logits / TEMPERATURE, -1)
        own = torch.log_softmax(student(ids, **options).logits / TEMPERATURE, -1)
        loss = torch.nn.functional.kl_div(own, target, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        (TEMPERATURE**2 * loss).backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    main()
