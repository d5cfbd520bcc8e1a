"""Running a recipe on a model."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxcompress import trace, tree
from jaxcompress.clustering import cluster, trained_codebooks
from jaxcompress.execution import materialize
from jaxcompress.pruning import Scope, gradual
from jaxcompress.quantization import quantization_aware, quantize
from jaxcompress.recipe._predict import predict
from jaxcompress.recipe._progress import Progress
from jaxcompress.recipe._recipe import Recipe
from jaxcompress.recipe._selections import check_selections
from jaxcompress.recipe._steps import ClusterStep, PruneStep, QuantizeStep, Training
from jaxcompress.recipe._text import Tokens
from jaxcompress.recipe._train import steps_of, train
from jaxcompress.schedules import constant, cubic
from jaxcompress.transforms import chain
from jaxcompress.types import Params, Transform, is_compressed


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
    recipe: Recipe, module: nn.Module, params: Params, tokens: Tokens | None = None, *, progress: Progress | None = None
) -> Params:
    """Prunes, quantizes and clusters `params`, while they are distilled from themselves if the recipe says so.

    Values are shared in a second part, when the first has pruned: k-means must see the weights that are left.

    Args:
        recipe: what to do.
        module: a BERT of `jaxcompress.models`.
        params: its parameters; they stay as they are, and are the teacher.
        tokens: rows to distil on.
        progress: where to show loss and time left.

    Returns:
        A tree of the same logical structure with compressed leaves.

    Raises:
        ValueError: the recipe distils and there are no `tokens`; a step that selects nothing; steps that contradict one
            another on a leaf; whatever a step finds wrong with a leaf.
    """
    check_selections(recipe, params)
    if recipe.distils and tokens is None:
        raise ValueError("This recipe distils: it needs texts (rows to run both models on).")
    layouts = _layouts(module, params)
    student = _with_frozen_steps(recipe, params, layouts)
    asked: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
    for part in _parts(recipe, layouts):
        student = _with_dense(part.dense, student)
        if part.training is None or tokens is None:
            student = _at_once(part.transform(0), student)
            continue
        widths = part.training.widths
        if not part.training.hidden and widths not in asked:
            # The teacher reads rows that are cut where the student's are.
            asked[widths] = predict(module, params, tokens, widths=widths, progress=progress, name="Asking the teacher")
        transform = part.transform(steps_of(part.training, tokens))
        student, state = train(
            module,
            student,
            tokens,
            part.training,
            teacher=params if part.training.hidden else None,
            cached=None if part.training.hidden else asked[widths],
            transform=transform,
            trainable=_not_compressed,
            progress=progress,
            name=part.name,
        )
        student = transform.finalize(student, state)
    return student


def without_distillation(recipe: Recipe) -> Recipe:
    """The same compression in one shot: the baseline that distillation must beat."""
    return dataclasses.replace(recipe, distil=None, distil_shared=None, fine_tune=None)


def _layouts(module: nn.Module, params: Params) -> Params:
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return trace.layouts(lambda p, ids, mask: module.apply({"params": p}, ids, mask), params, ids, ids)


def _with_frozen_steps(recipe: Recipe, params: Params, layouts: Params) -> Params:
    for step in recipe.quantize:
        if step.frozen:
            params = quantize(params, step.spec(), select=tree.by_path(step.select), layouts=layouts)
    for step in recipe.cluster:
        if step.frozen:
            params, _ = cluster(params, step.spec(), select=tree.by_path(step.select), layouts=layouts)
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
    begin, end = round(step.begin * steps), round(step.end * steps)
    schedule = (
        constant(step.sparsity) if steps == 0 else cubic(0.0, step.sparsity, begin=begin, end=max(end, begin + 1))
    )
    return gradual(
        schedule=schedule,
        every=1 if steps == 0 else step.every,
        select=tree.by_path(step.select),
        layouts=layouts,
        scope=cast(Scope, step.scope),  # checked by PruneStep
        pattern=step.parsed_pattern(),
    )


def _quantization(step: QuantizeStep, layouts: Params) -> Transform:
    return quantization_aware(step.spec(), select=tree.by_path(step.select), layouts=layouts)


def _sharing(step: ClusterStep, layouts: Params, steps: int) -> Transform:
    return trained_codebooks(
        step.spec(),
        every=step.every,
        until=round(step.until * steps),
        select=tree.by_path(step.select),
        layouts=layouts,
        store=step.store,
    )


def _with_dense(steps: Sequence[ClusterStep], params: Params) -> Params:
    if not steps:
        return params
    marks = tree.any_of(*(tree.by_path(step.select) for step in steps))(params)
    return tree.map_with_path(lambda _, leaf, mark: materialize(leaf) if mark else leaf, params, marks)


def _at_once(transform: Transform, params: Params) -> Params:
    state = transform.init(params, key=jax.random.key(0))
    floats, _ = tree.partition_trainable(params)
    # One update ranks the weights where they are: pruning in one shot.
    grads = tuple(floats for _ in transform.stages)
    state, _ = transform.update(grads, state, params, key=jax.random.key(0), loss=0.0)
    return transform.finalize(params, state)


def _not_compressed(params: Params) -> Params:
    """Frozen leaves, and those that an earlier part has finished, keep their bits."""
    return tree.map_with_path(lambda _, leaf: not is_compressed(leaf), params)
