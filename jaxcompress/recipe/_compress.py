"""Running a recipe on a model."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxcompress import trace, tree
from jaxcompress.pruning import Scope, gradual
from jaxcompress.quantization import quantization_aware, quantize
from jaxcompress.recipe._predict import predict
from jaxcompress.recipe._progress import Progress
from jaxcompress.recipe._recipe import PruneStep, QuantizeStep, Recipe
from jaxcompress.recipe._text import Tokens
from jaxcompress.recipe._train import steps_of, train
from jaxcompress.schedules import constant, cubic
from jaxcompress.transforms import chain
from jaxcompress.types import Params, Selector, Transform


def compress(
    recipe: Recipe, module: nn.Module, params: Params, tokens: Tokens | None = None, *, progress: Progress | None = None
) -> Params:
    """Prunes and quantizes `params`, while they are distilled from themselves if the recipe says so.

    Args:
        recipe: what to do.
        module: a BERT of `jaxcompress.models`.
        params: its parameters; they stay as they are, and are the teacher.
        tokens: rows to distil on.
        progress: where to show loss and time left.

    Returns:
        A tree of the same logical structure with compressed leaves.

    Raises:
        ValueError: the recipe distils and there are no `tokens`; a step that selects nothing; whatever a step finds
            wrong with a leaf.
    """
    layouts = _layouts(module, params)
    student = params
    for step in recipe.quantize:
        if step.frozen:
            student = quantize(student, step.spec(), select=tree.by_path(step.select), layouts=layouts)
    if recipe.distil is None:
        transform = _transform(recipe, layouts, steps=0)
        state = transform.init(student, key=jax.random.key(0))
        # One update ranks the weights where they are: pruning in one shot.
        state, _ = _rank_once(transform, student, state)
        return transform.finalize(student, state)
    if tokens is None:
        raise ValueError("This recipe distils: it needs texts (rows to run both models on).")
    transform = _transform(recipe, layouts, steps=steps_of(recipe.distil, tokens))
    cached = None
    if not recipe.distil.hidden:
        cached = predict(module, params, tokens, progress=progress, name="Asking the teacher")
    student, state = train(
        module,
        student,
        tokens,
        recipe.distil,
        teacher=params if cached is None else None,
        cached=cached,
        transform=transform,
        trainable=_not_frozen(recipe),
        progress=progress,
        name="Pruning and quantizing while distilling",
    )
    return transform.finalize(student, state)


def without_distillation(recipe: Recipe) -> Recipe:
    """The same compression in one shot: the baseline that distillation must beat."""
    return Recipe(prune=recipe.prune, quantize=recipe.quantize)


def _layouts(module: nn.Module, params: Params) -> Params:
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return trace.layouts(lambda p, ids, mask: module.apply({"params": p}, ids, mask), params, ids, ids)


def _transform(recipe: Recipe, layouts: Params, *, steps: int) -> Transform:
    pruning = [_pruning(step, layouts, steps) for step in recipe.prune]
    quantization = [_quantization(step, layouts) for step in recipe.quantize if not step.frozen]
    return chain(*pruning, *quantization)


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


def _rank_once(transform: Transform, params: Params, state: Any) -> Any:
    floats, _ = tree.partition_trainable(params)
    return transform.update(tuple(floats for _ in transform.stages), state, params, key=jax.random.key(0), loss=0.0)


def _not_frozen(recipe: Recipe) -> Selector | None:
    frozen = [tree.by_path(step.select) for step in recipe.quantize if step.frozen]
    return tree.exclude(tree.any_of(*frozen)) if frozen else None
