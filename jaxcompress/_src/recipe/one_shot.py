"""Steps that need no training: each is one call of its method, on what the earlier steps left."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.calibration.sequential import sequential
from jaxcompress._src.pruning.patterns import unstructured
from jaxcompress._src.pruning.store import store_masked
from jaxcompress._src.recipe.calibrate import Evidence
from jaxcompress._src.recipe.progress import Progress
from jaxcompress._src.recipe.steps import Step
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, map_with_path
from jaxcompress._src.tree.selectors import by_path
from jaxcompress._src.tree.unselected import Unselected
from jaxcompress._src.types import Params, plain
from jaxcompress._src.units.group import UnitGroup

_CALIBRATED = ("apply", "batches", "statistics", "folds", "fisher", "loss", "examples", "row_mask")
"""Arguments that come from texts."""


def calibrates(step: Step) -> bool:
    """Whether a one-shot step looks at texts."""
    return bool(_from_texts(step)) or (step.inner is not None and calibrates(step.inner))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What steps are given besides the parameters.

    Attributes:
        layouts: what the model does with each leaf.
        groups: units that live and die together.
        evidence: texts; None where no step needs them.
        progress: told what each step did.
    """

    layouts: Params
    groups: Sequence[UnitGroup]
    evidence: Evidence | None
    progress: Progress


def run_steps(steps: Sequence[tuple[str, Step]], params: Params, around: Surroundings) -> Params:
    """Does one-shot steps one after another, then stores what was pruned without its zeros.

    Args:
        steps: each with its name for messages.
        params: the tree before.
        around: what they are given.

    Raises:
        ValueError: whatever a step finds wrong; a step gave values to pruned weights. Names the step.
    """
    original = unrounded = params
    masks: dict[str, Any] = {}
    patterns: dict[str, Any] = {}
    folded = [name for name, step in steps if step.name == "awq"]
    for name, step in steps:
        if step.name == "learned_rounding" and folded:
            raise ValueError(
                f"{name}: `learned_rounding` needs the weights as they were, which {folded[0]} has scaled."
            )
        if step.stage == "prune" and step.name == "tune_masked" and not masks:
            raise ValueError(f"{name}: `tune_masked` tunes what earlier [[prune]] steps left, and there are none.")
        try:
            references = {"learned_rounding": unrounded}
            params, info = _run(step, params, references.get(step.name, original), masks, around)
        except ValueError as err:
            named = ValueError(f"{name} ({step.name}): {err}")
            for note in getattr(err, "__notes__", ()):  # which leaf
                named.add_note(note)
            raise named from err
        around.progress.note(f"{name}, {step.name}: {summary(info)}")
        if step.stage != "quantize" or step.name == "smooth":
            unrounded = params
        if step.stage == "prune":
            for path, leaf in _marked(step, params) if step.select else ():
                masks[path] = np.asarray(plain(leaf)) != 0
                patterns[path] = step.keywords.get("pattern", unstructured())
    return _stored(params, masks, patterns, around.layouts)


def summary(info: Any) -> str:
    """One line of what a method says of its leaves."""
    entries = list(info.values()) if isinstance(info, dict) else []
    errors = [entry.error for entry in entries if getattr(entry, "error", None) is not None]
    before = [entry.error_before for entry in entries if getattr(entry, "error_before", None) is not None]
    parts = [f"{len(entries)} leaves"] if entries else ["done"]
    if units := [(entry.units, entry.of) for entry in entries if hasattr(entry, "units")]:
        parts = [f"{sum(left for left, _ in units)} of {sum(of for _, of in units)} units are left"]
    if errors:
        parts.append(f"mean relative output error {np.mean(errors):.4f}")
    if before:
        parts.append(f"{np.mean(before):.4f} before")
    if unseen := sum(getattr(entry, "unseen_entries", 0) for entry in entries):
        parts.append(f"{unseen} were reached by no row")
    return ", ".join(parts)


def _run(
    step: Step, params: Params, reference: Params, masks: dict[str, Any], around: Surroundings
) -> tuple[Params, Any]:
    function = step.method.function
    select = None if step.select is None else by_path(step.select)
    keywords = dict(step.keywords)
    if step.inner is not None:
        keywords["compress"] = _compressing(step.inner)
    if step.sequential:
        evidence = _needed(around.evidence)

        def one(params: Params, statistics: Params, layouts: Params) -> tuple[Params, Any]:
            return function(params, statistics, layouts=layouts, **keywords)

        return sequential(evidence.apply, params, evidence.batches, one, select=select, row_mask=evidence.row_mask)
    given: dict[str, Callable[[], Any]] = {
        "params": lambda: params,
        "select": lambda: select,
        "layouts": lambda: around.layouts,
        "groups": lambda: around.groups,
        "masks": lambda: _partial(params, masks),
        "apply": lambda: _needed(around.evidence).hidden if step.name == "learned_rounding" else _apply(around),
        "batches": lambda: _needed(around.evidence).batches,
        "statistics": lambda: _needed(around.evidence).statistics(params, select),
        "folds": lambda: _needed(around.evidence).folds(params),
        "fisher": lambda: _needed(around.evidence).fisher(params),
        "loss": lambda: _needed(around.evidence).loss,
        "examples": lambda: _needed(around.evidence).examples(reference),
        "row_mask": lambda: _needed(around.evidence).row_mask,
    }
    if step.name in ("learned_rounding", "correct_biases"):
        given |= {"params": lambda: reference, "compressed": lambda: params, "rounded": lambda: params}
    names = [name for name in _parameters(step) if name in given]
    return function(**{name: given[name]() for name in names}, **keywords)


def _parameters(step: Step) -> list[str]:
    """The arguments of a method that it is given: those that must be, and what texts say where they may be."""
    optional = ("select", "layouts", "statistics", "folds", "row_mask")
    parameters = inspect.signature(step.method.function).parameters.values()
    return [p.name for p in parameters if p.name not in step.keywords and (p.default is p.empty or p.name in optional)]


def _from_texts(step: Step) -> list[str]:
    return [name for name in _parameters(step) if name in _CALIBRATED]


def _compressing(step: Step) -> Callable[[Params, Params, Params], tuple[Params, Any]]:
    """A step as what `compress_factors` and `with_residual` call."""
    names = inspect.signature(step.method.function).parameters

    def compress(params: Params, statistics: Params, layouts: Params) -> tuple[Params, Any]:
        evidence = {"statistics": statistics} if "statistics" in names else {}
        return step.method.function(params, **evidence, layouts=layouts, **step.keywords)

    return compress


def _apply(around: Surroundings) -> Callable[..., Any]:
    return _needed(around.evidence).apply


def _needed(evidence: Evidence | None) -> Evidence:
    if evidence is None:
        raise ValueError("it calibrates: it needs texts.")
    return evidence


def _marked(step: Step, params: Params) -> list[tuple[str, Any]]:
    marks = leaves_by_path(by_path(step.select or "")(params))
    return [(path, leaf) for path, leaf in leaves_with_paths(params) if marks[path]]


def _partial(params: Params, masks: dict[str, Any]) -> Params:
    return map_with_path(lambda path, _: jnp.asarray(masks[path]) if path in masks else Unselected, params)


def _stored(params: Params, masks: dict[str, Any], patterns: dict[str, Any], layouts: Params) -> Params:
    """Pruned leaves without their zeros: as compressed ones, which no training after this fills again."""

    def store(path: str, leaf: Any, layout: Any) -> Any:
        if path not in masks:
            return leaf
        filled = int((np.asarray(plain(leaf)) != 0)[~masks[path]].sum())
        if filled:
            raise ValueError(f"{filled} pruned weights of leaf {path!r} have values again after a later step.")
        return store_masked(leaf, jnp.asarray(masks[path]), layout, patterns[path])

    return map_with_path(store, params, layouts)
