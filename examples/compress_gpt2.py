"""Pruning, rounding, low rank and distillation of a GPT-2 on Brown characters, at equal bytes.

The kernels of the layers are brought to a quarter, an eighth and less of their float32 bytes by each technique alone,
on 64 windows of 128 characters of training texts; the table and the plot show the perplexity of a character on files
that are held out. Of each technique the setting is taken that keeps the most within the budget:

- prune: SparseGPT, kept weights in bfloat16 beside a bit mask.
- quantize: `reconstruct`, asymmetric, groups of 32, scales in bfloat16.
- low rank: factors that come closest on the inputs of the kernels, in bfloat16.
- distil: fewer layers (first and last ones), trained after the whole model, in bfloat16.

    python examples/compress_gpt2.py [--quick] [--model DIRECTORY] [--steps 600] [--plot FILE]

The model is that of `train_gpt2.py`, which lies beside this file. The last line is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from brown_characters import DIRECTORY, Characters, characters, held_out_perplexity
from train_gpt2 import batches
from workbench import Table, format_table, note

import jaxcompress as jc
from jaxcompress.arrays import sparsify
from jaxcompress.distillation import make_train_step, next_token_labels, select_layers, soft_targets
from jaxcompress.models import from_pretrained, resized
from jaxcompress.quantization import QuantSpec

KERNELS = jc.tree.by_path(r"transformer/h/.*/kernel")
BUDGETS = (0.25, 0.125, 0.0875)


class _TooSmallError(Exception):
    """A budget that a technique cannot meet."""


class Model(NamedTuple):
    """The dense model, and windows of the training texts."""

    module: Any
    params: Any
    batches: list[Any]

    def apply(self, params: Any, ids: Any) -> jax.Array:
        """Logits."""
        return self.module.apply({"params": params}, ids)["logits"]


def main() -> None:
    arguments = _arguments()
    text = characters()
    module, params = from_pretrained(arguments.model)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(text.train) - 128, 8 if arguments.quick else 64)
    windows = np.stack([text.train[start : start + 128] for start in starts])
    model = Model(module, params, [(part,) for part in np.split(windows, len(windows) // 8)])
    dense = kernel_bytes(params)
    rows = [{"technique": "dense", "share": 1.0, "perplexity": held_out_perplexity(module, params, text)}]
    for budget in BUDGETS[:1] if arguments.quick else BUDGETS:
        for name, technique in TECHNIQUES.items():
            try:
                small_module, small = technique(model, budget, text, 5 if arguments.quick else arguments.steps)
            except _TooSmallError as err:
                note(f"{name}: {err}")
                continue
            share = kernel_bytes(small) / dense
            assert share <= budget, (name, share, budget)
            figure = held_out_perplexity(small_module, small, text)
            rows.append({"technique": name, "budget": budget, "share": round(share, 4), "perplexity": figure})
            note(json.dumps(rows[-1]))
    _show(rows)
    if arguments.plot:
        _plot(rows, arguments.plot)
    print(json.dumps({"quick": arguments.quick, "results": rows}))


def kernel_bytes(params: Any) -> int:
    """Stored bytes of the kernels of all layers."""
    sizes = jc.report.size_report(params, group_by={"kernels": KERNELS})
    return {group.name: group.stored_bytes for group in sizes.groups}["kernels"]


def pruned(model: Model, budget: float, text: Characters, steps: int) -> tuple[Any, Any]:
    """16 bits for each weight that is kept, and one for all."""
    del text, steps
    density = (32 * budget - 1) / 16
    statistics = jc.calibration.input_statistics(model.apply, model.params, model.batches, select=KERNELS)
    while density > 0.01:
        sparse, _ = jc.pruning.sparsegpt(model.params, statistics, sparsity=1 - density, select=KERNELS)
        stored = _on_kernels(lambda leaf: sparsify(leaf.astype(jnp.bfloat16), leaf != 0), sparse)
        if kernel_bytes(stored) <= budget * kernel_bytes(model.params):
            return model.module, stored
        density *= 0.98  # every kernel is padded to its fullest row
    raise _TooSmallError(f"A bit mask and a hundredth of the weights are more than {budget} of 32 bits.")


def quantized(model: Model, budget: float, text: Characters, steps: int) -> tuple[Any, Any]:
    """As many bits as fit, with a scale and a zero point for each 32."""
    del text, steps
    for bits in (8, 4, 3, 2):
        spec = QuantSpec(bits=bits, group_size=32, symmetric=False, scale_dtype="bfloat16")
        nearest, _ = jc.quantization.quantize(model.params, spec, select=KERNELS)
        if kernel_bytes(nearest) <= budget * kernel_bytes(model.params):
            found = jc.quantization.reconstruct(model.apply, model.params, model.batches, spec, select=KERNELS)
            return model.module, found[0]
    raise _TooSmallError(f"2 bits are more than {budget} of 32.")


def low_rank(model: Model, budget: float, text: Characters, steps: int) -> tuple[Any, Any]:
    """Both factors in 16 bits."""
    del text, steps
    statistics = jc.calibration.input_statistics(model.apply, model.params, model.batches, select=KERNELS)
    rank = jc.lowrank.parameter_share(2 * budget)
    small, _ = jc.lowrank.activation_svd(model.params, statistics, rank=rank, select=KERNELS)
    return model.module, _on_kernels(lambda leaf: jax.tree.map(lambda factor: factor.astype(jnp.bfloat16), leaf), small)


def distilled(model: Model, budget: float, text: Characters, steps: int) -> tuple[Any, Any]:
    """Half of the layers in 16 bits are a quarter of the bytes."""
    layers = model.module.config.num_hidden_layers
    count = int(2 * budget * layers)
    if not count:
        raise _TooSmallError(f"One layer of {layers} in 16 bits is more than {budget} of all.")
    kept = sorted({round(place * (layers - 1) / max(count - 1, 1)) for place in range(count)})
    params = select_layers(model.params, r"transformer/h/(\d+)/.*", kept)
    module = resized(model.module, params)

    def apply_of(module: Any) -> Any:
        def apply(params: Any, batch: Any, *, key: Any, train: bool) -> Any:
            del key, train
            return module.apply({"params": params}, batch["input_ids"])

        return apply

    losses = {"soft": soft_targets(mask=None), "next": (0.2, next_token_labels(mask=None))}
    rate = optax.schedules.warmup_cosine_decay_schedule(0.0, 1e-3, steps // 20 + 1, steps + 1)
    init_state, step = make_train_step(apply_of(module), apply_of(model.module), optax.adamw(rate), losses=losses)
    state = init_state(params, key=jax.random.key(0))
    for _, batch in zip(range(steps), batches(text.train, 1), strict=False):
        state, _ = step(state, model.params, batch)
    return module, _on_kernels(lambda leaf: leaf.astype(jnp.bfloat16), state.params)


TECHNIQUES = {"prune": pruned, "quantize": quantized, "low rank": low_rank, "distil": distilled}


def _on_kernels(change: Any, params: Any) -> Any:
    marks = KERNELS(params)
    return jax.tree.map(
        lambda leaf, mark: change(leaf) if mark else leaf, params, marks, is_leaf=lambda x: hasattr(x, "materialize")
    )


def _show(rows: list[dict[str, Any]]) -> None:
    cells = [(row["technique"], f"{row['share']:.3f}", f"{row['perplexity']:.3f}") for row in rows]
    print(format_table(Table(header=("technique", "bytes of the kernels", "perplexity"), rows=tuple(cells))))


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in TECHNIQUES:
        own = [row for row in rows if row["technique"] == name]
        axes.plot([row["share"] for row in own], [row["perplexity"] for row in own], marker="o", label=name)
    axes.axhline(rows[0]["perplexity"], color="black", linewidth=0.8, label="dense")
    axes.set(xlabel="bytes of the kernels, share of float32", ylabel="perplexity of a character", yscale="log")
    axes.set_yticks(ticks := [4, 5, 7, 10, 15, 25], map(str, ticks))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path, default=DIRECTORY)
    parser.add_argument("--steps", type=int, default=600, help="of the distillation")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
