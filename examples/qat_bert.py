"""Quantization-aware training of a fine-tuned MiniLM: learned steps (LSQ) at few bits, distilled from itself.

The 36 kernels of the encoder are rounded in every step, in groups of 32 inputs, with scales that are trained too; the
float model is the teacher (soft targets, sentence vectors, hidden states), labels are not used, and the embeddings stay
as they are. What is measured is the stored model: packed codes and bfloat16 scales, run by `execute`. Options were
chosen on the validation rows; the table is of the test rows, with 95 % intervals, beside rounding to nearest.

    python examples/qat_bert.py [--model FILE] [--bits 2] [--epochs 2] [--out DIR] [--load DIR] [--validation] [--quick]

FILE is a safetensors file of encoder and classifier with Hugging Face's names; by default the demo's model is taken.
`--out` saves the stored model, `--load` measures a saved one instead of training. The last line printed is JSON.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from minilm import Lines, Task, load_task, timed
from workbench import Table, format_table

import jaxcompress as jc
from jaxcompress import report
from jaxcompress.quantization import QuantSpec, lsq, quantize
from jaxcompress.recipe import Tokens, Training, predict, train

KERNELS = jc.tree.by_path("bert/encoder/.*/kernel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="encoder and classifier (safetensors); default: the demo's model")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=32, help="inputs that share a scale")
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows, and of dropout")
    parser.add_argument("--out", type=Path, help="directory for the stored model")
    parser.add_argument("--load", type=Path, help="a directory that `--out` wrote")
    parser.add_argument("--validation", action="store_true", help="report on the validation rows")
    parser.add_argument("--quick", action="store_true", help="256 rows to train on, 100 to test")
    arguments = parser.parse_args()
    begun = time.monotonic()
    task = load_task(arguments.model)
    held_out = task.validation if arguments.validation else task.test
    spec = QuantSpec(
        bits=arguments.bits,
        group_size=arguments.group,
        symmetric=arguments.symmetric,
        convention="full" if arguments.symmetric else "narrow",
        scale_dtype="bfloat16",
        range_rule="mse",
    )
    rows = task.train
    if arguments.quick:
        held_out, rows = first(held_out, 100), first(rows, 256)
    with timed("Rounding to nearest"):
        models = {"dense": task.params, "rounded to nearest": quantize(task.params, spec, select=KERNELS)[0]}
    if arguments.load:
        models["learned steps"] = jc.checkpoint.restore(arguments.load)[0]
    else:
        models["learned steps"] = trained(
            task, spec, rows, epochs=arguments.epochs, learning_rate=arguments.learning_rate, seed=arguments.seed
        )
    if arguments.out:
        jc.checkpoint.save(arguments.out, models["learned steps"])
    figures = measure(task.module, models, held_out)
    print(table(figures))
    settings: dict[str, Any] = {"rows": len(held_out), "split": "validation" if arguments.validation else "test"}
    settings |= {"bits": spec.bits, "group": spec.group_size, "symmetric": spec.symmetric, "epochs": arguments.epochs}
    settings |= {"learning_rate": arguments.learning_rate, "seed": arguments.seed}
    settings |= {"seconds": round(time.monotonic() - begun)}
    print(json.dumps(settings | {"models": figures}))


def trained(task: Task, spec: QuantSpec, rows: Tokens, *, epochs: int, learning_rate: float, seed: int) -> Any:
    """Distilled from the float model with rounded weights; the stored tree."""
    training = Training(
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        temperature=2.0,
        soft_targets=1.0,
        pooled=1.0,
        hidden=1.0,
    )
    transform = lsq(spec, select=KERNELS)
    steps = max(epochs * (len(rows) // training.batch_size), 2)
    # Adam's steps are absolute: scales are near 0.05, zero points count codes.
    rates = {"scale": learning_rate / 4, "zero_point": 1e-2}
    optimizers = {name: optax.adam(optax.schedules.cosine_decay_schedule(rate, steps)) for name, rate in rates.items()}
    params, state = train(
        task.module,
        task.params,
        rows,
        training,
        teacher=task.params,
        transform=transform,
        transform_optimizer=optax.partition(optimizers, _names),
        trainable=jc.tree.exclude(jc.tree.by_path("bert/embeddings/.*")),
        progress=Lines(),
        name="Learning steps",
    )
    return transform.finalize(params, state)


def measure(module: Any, models: dict[str, Any], rows: Tokens) -> dict[str, dict[str, Any]]:
    """Fidelity to the model called "dense", and the bits of a kernel's weight; intervals are (value, low, high)."""
    found = {name: predict(module, params, rows) for name, params in models.items()}
    dense, figures = found["dense"], {}
    right = dense["logits"].argmax(-1) == rows.labels
    for name, params in models.items():
        logits, vectors = found[name]["logits"], found[name]["pooler_output"]
        errors = np.linalg.norm(vectors - dense["pooler_output"], axis=1)
        agreement = report.agreement(dense["logits"].argmax(-1), logits.argmax(-1))
        divergence = report.kl_divergence(dense["logits"], logits)
        difference = report.paired_difference(logits.argmax(-1) == rows.labels, right)
        figures[name] = {
            "bits_per_weight": bits_per_weight(params),
            "accuracy": float((logits.argmax(-1) == rows.labels).mean()),
            "difference": [difference.difference, difference.low, difference.high],
            "agreement": [agreement.rate, agreement.low, agreement.high],
            "kl": [divergence.mean, divergence.low, divergence.high],
            "vector_error": float((errors / np.linalg.norm(dense["pooler_output"], axis=1)).mean()),
        }
    return figures


def bits_per_weight(params: Any) -> float:
    """Stored bits of the kernels of the encoder, scales and zero points included, per weight."""
    marks = jax.tree.leaves(KERNELS(params))
    kernels = [leaf for mark, (_, leaf) in zip(marks, jc.tree.leaves_with_paths(params), strict=True) if mark]
    bits = sum(leaf.nbits if hasattr(leaf, "nbits") else 8 * leaf.nbytes for leaf in kernels)
    return bits / sum(int(np.prod(leaf.shape)) for leaf in kernels)


def table(figures: dict[str, dict[str, Any]]) -> str:
    """One row for each model."""
    header = ("", "bits", "accuracy", "difference, points", "agreement", "KL to dense, nats", "vector error")
    rows = []
    for name, of in figures.items():
        spread = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in of["difference"]))
        divergence = "{:.4f} [{:.4f}, {:.4f}]".format(*of["kl"])
        last = (spread, f"{100 * of['agreement'][0]:.1f}", divergence, f"{of['vector_error']:.3f}")
        first = (name, f"{of['bits_per_weight']:.2f}", f"{100 * of['accuracy']:.1f}")
        rows.append((*first, *(("",) * 4 if name == "dense" else last)))
    return format_table(Table(header, tuple(rows)))


def first(tokens: Tokens, count: int) -> Tokens:
    """The first rows."""
    return Tokens(ids=tokens.ids[:count], labels=tokens.labels[:count], pad_id=tokens.pad_id)


def _names(steps: Any) -> Any:
    """Which rate each part of the `LearnedSteps` gets."""
    return type(steps)("scale", "zero_point")


if __name__ == "__main__":
    main()
