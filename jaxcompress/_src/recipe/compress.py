"""Running a recipe on a model."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jaxcompress._src.clustering.spec import CodebookSpec
from jaxcompress._src.execution.materialize import materialize
from jaxcompress._src.models.families import config_of, head_of, max_tokens, resized, unit_groups
from jaxcompress._src.models.hf.companions import SentencePooling
from jaxcompress._src.recipe.calibrate import Evidence
from jaxcompress._src.recipe.one_shot import Surroundings, run_steps
from jaxcompress._src.recipe.options import PENALTIES, at_steps, read_options
from jaxcompress._src.recipe.predict import predict
from jaxcompress._src.recipe.progress import Progress, Silent
from jaxcompress._src.recipe.recipe import Recipe
from jaxcompress._src.recipe.selections import check_selections
from jaxcompress._src.recipe.steps import Step, Training
from jaxcompress._src.recipe.tokens import Tokens
from jaxcompress._src.recipe.train import prepared, steps_of, train
from jaxcompress._src.trace.layouts import layouts as trace_layouts
from jaxcompress._src.transforms import chain
from jaxcompress._src.tree.checks import check_finite
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.tree.selectors import any_of, by_path
from jaxcompress._src.types import Params, Transform, is_compressed
from jaxcompress._src.units.costs import parameter_costs
from jaxcompress._src.units.gates import gate_values
from jaxcompress._src.units.refit import refit
from jaxcompress._src.units.select import select_units
from jaxcompress._src.units.shrink import shrink

_TEACHER = "Computing teacher outputs"
_GATES_RATE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """A part of the work with a training of its own.

    Attributes:
        name: shown while it trains.
        training: its options.
        steps: those that train.
        dense: selections of leaves that an earlier part may have made sparse, and which this one wants dense.
    """

    name: str
    training: Training
    steps: Sequence[Step] = ()
    dense: Sequence[str] = ()


def compress(
    recipe: Recipe,
    module: nn.Module,
    params: Params,
    tokens: Tokens | None = None,
    *,
    pooling: SentencePooling = "mean",
    progress: Progress | None = None,
) -> Params:
    """Runs the steps of a recipe on `params`, which are distilled from themselves if the recipe says so.

    First what needs no training, stage after stage; then pruning and rounding in one training; then values are shared
    in another, since k-means must see the weights that are left. Inputs are quantized last.

    Args:
        recipe: what to do.
        module: a model of `jaxcompress.models`.
        params: its parameters; they stay as they are, and are the teacher.
        tokens: rows to calibrate and to distil on.
        pooling: of the sentence vectors of a plain encoder.
        progress: where to show loss and time left, and told what each step did, and what is left out or cut.

    Returns:
        A tree of the same logical structure with compressed leaves. Where units were taken out, arrays are smaller:
        `models.resized(module, params)` is then the module.

    Raises:
        ValueError: before anything runs: the recipe needs texts and there are no `tokens`, or they do not fit it; a
            leaf is compressed already; a step selects nothing; steps contradict one another on a leaf. Then whatever a
            step finds wrong with a leaf.
    """
    check_selections(recipe, params)
    if tokens is None and recipe.needs_texts:
        what = (
            "distils: it needs texts (rows to run both models on)" if recipe.distils else "calibrates: it needs texts"
        )
        raise ValueError(f"This recipe {what}.")
    for path, leaf in leaves_with_paths(params):
        check_finite(path, leaf)
    return _Run(recipe, module, params, tokens, pooling, progress).result()


def without_distillation(recipe: Recipe) -> Recipe:
    """The same compression in one shot: the baseline that distillation must beat."""
    return dataclasses.replace(recipe, distil=None, distil_shared=None, fine_tune=None)


class _Run:
    """One recipe on one model: the dense model beside what has become of it."""

    def __init__(
        self,
        recipe: Recipe,
        module: nn.Module,
        params: Params,
        tokens: Tokens | None,
        pooling: SentencePooling,
        progress: Progress | None,
    ) -> None:
        self._recipe, self._tokens = recipe, tokens
        self._pooling: SentencePooling = pooling
        self._dense_module, self._dense = module, jax.tree.map(jnp.asarray, params)
        self._progress = progress or Silent()
        self._outputs: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
        self._said: set[str] = set()
        self._distil, self._distil_shared = self._prepared(recipe.distil), self._prepared(recipe.distil_shared)

    def result(self) -> Params:
        """Runs all stages."""
        layouts = _layouts(self._dense_module, self._dense)
        _try(self._parts(), self._dense, self._recipe, self._tokens, layouts)
        module, params = self._shrunk()
        if module is not self._dense_module:
            layouts = _layouts(module, params)
        at_once = [(name, step) for name, step in self._recipe.at_once if step.stage != "shrink"]
        around = self._around(module, layouts)
        params = run_steps([step for step in at_once if not step[1].method.last], params, around)
        for part in self._parts():
            params = _with_dense(part.dense, params)
            beginnings = self._beginnings(part.steps, module, params)
            transform = _transform(part.steps, layouts, beginnings, steps_of(part.training, self._rows()))
            params, state = self._trained(part.name, part.training, module, params, transform)
            params = transform.finalize(params, state)
        return run_steps([step for step in at_once if step[1].method.last], params, around)

    def _prepared(self, training: Training | None) -> Training | None:
        """A training that fits the rows and the model; what it leaves out is said once."""
        if training is None or self._tokens is None:
            return None

        def note(text: str) -> None:
            if text not in self._said:
                self._said.add(text)
                self._progress.note(text)

        return prepared(training, self._dense_module, self._tokens, note=note)

    def _around(self, module: nn.Module, layouts: Params) -> Surroundings:
        evidence = None
        if self._recipe.calibrates and self._tokens is not None:
            evidence = Evidence(self._recipe.calibrate, module, self._tokens, pooling=self._pooling)
        groups = unit_groups(config_of(module)) if self._recipe.shrink else ()
        return Surroundings(layouts=layouts, groups=groups, evidence=evidence, progress=self._progress)

    def _shrunk(self) -> tuple[nn.Module, Params]:
        """The model without the units that [[shrink]] steps take out."""
        module, params = self._dense_module, self._dense
        for name, step in self._recipe.steps:
            if step.stage != "shrink":
                continue
            around = self._around(module, _layouts(module, params))
            if step.trains:
                params = self._without_closed_gates(name, step, module, params, around)
            else:
                params = run_steps([(name, step)], params, around)
            module = resized(module, params)
        return module, params

    def _without_closed_gates(
        self, name: str, step: Step, module: nn.Module, params: Params, around: Surroundings
    ) -> Params:
        """Gates find what goes while they are trained; the weights of the rest are the dense ones, fitted."""
        if self._distil is None:
            raise ValueError(f"{name}: gates are trained: the recipe needs a table [distil].")
        costs = parameter_costs(params, select=None if step.select is None else by_path(step.select))
        rule = PENALTIES[step.table["penalty"]["rule"]]
        aim = read_options(rule, {key: value for key, value in step.table["penalty"].items() if key != "rule"})
        steps = steps_of(self._distil, self._rows())
        penalty = {"penalty": rule(**at_steps(aim, steps), costs=costs)}
        gates = step.method.function(around.groups, **at_steps(step.keywords, steps) | penalty)
        rate = optax.adam(_GATES_RATE)
        gated, state = self._trained("Training gates", self._distil, module, params, gates, transform_optimizer=rate)
        target = {key: value for key, value in aim.items() if key in ("sparsity", "budget")}
        scores = state.trainable["log_alpha"]
        if target:
            keep = select_units(scores, around.groups, gated, **target, costs=costs, rule="rank").keep
        else:
            keep = {name: np.asarray(gate) > 0 for name, gate in gate_values(scores).items()}
        units = f"{sum(int(np.sum(mask)) for mask in keep.values())} of {sum(len(mask) for mask in keep.values())}"
        self._progress.note(f"{name}, {step.name}: {units} units are left")
        evidence = Evidence(self._recipe.calibrate, module, self._rows(), pooling=self._pooling)
        fitted, _ = refit(evidence.apply, params, around.groups, keep, evidence.batches, row_mask=evidence.row_mask)
        return shrink(fitted, around.groups, keep)

    def _parts(self) -> list[_Part]:
        """The trainings, in order."""
        if self._distil is None and self._distil_shared is None:
            return []
        training = [step for _, step in self._recipe.steps if self._recipe.trains(step) and step.stage != "shrink"]
        shared = [step for step in training if step.stage == "cluster"]
        first = [step for step in training if step.stage != "cluster"]
        parts = []
        if self._distil is not None and (first or not shared):
            name = "Pruning and quantizing while distilling" if first else "Distilling"
            parts.append(_Part(name=name, training=self._distil, steps=first))
        last = self._distil_shared or self._distil
        if shared and last is not None:
            selections = [step.select for step in shared if step.select]
            name = "Sharing values while distilling"
            parts.append(_Part(name=name, training=last, steps=shared, dense=selections))
        return parts

    def _trained(
        self, name: str, training: Training, module: nn.Module, params: Params, transform: Transform, **options: Any
    ) -> tuple[Params, Any]:
        # Hidden states, and distributions over a vocabulary, are too large to keep for every row.
        alongside = training.hidden > 0 or head_of(module).answer == "tokens"
        return train(
            module,
            params,
            self._rows(),
            training,
            teacher=self._dense if alongside else None,
            teacher_module=self._dense_module,
            cached=None if alongside else self._teacher_outputs(training.widths),
            transform=transform,
            trainable=_not_compressed,
            pooling=self._pooling,
            progress=self._progress,
            name=name,
            **options,
        )

    def _beginnings(self, steps: Sequence[Step], module: nn.Module, params: Params) -> list[Params | None]:
        """What each transform begins with, such as the ranges of inputs."""
        if all(step.method.statistics is None for step in steps):
            return [None for _ in steps]
        evidence = Evidence(self._recipe.calibrate, module, self._rows(), pooling=self._pooling)
        return [
            step.method.statistics(evidence, params, by_path(step.select or ""), step.keywords)
            if step.method.statistics
            else None
            for step in steps
        ]

    def _teacher_outputs(self, widths: tuple[int, ...]) -> dict[str, np.ndarray]:
        """The teacher reads rows that are cut where the student's are; parts that cut alike share its outputs."""
        if widths not in self._outputs:
            self._outputs[widths] = predict(
                self._dense_module,
                self._dense,
                self._rows(),
                widths=widths,
                pooling=self._pooling,
                progress=self._progress,
                name=_TEACHER,
            )
        return self._outputs[widths]

    def _rows(self) -> Tokens:
        if self._tokens is None:
            raise ValueError("This recipe needs texts.")
        return self._tokens


def _transform(steps: Sequence[Step], layouts: Params, beginnings: Sequence[Params | None], count: int) -> Transform:
    """The transforms of steps for a training of `count` steps."""
    return chain(
        *(
            _beginning_with(
                beginning,
                step.method.function(select=by_path(step.select), layouts=layouts, **at_steps(step.keywords, count)),
            )
            for step, beginning in zip(steps, beginnings, strict=True)
            if step.select is not None
        )
    )


def _beginning_with(beginning: Params | None, transform: Transform) -> Transform:
    if beginning is None:
        return transform

    def init(params: Params, *, key: jax.Array, statistics: Any = None) -> Any:
        del statistics
        return transform.init(params, key=key, statistics=beginning)

    return transform._replace(init=init)


def _try(parts: Sequence[_Part], params: Params, recipe: Recipe, tokens: Tokens | None, layouts: Params) -> None:
    """What a transform or shared values find wrong with a leaf is said before hours of work."""
    for _, step in recipe.steps:
        spec = step.keywords.get("spec")
        if isinstance(spec, CodebookSpec) and step.select is not None:
            map_with_path(_blocks(spec), params, layouts, by_path(step.select)(params))
    for part in parts:
        if not part.dense and tokens is not None:  # shared values are found on the host only
            # What some begin with is not known yet.
            known = [step for step in part.steps if step.method.statistics is None]
            init = _transform(known, layouts, [None for _ in known], steps_of(part.training, tokens)).init
            jax.eval_shape(functools.partial(init, key=jax.random.key(0)), params)


def _blocks(spec: CodebookSpec) -> Callable[..., None]:
    def visit(_: str, leaf: Any, layout: Any, mark: bool) -> None:
        if mark:
            spec.blocks(leaf.shape, layout)

    return visit


def _layouts(module: nn.Module, params: Params) -> Params:
    ids = jax.ShapeDtypeStruct((2, min(8, max_tokens(module))), jnp.int32)
    return trace_layouts(lambda p, ids, mask: module.apply({"params": p}, ids, mask), params, ids, ids)


def _with_dense(selections: Sequence[str], params: Params) -> Params:
    if not selections:
        return params
    marks = any_of(*map(by_path, selections))(params)
    return map_with_path(lambda _, leaf, mark: materialize(leaf) if mark else leaf, params, marks)


def _not_compressed(params: Params) -> Params:
    """Frozen leaves, and those that an earlier part has finished, keep their bits."""
    return map_with_path(lambda _, leaf: not is_compressed(leaf), params)
