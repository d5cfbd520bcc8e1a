"""The demo on a real decoder: from a GGUF file to a compressed model that continues texts."""

import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxcompress._src.cli.language_models import model_logits
from jaxcompress._src.cli.paths import check_output_directory
from jaxcompress._src.cli.screen import Screen
from jaxcompress._src.models.decoder.generate import generate
from jaxcompress._src.models.families import config_of, family_of
from jaxcompress._src.models.hf.read import from_pretrained
from jaxcompress._src.recipe.assets import BROWN, SMOLLM2, cache_directory, fetch
from jaxcompress._src.recipe.brown import brown
from jaxcompress._src.recipe.compress import compress
from jaxcompress._src.recipe.directories import save_compressed
from jaxcompress._src.recipe.recipe import read_recipe
from jaxcompress._src.recipe.text import Texts
from jaxcompress._src.recipe.tokens import Tokens, decode, in_windows, whole_rows
from jaxcompress._src.report.latency import LatencyComparison, compare_latency
from jaxcompress._src.report.perplexity import perplexity
from jaxcompress._src.report.size import size_report
from jaxcompress._src.report.table import format_bytes
from jaxcompress._src.types import Params

_WINDOW = 256  # tokens that are read at once, held-out texts and calibration alike
_CHARACTERS = 1200  # of each held-out text
_NEW_TOKENS = 32
_PROMPT = "The capital of France is"


def run_decoder_demo(screen: Screen, *, recipe: str | None, out: Path | None) -> None:
    """Reads, calibrates, compresses, saves, restores in a new process, compares and shows."""
    begun = time.monotonic()
    steps = read_recipe("demo-smollm2" if recipe is None else recipe)
    out = cache_directory() / "demo-smollm2" if out is None else out
    check_output_directory(out, None, overwrite=True)
    file = next(fetch(SMOLLM2, note=screen.note).glob("*.gguf"))
    corpus = brown(next(fetch(BROWN, note=screen.note).glob("*.tgz")))
    module, dense = from_pretrained(file)
    config = config_of(module)
    train = whole_rows(file, _texts(list(corpus.train.values())[:: len(corpus.train) // 32]), config=config)
    windows = in_windows(train, _WINDOW)
    held_out = _texts([text[:_CHARACTERS].rpartition(" ")[0] for text in list(corpus.held_out.values())[::3]])
    compressed = compress(steps, module, dense, windows, progress=screen)
    path = save_compressed(out, module, compressed, source=file, recipe=steps, overwrite=True)
    figures = _figures(screen, file, module, dense, compressed, held_out, path)
    figures |= {"checkpoint": str(path.resolve()), "seconds": time.monotonic() - begun}
    _show(screen, figures)
    screen.result(figures, lines=[f"Compressed model: {out}", f"Took {figures['seconds']:.0f} s."])


def _texts(texts: list[str]) -> Texts:
    return Texts(texts=tuple(texts), labels=np.full(len(texts), -100, np.int32))


def _figures(
    screen: Screen, file: Path, module: nn.Module, dense: Params, compressed: Params, held_out: Texts, path: Path
) -> dict[str, Any]:
    rows = whole_rows(file, held_out, config=config_of(module))
    screen.note("Reading held-out texts ...")
    before = perplexity(model_logits(module), dense, rows.ids, window=_WINDOW, stride=_WINDOW // 2)
    after = _restored_perplexity(screen, path.parent, held_out)
    sizes = size_report(compressed, group_by=family_of(module).parts, disk_path=path)
    prompt = whole_rows(file, _texts([_PROMPT]), config=config_of(module))
    timed = _speed(module, dense, compressed, prompt)
    return {
        "texts": len(rows),
        "tokens": before.count,
        "perplexity_dense": before.perplexity,
        "perplexity_dense_interval": [before.low, before.high],
        "perplexity_compressed": after["perplexity"],
        "perplexity_compressed_interval": after["perplexity_interval"],
        "bytes_dense": sizes.total.dense_bytes,
        "bytes_stored": sizes.total.stored_bytes,
        "bytes_disk": sizes.disk_bytes,
        "bytes_gguf": file.stat().st_size,
        "ratio_disk": sizes.total.dense_bytes / (sizes.disk_bytes or 1),
        "groups": {group.name: [group.dense_bytes, group.stored_bytes] for group in sizes.groups},
        **{f"tokens_per_second_{name}": _NEW_TOKENS / each.median for name, each in timed.latencies.items()},
        **{
            f"continuation_{name}": _continuation(file, module, params, prompt)
            for name, params in (("dense", dense), ("compressed", compressed))
        },
    }


def _restored_perplexity(screen: Screen, directory: Path, texts: Texts) -> dict[str, Any]:
    """The figures of the saved model, by a new process that knows its path alone."""
    screen.note("Restoring in a new process ...")
    with tempfile.TemporaryDirectory() as temporary:
        rows = Path(temporary) / "rows.csv"
        with rows.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text",))
            writer.writerows((text,) for text in texts.texts)
        command = [sys.executable, "-m", "jaxcompress", "evaluate", str(directory), "--data", str(rows)]
        command += ["--max-length", str(_WINDOW), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{str(directory)!r} could not be restored and run in a new process.")
        return json.loads(done.stdout.splitlines()[-1])


def _speed(module: nn.Module, dense: Params, compressed: Params, prompt: Tokens) -> LatencyComparison:
    """One row, token by token; both models compiled, measured in turn."""

    def run(params: Params) -> jax.Array:
        return generate(module, params, np.array(prompt.ids), max_new_tokens=_NEW_TOKENS).tokens

    return compare_latency(
        {"dense": lambda: run(dense), "compressed": lambda: run(compressed)}, baseline="dense", repeats=5
    )


def _continuation(file: Path, module: nn.Module, params: Params, prompt: Tokens) -> str:
    tokens, lengths = generate(module, params, np.array(prompt.ids), max_new_tokens=_NEW_TOKENS)
    return decode(file, np.asarray(tokens)[0, : int(lengths[0])].tolist())


def _show(screen: Screen, figures: dict[str, Any]) -> None:
    def interval(name: str) -> str:
        low, high = figures[f"perplexity_{name}_interval"]
        return f"{figures[f'perplexity_{name}']:.1f} [{low:.1f}, {high:.1f}]"

    rows = [
        ("perplexity", interval("dense"), interval("compressed")),
        ("bytes in memory", *(format_bytes(figures[f"bytes_{name}"]) for name in ("dense", "stored"))),
        ("bytes on disk", format_bytes(figures["bytes_gguf"]), format_bytes(figures["bytes_disk"])),
        *((f"  {name} in memory", *map(format_bytes, sizes)) for name, sizes in figures["groups"].items()),
        ("tokens per second", *(f"{figures[f'tokens_per_second_{name}']:.1f}" for name in ("dense", "compressed"))),
        (f"{_PROMPT} ...", *(figures[f"continuation_{name}"].strip() for name in ("dense", "compressed"))),
    ]
    title = f"SmolLM2-135M on {figures['texts']} held-out Brown texts, {figures['tokens']} tokens, [95 % intervals]"
    screen.table(title, ("", "4 bits, as published", "compressed"), rows)
