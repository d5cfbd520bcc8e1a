"""Running a recipe on a model."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxcompress._src.clustering.cluster import cluster
from jaxcompress._src.clustering.transform import trained_codebooks
from jaxcompress._src.execution.materialize import materialize
from jaxcompress._src.models.families import config_of, head_of
from jaxcompress._src.pruning.gradual import gradual
from jaxcompress._src.pruning.ranking import Scope
from jaxcompress._src.quantization.quantize import quantize
from jaxcompress._src.quantization.transform import quantization_aware
from jaxcompress._src.recipe.heads import SentencePooling
from jaxcompress._src.recipe.predict import predict
from jaxcompress._src.recipe.progress import Progress, Silent
from jaxcompress._src.recipe.recipe import Recipe
from jaxcompress._src.recipe.selections import check_selections
from jaxcompress._src.recipe.steps import ClusterStep, PruneStep, QuantizeStep, Training
from jaxcompress._src.recipe.tokens import Tokens
from jaxcompress._src.recipe.train import prepared, steps_of, train
from jaxcompress._src.schedules import constant, cubic
from jaxcompress._src.trace.layouts import layouts as trace_layouts
from jaxcompress._src.transforms import chain
from jaxcompress._src.tree.checks import check_finite
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.tree.partition import partition_trainable
from jaxcompress._src.tree.selectors import any_of, by_path
from jaxcompress._src.types import Params, Transform, is_compressed

_TEACHER = "Computing teacher outputs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """A part of the work, with a training of its own.

    Attributes:
        name: shown while it trains.
        transform: number of steps -> the transform.
        training: None: in one shot.
        dense: steps whose leaves an earlier part may have made sparse, and which want them dense.
    """

    name: str
    transform: Callable[[int], Transform]
    training: Training | None
    dense: Sequence[ClusterStep] = ()


def compress(
    recipe: Recipe,
    module: nn.Module,
    params: Params,
    tokens: Tokens | None = None,
    *,
    pooling: SentencePooling = "mean",
    progress: Progress | None = None,
) -> Params:
    """Prunes, quantizes and clusters `params`, while they are distilled from themselves if the recipe says so.

    Values are shared in a second part, when the first has pruned: k-means must see the weights that are left.

    Args:
        recipe: what to do.
        module: a model of `jaxcompress.models`.
        params: its parameters; they stay as they are, and are the teacher.
        tokens: rows to distil on.
        pooling: of the sentence vectors of a plain encoder, which `pooled` compares.
        progress: where to show loss and time left, and told what is left out or cut.

    Returns:
        A tree of the same logical structure with compressed leaves.

    Raises:
        ValueError: before anything runs: the recipe distils and there are no `tokens`, or they do not fit it; a leaf is
            compressed already; a step selects nothing; steps contradict one another on a leaf; whatever a step finds
            wrong with a leaf.
    """
    check_selections(recipe, params)
    if recipe.distils and tokens is None:
        raise ValueError("This recipe distils: it needs texts (rows to run both models on).")
    layouts = _layouts(module, params)
    parts = _prepared(_parts(recipe, layouts), module, tokens, progress)
    _try(recipe, parts, params, layouts, tokens)
    student = _with_frozen_steps(recipe, params, layouts)
    asked: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
    for part in parts:
        student = _with_dense(part.dense, student)
        if part.training is None or tokens is None:
            student = _at_once(part.transform(0), student)
            continue
        widths = part.training.widths
        # Hidden states, and distributions over a vocabulary, are too large to keep for every row.
        alongside = part.training.hidden > 0 or head_of(module).answer == "tokens"
        if not alongside and widths not in asked:
            # The teacher reads rows that are cut where the student's are.
            asked[widths] = predict(
                module, params, tokens, widths=widths, pooling=pooling, progress=progress, name=_TEACHER
            )
        transform = part.transform(steps_of(part.training, tokens))
        student, state = train(
            module,
            student,
            tokens,
            part.training,
            teacher=params if alongside else None,
            cached=None if alongside else asked[widths],
            transform=transform,
            trainable=_not_compressed,
            pooling=pooling,
            progress=progress,
            name=part.name,
        )
        student = transform.finalize(student, state)
    return student


def without_distillation(recipe: Recipe) -> Recipe:
    """The same compression in one shot: the baseline that distillation must beat."""
    return dataclasses.replace(recipe, distil=None, distil_shared=None, fine_tune=None)


def _prepared(
    parts: Sequence[_Part], module: nn.Module, tokens: Tokens | None, progress: Progress | None
) -> list[_Part]:
    """The parts with trainings that fit the rows and the model."""
    said: set[str] = set()

    def note(text: str) -> None:
        if text not in said:
            said.add(text)
            (progress or Silent()).note(text)

    def fitting(training: Training | None) -> Training | None:
        return training if training is None or tokens is None else prepared(training, module, tokens, note=note)

    return [dataclasses.replace(part, training=fitting(part.training)) for part in parts]


def _try(recipe: Recipe, parts: Sequence[_Part], params: Params, layouts: Params, tokens: Tokens | None) -> None:
    """What a step finds wrong with a leaf is said before hours of work."""
    for path, leaf in leaves_with_paths(params):
        if not np.isfinite(np.asarray(leaf)).all():
            check_finite(path, leaf)
    for step in recipe.cluster:
        marks = by_path(step.select)(params)
        map_with_path(_blocks(step), params, layouts, marks)
    for part in parts:
        if not part.dense:  # shared values are found on the host only
            steps = 0 if part.training is None or tokens is None else steps_of(part.training, tokens)
            jax.eval_shape(functools.partial(part.transform(steps).init, key=jax.random.key(0)), params)


def _blocks(step: ClusterStep) -> Callable[..., None]:
    def visit(_: str, leaf: Any, layout: Any, mark: bool) -> None:
        if mark:
            step.spec().blocks(leaf.shape, layout)

    return visit


def _layouts(module: nn.Module, params: Params) -> Params:
    ids = jax.ShapeDtypeStruct((2, min(8, config_of(module).max_position_embeddings)), jnp.int32)
    return trace_layouts(lambda p, ids, mask: module.apply({"params": p}, ids, mask), params, ids, ids)


def _with_frozen_steps(recipe: Recipe, params: Params, layouts: Params) -> Params:
    for step in recipe.quantize:
        if step.frozen:
            params, _ = quantize(params, step.spec(), select=by_path(step.select), layouts=layouts)
    for step in recipe.cluster:
        if step.frozen:
            params, _ = cluster(params, step.spec(), select=by_path(step.select), layouts=layouts)
    return params


def _parts(recipe: Recipe, layouts: Params) -> list[_Part]:
    prune, quantized = recipe.prune, [step for step in recipe.quantize if not step.frozen]
    clustered = [step for step in recipe.cluster if not step.frozen]

    def first(steps: int) -> Transform:
        pruning = [_pruning(step, layouts, steps) for step in prune]
        return chain(*pruning, *(_quantization(step, layouts) for step in quantized))

    def second(steps: int) -> Transform:
        return chain(*(_sharing(step, layouts, steps) for step in clustered))

    parts = []
    if prune or quantized or not clustered:
        parts.append(_Part(name="Pruning and quantizing while distilling", transform=first, training=recipe.distil))
    if clustered:
        training = recipe.distil_shared or recipe.distil
        name = "Sharing values while distilling"
        parts.append(_Part(name=name, transform=second, training=training, dense=clustered))
    return parts


def _pruning(step: PruneStep, layouts: Params, steps: int) -> Transform:
    # The end is at least one step away, and never behind the last step: what is asked for is always reached.
    end = max(round(step.end * steps), 1)
    begin = min(round(step.begin * steps), end - 1)
    schedule = constant(step.sparsity) if steps == 0 else cubic(0.0, step.sparsity, begin=begin, end=end)
    return gradual(
        schedule=schedule,
        every=1 if steps == 0 else step.every,
        select=by_path(step.select),
        layouts=layouts,
        scope=cast(Scope, step.scope),  # checked by PruneStep
        pattern=step.parsed_pattern(),
    )


def _quantization(step: QuantizeStep, layouts: Params) -> Transform:
    return quantization_aware(step.spec(), select=by_path(step.select), layouts=layouts)


def _sharing(step: ClusterStep, layouts: Params, steps: int) -> Transform:
    return trained_codebooks(
        step.spec(),
        every=step.every,
        until=max(round(step.until * steps), 1) if step.until and steps else 0,
        select=by_path(step.select),
        layouts=layouts,
        store=step.store,
    )


def _with_dense(steps: Sequence[ClusterStep], params: Params) -> Params:
    if not steps:
        return params
    marks = any_of(*(by_path(step.select) for step in steps))(params)
    return map_with_path(lambda _, leaf, mark: materialize(leaf) if mark else leaf, params, marks)


def _at_once(transform: Transform, params: Params) -> Params:
    state = transform.init(params, key=jax.random.key(0))
    floats, _ = partition_trainable(params)
    # One update ranks the weights where they are: pruning in one shot.
    grads = tuple(floats for _ in transform.stages)
    state, _ = transform.update(grads, state, params, key=jax.random.key(0), loss=0.0)
    return transform.finalize(params, state)


def _not_compressed(params: Params) -> Params:
    """Frozen leaves, and those that an earlier part has finished, keep their bits."""
    return map_with_path(lambda _, leaf: not is_compressed(leaf), params)
