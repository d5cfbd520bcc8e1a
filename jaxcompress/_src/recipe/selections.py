"""Steps of a recipe that contradict one another on a model, found before hours of training."""

import jax

from jaxcompress._src.recipe.recipe import Recipe
from jaxcompress._src.recipe.steps import Step
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.selectors import by_path
from jaxcompress._src.types import Params, is_compressed


def check_selections(recipe: Recipe, params: Params) -> None:
    """Checks which leaves each step selects.

    Raises:
        ValueError: a leaf is compressed already; a step selects nothing; a leaf is in two steps that give it its
            values; a leaf is pruned by a step whose zeros another would not keep. Names the steps and the leaf.
    """
    compressed = [path for path, leaf in leaves_with_paths(params) if is_compressed(leaf)]
    if compressed:
        raise ValueError(
            f"{len(compressed)} leaves are compressed already, such as {compressed[0]!r}: compress the original model, "
            "or call `jaxcompress.materialize(params)` first."
        )
    steps = [(name, step if recipe.trains(step) else step.one_shot) for name, step in recipe.steps]
    pruned: dict[str, tuple[str, Step]] = {}
    owners: dict[str, str] = {}
    for name, step in steps:
        for path in _paths(name, step, params):
            if step.stage == "prune":
                pruned[path] = (name, step)
            elif step.stage != "shrink":
                if step.method.gives_values and path in owners:
                    raise ValueError(
                        f"Leaf {path!r} is in {owners[path]} and in {name}; only one can give it its values."
                    )
                if step.method.gives_values:
                    owners[path] = name
                if path in pruned and (step.method.gives_values or not step.method.keeps_zeros):
                    _check_zeros(path, *pruned[path], name, step)


def _check_zeros(path: str, pruning: str, prune: Step, name: str, step: Step) -> None:
    if prune.trains and not step.trains:
        raise ValueError(f"Leaf {path!r} is in {pruning} and frozen by {name}: it could not be pruned.")
    if not prune.trains and step.trains and step.stage != "cluster":
        raise ValueError(
            f"Leaf {path!r} is pruned by {pruning} before the training, in which {name} would give its zeros values: "
            "prune it by a method that trains, or compress it by one that does not."
        )
    if not getattr(step.keywords.get("spec"), "zero", True):
        raise ValueError(f"Leaf {path!r} is in {pruning}, so `zero` must be true in {name}.")
    if not step.method.keeps_zeros:
        raise ValueError(f"Leaf {path!r} is in {pruning}, and {name}, {step.name!r}, would give its zeros values.")


def _paths(name: str, step: Step, params: Params) -> list[str]:
    if step.select is None:
        return []
    try:
        marks = by_path(step.select)(params)
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from err
    return [path for (path, _), mark in zip(leaves_with_paths(params), jax.tree.leaves(marks), strict=True) if mark]
