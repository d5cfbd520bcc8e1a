"""LeNet-300-100 on Fashion-MNIST, trained sparse at 95 and 98 %: five ways at the same number of epochs.

Settings were chosen with `--validate`: trained on the first 55,000 training images, accuracy on the other 5,000.
Without it all 60,000 are trained on, and the accuracy is that of the 10,000 test images. The last line printed is JSON.

    python examples/sparse_lenet.py [--quick] [--data DIRECTORY] [--methods gradual rigl] [--plot sparse_lenet.png]

The images are those of the Debian package `dataset-fashion-mnist`, fetched once with apt-get; `--data` takes a folder
with its four `.gz` files.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from workbench import fashion_mnist

import jaxcompress as jc
from jaxcompress import pruning
from jaxcompress.distillation import hard_labels, make_train_step
from jaxcompress.schedules import cubic

SIZES = (784, 300, 100, 10)
BATCH = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one method.

    Attributes:
        rate: largest learning rate; it falls by a cosine.
        decay: weight decay of the kernels.
        smoothing: of the labels.
        options: passed on to the transform.
    """

    rate: float = 2e-3
    decay: float = 0.05
    smoothing: float = 0.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


SETTINGS = {
    "dense": Settings(rate=2e-3, decay=0.3),
    # A high rate: what the schedule takes away must be made up for in little time.
    "gradual": Settings(rate=6e-3, decay=0.2),
    # Pruned weights move as fast as kept ones here: at high rates the masks never settle.
    "straight_through": Settings(rate=1e-3),
    "movement": Settings(),
    "rigl": Settings(rate=4e-3),
    "sparse_evolution": Settings(rate=4e-3),
}


def main() -> None:
    arguments = parse()
    data = images(arguments.data, validate=arguments.validate, quick=arguments.quick)
    epochs = arguments.epochs or (2 if arguments.quick else 30)
    seeds = range(1 if arguments.quick else arguments.seeds)
    rows = []
    for method in arguments.methods:
        for sparsity in (0.0,) if method == "dense" else arguments.sparsities:
            begun = time.perf_counter()
            runs = [
                train(method, sparsity, data, epochs=epochs, seed=seed, settings=setting(arguments, method))
                for seed in seeds
            ]
            accuracies = [accuracy for accuracy, _ in runs]
            rows.append(
                {
                    "method": method,
                    "sparsity": round(runs[0][1], 4),
                    "accuracy": round(100 * statistics.mean(accuracies), 2),
                    "runs": [round(100 * accuracy, 2) for accuracy in accuracies],
                    "seconds": round(time.perf_counter() - begun, 1),
                }
            )
            print(rows[-1], flush=True)
    print(table(rows))
    if arguments.plot:
        plot(rows, arguments.plot)
    kind = "validation" if arguments.validate else "test"
    print(json.dumps({"rows": rows, "epochs": epochs, "images": len(data["train"][1]), "of": kind}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, two epochs, one seed")
    parser.add_argument("--data", type=Path, help="folder with the four files of the data set")
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.95, 0.98])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--validate", action="store_true", help="report the last 5,000 training images instead")
    parser.add_argument("--rate", type=float, help="instead of the settings: learning rate")
    parser.add_argument("--decay", type=float, help="instead of the settings: weight decay")
    parser.add_argument("--smoothing", type=float, help="instead of the settings: label smoothing")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: options of the transform")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def setting(arguments: argparse.Namespace, method: str) -> Settings:
    given = {name: value for name in ("rate", "decay", "smoothing") if (value := getattr(arguments, name)) is not None}
    own = dataclasses.replace(SETTINGS[method], **given)
    return dataclasses.replace(own, options=own.options | arguments.options)


def images(path: Path | None, *, validate: bool, quick: bool) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(pixels, labels) to train on and to report."""
    found = fashion_mnist(path)
    x, y = found.train_images.reshape(60000, -1), found.train_labels
    # Settings were chosen without the last 5,000; the reported models may learn from them.
    count = 4096 if quick else 55000 if validate else 60000
    held = (x[55000:], y[55000:]) if validate else (found.test_images.reshape(10000, -1), found.test_labels)
    return {"train": (jnp.asarray(x[:count]), jnp.asarray(y[:count])), "held": tuple(map(jnp.asarray, held))}


def train(
    method: str, sparsity: float, data: dict[str, Any], *, epochs: int, seed: int, settings: Settings
) -> tuple[float, float]:
    """Accuracy on the held images and the share of zeros among the weights, after training and `finalize`."""
    params = initial(jax.random.key(seed))
    per_epoch = len(data["train"][1]) // BATCH
    steps = epochs * per_epoch
    transform = transforms(method, sparsity, steps, settings.options)
    rate = optax.schedules.warmup_cosine_decay_schedule(0.0, settings.rate, per_epoch // 2, steps)
    optimizer = optax.adamw(
        rate, weight_decay=settings.decay, mask=lambda tree: jax.tree.map(lambda w: w.ndim > 1, tree)
    )
    init_state, step = make_train_step(
        apply,
        None,
        optimizer,
        losses={"labels": hard_labels(smoothing=settings.smoothing)},
        transform=transform,
        transform_optimizer=optax.adam(1e-2) if method == "movement" else None,
    )
    state = init_state(params, key=jax.random.key(100 + seed))

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        order = jax.random.permutation(key, len(y))[: per_epoch * BATCH].reshape(per_epoch, BATCH)
        return jax.lax.scan(
            lambda state, rows: (step(state, None, {"x": x[rows], "labels": y[rows]})[0], None), state, order
        )[0]

    for key in jax.random.split(jax.random.key(200 + seed), epochs):
        state = epoch(state, key, *data["train"])
    final = transform.finalize(state.params, state.transform_state)
    x, y = data["held"]
    logits = jax.jit(jc.execute(lambda tree, x: apply(tree, {"x": x}, key=None, train=False)["logits"]))(final, x)
    kernels = [jc.materialize(layer["kernel"]) for layer in final.values()]
    zeros = sum(int((kernel == 0).sum()) for kernel in kernels) / sum(kernel.size for kernel in kernels)
    return float((logits.argmax(1) == y).mean()), zeros


def transforms(method: str, sparsity: float, steps: int, options: dict[str, Any]) -> Any:
    """All see the same number of steps; the last two fifths are at the final sparsity and fixed masks, or nearly."""
    schedule, until = cubic(0.0, sparsity, begin=steps // 10, end=3 * steps // 5), 3 * steps // 4
    match method:
        case "gradual":
            return pruning.gradual(**{"schedule": schedule, "every": 50, "scope": "global", **options})
        case "straight_through":
            return pruning.straight_through_magnitude(
                **{"schedule": schedule, "every": 20, "scope": "global", "freeze_at": 4 * steps // 5, **options}
            )
        case "movement":
            return pruning.movement(
                **{"schedule": schedule, "every": 20, "scope": "global", "freeze_at": 4 * steps // 5, **options}
            )
        case "rigl":
            every = min(100, until // 4)
            return pruning.rigl(**{"sparsity": sparsity, "until": until, "every": every, **options})
        case "sparse_evolution":
            every = min(400, until // 4)
            return pruning.sparse_evolution(**{"sparsity": sparsity, "until": until, "every": every, **options})
        case _:
            return jc.identity()


def initial(key: jax.Array) -> dict[str, Any]:
    """Kernels of variance 2 / n_in."""
    layers = {}
    for i, (n, m) in enumerate(itertools.pairwise(SIZES)):
        kernel = jax.random.normal(jax.random.fold_in(key, i), (n, m)) * jnp.sqrt(2 / n)
        layers[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(m)}
    return layers


def apply(params: Any, batch: dict[str, jax.Array], *, key: Any, train: bool) -> dict[str, jax.Array]:
    del key, train
    x = (batch["x"] - 0.286) / 0.353
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        x = x @ layer["kernel"] + layer["bias"][None]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return {"logits": x}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'method':20} {'zeros %':>8} {'accuracy %':>11}   runs"]
    lines += [
        f"{row['method']:20} {100 * row['sparsity']:8.2f} {row['accuracy']:11.2f}   {row['runs']}" for row in rows
    ]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        axes.plot([100 * row["sparsity"] for row in own], [row["accuracy"] for row in own], "o-", label=method)
    axes.set(xlabel="weights that are zero (%)", ylabel="test accuracy (%)", title="LeNet-300-100, Fashion-MNIST")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
