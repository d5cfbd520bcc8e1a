"""How fast MiniLM's encoder is with 50 % and 25 % of its parameters, over the dense one in the same run.

Heads and FFN columns are taken out physically, the shapes chosen by unit magnitudes of random weights under the budget
(time depends on shapes alone, and any choice of one size costs about the same). 8 x 64 tokens, compiled, in turns.

    python examples/benchmarks/shrink_latency.py [--quick] [--repeats 40]

The last line printed is JSON.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress import report, structured
from jaxcompress._src.report.table import Table, format_table
from jaxcompress.models import BertConfig, make_module, resized, unit_groups

SHARES = {"50 %": 0.5, "25 %": 0.25}
LIMITS = {"50 %": 0.6, "25 %": 0.35}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small encoder and few repeats")
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    quick = arguments.quick
    config = BertConfig(
        vocab_size=2000 if quick else 30522,
        hidden_size=96 if quick else 384,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=3 if quick else 12,
        intermediate_size=384 if quick else 1536,
        pooling="mean",
    )
    module = make_module(config)
    ids = jax.random.randint(jax.random.key(0), (8, 64), 0, config.vocab_size)
    mask = jnp.ones_like(ids)
    params = jax.jit(module.init)(jax.random.key(1), ids)["params"]
    encoder = jc.tree.by_path("encoder/.*")
    costs = structured.parameter_costs(params, select=encoder)
    groups = unit_groups(config)
    scores = structured.magnitude_unit_scores(params, groups)
    models, sizes = {"dense": (module, params)}, {}
    for name, share in SHARES.items():
        found = structured.select_units(scores, groups, params, sparsity=1 - share, costs=costs, rule="group")
        small = structured.shrink(params, groups, found.keep)
        models[name], sizes[name] = (resized(module, small), small), 1 - found.sparsity
    runs = {name: functools.partial(_compiled(module), params, ids, mask) for name, (module, params) in models.items()}
    compared = report.compare_latency(runs, repeats=10 if quick else arguments.repeats, warmup=5, baseline="dense")
    rows = [("dense", "100.0%", "", f"{1000 * compared.latencies['dense'].median:.1f}", "1.00", "")]
    for name in SHARES:
        heads, columns = (
            np.unique(sizes_).tolist()
            for sizes_ in (models[name][0].config.num_attention_heads, models[name][0].config.intermediate_size)
        )
        milliseconds, ratio = 1000 * compared.latencies[name].median, compared.ratios[name]
        shape = f"{heads} heads, {columns} columns"
        rows.append((name, f"{sizes[name]:.1%}", shape, f"{milliseconds:.1f}", f"{ratio:.3f}", f"<= {LIMITS[name]}"))
    print(format_table(Table(("encoder", "left", "by layer", "ms", "ratio", "wanted"), tuple(rows))))
    figures = {
        "share": sizes,
        "ratio": {name: round(compared.ratios[name], 3) for name in SHARES},
        "ratio_of_fastest": {
            name: round(compared.latencies[name].min / compared.latencies["dense"].min, 3) for name in SHARES
        },
        "dense_ms": round(1000 * compared.latencies["dense"].median, 1),
        "quick": quick,
    }
    print(json.dumps(figures))


def _compiled(module: object) -> object:
    return jax.jit(lambda params, ids, mask: module.apply({"params": params}, ids, mask)["pooler_output"])


if __name__ == "__main__":
    main()
