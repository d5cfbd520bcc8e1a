"""Takes heads and FFN columns out of a fine-tuned MiniLM until half of its encoder is left, physically.

Without training, units are scored on training rows, chosen under the budget, and what the removed ones did is made up
for by least squares. With `--train EPOCHS`, hard concrete gates choose under a Lagrangian while the model is distilled
from itself, and what is left is distilled further; the baseline, units by magnitude, gets all epochs of distillation.
Options were chosen on the validation rows; the table is of the test rows, each model against the dense one on the same
rows, with 95 % intervals. Times are medians, measured in turns, over the dense one.

    python examples/shrink_bert.py [--model FILE] [--share 0.5] [--train 3] [--plot FILE] [--quick]

The last line printed is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from gated_minilm import by_magnitude, with_gates
from minilm import ENCODER, Lines, Models, Task, batches, compare, load_task, table, timed

from jaxcompress import structured
from jaxcompress.models import resized, unit_groups
from jaxcompress.recipe import Tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="encoder and classifier (safetensors); default: the demo's model")
    parser.add_argument("--share", type=float, default=0.5, help="of the encoder's parameters that may be left")
    parser.add_argument("--examples", type=int, default=1024, help="training rows for scores and least squares")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these rows")
    parser.add_argument("--rows", default="test", choices=("test", "validation"))
    parser.add_argument("--train", type=int, default=0, metavar="EPOCHS", help="also the route with gates; at least 2")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--quick", action="store_true", help="few rows")
    arguments = parser.parse_args()
    task = load_task(arguments.model)
    rows = getattr(task, arguments.rows)
    if arguments.quick:
        rows = Tokens(ids=rows.ids[:100], labels=rows.labels[:100], pad_id=rows.pad_id)
    models: Models = {"dense": (task.module, task.params)}
    models |= post_training(
        task, share=arguments.share, examples=64 if arguments.quick else arguments.examples, seed=arguments.seed
    )
    if arguments.train:
        models |= trained(task, share=arguments.share, epochs=arguments.train, quick=arguments.quick)
    figures = compare(models, rows)
    print(table(figures))
    if arguments.plot:
        draw(figures, arguments.plot)
    settings = {"rows": len(rows), "split": arguments.rows, "share": arguments.share, "seed": arguments.seed}
    print(json.dumps(settings | {"models": figures}))


def post_training(task: Task, *, share: float, examples: int, seed: int = 0, rounds: int = 3) -> Models:
    """By magnitude and by Fisher information; rearranged; gates, and whole rows, fitted. No weight is trained.

    The last one goes down to `share` in several rounds: what was fitted is scored again before more is taken out.
    """
    groups = unit_groups(task.module.config)
    rows = np.random.default_rng(seed).permutation(len(task.train))[:examples]
    made = batches(task.train, rows)
    costs = structured.parameter_costs(task.params, select=ENCODER)
    gradients = _gradients(task, task.params, groups, made)

    def select(scores: Any, share: float, **options: Any) -> Any:
        return structured.select_units(scores, groups, task.params, sparsity=1 - share, costs=costs, **options).keep

    def by_fisher(gradients: Any, share: float) -> Any:
        keep = select(structured.fisher_unit_scores(gradients), share)
        return structured.swap_units(keep, gradients)

    magnitude = select(structured.magnitude_unit_scores(task.params, groups), share, rule="kind")
    swapped = by_fisher(gradients, share)
    keep, fitted = by_fisher(gradients, share ** (1 / rounds)), task.params
    for i in range(rounds):
        if i:
            # Units that are gone have rows of zeros, so no gradient and no score: they stay gone.
            keep = by_fisher(_gradients(task, fitted, groups, made), share ** ((i + 1) / rounds))
        fitted = _fitted(task, groups, keep, made)
    whole = {
        "magnitude": (task.params, magnitude),
        "Fisher": (task.params, select(structured.fisher_unit_scores(gradients), share)),
        "Fisher, rearranged": (task.params, swapped),
        "+ gates fitted": (_fitted(task, groups, swapped, made, fit="gates", bias=False), swapped),
        "+ rows fitted": (_fitted(task, groups, swapped, made), swapped),
        f"+ rows fitted, {rounds} rounds": (fitted, keep),
        "magnitude, rows fitted": (_fitted(task, groups, magnitude, made), magnitude),
    }
    trees = {name: structured.shrink(params, groups, keep) for name, (params, keep) in whole.items()}
    return {name: (resized(task.module, tree), tree) for name, tree in trees.items()}


def _gradients(task: Task, params: Any, groups: Any, made: list[dict[str, np.ndarray]]) -> Any:
    with timed("Gradients of the gates"):
        return structured.gate_gradients(label_loss(task.module), params, groups, made)


def _fitted(task: Task, groups: Any, keep: Any, made: list[dict[str, np.ndarray]], **options: Any) -> Any:
    """The dense parameters with the rows of kept units fitted by least squares, and 0 in the others."""
    with timed(f"Least squares {options or ''}"):
        return structured.refit(
            lambda p, ids, mask: task.module.apply({"params": p}, ids, mask)["logits"],
            task.params,
            groups,
            keep,
            [(batch["ids"], batch["mask"]) for batch in made],
            row_mask=lambda ids, mask: mask,
            **options,
        )[0]


def trained(task: Task, *, share: float, epochs: int, quick: bool) -> Models:
    """With gates and by magnitude, both distilled from the dense model for the same number of passes."""
    rows = task.train if not quick else Tokens(ids=task.train.ids[:256], labels=task.train.labels[:256], pad_id=0)
    options = {"share": share, "count": ENCODER, "epochs": epochs, "progress": Lines()}
    return {
        "gates, distilled": with_gates(task.module, task.params, rows, **options),
        "magnitude, distilled": by_magnitude(task.module, task.params, rows, **options),
    }


def label_loss(module: nn.Module) -> Any:
    """Cross-entropy with the labels: its squared gradients are the empirical Fisher information."""

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = module.apply({"params": params}, batch["ids"], batch["mask"])["logits"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1).mean()

    return loss


def draw(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """KL and agreement of every model, and the sizes of the layers that the best one keeps, as a PNG file."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = [name for name in figures if name != "dense"]
    best = min(names, key=lambda name: figures[name]["kl"][0])
    figure, (divergence, agreement, sizes) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axes, key, title, scale in (
        (divergence, "kl", "KL to the dense model, nats", 1.0),
        (agreement, "agreement", "agreement with the dense model, %", 100.0),
    ):
        values = scale * np.array([figures[name][key] for name in names])
        errors = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])
        axes.barh(names, values[:, 0], xerr=errors, color="#0b7a75", ecolor="#444444")
        axes.invert_yaxis()
        axes.set_title(title, loc="left", fontsize=10)
    agreement.set_xlim(50, 100)
    agreement.set_yticks([])
    for key, label, color in (("heads", "heads", "#d1495b"), ("columns", "FFN columns", "#0b7a75")):
        kept, whole = (np.array(figures[name][key]) for name in (best, "dense"))
        sizes.plot(range(len(kept)), 100 * kept / whole, "o-", color=color, label=label)
    sizes.set_title(f"kept by layer, % ({best})", loc="left", fontsize=10)
    sizes.set_ylim(0, 105)
    sizes.legend(fontsize=8)
    for axes in (divergence, agreement, sizes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
