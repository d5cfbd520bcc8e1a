"""Losses over a vocabulary of GPT-2's size, 4 x 512 tokens of width 768: logits in full, and deferred.

Memory is XLA's own analysis of the compiled program: what it needs beside its arguments and results, in bytes, as a
share of the student's logits in float32. Times are of value and gradient, by hidden states and head, in one run.

    python examples/benchmarks/chunked_loss.py [--quick]
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.distillation import deferred_logits, hard_labels, jensen_shannon, reverse_kl, soft_targets

LOSSES = {
    "forward_kl": soft_targets(temperature=2.0),
    "reverse_kl": soft_targets(divergence=reverse_kl),
    "jensen_shannon": soft_targets(divergence=jensen_shannon()),
    "labels": hard_labels(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 x 64 tokens, 5,003 classes")
    parser.add_argument("--block-size", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    shape = (1, 64, 64, 5003) if arguments.quick else (4, 512, 768, 50257)
    block_size = arguments.block_size or (64 if arguments.quick else 512)
    figures = {"logits_mb": round(4e-6 * shape[0] * shape[1] * shape[3], 1), "block_size": block_size}
    for name in LOSSES:
        figures |= compare(name, shape, block_size, arguments.repeats, tied=name == "labels")
    print(table(figures))
    print(json.dumps(figures))


def compare(name: str, shape: tuple[int, ...], block_size: int, repeats: int, *, tied: bool) -> dict[str, float]:
    batch, positions, width, classes = shape
    keys = iter(jax.random.split(jax.random.key(0), 5))
    heads = [
        (
            jax.random.normal(next(keys), (batch, positions, width)),
            jax.random.normal(next(keys), (classes, width) if tied else (width, classes)) * width**-0.5,
        )
        for _ in range(2)
    ]
    labels = {"labels": jax.random.randint(next(keys), (batch, positions), 0, classes)}
    labels |= {"attention_mask": jnp.ones((batch, positions), bool)}
    makers = {
        "full": lambda hidden, kernel: hidden @ (kernel.T if tied else kernel),
        "deferred": functools.partial(deferred_logits, tied=tied, block_size=block_size),
    }
    programs = {kind: compiled(LOSSES[name], make, heads[0], heads[1], labels) for kind, make in makers.items()}
    bytes_of_logits = 4 * batch * positions * classes
    temporary = {kind: program.memory_analysis().temp_size_in_bytes for kind, program in programs.items()}
    results: dict[str, Any] = {}
    seconds: dict[str, float] = dict.fromkeys(programs, float("inf"))
    for _ in range(repeats):
        for kind, program in programs.items():
            begun = time.perf_counter()
            results[kind] = jax.block_until_ready(program(*heads, labels))
            seconds[kind] = min(seconds[kind], time.perf_counter() - begun)
    (value, gradients), (other, others) = results["full"], results["deferred"]
    return {
        f"{name}_full_temporary": round(temporary["full"] / bytes_of_logits, 3),
        f"{name}_temporary": round(temporary["deferred"] / bytes_of_logits, 3),
        f"{name}_seconds": round(seconds["deferred"], 2),
        f"{name}_time_to_full": round(seconds["deferred"] / seconds["full"], 2),
        f"{name}_error": float(abs(other / value - 1)),
        f"{name}_gradient_error": max(map(relative_error, others, gradients)),
    }


def compiled(loss: Any, make: Callable[..., Any], student: Any, teacher: Any, batch: Any) -> Any:
    def mean(hidden: jax.Array, kernel: jax.Array, teacher: Any, batch: Any) -> jax.Array:
        total, count = loss({"logits": make(hidden, kernel)}, {"logits": make(*teacher)}, batch)
        return total / count

    run = jax.jit(lambda student, teacher, batch: jax.value_and_grad(mean, argnums=(0, 1))(*student, teacher, batch))
    return run.lower(student, teacher, batch).compile()


def relative_error(array: jax.Array, reference: jax.Array) -> float:
    return float(jnp.linalg.norm(array - reference) / jnp.linalg.norm(reference))


def table(figures: dict[str, Any]) -> str:
    wanted = {"_full_temporary": "", "_temporary": "at most 0.125", "_error": "at most 1e-5", "_time_to_full": ""}

    def goal(name: str) -> str:
        return next((text for ending, text in wanted.items() if name.endswith(ending)), "")

    return "\n".join(f"{name:32} {value!s:>24}   {goal(name)}" for name, value in figures.items())


if __name__ == "__main__":
    main()
