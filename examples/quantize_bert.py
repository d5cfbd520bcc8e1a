"""Quantization of a fine-tuned MiniLM after training: methods x bits on Rotten Tomatoes.

The 36 kernels of the encoder are rounded in groups of 32 on 128 training sentences; the table shows how far the model
is from the dense one on the test rows: KL(dense || rounded) of the classes in nats, the mean relative error of the
sentence vectors, agreement of the classes, accuracy, and bytes of the encoder's kernels. No labels are used, and no
weight is trained. Options were chosen on the validation rows.

    python examples/quantize_bert.py [--quick] [--model FILE] [--seeds 0 1 2] [--bits 4 3 2] [--methods ...]
        [--validation] [--plot FILE]

FILE of `--model` is a safetensors file with Hugging Face names (torch orientation) of the encoder and `classifier`;
without it, the model of `jaxcompress demo --full` is used, and fine-tuned now if it is not in the cache. The method
"allocated" gives each kernel its own bits, 3.5 on average; "reconstruct-spliced" also sees ten times as many sentences,
made of beginnings and ends of the 128; "searched" ranges are those of least error, in natural order from the weights as
they are by then; "W8A8" rounds inputs too. The last line is JSON.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from minilm import first, load_task
from workbench import Table, evaluation_batches, format_table, note, predictor

import jaxcompress as jc
from jaxcompress import quantization
from jaxcompress.arrays import InputQuantizedArray
from jaxcompress.quantization import QuantSpec, RangeSearch
from jaxcompress.recipe import Tokens
from jaxcompress.tree import leaves_with_paths

KERNELS = jc.tree.by_path("bert/encoder/.*/kernel")
WIDTHS = (24, 40, 64)
Batches = list[tuple[np.ndarray, np.ndarray]]


class Model:
    """The dense model, with what all methods need of it."""

    def __init__(self, module: Any, params: Any) -> None:
        self.module, self.params = module, jax.tree.map(jnp.asarray, params)
        example = np.ones((2, WIDTHS[0]), np.int32)
        self.layouts = jc.trace.layouts(self.apply, self.params, example, example)
        self._run = predictor(module)

    def apply(self, params: Any, ids: Any, mask: Any) -> jax.Array:
        return self.module.apply({"params": params}, ids, mask)["logits"]

    def vector(self, params: Any, ids: Any, mask: Any) -> jax.Array:
        return self.module.apply({"params": params}, ids, mask)["pooler_output"]

    def hidden(self, params: Any, ids: Any, mask: Any) -> jax.Array:
        return self.module.apply({"params": params}, ids, mask)["last_hidden_state"]

    def outputs(self, params: Any, tokens: Tokens) -> dict[str, np.ndarray]:
        """Logits and vectors of all rows; on plain arrays where inputs stay floats: one compilation serves them all."""
        compressed = any(isinstance(leaf, InputQuantizedArray) for _, leaf in leaves_with_paths(params))
        plain, found = params if compressed else jc.materialize(params), {}
        for batch in evaluation_batches(tokens, batch_size=50, widths=WIDTHS):
            kept = batch["row"] >= 0
            for name, values in self._run(plain, batch["input_ids"], batch["attention_mask"]).items():
                whole = found.setdefault(name, np.zeros((len(tokens), values.shape[-1]), np.float32))
                whole[batch["row"][kept]] = np.asarray(values, np.float32)[kept]
        return found


class Samples(NamedTuple):
    """Training sentences to calibrate on, in batches; `spliced`: with ten times as many that are made from them."""

    sentences: Batches
    spliced: Batches


Method = Callable[[Model, Samples, Any], Any]
"""`(model, samples, bits) -> params`."""


def attended(ids: Any, mask: Any) -> Any:
    """Which tokens are no padding."""
    del ids
    return mask


def share_of_sentence(ids: Any, mask: Any) -> Any:
    """What a token counts in the mean that makes the sentence vector."""
    del ids
    return mask / np.maximum(np.asarray(mask).sum(axis=1, keepdims=True), 1)


def main() -> None:
    arguments = _arguments()
    begun = time.monotonic()
    task = load_task(arguments.model)
    model = Model(task.module, task.params)
    rows = task.validation if arguments.validation else task.test
    rows = first(rows, 100) if arguments.quick else rows
    dense = model.outputs(model.params, rows)
    found = []
    for seed in arguments.seeds:
        samples = calibration(task.train, seed, rows=32 if arguments.quick else 128)
        for name in arguments.methods:
            if seed != arguments.seeds[0] and name in WITHOUT_DATA:
                continue
            for bits in OWN_BITS.get(name, arguments.bits):
                start = time.monotonic()
                params = METHODS[name](model, samples, bits)
                seconds = time.monotonic() - start
                found.append({"method": name, "bits": bits, "seed": seed} | figures(model, params, rows, dense))
                found[-1]["seconds"] = round(seconds, 1)
                note(json.dumps(found[-1]))
    means = _means(found)
    _show(means)
    if arguments.plot:
        draw(means, arguments.plot)
    accuracy = float((dense["logits"].argmax(-1) == rows.labels).mean())
    summary = {"rows": found, "means": means, "accuracy_dense": accuracy, "rows_held_out": len(rows)}
    summary["held_out"] = "validation" if arguments.validation else "test"
    print(json.dumps(summary | {"seconds": round(time.monotonic() - begun)}))


def calibration(train: Tokens, seed: int, *, rows: int) -> Samples:
    """Tuples (ids, mask); rows that fill up a batch are masked out altogether."""
    chosen = np.random.default_rng(seed).choice(len(train), rows, replace=False)
    own = tuple(train.ids[i] for i in chosen)
    more = tuple(jc.calibration.spliced(own, 10, seed=seed))

    def batches(ids: tuple[tuple[int, ...], ...]) -> Batches:
        tokens = Tokens(ids=ids, labels=np.zeros(len(ids), np.int32), pad_id=train.pad_id)
        found = evaluation_batches(tokens, batch_size=32, widths=WIDTHS)
        return [(b["input_ids"], b["attention_mask"] * (b["row"] >= 0)[:, None]) for b in found]

    return Samples(batches(own), batches(own + more))


def figures(model: Model, params: Any, rows: Tokens, dense: dict[str, np.ndarray]) -> dict[str, Any]:
    """How far the model is from the dense one, and what its kernels take."""
    found, wanted = model.outputs(params, rows), dense["pooler_output"]
    errors = np.linalg.norm(found["pooler_output"] - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    marks = jax.tree.leaves(KERNELS(model.params))
    bits = sum(leaf.nbits for (_, leaf), mark in zip(leaves_with_paths(params), marks, strict=True) if mark)
    return {
        "kl": round(jc.report.kl_divergence(dense["logits"], found["logits"]).mean, 5),
        "vector_error": round(float(errors.mean()), 4),
        "agreement": round(float((found["logits"].argmax(-1) == dense["logits"].argmax(-1)).mean()), 4),
        "accuracy": round(float((found["logits"].argmax(-1) == rows.labels).mean()), 4),
        "bytes": bits // 8,
    }


def spec_of(bits: int, *, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(bits=bits, group_size=32, symmetric=symmetric, convention="full", scale_dtype="bfloat16")


def _rtn(model: Model, samples: Samples, bits: int) -> Any:
    del samples
    return quantization.quantize(model.params, spec_of(bits), select=KERNELS, layouts=model.layouts)[0]


def _hqq(model: Model, samples: Samples, bits: int) -> Any:
    del samples
    spec = spec_of(bits, symmetric=False)
    return quantization.hqq(model.params, spec, iterate="legacy", select=KERNELS, layouts=model.layouts)[0]


def _in_sequence(*, symmetric: bool = False, **options: Any) -> Method:
    def method(model: Model, samples: Samples, bits: int) -> Any:
        return _reconstructed(model, samples.sentences, spec_of(bits, symmetric=symmetric), **options)

    return method


def _spliced(model: Model, samples: Samples, bits: int) -> Any:
    return _reconstructed(model, samples.spliced, spec_of(bits, symmetric=False))


def _reconstructed(model: Model, batches: Batches, spec: Any, **options: Any) -> Any:
    options = {"row_mask": share_of_sentence, "select": KERNELS} | options
    return quantization.reconstruct(model.apply, model.params, batches, spec, **options)[0]


def _learned(model: Model, samples: Samples, bits: int) -> Any:
    """Rounding up or down learned layer by layer, from where `reconstruct` ends."""
    return quantization.learned_rounding(
        model.hidden,
        model.params,
        _spliced(model, samples, bits),
        samples.spliced,
        together=lambda path: re.findall(r"layer/(\d+)/", path)[0],
        row_mask=share_of_sentence,
    )[0]


def _awq(model: Model, samples: Samples, bits: int) -> Any:
    statistics = _statistics(model, samples, "gram", "absolute_sum")
    spec, folds = spec_of(bits, symmetric=False), _folds(model, samples)
    return quantization.awq(model.params, statistics, spec, folds=folds, select=KERNELS, layouts=model.layouts)[0]


def _int8(*, smooth: bool = False, **inputs: Any) -> Method:
    """Weights of 8 bits, one scale for each output; inputs of 8 bits, one for each token, found as they come."""

    def method(model: Model, samples: Samples, bits: int) -> Any:
        params = model.params
        if smooth:
            params, _ = quantization.smooth(params, _statistics(model, samples, "absolute_max"), _folds(model, samples))
        where = {"select": KERNELS, "layouts": model.layouts}
        params, _ = quantization.quantize(params, QuantSpec(bits=bits), **where)
        return quantization.quantize_inputs(params, QuantSpec(bits=bits, **inputs), **where)[0]

    return method


def _statistics(model: Model, samples: Samples, *names: Any) -> Any:
    return jc.calibration.input_statistics(
        model.apply, model.params, samples.sentences, select=KERNELS, statistics=names, row_mask=attended
    )


def _folds(model: Model, samples: Samples) -> Any:
    return jc.trace.folds(model.apply, model.params, *samples.sentences[0])


def _allocated(model: Model, samples: Samples, bits: float) -> Any:
    """`reconstruct` with 3 or 4 bits for each kernel, `bits` on average, by one pass of gradients."""
    kernels, rest = jc.tree.partition_trainable(model.params, select=KERNELS)

    def scaled_margin(kernels: Any, batch: Any) -> jax.Array:
        # Squared gradients of sqrt(p (1 - p)) z are the Fisher information of two classes whose logits differ by z: the
        # mean over labels as the model itself would draw them.
        logits = model.apply(jc.tree.combine(kernels, rest), *batch)
        margin = logits[:, 1] - logits[:, 0]
        chances = jax.nn.sigmoid(jax.lax.stop_gradient(margin))
        return jnp.sum(jnp.sqrt(chances * (1 - chances)) * margin)

    fisher = jc.calibration.fisher(scaled_margin, kernels, samples.sentences)
    specs = [spec_of(b, symmetric=False) for b in (3, 4)]
    table = quantization.fisher_sensitivity(model.params, fisher, specs, select=KERNELS, layouts=model.layouts)
    each = dict(leaves_with_paths(quantization.allocate_bits(table, mean_bits=bits, counted="codes")))
    return _reconstructed(model, samples.spliced, each.__getitem__)


def _published(**options: Any) -> dict[str, Any]:
    return {"targets": "weights", "bias": False, "range_search": None, "refine": 0, "row_mask": attended, **options}


METHODS: dict[str, Method] = {
    "RTN": _rtn,
    "HQQ": _hqq,
    "AWQ": _awq,
    "GPTQ": _in_sequence(symmetric=True, **_published(order="natural")),
    "GPTQ-searched": _in_sequence(
        symmetric=True, **_published(order="natural", group_scales="updated", range_search=RangeSearch())
    ),
    "GPTQ-order": _in_sequence(symmetric=True, **_published()),
    "GPTQ-order-searched": _in_sequence(symmetric=True, **_published(range_search=RangeSearch())),
    "GPTQ-order-asym": _in_sequence(**_published()),
    "reconstruct": _in_sequence(),
    "reconstruct-spliced": _spliced,
    "allocated": _allocated,
    "learned": _learned,
    "W8A8": _int8(),
    "W8A8-asym": _int8(symmetric=False),
    "W8A8-smooth": _int8(smooth=True),
}
OWN_BITS = {"allocated": [3.5], "W8A8": [8], "W8A8-asym": [8], "W8A8-smooth": [8]}
WITHOUT_DATA = ("RTN", "HQQ", "W8A8", "W8A8-asym")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 rows, 32 sentences, one seed, 3 bits only")
    parser.add_argument("--model", type=Path, help="safetensors of a fine-tuned encoder and classifier")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--validation", action="store_true", help="report on the validation rows")
    parser.add_argument("--plot", type=Path, help="PNG file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.bits = arguments.seeds[:1], [3]
    return arguments


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Method -> bits -> means over the seeds."""
    means: dict[str, dict[str, dict[str, float]]] = {}
    for method, bits in dict.fromkeys((row["method"], row["bits"]) for row in rows):
        own = [row for row in rows if (row["method"], row["bits"]) == (method, bits)]
        names = ("kl", "vector_error", "agreement", "accuracy", "bytes")
        means.setdefault(method, {})[str(bits)] = {
            name: round(float(np.mean([row[name] for row in own])), 5) for name in names
        }
    return means


def _show(means: dict[str, dict[str, dict[str, float]]]) -> None:
    header = ("method", "bits", "KL, nats", "vector error", "agreement, %", "accuracy, %", "kernels")
    rows = [
        (
            method,
            bits,
            f"{of['kl']:.4f}",
            f"{of['vector_error']:.3f}",
            f"{100 * of['agreement']:.1f}",
            f"{100 * of['accuracy']:.1f}",
            f"{of['bytes'] / 1e6:.2f} MB",
        )
        for method, entry in means.items()
        for bits, of in entry.items()
    ]
    print(format_table(Table(header, tuple(rows))))


def draw(means: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """KL and vector error over the bytes of the kernels, one line for each method."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"kl": "KL to the dense model, nats", "vector_error": "relative error of the sentence vector"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for method, entry in means.items():
            points = sorted((of["bytes"] / 1e6, of[name]) for of in entry.values())
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
        axes.set_yscale("log")
        axes.set_xlabel("bytes of the encoder's kernels, MB")
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
