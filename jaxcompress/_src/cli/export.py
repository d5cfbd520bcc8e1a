"""What `export` does: a model in another format, run or read back at once, and compared with JAX."""

import importlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import typer

from jaxcompress._src.cli.export_formats import FORMATS, ExportFormat, Request, Written
from jaxcompress._src.cli.export_runners import Runner, compare_weights, model_apply
from jaxcompress._src.cli.memory import is_out_of_memory
from jaxcompress._src.cli.paths import check_export_target
from jaxcompress._src.cli.screen import Screen
from jaxcompress._src.cli.token_inputs import random_tokens, token_shape
from jaxcompress._src.execution.execute import execute
from jaxcompress._src.execution.materialize import materialize
from jaxcompress._src.recipe.directories import load_model
from jaxcompress._src.report.disk import disk_bytes
from jaxcompress._src.report.latency import compare_latency
from jaxcompress._src.report.size import size_report
from jaxcompress._src.report.table import format_bytes, format_milliseconds
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import is_compressed

_OPTIONS = {"round_inputs": "--float-inputs", "tokenizer": "--no-tokenizer"}  # by keyword, where they are not alike


def run_export(
    screen: Screen,
    model: Path,
    format: str,
    out: Path,
    *,
    tokens: str | None,
    overwrite: bool,
    error: float | None,
    repeats: int,
    options: Mapping[str, Any],
) -> None:
    """Writes a model, runs or reads back what was written, and shows differences, bytes and times.

    Args:
        screen: for notes and results.
        model: what `load_model` opens.
        format: one of `FORMATS`.
        out: to write, whole or not at all.
        tokens: rows x tokens of what is run, and of files with fixed shapes; None: 1 x 64.
        overwrite: replace an older export.
        error: relative error of outputs that is accepted; None: what the format is known to have.
        repeats: timed rounds.
        options: keyword arguments of the format's writer; None where they were not given.

    Raises:
        ModuleNotFoundError: the format's extra is missing.
        OSError: `out` cannot be written, or the model not read.
        ValueError: a mistake in the arguments, or leaves that the format cannot hold.
        typer.Exit: what was written differs from the model, or cannot be run; what is the matter was said.
    """
    if format not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}; got {format!r}.")
    target = FORMATS[format]
    given = {name: value for name, value in options.items() if value is not None}
    _check_options(format, target, given, tokens=tokens, error=error)
    _import(format, target)
    check_export_target(out, model, ending=target.ending, overwrite=overwrite)
    loaded = load_model(model)
    request = Request(
        loaded=loaded,
        out=out,
        shape=token_shape(tokens, [loaded], rows=1, length=64),
        tokenizer=given.pop("tokenizer", True),
        options=given,
        overwrite=overwrite,
    )
    screen.note(f"Writing {out} ...")
    written = target.write(request)
    sizes = size_report(loaded.params)
    figures: dict[str, Any] = {
        "path": os.path.realpath(out),
        "format": format,
        "forms": dict(Counter(written.forms.values())),
        "bytes_disk": disk_bytes(out),
        "bytes_dense": sizes.total.dense_bytes,
        "runtime": target.runtime,
        "left_out": target.left_out,
    }
    problem = None
    try:
        problem = _check(screen, target, request, written, figures, error=error, repeats=repeats)
    except Exception as err:  # whatever a runtime raises about a file of ours
        if is_out_of_memory(err):
            raise
        problem = f"{target.runtime} fails on it: {str(err).strip() or type(err).__name__}"
    figures["problem"] = problem
    _show(screen, str(model), out, figures)
    screen.result(figures, lines=[f"Written to {out}"] if problem is None else [])
    if problem is not None:
        screen.error(f"{str(out)!r} was written and stays there, but {problem}")
        raise typer.Exit(1)


def _check_options(
    format: str, target: ExportFormat, given: Mapping[str, Any], *, tokens: str | None, error: float | None
) -> None:
    run = {"tokens": tokens, "max_error": error} if target.run is None else {}
    wrong = [name for name in given if name not in target.options] + [
        name for name, value in run.items() if value is not None
    ]
    if wrong:
        options = ", ".join(map(_flag, target.options)) or "none"
        raise ValueError(f"{_flag(wrong[0])} is not for --format {format}, whose own options are: {options}.")


def _flag(name: str) -> str:
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")


def _import(format: str, target: ExportFormat) -> None:
    """Before the work: a file that cannot be run would be one that nobody has looked at."""
    for name in target.modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as err:
            text = f"--format {format} needs {name.partition('.')[0]}: pip install 'jaxcompress[{target.extra}]'"
            raise ModuleNotFoundError(text, name=err.name) from err


def _check(
    screen: Screen,
    target: ExportFormat,
    request: Request,
    written: Written,
    figures: dict[str, Any],
    *,
    error: float | None,
    repeats: int,
) -> str | None:
    """Fills `figures`; what is the matter, or None."""
    problem = None
    if target.weights is not None:
        weights = target.weights(request.out, request.loaded.module)
        figures["weight_difference"], wrong = compare_weights(request.loaded.params, written.rounding, weights)
        if wrong:
            problem = f"weights differ from the model's by more than their rounding, first {wrong!r}."
    if target.run is None:
        return problem
    screen.note(f"Running it by {target.runtime} ...")
    runner = target.run(request.out)
    allowed = target.error(request) if error is None else error
    reference = jax.jit(execute(model_apply(request.loaded)))
    problem = _compare_outputs(target, request, runner, reference, figures, allowed) or problem
    if target.own_runtime:
        _time(screen, request, runner, reference, figures, repeats)
    return problem


def _compare_outputs(
    target: ExportFormat,
    request: Request,
    runner: Runner,
    reference: Callable[..., Mapping[str, Any]],
    figures: dict[str, Any],
    allowed: float,
) -> str | None:
    rows, length = request.shape
    # A second size shows that sizes are free; a padded row, that the mask is read.
    other = (rows + 1, max(1, length // 2)) if target.any_size else request.shape
    figures |= {"difference": 0.0, "relative_error": 0.0, "accepted_error": allowed}
    for shape, padded in ((request.shape, False), (other, True)):
        inputs = random_tokens([request.loaded], *shape, padded=padded)
        wanted = {name: np.asarray(each) for name, each in reference(request.loaded.params, *inputs).items()}
        found = {name: np.asarray(each) for name, each in runner(*inputs).items()}
        if {name: each.shape for name, each in found.items()} != {name: each.shape for name, each in wanted.items()}:
            return f"its outputs are {_shapes(found)}, those of the model {_shapes(wanted)}."
        for name, ours in wanted.items():
            if not np.isfinite(ours).all():
                return f"it could not be compared: the model itself gives NaN or infinity in {name!r}."
            theirs = found[name]
            if not np.isfinite(theirs).all():
                return f"{target.runtime} gives NaN or infinity in {name!r}, where JAX does not."
            difference = theirs.astype(np.float64) - ours.astype(np.float64)
            size = float(np.linalg.norm(ours.astype(np.float64)))
            relative = float(np.linalg.norm(difference)) / size if size else float(np.linalg.norm(difference))
            figures["difference"] = max(figures["difference"], float(np.abs(difference).max(initial=0)))
            figures["relative_error"] = max(figures["relative_error"], relative)
    if figures["relative_error"] > allowed:
        return (
            f"its outputs differ from JAX's by {_percent(figures['relative_error'])} of their size, more than the "
            f"{_percent(allowed)} that are accepted; --max-error accepts more."
        )
    return None


def _percent(share: float) -> str:
    value = 100 * share
    return f"{value:.2g} %" if value < 99.5 else f"{value:,.0f} %"


def _shapes(outputs: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: each.shape for name, each in sorted(outputs.items())}


def _time(
    screen: Screen,
    request: Request,
    runner: Runner,
    reference: Callable[..., Any],
    figures: dict[str, Any],
    repeats: int,
) -> None:
    """Adds the times of one call, in turns with JAX on dense leaves."""
    loaded, inputs = request.loaded, random_tokens([request.loaded], *request.shape)
    dense, apply = materialize(loaded.params), jax.jit(model_apply(loaded))
    runs: dict[str, Callable[[], Any]] = {"exported": lambda: runner(*inputs), "dense": lambda: apply(dense, *inputs)}
    if any(is_compressed(leaf) for _, leaf in leaves_with_paths(loaded.params)):
        runs["compressed"] = lambda: reference(loaded.params, *inputs)
    screen.note(f"Timing {repeats} rounds of {request.shape[0]} x {request.shape[1]} tokens ...")
    timed = compare_latency(runs, repeats=repeats, warmup=1, settle=1, baseline="dense")
    figures["shape"] = list(request.shape)
    figures["seconds"] = {name: latency.median for name, latency in timed.latencies.items()}
    figures["wall_ratio"], figures["cpu_ratio"] = (
        {name: [each.median, each.low, each.high] for name, each in ratios.items()}
        for ratios in (timed.wall, timed.cpu)
    )


def _show(screen: Screen, model: str, out: Path, figures: Mapping[str, Any]) -> None:
    ratio = figures["bytes_dense"] / max(figures["bytes_disk"], 1)
    rows = [(f"{count} {'leaf' if count == 1 else 'leaves'}", form) for form, count in figures["forms"].items()]
    rows.append(("on disk", f"{format_bytes(figures['bytes_disk'])}, {ratio:.2f}x smaller than in float32"))
    if "weight_difference" in figures:
        rows.append(("largest difference of a weight", f"{figures['weight_difference']:.2g}"))
    if "difference" in figures:
        rows.append(("largest difference of an output", f"{figures['difference']:.2g}"))
        text = f"{_percent(figures['relative_error'])} (accepted: {_percent(figures['accepted_error'])})"
        rows.append(("difference / size of the outputs", text))
    if "seconds" in figures:
        rows_of, length = figures["shape"]
        names = {"dense": "JAX, dense", "compressed": "JAX, compressed", "exported": figures["runtime"]}
        for name in [name for name in names if name in figures["seconds"]]:
            (wall, *walls), (cpu, *cpus) = (figures[f"{kind}_ratio"][name] for kind in ("wall", "cpu"))
            text = f"{format_milliseconds(figures['seconds'][name])} ms"
            if name != "dense":
                text += f"; wall time {wall:.2f} [{walls[0]:.2f}, {walls[1]:.2f}] of dense, "
                text += f"CPU time {cpu:.2f} [{cpus[0]:.2f}, {cpus[1]:.2f}]"
            rows.append((f"{rows_of} x {length} tokens, {names[name]}", text))
    if figures["left_out"]:
        rows.append(("here", figures["left_out"]))
    screen.table(f"{model} → {out} ({figures['format']}, by {figures['runtime']})", ("", "what was written"), rows)
