"""What weights cost, what units cost, and what is left of the cost when some of them go."""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.units.group import UnitGroup, UnitSlices, index_owners, leaf_shapes
from jaxcompress._src.units.slices import spread_units

Costs = Mapping[str, float]
"""Path of a leaf -> cost of one of its weights; weights of leaves without an entry cost nothing."""


def parameter_costs(params: Params, *, select: Selector | None = None) -> dict[str, float]:
    """A cost of 1 for every weight of the selected leaves: what is left is counted in parameters.

    Args:
        params: the tree.
        select: which leaves count; by default all. `tree.by_path("bert/encoder/.*")` counts the encoder of a BERT.

    Example:
        >>> from jaxcompress import tree
        >>> parameter_costs({"table": jnp.ones((9, 2)), "kernel": jnp.ones((2, 2))}, select=tree.by_path("kernel"))
        {'kernel': 1.0}
    """
    return dict.fromkeys(_selected(params, select), 1.0)


def flop_costs(params: Params, *, select: Selector | None = None, layouts: Params) -> dict[str, float]:
    """FLOPs of each leaf's matmuls per weight, at the input shapes of the trace; leaves without any are left out.

    The products of activations with activations (attention scores) belong to no leaf, and are not counted.

    Args:
        params: the tree.
        select: which leaves count; by default all.
        layouts: from `trace.layouts`, at the shapes of the inputs that matter.

    Example:
        >>> from jaxcompress import trace
        >>> params, x = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((1, 3))}, jnp.ones((5, 2))
        >>> flop_costs(params, layouts=trace.layouts(lambda p, x: x @ p["kernel"] + p["bias"], params, x))
        {'kernel': 10.0}
    """
    flops = {path: layout.flops for path, layout in leaves_with_paths(layouts) if not is_unselected(layout)}
    sizes = {path: math.prod(shape) for path, shape in _selected(params, select).items()}
    return {path: flops[path] / size for path, size in sizes.items() if size and flops.get(path)}


def total_cost(params: Params, costs: Costs | None = None) -> float:
    """The cost of all weights; without `costs`, their number.

    Raises:
        ValueError: it is 0.

    Example:
        >>> total_cost({"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, {"w": 10.0})
        60.0
    """
    total = sum(_cost(costs, path) * math.prod(shape) for path, shape in leaf_shapes(params).items())
    if not total:
        raise ValueError("`costs` counts nothing in these parameters: check its paths.")
    return float(total)


def unit_costs(group: UnitGroup, params: Params, costs: Costs | None = None) -> np.ndarray:
    """What each unit costs, the slices of all leaves together; without `costs`, how many weights it owns.

    Args:
        group: its units.
        params: gives the shapes.
        costs: path -> cost of a weight.

    Returns:
        float64 (count,).

    Example:
        >>> slices = (UnitSlices(path="a", axis=0, unit=0), UnitSlices(path="b", axis=0, unit=1))
        >>> group = UnitGroup(name="layers", count=2, slices=slices)
        >>> unit_costs(group, {"a": jnp.ones((2, 3)), "b": jnp.ones(5)}).tolist()
        [6.0, 5.0]
    """
    shapes = leaf_shapes(params)
    total = np.zeros(group.count)
    for part in group.slices:
        cost = _cost(costs, part.path) * math.prod(shapes[part.path])
        if part.unit is not None:
            total[part.unit] += cost
        elif part.axis is not None:
            length = shapes[part.path][part.axis]
            owners = index_owners(part, group.count, length)
            total += cost / max(length, 1) * np.bincount(owners[owners >= 0], minlength=group.count)
    return total


def expected_cost(
    params: Params, groups: Sequence[UnitGroup], probabilities: Mapping[str, Any], costs: Costs | None = None
) -> Any:
    """Σ over leaves of cost · Π over axes of the expected number of kept indices: the cost of what is left.

    Units of different groups are taken as independent, and so are the axes of a leaf. At probabilities 0 and 1 it is
    the cost of what `shrink` leaves, where leaves of zeros count as removed.

    Args:
        params: gives the shapes.
        groups: see `check_groups`; those without an entry in `probabilities` keep everything.
        probabilities: that a unit, or a weight, is kept: name of a group -> (count,), or path of a leaf whose weights
            have gates of their own -> its shape.
        costs: path -> cost of a weight.

    Returns:
        A float32 scalar, differentiable, if the probabilities are JAX arrays; otherwise a float, exact up to 2^53.

    Example:
        >>> group = UnitGroup(name="ffn", count=2, slices=(UnitSlices(path="down", axis=0),))
        >>> float(expected_cost({"down": jnp.ones((2, 3))}, [group], {"ffn": [1.0, 0.5]}))
        4.5
    """
    traced = any(isinstance(probability, jax.Array) for probability in probabilities.values())
    module, dtype = (jnp, jnp.float32) if traced else (np, np.float64)
    known = {name: module.asarray(probability, dtype) for name, probability in probabilities.items()}
    owners: dict[str, list[tuple[UnitSlices, Any]]] = {}
    for group in groups:
        for part in group.slices if group.name in known else ():
            owners.setdefault(part.path, []).append((part, known[group.name]))
    names = {group.name for group in groups}
    total = module.zeros((), dtype)
    for path, shape in leaf_shapes(params).items():
        if cost := _cost(costs, path):
            single = path in known and path not in names
            total = total + cost * (known[path].sum() if single else _expected_size(shape, owners.get(path, ())))
    return total if traced else float(total)


def _expected_size(shape: tuple[int, ...], owners: Sequence[tuple[UnitSlices, Any]]) -> Any:
    size: Any = 1.0
    for axis, length in enumerate(shape):
        along: Any = [spread_units(part, probability, length) for part, probability in owners if part.axis == axis]
        size = size * (functools.reduce(operator.mul, along).sum() if along else length)
    for part, probability in owners:
        if part.axis is None:
            size = size * probability[part.unit]
    return size


def _selected(params: Params, select: Selector | None) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves that count."""
    shapes = leaf_shapes(params)
    if select is None:
        return shapes
    marks = {path for path, mark in leaves_with_paths(select(params)) if mark and not is_unselected(mark)}
    return {path: shape for path, shape in shapes.items() if path in marks}


def _cost(costs: Costs | None, path: str) -> float:
    return 1.0 if costs is None else costs.get(path, 0.0)
