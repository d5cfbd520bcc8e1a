"""A fine-tuned MiniLM of six layers, distilled into three of them.

The student begins with those three layers of the six that, without training, come closest to all of them on training
rows. It learns the teacher's probabilities and pooled vectors, which are computed once; it sees no label. Beside it,
trained for as many steps:

- untaught: the student before all training.
- labels alone: the student, on the labels instead of the teacher.
- outside: paraphrase-MiniLM-L3-v2, an encoder of three layers and the same sizes that others distilled for sentence
  similarity, with a new classifier, on the labels.

Embeddings stay as they are. The table is of the test rows, each model against the teacher ("dense") on the same rows,
with 95 % intervals; nothing was chosen by them.

    python examples/distil_bert.py [--model FILE] [--epochs 1] [--out DIRECTORY] [--quick]

The last line printed is JSON.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from minilm import Lines, Models, Task, batches, compare, first, load_task, table
from minilm_l3 import with_weights_of_l3
from workbench import note

import jaxcompress as jc
from jaxcompress.distillation import select_layers
from jaxcompress.models import from_pretrained, resized, save_pretrained
from jaxcompress.recipe import Tokens, Training, predict, train

LAYERS = r"bert/encoder/layer/(\d+)/.*"
NOT_EMBEDDINGS = jc.tree.exclude(jc.tree.by_path("bert/embeddings/.*"))
LABELS: dict[str, Any] = {"hard_labels": 1.0}
TEACHER: dict[str, Any] = {"temperature": 2.0, "soft_targets": 1.0, "pooled": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="encoder and classifier (safetensors); default: the demo's model")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rows", default="test", choices=("test", "validation"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="for the students; those that it has are not trained again")
    parser.add_argument("--quick", action="store_true", help="few rows, one pass")
    arguments = parser.parse_args()
    task = load_task(arguments.model)
    layers = closest_layers(task, arguments.layers, rows=32 if arguments.quick else 128)
    note(f"layers {layers}")
    rows, tested = task.train, getattr(task, arguments.rows)
    if arguments.quick:
        rows, tested, arguments.epochs = first(rows, 64), first(tested, 100), 1
    models = students(task, rows, layers, arguments)
    figures = compare(models, tested)
    print(table(figures))
    recovered = recovered_shares(figures)
    for name, shares in recovered.items():
        print(f"{name}: of what the untaught student lacks, recovered " + json.dumps(shares))
    settings = {"quick": arguments.quick, "rows": len(tested), "split": arguments.rows, "layers": layers}
    settings |= {"epochs": arguments.epochs, "learning_rate": arguments.learning_rate, "seed": arguments.seed}
    print(json.dumps(settings | {"recovered": recovered, "models": figures}))


def closest_layers(task: Task, count: int, *, rows: int) -> list[int]:
    """The layers that, without training, come closest to all of them on some training rows."""
    made = batches(task.train, np.arange(rows))

    def divergence(layers: tuple[int, ...]) -> float:
        params = select_layers(task.params, LAYERS, layers)
        return jc.report.kl_divergence(dense, logits(resized(task.module, params), params, made)).mean

    dense = logits(task.module, task.params, made)
    return list(min(itertools.combinations(range(task.module.config.num_hidden_layers), count), key=divergence))


def logits(module: nn.Module, params: Any, made: list[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([_logits(module, params, batch["ids"], batch["mask"]) for batch in made])


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: Any, params: Any, ids: Any, mask: Any) -> jax.Array:
    return module.apply({"params": params}, ids, mask)["logits"]


def students(task: Task, rows: Tokens, layers: list[int], arguments: argparse.Namespace) -> Models:
    untaught = select_layers(task.params, LAYERS, layers)
    module = resized(task.module, untaught)
    outside = with_weights_of_l3(untaught)
    head = 0.02 * jax.random.normal(jax.random.key(arguments.seed), untaught["classifier"]["kernel"].shape)
    outside |= {"classifier": {"kernel": head, "bias": jnp.zeros(head.shape[1])}}
    taught = predict(task.module, task.params, rows, progress=Lines(), name="teacher")

    def trained(name: str, params: Any, losses: dict[str, Any]) -> tuple[nn.Module, Any]:
        directory = arguments.out and arguments.out / name
        if directory and directory.exists():
            return from_pretrained(directory)
        training = Training(
            epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            widths=(32, 64),
            weight_decay=0.01,
            seed=arguments.seed,
            **losses,
        )
        options = {"trainable": NOT_EMBEDDINGS, "progress": Lines(), "name": name}
        params, _ = train(module, params, rows, training, cached=taught, **options)
        if directory:
            save_pretrained(directory, module, params)
        return module, params

    return {
        "dense": (task.module, task.params),
        "untaught": (module, untaught),
        "distilled": trained("distilled", untaught, TEACHER),
        "labels alone": trained("labels", untaught, LABELS),
        "outside": trained("outside", outside, LABELS),
    }


def recovered_shares(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """1 - (a student's distance from the teacher) / (the untaught one's): in accuracy, agreement and KL."""

    def distances(name: str) -> dict[str, float]:
        accuracy = figures["dense"]["accuracy"] - figures[name]["accuracy"]
        return {"accuracy": accuracy, "agreement": 1 - figures[name]["agreement"][0], "kl": figures[name]["kl"][0]}

    before = distances("untaught")
    return {
        name: {key: round(1 - value / before[key], 3) for key, value in distances(name).items() if before[key] > 0}
        for name in figures
        if name not in ("dense", "untaught")
    }


if __name__ == "__main__":
    main()
