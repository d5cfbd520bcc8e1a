"""Steps of a recipe that contradict one another on a model, found before hours of training."""

from collections.abc import Iterable
from typing import Any

import jax

from jaxcompress._src.recipe.recipe import Recipe
from jaxcompress._src.recipe.steps import ClusterStep, PruneStep, QuantizeStep
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.selectors import by_path
from jaxcompress._src.types import Params, is_compressed


def check_selections(recipe: Recipe, params: Params) -> None:
    """Checks which leaves each step selects.

    Raises:
        ValueError: a leaf is compressed already; a step selects nothing; a leaf is in two steps that give it its
            values; a leaf is pruned that is frozen, or whose shared values leave out 0. Names the steps and the leaf.
    """
    compressed = [path for path, leaf in leaves_with_paths(params) if is_compressed(leaf)]
    if compressed:
        raise ValueError(
            f"{len(compressed)} leaves are compressed already, such as {compressed[0]!r}: compress the original model, "
            "or call `jaxcompress.materialize(params)` first."
        )
    pruned = {path: name for name, step in _named("prune", recipe.prune) for path in _paths(name, step, params)}
    owners: dict[str, str] = {}
    for name, step in [*_named("quantize", recipe.quantize), *_named("cluster", recipe.cluster)]:
        for path in _paths(name, step, params):
            if path in owners:
                raise ValueError(f"Leaf {path!r} is in {owners[path]} and in {name}; only one can give it its values.")
            owners[path] = name
            if path in pruned and step.frozen:
                raise ValueError(f"Leaf {path!r} is in {pruned[path]} and frozen by {name}: it could not be pruned.")
            if path in pruned and isinstance(step, ClusterStep) and not step.zero:
                raise ValueError(f"Leaf {path!r} is in {pruned[path]}, so `zero` must be true in {name}.")


def _named(table: str, steps: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"[[{table}]] {i + 1}", step) for i, step in enumerate(steps)]


def _paths(name: str, step: PruneStep | QuantizeStep | ClusterStep, params: Params) -> list[str]:
    try:
        marks = by_path(step.select)(params)
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from err
    return [path for (path, _), mark in zip(leaves_with_paths(params), jax.tree.leaves(marks), strict=True) if mark]
