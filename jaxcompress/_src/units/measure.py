"""What the size of a model is: weights, or operations, that are counted for every leaf."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.units.count import expected_parameters
from jaxcompress._src.units.group import UnitGroup

Measure = Callable[[Params], Mapping[str, float]]
"""`params -> path -> what one weight of that leaf counts`; leaves without an entry do not count."""


def parameters(*, count: Selector | None = None) -> Measure:
    """Every weight counts one.

    Args:
        count: which leaves are counted; by default all. `tree.by_path("bert/encoder/.*")` counts the encoder.

    Example:
        >>> from jaxcompress.tree import by_path
        >>> parameters(count=by_path("w"))({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
        {'w': 1.0}
    """

    def measure(params: Params) -> dict[str, float]:
        marked = _marked(params, count)
        return {path: 1.0 for path, leaf in leaves_with_paths(params) if hasattr(leaf, "shape") and path in marked}

    return measure


def flops(layouts: Params, *, count: Selector | None = None) -> Measure:
    """Every weight counts the floating-point operations that one call spends on it.

    Args:
        layouts: from `trace.layouts`, at the shapes of the inputs that matter.
        count: which leaves are counted; by default all.

    Example:
        >>> from jaxcompress.trace import layouts
        >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones((1, 3))}
        >>> flops(layouts(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones((5, 2))))(params)
        {'w': 10.0}
    """
    operations = {path: layout.flops for path, layout in leaves_with_paths(layouts)}

    def measure(params: Params) -> dict[str, float]:
        marked = _marked(params, count)
        return {
            path: operations[path] / leaf.size
            for path, leaf in leaves_with_paths(params)
            if path in marked and operations.get(path, 0) and leaf.size
        }

    return measure


def expected_size(
    params: Params, groups: Sequence[UnitGroup], probabilities: Mapping[str, Any], weights: Mapping[str, float]
) -> jax.Array:
    """The size that is left, by what each weight counts; differentiable.

    Args:
        params: gives the shapes.
        groups: of units.
        probabilities: name of a group -> (count,), or path of a leaf whose weights have gates of their own -> its
            shape.
        weights: path -> what a weight counts.

    Returns:
        float32 scalar: see `units.expected_parameters`; a leaf of gated weights adds up their probabilities.

    Example:
        >>> float(expected_size({"w": jnp.ones((2, 2))}, [], {"w": jnp.full((2, 2), 0.25)}, {"w": 3.0}))
        3.0
    """
    names = {group.name for group in groups}
    own = {path: p for path, p in probabilities.items() if path not in names}
    rest = {path: weight for path, weight in weights.items() if path not in own}
    total = expected_parameters(params, groups, probabilities, weights=rest)
    for path, probability in own.items():
        total = total + weights.get(path, 0.0) * jnp.sum(probability)
    return total


def full_size(params: Params, weights: Mapping[str, float]) -> float:
    """The size with everything kept."""
    return float(sum(weights[path] * leaf.size for path, leaf in leaves_with_paths(params) if path in weights))


def _marked(params: Params, count: Selector | None) -> set[str]:
    if count is None:
        return {path for path, _ in leaves_with_paths(params)}
    return {path for path, mark in leaves_with_paths(count(params)) if mark and not is_unselected(mark)}
