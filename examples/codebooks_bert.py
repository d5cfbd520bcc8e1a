"""Codebooks of about two bits for a fine-tuned MiniLM: single values, runs of weights, sums of runs.

The 36 kernels of the encoder are compressed with the mean squares of their inputs on 128 training sentences as
importance, and nothing is trained. The table shows how far the model is from the dense one on the held-out rows, as in
`quantize_bert.py`, and the stored bits per weight of the kernels, with tables and scales.

    python examples/codebooks_bert.py [--quick] [--model FILE] [--validation] [--methods ...]

The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from minilm import load_task
from quantize_bert import KERNELS, Model, calibration, figures, spec_of
from workbench import Table, format_table, note

import jaxcompress as jc
from jaxcompress.clustering import AdditiveSpec, CodebookSpec, additive_quantize, cluster, input_importance
from jaxcompress.recipe import Tokens

Method = Callable[[Model, Any], Any]
"""`(model, importance) -> params`."""


def _rounded(model: Model, importance: Any) -> Any:
    del importance
    return jc.quantization.quantize(model.params, spec_of(2), select=KERNELS, layouts=model.layouts)[0]


def _values(per: Any) -> Method:
    spec = CodebookSpec(values=4, zero=False, per=per, dtype="bfloat16")
    return lambda model, h: cluster(model.params, spec, importance=h, select=KERNELS, layouts=model.layouts)[0]


def _runs(**options: Any) -> Method:
    spec = AdditiveSpec(**options)
    return lambda model, h: additive_quantize(model.params, spec, importance=h, select=KERNELS, layouts=model.layouts)[
        0
    ]


METHODS: dict[str, Method] = {
    "RTN, groups of 32": _rounded,
    "4 values": _values("leaf"),
    "4 values per output": _values("output"),
    "256 runs of 4": _runs(length=4, tables=1, values=256),
    "256 runs of 4, no scales": _runs(length=4, tables=1, values=256, scaled=False),
    "256 + 256 runs of 8": _runs(length=8, tables=2, values=256),
}


def main() -> None:
    arguments = _arguments()
    task = load_task(arguments.model)
    model, begun = Model(task.module, task.params), time.monotonic()
    rows = task.validation if arguments.validation else task.test
    if arguments.quick:
        rows = Tokens(ids=rows.ids[:100], labels=rows.labels[:100], pad_id=rows.pad_id)
    dense = model.outputs(model.params, rows)
    importance = _importance(model, calibration(task.train, 0, rows=32 if arguments.quick else 128))
    marked = zip(jax.tree.leaves(model.params), jax.tree.leaves(KERNELS(model.params)), strict=True)
    weights = sum(leaf.size for leaf, mark in marked if mark)
    found = []
    for name in arguments.methods:
        start = time.monotonic()
        params = METHODS[name](model, importance)
        seconds = round(time.monotonic() - start)
        found.append({"method": name} | figures(model, params, rows, dense) | {"seconds": seconds})
        found[-1]["bits_per_weight"] = round(8 * found[-1]["bytes"] / weights, 3)
        note(json.dumps(found[-1]))
    header = ("method", "bits", "KL, nats", "vector error", "agreement, %")
    table = [(r["method"], r["bits_per_weight"], r["kl"], r["vector_error"], 100 * r["agreement"]) for r in found]
    cells = tuple((name, f"{b:.2f}", f"{kl:.4f}", f"{error:.3f}", f"{same:.1f}") for name, b, kl, error, same in table)
    print(format_table(Table(header, cells)))
    held_out = "validation" if arguments.validation else "test"
    print(json.dumps({"rows": found, "held_out": held_out, "seconds": round(time.monotonic() - begun)}))


def _importance(model: Model, batches: Any) -> Any:
    statistics = jc.calibration.input_statistics(
        model.apply,
        model.params,
        batches,
        select=KERNELS,
        statistics=("squared_sum",),
        row_mask=lambda ids, mask: mask,
    )
    return input_importance(model.params, statistics, layouts=model.layouts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 rows, 32 sentences, two methods")
    parser.add_argument("--model", type=Path, help="safetensors of a fine-tuned encoder and classifier")
    parser.add_argument("--validation", action="store_true", help="report on the validation rows")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.methods = ["4 values", "256 runs of 4"]
    return arguments


if __name__ == "__main__":
    main()
