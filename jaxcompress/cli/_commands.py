"""What `compress`, `inspect` and `evaluate` do."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress import checkpoint, report
from jaxcompress.cli._models import load_model, save_compressed
from jaxcompress.cli._screen import Screen
from jaxcompress.recipe import compress as run_recipe
from jaxcompress.recipe import predict, read_recipe, read_texts, tokenize


def run_compress(screen: Screen, model: Path, recipe: str, out: Path, *, data: Path | None, overwrite: bool) -> None:
    """Runs a recipe on a model and writes the result."""
    steps = read_recipe(recipe)
    if (out / "checkpoint").exists() and not overwrite:
        raise FileExistsError(f"{str(out)!r} already holds a compressed model; give --overwrite to replace it.")
    if steps.distils and data is None:
        raise ValueError(f"The recipe {recipe!r} distils: give --data, a CSV file with a column `text`.")
    check_writable(out)
    loaded = load_model(model)
    tokens = None if data is None else tokenize(loaded.tokenizer, read_texts(data))
    compressed = run_recipe(steps, loaded.module, loaded.params, tokens, progress=screen)
    path = save_compressed(
        out, loaded.module, compressed, tokenizer=loaded.tokenizer, recipe=steps, overwrite=overwrite
    )
    sizes = report.size_report(compressed, disk_path=path)
    _show_sizes(screen, f"{model} → {out}", sizes)
    screen.result({"checkpoint": str(path.resolve()), **_totals(sizes)}, lines=[f"Written to {path}"])


def run_inspect(screen: Screen, model: Path, *, leaves: bool) -> None:
    """Shows sizes, and where a compressed model comes from."""
    loaded = load_model(model)
    sizes = report.size_report(loaded.params, disk_path=loaded.weights)
    if leaves:
        table = report.leaf_table(sizes)
        screen.table("Leaves", table.header, table.rows)
    _show_sizes(screen, str(model), sizes)
    figures: dict[str, Any] = sizes.to_dict()
    if (model / "checkpoint").is_dir():
        manifest = checkpoint.read_manifest(model / "checkpoint")
        figures |= {"versions": dict(manifest.versions), "metadata": dict(manifest.metadata)}
    screen.result(figures)


def run_evaluate(screen: Screen, model: Path, data: Path, *, against: Path | None, outputs: Path | None) -> None:
    """Predicts every row and compares with labels and with another model."""
    texts = read_texts(data)
    loaded = load_model(model)
    tokens = tokenize(loaded.tokenizer, texts)
    found = predict(loaded.module, loaded.params, tokens, progress=screen, name=f"Running {model}")
    if outputs is not None:
        np.savez(outputs, allow_pickle=False, **found)
    figures: dict[str, Any] = {"rows": len(tokens)}
    labelled = bool((texts.labels >= 0).all())
    if labelled:
        figures["accuracy"] = float((found["logits"].argmax(-1) == texts.labels).mean())
    if against is not None:
        other = load_model(against)
        wanted = predict(other.module, other.params, tokens, progress=screen, name=f"Running {against}")
        figures |= compare(wanted["logits"], found["logits"], texts.labels if labelled else None)
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in figures.items()]
    screen.table(str(model), ("figure", "value"), rows)
    screen.result(figures)


def compare(wanted: np.ndarray, found: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Figures of one model against another on the same rows; intervals are 95 %.

    Args:
        wanted: logits of the reference.
        found: logits of the model.
        labels: the truth, if it is known.
    """
    agreement = report.agreement(wanted.argmax(-1), found.argmax(-1))
    divergence = report.kl_divergence(wanted, found)
    figures: dict[str, Any] = {
        "agreement": agreement.rate,
        "agreement_interval": [agreement.low, agreement.high],
        "kl": divergence.mean,
        "kl_interval": [divergence.low, divergence.high],
    }
    if labels is not None:
        difference = report.paired_difference(found.argmax(-1) == labels, wanted.argmax(-1) == labels)
        figures |= {
            "accuracy_difference": difference.difference,
            "accuracy_difference_interval": [difference.low, difference.high],
        }
    return figures


def check_writable(directory: Path) -> None:
    """Raises before hours of work when their result could not be written.

    Raises:
        OSError: `directory` cannot be made or written to.
    """
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{str(directory)!r} cannot be written: {str(existing)!r} is not a directory.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{str(directory)!r} cannot be written: no permission in {str(existing)!r}.")


def _show_sizes(screen: Screen, title: str, sizes: report.SizeReport) -> None:
    table = report.total_table(sizes)
    screen.table(title, table.header, table.rows)


def _totals(sizes: report.SizeReport) -> dict[str, Any]:
    return {
        "bytes_dense": sizes.total.dense_bytes,
        "bytes_stored": sizes.total.stored_bytes,
        "bytes_disk": sizes.disk_bytes,
    }
