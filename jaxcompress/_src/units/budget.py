"""The final choice: which units stay, so that the model has the size that was asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params
from jaxcompress._src.units.group import UnitGroup, UnitSlices, check_groups, index_owners
from jaxcompress._src.units.measure import Measure, full_size, parameters
from jaxcompress._src.units.penalty import by_name, check_known
from jaxcompress._src.units.targets import check_shape

Keep = dict[str, np.ndarray]


def units_within(
    log_alpha: Mapping[str, Any],
    groups: Sequence[UnitGroup],
    params: Params,
    *,
    sparsity: int | float | None = None,
    size: int | float | None = None,
    shape: Mapping[str, int] | None = None,
    measure: Measure = parameters(),  # noqa: B008 (a pure function)
    at_least: int | Mapping[str, int] = 0,
) -> Keep:
    """The units with the highest log alpha that fit into a budget; one with no room is passed over for later ones.

    Gates were trained against one common price of a weight, so that log alpha already says what a unit is worth beyond
    its size, and one threshold over all groups is the right cut. What is left is at most the budget, and short of it by
    less than the cheapest unit left out. Ties are dealt evenly over the groups, the lowest indices of each first.

    Args:
        log_alpha: `state.trainable["log_alpha"]`, or any finite scores: name of a group -> (count,), or path of a leaf
            whose weights have gates -> its shape.
        groups: of units; those without an entry in `log_alpha` keep everything.
        params: gives the shapes.
        sparsity: budget as 1 - size / full size.
        size: budget in units of `measure`.
        shape: instead of a budget: kind -> units that stay in each group of it; other kinds keep everything.
        measure: what is counted.
        at_least: units that each group keeps in any case, its highest; by name or kind, 0 for those left out.

    Returns:
        name -> bool array, True = kept; see `units.remove_units` and `gate_values`.

    Raises:
        ValueError: not exactly one of `sparsity`, `size` and `shape`; a budget below what the units allow, which is
            named; an impossible shape; scores that are missing, of the wrong shape or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = UnitGroup(name="rows", count=4, slices=(UnitSlices(path="w", axis=0),))
        >>> params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
        >>> units_within({"rows": [0.5, 2.0, -1.0, 1.0]}, [rows], params, size=7)
        {'rows': array([False,  True, False,  True])}
    """
    if sum(option is not None for option in (sparsity, size, shape)) != 1:
        raise ValueError(f"Give one of `sparsity`, `size` and `shape`, got {sparsity}, {size} and {shape}.")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"`sparsity` must be in [0, 1], got {sparsity}.")
    if size is not None and not size >= 0:
        raise ValueError(f"`size` must be at least 0, got {size}.")
    if not log_alpha:
        raise ValueError("`log_alpha` is empty: there are no units to choose from.")
    check_groups(groups, params)
    scores = _scores(log_alpha, groups, params)
    if shape is not None:
        check_shape(tuple(groups), shape)
        return {
            group.name: _highest(scores[group.name], shape[group.kind])
            if group.kind in shape
            else np.ones(group.count, bool)
            for group in groups
        }
    weights = measure(params)
    full = full_size(params, weights)
    budget = size if size is not None else (1 - (sparsity or 0.0)) * full
    required = _required(scores, groups, at_least)
    count = kept_size(params, groups, weights)
    # Budgets may be computed: 0.9 of 10 is less than 9 in floats.
    slack = 1e-9 * full
    if (least := count(required)) > budget + slack:
        raise ValueError(
            f"The budget {budget:g} is below what the units allow: the least possible is {least:g} of {full:g} "
            f"(sparsity {1 - least / full if full else 0:.6g})."
        )
    return _fill(scores, groups, required, lambda keep: count(keep) <= budget + slack)


def kept_size(params: Params, groups: Sequence[UnitGroup], weights: Mapping[str, float]) -> Callable[[Keep], float]:
    """`keep -> size that is left`, in float64; exact for sizes up to 2^53.

    Args:
        params: gives the shapes.
        groups: of units.
        weights: path -> what a weight counts.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = UnitGroup(name="rows", count=2, slices=(UnitSlices(path="w", axis=0),))
        >>> kept_size({"w": jnp.ones((2, 3))}, [rows], {"w": 1.0})({"rows": np.array([True, False])})
        3.0
    """
    shapes = {path: leaf.shape for path, leaf in leaves_with_paths(params) if path in weights}
    owners: dict[str, list[tuple[UnitGroup, UnitSlices]]] = {}
    for group in groups:
        for part in group.slices:
            if part.path in weights:
                owners.setdefault(part.path, []).append((group, part))
    others = sum(weights[path] * np.prod(shape) for path, shape in shapes.items() if path not in owners)

    def count(keep: Keep) -> float:
        total = float(others)
        for path, parts in owners.items():
            known = [(part, keep[group.name]) for group, part in parts if group.name in keep]
            total += weights[path] * _left(shapes[path], known)
        names = {group.name for group in groups}
        for path, kept in keep.items():
            if path not in names and path in weights:
                total -= weights[path] * (kept.size - kept.sum())
        return float(total)

    return count


def _left(shape: tuple[int, ...], parts: list[tuple[UnitSlices, np.ndarray]]) -> float:
    if any(part.axis is None and not kept[part.unit] for part, kept in parts):
        return 0.0
    left = 1.0
    for axis, length in enumerate(shape):
        along = np.ones(length, bool)
        for part, kept in parts:
            if part.axis == axis:
                owners = index_owners(part, len(kept), length)
                along &= (owners < 0) | kept[owners]
        left *= along.sum()
    return left


def _scores(log_alpha: Mapping[str, Any], groups: Sequence[UnitGroup], params: Params) -> dict[str, np.ndarray]:
    leaves = dict(leaves_with_paths(params))
    shapes = {group.name: (group.count,) for group in groups}
    scores = {}
    for name, values in log_alpha.items():
        scores[name] = np.asarray(values, np.float64)
        wanted = shapes.get(name) or tuple(getattr(leaves.get(name), "shape", ()))
        if name not in shapes and name not in leaves:
            raise ValueError(f"The scores name {name!r}, which is neither a unit group nor a leaf.")
        if scores[name].shape != wanted:
            raise ValueError(f"The scores of {name!r} need the shape {wanted}, got {scores[name].shape}.")
        if not np.isfinite(scores[name]).all():
            raise ValueError(f"The scores of {name!r} hold NaN or Inf.")
    return scores


def _required(scores: Mapping[str, np.ndarray], groups: Sequence[UnitGroup], at_least: int | Mapping[str, int]) -> Keep:
    kinds = {group.name: group.kind for group in groups}
    if isinstance(at_least, Mapping):
        check_known(at_least, {*scores, *(kind for kind in kinds.values() if kind)}, "at_least")
    return {name: _highest(own, int(by_name(at_least, name, kinds.get(name, ""), 0))) for name, own in scores.items()}


def _highest(scores: np.ndarray, number: int) -> np.ndarray:
    kept = np.zeros(scores.size, bool)
    kept[np.argsort(-scores.ravel(), kind="stable")[: max(number, 0)]] = True
    return kept.reshape(scores.shape)


def _fill(
    scores: Mapping[str, np.ndarray],
    groups: Sequence[UnitGroup],
    required: Keep,
    fits: Callable[[Keep], bool],
) -> Keep:
    """`required`, then the units in order of their score, as long as they fit."""
    order, owner, split = _ranking(scores, required)
    names = list(scores)

    def best(number: int) -> np.ndarray:
        chosen = np.zeros(len(order), bool)
        chosen[order[:number]] = True
        return chosen

    low, high = sum(int(kept.sum()) for kept in required.values()), len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(split(best(middle))) else (low, middle - 1)
    chosen = best(low)
    # Where one unit did not fit, no other of its group does, now or later: they cost the same, unless they own leaves
    # of their own.
    alike = {group.name: all(part.unit is None for part in group.slices) for group in groups}
    full: set[str] = set()
    for place in order[low:]:
        name = names[owner[place]]
        if name in full:
            continue
        chosen[place] = True
        if not fits(split(chosen)):
            chosen[place] = False
            if alike.get(name, True):
                full.add(name)
            if len(full) == len(names):
                break
    return split(chosen)


def _ranking(
    scores: Mapping[str, np.ndarray], required: Keep
) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], Keep]]:
    """All units in one row: their order, the place of each one's group, and how to take the row apart again."""
    counts = [own.size for own in scores.values()]
    owner = np.repeat(np.arange(len(counts)), counts)
    index = np.concatenate([np.arange(count) for count in counts])
    value = np.concatenate([own.ravel() for own in scores.values()])
    first = np.concatenate([required[name].ravel() for name in scores])
    # The relative place within its group deals equal scores evenly over the groups.
    order = np.lexsort((owner, index / np.repeat(counts, counts), -value, ~first))

    def split(chosen: np.ndarray) -> Keep:
        parts = np.split(chosen, np.cumsum(counts)[:-1])
        return {name: part.reshape(own.shape) for (name, own), part in zip(scores.items(), parts, strict=True)}

    return order, owner, split
