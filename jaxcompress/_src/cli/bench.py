"""What `bench` does: how fast a model runs, beside another one or its own dense form."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxcompress._src.cli.screen import Screen
from jaxcompress._src.cli.token_inputs import random_tokens, token_shape
from jaxcompress._src.execution.execute import execute
from jaxcompress._src.execution.expand import expand_sparse
from jaxcompress._src.execution.kernels.native.library import instruction_set
from jaxcompress._src.execution.kernels.processor import instruction_sets, processor_count
from jaxcompress._src.execution.materialize import materialize
from jaxcompress._src.execution.plan import Plan, plan
from jaxcompress._src.models.decoder.generate import generate
from jaxcompress._src.models.families import head_of, max_tokens
from jaxcompress._src.recipe.directories import LoadedModel, load_model
from jaxcompress._src.report.latency import LatencyComparison, RatioSpread, compare_latency
from jaxcompress._src.report.program import ProgramCost, compile_timed
from jaxcompress._src.report.size import size_report
from jaxcompress._src.report.table import format_bytes, format_milliseconds
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params, is_compressed

_NEW_TOKENS = 32
_DECODING_ROUNDS = 5  # at most: each is as long as 32 calls

_Contender = tuple[nn.Module, Params]


def run_bench(
    screen: Screen,
    model: Path,
    *,
    against: Path | None,
    tokens: str | None,
    repeats: int,
    expand: bool,
    show_plan: bool,
) -> None:
    """Runs a model on random tokens, in turns with its baseline, and shows times, memory and kernels.

    Args:
        screen: for notes and results.
        model: what `load_model` opens.
        against: another model; by default the dense form of the same, if it is compressed.
        tokens: rows x tokens, as on the command line; None: 8 x 64.
        repeats: timed rounds.
        expand: whether sparse leaves are expanded first.
        show_plan: whether to show every product and its kernel.

    Raises:
        ValueError: more tokens than a model has positions.
        OSError: a model cannot be read.
    """
    loaded = load_model(model)
    models = [loaded] if against is None else [loaded, load_model(against)]
    if expand:
        models = [dataclasses.replace(each, params=expand_sparse(each.params)[0]) for each in models]
    rows, length = token_shape(tokens, models, rows=8, length=64)
    contenders, names = _contenders(models)
    inputs = random_tokens(models, rows, length)
    runs: dict[str, Callable[[], Any]] = {}
    costs: dict[str, ProgramCost] = {}
    for role, (module, params) in contenders.items():
        screen.note(f"Compiling {names[role]} ...")
        run, costs[role] = compile_timed(execute(_apply(module)), params, *inputs)
        runs[role] = _bound(run, params, *inputs)
    screen.note(f"Timing {repeats} rounds of {rows} x {length} tokens ...")
    timed = compare_latency(runs, repeats=repeats, warmup=1, settle=1, baseline=list(contenders)[-1])
    plans = {role: plan(_apply(module), params, *inputs) for role, (module, params) in contenders.items()}
    figures: dict[str, Any] = {
        "rows": rows,
        "length": length,
        "repeats": repeats,
        "processors": processor_count(),
        "instruction_sets": list(instruction_sets()),
        "kernel_instructions": instruction_set(),
    }
    for role, (_, params) in contenders.items():
        figures[role] = {"name": names[role], **_times(timed, role, rows * length), **_memory(costs[role], params)}
        figures[role]["kernels"] = _kernels(plans[role])
    if all(head_of(each.module).causal and head_of(each.module).answer == "tokens" for each in models):
        _decode(screen, contenders, inputs[0], repeats, figures)
    if show_plan:
        figures["plan"] = [_planned(each) for each in plans["model"].matmuls]
        screen.text(str(plans["model"]))
    _show(screen, figures)
    screen.result(figures)


def _contenders(models: list[LoadedModel]) -> tuple[dict[str, _Contender], dict[str, str]]:
    """`model`, and `baseline` if there is any, with their names; the last one is what ratios are relative to."""
    loaded = models[0]
    contenders: dict[str, _Contender] = {"model": (loaded.module, loaded.params)}
    names = {"model": str(loaded.directory)}
    if len(models) > 1:
        contenders["baseline"] = models[1].module, models[1].params
        names["baseline"] = str(models[1].directory)
    elif any(is_compressed(leaf) for _, leaf in leaves_with_paths(loaded.params)):
        contenders["baseline"] = loaded.module, materialize(loaded.params)
        names["baseline"] = "the same, dense"
    return contenders, names


def _apply(module: nn.Module) -> Callable[..., Any]:
    return lambda params, ids, mask: module.apply({"params": params}, ids, mask)


def _bound(run: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: run(*args)


def _times(timed: LatencyComparison, role: str, tokens: int) -> dict[str, Any]:
    latency = timed.latencies[role]
    return {
        "seconds": latency.median,
        "seconds_min": latency.min,
        "seconds_max": latency.max,
        "cpu_seconds": latency.cpu,
        "tokens_per_second": tokens / latency.median,
        **_ratios(timed, role),
    }


def _ratios(timed: LatencyComparison, role: str) -> dict[str, Any]:
    return {"wall_ratio": _spread(timed.wall[role]), "cpu_ratio": _spread(timed.cpu[role])}


def _spread(ratio: RatioSpread) -> list[float]:
    return [ratio.median, ratio.low, ratio.high]


def _memory(cost: ProgramCost, params: Params) -> dict[str, Any]:
    return {
        "first_call_seconds": cost.first_call,
        "trace_seconds": cost.trace,
        "compile_seconds": cost.compile,
        "parameter_bytes": size_report(params).total.stored_bytes,
        "temporary_bytes": cost.temporaries,
    }


def _kernels(planned: Plan) -> dict[str, int]:
    """How many products each kernel has; `plain array` counts the leaves that are widened as a whole."""
    kernels = Counter(each.kernel for each in planned.matmuls)
    if planned.fallbacks:
        kernels["plain array"] = len(planned.fallbacks)
    return dict(kernels)


def _planned(matmul: Any) -> dict[str, Any]:
    names = ("path", "kind", "rows", "inputs", "outputs", "kernel", "error")
    return {name: getattr(matmul, name) for name in names} | {"refused": dict(matmul.refused)}


def _decode(
    screen: Screen, contenders: dict[str, _Contender], ids: np.ndarray, repeats: int, figures: dict[str, Any]
) -> None:
    """Adds the tokens per second of `generate`, and the kernels of one row of one token."""
    room = min(max_tokens(module) for module, _ in contenders.values())
    if room < 2:
        screen.note("Generating nothing: a model reads one token alone.")
        return
    new = min(_NEW_TOKENS, room - 1)
    prompt = ids[:1, : room - new]
    screen.note(f"Generating {new} tokens after {prompt.shape[1]} ...")

    def run(module: nn.Module, params: Params) -> Any:
        return generate(module, params, prompt, max_new_tokens=new).tokens

    runs = {role: _bound(run, *contender) for role, contender in contenders.items()}
    rounds = min(repeats, _DECODING_ROUNDS)
    timed = compare_latency(runs, repeats=rounds, warmup=1, baseline=list(contenders)[-1])
    one = jax.ShapeDtypeStruct((1, 1), np.int32)
    for role, (module, params) in contenders.items():
        figures[role]["decoding"] = {
            "prompt": prompt.shape[1],
            "new_tokens": new,
            "tokens_per_second": new / timed.latencies[role].median,
            **_ratios(timed, role),
            "kernels": _kernels(plan(_apply(module), params, one, one)),
        }


def _show(screen: Screen, figures: dict[str, Any]) -> None:
    roles = [role for role in ("model", "baseline") if role in figures]

    def row(title: str, cell: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return title, *(cell(figures[role]) for role in roles)

    def milliseconds(of: dict[str, Any]) -> str:
        low, middle, high = (format_milliseconds(of[name]) for name in ("seconds_min", "seconds", "seconds_max"))
        return f"{middle} [{low}, {high}]"

    rows = [
        row("wall time of a call, ms [fastest, slowest]", milliseconds),
        row("CPU time of a call, ms", lambda of: format_milliseconds(of["cpu_seconds"])),
        row("tokens per second", lambda of: f"{of['tokens_per_second']:,.0f}"),
        row("first call, s (compiling)", lambda of: f"{of['first_call_seconds']:.1f} ({of['compile_seconds']:.1f})"),
        row("parameters in memory", lambda of: format_bytes(of["parameter_bytes"])),
        row("peak temporaries", lambda of: _bytes(of["temporary_bytes"])),
        row("products by kernel", lambda of: _counted(of["kernels"])),
    ]
    if len(roles) > 1:
        rows[3:3] = [
            row("wall time / baseline [10 %, 90 % of rounds]", lambda of: _ratio(of["wall_ratio"])),
            row("CPU time / baseline [10 %, 90 % of rounds]", lambda of: _ratio(of["cpu_ratio"])),
        ]
    if decoding := figures["model"].get("decoding"):
        title = f"decoding, tokens per second (prompt {decoding['prompt']}, {decoding['new_tokens']} new)"
        rows.append(row(title, lambda of: f"{of['decoding']['tokens_per_second']:.1f}"))
        if len(roles) > 1:
            rows.append(row("decoding, wall time / baseline", lambda of: _ratio(of["decoding"]["wall_ratio"])))
            rows.append(row("decoding, CPU time / baseline", lambda of: _ratio(of["decoding"]["cpu_ratio"])))
        rows.append(row("decoding, products by kernel", lambda of: _counted(of["decoding"]["kernels"])))
    title = f"{figures['rows']} x {figures['length']} random tokens, {figures['repeats']} rounds in turns"
    screen.table(title, ("", *(figures[role]["name"] for role in roles)), rows)
    sets = ", ".join(figures["instruction_sets"]) or "instruction sets unknown"
    kernels = figures["kernel_instructions"] or "none"
    screen.text(f"{figures['processors']} processors ({sets}); compiled kernels: {kernels}.")


def _ratio(spread: list[float]) -> str:
    middle, low, high = spread
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)


def _counted(kernels: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in kernels.items()) or "0 (all plain)"
