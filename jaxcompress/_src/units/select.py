"""Which units to keep under a budget."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxcompress._src.types import Params
from jaxcompress._src.units.budget import allowed_cost, check_budget, check_reachable, check_shape
from jaxcompress._src.units.costs import Costs, expected_cost, total_cost, unit_costs
from jaxcompress._src.units.group import UnitGroup, by_name, check_groups, check_known, leaf_shapes
from jaxcompress._src.units.knapsack import highest_total, in_order, same_share

Rule = Literal["total", "rank", "kind", "group"]
"""How units compete; see `select_units`."""

Keep = Mapping[str, np.ndarray]
"""Name of a group -> bool (count,), True = kept; or path of a leaf whose weights have gates -> its shape."""

# Budgets may be computed: 0.9 of 10 is less than 9 in floats. Relative to the total cost.
_SLACK = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What was selected.

    Attributes:
        keep: name of a group -> bool (count,), True = kept.
        cost: of what is left.
        total: the cost of everything.
        least: the cost of what stays even when no unit does.
        exact: whether no other choice within the budget has a higher total score.
    """

    keep: Keep
    cost: float
    total: float
    least: float
    exact: bool

    @property
    def sparsity(self) -> float:
        """`1 - cost / total`: the share that goes."""
        return 1 - self.cost / self.total


def select_units(
    scores: Mapping[str, Any],
    groups: Sequence[UnitGroup],
    params: Params,
    *,
    sparsity: int | float | None = None,
    budget: int | float | None = None,
    shape: Mapping[str, int] | None = None,
    costs: Costs | None = None,
    rule: Rule = "total",
    uniform: bool = False,
    at_least: int | Mapping[str, int] = 0,
) -> Selection:
    """The units with the highest scores whose cost, with all that stays anyway, is within a budget.

    Units compete by one of four rules:

    - "total": the highest sum of scores within the budget, for scores that add up: Fisher information, Taylor. All
      combinations of numbers of units of each cost are tried; with too many of them, greedily by score per cost.
      Among equal scores the earlier group, then the lower index, is kept.
    - "rank": in the order of the scores, whatever fits, for locations of gates that were trained against one price of
      a weight: log alpha already says what a unit is worth beyond its cost, and one threshold over all groups is the
      right cut. Ties are dealt evenly over the groups, the lowest indices of each first. Groups may nest, and leaves
      whose single weights have gates compete too.
    - "kind", "group": every kind, or group, keeps the same share of its units, its highest: for scores that cannot be
      compared across them, such as magnitudes.

    Args:
        scores: name of a group -> (count,), from a score function, or the "log_alpha" of gates. With "rank" also path
            of a leaf whose weights have gates -> its shape.
        groups: the units. Except with "rank" or `shape`, no leaf may belong to two groups.
        params: gives the shapes.
        sparsity: the budget as 1 - cost of what is left / cost of everything. Either this, `budget` or `shape`.
        budget: the cost of what is left.
        shape: kind -> units that stay in each group of it, its highest; other kinds keep everything.
        costs: path -> cost of one weight, from `parameter_costs` or `flop_costs`. By default every weight of the tree
            costs 1.
        rule: how units compete.
        uniform: all groups of a kind keep the same number of units: equal widths in all layers, as one configuration
            for all of them (Hugging Face) and a scan over layers need. Each group keeps its best. Not with "rank".
        at_least: units that each group keeps in any case, its highest; by name or kind, 0 for those left out. With
            "rank" only.

    Returns:
        The selection. Units cannot be split: its cost is at most the budget, and less than one unit below it (where
        there are units left to keep).

    Raises:
        ValueError: not exactly one of `sparsity`, `budget` and `shape`; a budget below what stays when all units go,
            which is named; an impossible shape; scores that are missing, of the wrong shape, not finite, or, except
            with "rank" or `shape`, negative; two groups that own the same leaf; with `uniform`, groups of one kind
            with different numbers of units, or units of different costs in one group; options that the rule does not
            have.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.structured import UnitSlices
        >>> group = UnitGroup(name="rows", count=3, slices=(UnitSlices(path="w", axis=0),))
        >>> params = {"w": jnp.ones((3, 10)), "b": jnp.ones(10)}
        >>> selection = select_units({"rows": [0.5, 2.0, 1.0]}, [group], params, sparsity=0.2)
        >>> selection.keep, selection.cost, selection.sparsity
        ({'rows': array([False,  True,  True])}, 30.0, 0.25)

    References:
        "total": Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", algorithm 1.
    """
    check_budget(sparsity=sparsity, budget=budget, shape=shape)
    _check_rule(rule, shape, uniform, at_least)
    check_groups(groups, params)
    values = _check_scores(scores, groups, params, rule=rule, signed=rule == "rank" or shape is not None)
    total = total_cost(params, costs)
    nothing = {name: np.zeros(score.shape, bool) for name, score in values.items()}
    least = expected_cost(params, groups, nothing, costs)
    if shape is not None:
        check_shape(groups, shape)
        keep = {group.name: _highest(values[group.name], shape.get(group.kind, group.count)) for group in groups}
        exact = True
    else:
        allowed = allowed_cost(total, sparsity=sparsity, budget=budget)
        check_reachable(allowed, least, total, slack=_SLACK)
        allowed += _SLACK * total
        if rule == "rank":
            keep, exact = _by_rank(values, groups, params, costs, allowed, total, at_least), False
        else:
            keep, exact = _by_value(values, groups, params, costs, allowed - least, rule, uniform)
    return Selection(keep=keep, cost=expected_cost(params, groups, keep, costs), total=total, least=least, exact=exact)


def _by_value(
    scores: Keep,
    groups: Sequence[UnitGroup],
    params: Params,
    costs: Costs | None,
    budget: float,
    rule: Rule,
    uniform: bool,
) -> tuple[Keep, bool]:
    """Choices of units that cost the same whatever else is kept."""
    _check_disjoint(groups)
    values = np.concatenate([scores[group.name] for group in groups])
    prices = np.concatenate([unit_costs(group, params, costs) for group in groups])
    members = np.split(np.arange(len(values)), np.cumsum([group.count for group in groups])[:-1])
    # Rows of units that stay or go together: single ones, or the n-th best of every group of a kind.
    blocks = _equal_widths(groups, members, values, prices) if uniform else [units[:, None] for units in members]
    gains = np.concatenate([values[block].sum(axis=1) for block in blocks])
    spent = np.concatenate([prices[block].sum(axis=1) for block in blocks])
    rows = np.split(np.arange(len(gains)), np.cumsum([len(block) for block in blocks])[:-1])
    if rule == "total":
        keep, exact = highest_total(gains, spent, budget)
    else:
        pools = rows if uniform or rule == "group" else _by_kind(groups, rows)
        keep, exact = same_share(gains, spent, budget, pools), False
    stays = np.zeros(len(values), bool)
    for block, row in zip(blocks, rows, strict=True):
        stays[block[keep[row]]] = True
    return {group.name: stays[units] for group, units in zip(groups, members, strict=True)}, exact


def _by_kind(groups: Sequence[UnitGroup], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    pools: dict[str, list[np.ndarray]] = {}
    for group, row in zip(groups, rows, strict=True):
        pools.setdefault(group.kind, []).append(row)
    return [np.concatenate(pool) for pool in pools.values()]


def _equal_widths(
    groups: Sequence[UnitGroup], members: Sequence[np.ndarray], values: np.ndarray, prices: np.ndarray
) -> list[np.ndarray]:
    """For each kind, (count, groups): in row n the n-th best unit of each group."""
    kinds: dict[str, list[np.ndarray]] = {}
    for group, units in zip(groups, members, strict=True):
        together = kinds.setdefault(group.kind or group.name, [])
        if together and len(together[0]) != len(units):
            raise ValueError(
                f"`uniform`: unit group {group.name!r} has {len(units)} units, another of kind {group.kind!r} has "
                f"{len(together[0])}."
            )
        if len(set(prices[units])) > 1:
            raise ValueError(f"`uniform`: the units of group {group.name!r} differ in cost.")
        together.append(units[np.argsort(-values[units], kind="stable")])
    return [np.stack(orders, axis=1) for orders in kinds.values()]


def _by_rank(
    scores: Keep,
    groups: Sequence[UnitGroup],
    params: Params,
    costs: Costs | None,
    allowed: float,
    total: float,
    at_least: int | Mapping[str, int],
) -> Keep:
    """Choices of units whose costs may depend on what else is kept."""
    if isinstance(at_least, Mapping):
        check_known(at_least, {*scores, *(group.kind for group in groups if group.kind)}, "at_least")
    required = {name: _highest(score, by_name(at_least, name, groups, 0)) for name, score in scores.items()}
    check_reachable(allowed, expected_cost(params, groups, required, costs), total, slack=0.0)
    counts = [score.size for score in scores.values()]
    owners = np.repeat(np.arange(len(counts)), counts)
    index = np.concatenate([np.arange(count) for count in counts])
    values = np.concatenate([score.ravel() for score in scores.values()])
    first = np.concatenate([units.ravel() for units in required.values()])
    # The relative place within its group deals equal scores evenly over the groups.
    order = np.lexsort((owners, index / np.repeat(counts, counts), -values, ~first))

    def split(flat: np.ndarray) -> Keep:
        parts = np.split(flat, np.cumsum(counts)[:-1])
        return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}

    def fits(flat: np.ndarray) -> bool:
        return expected_cost(params, groups, split(flat), costs) <= allowed

    alike = {group.name: all(part.unit is None for part in group.slices) for group in groups}
    return split(in_order(order, int(first.sum()), owners, [alike.get(name, True) for name in scores], fits))


def _highest(scores: np.ndarray, number: int) -> np.ndarray:
    keep = np.zeros(scores.size, bool)
    keep[np.argsort(-scores.ravel(), kind="stable")[: max(number, 0)]] = True
    return keep.reshape(scores.shape)


def _check_rule(rule: str, shape: Mapping[str, int] | None, uniform: bool, at_least: int | Mapping[str, int]) -> None:
    if rule not in get_args(Rule):
        raise ValueError(f"`rule` must be one of {', '.join(map(repr, get_args(Rule)))}, got {rule!r}.")
    if uniform and (rule == "rank" or shape is not None):
        raise ValueError("`uniform` goes with the rules 'total', 'kind' and 'group', without `shape`.")
    if at_least and (rule != "rank" or shape is not None):
        raise ValueError("`at_least` goes with the rule 'rank', without `shape`.")


def _check_scores(
    scores: Mapping[str, Any], groups: Sequence[UnitGroup], params: Params, *, rule: Rule, signed: bool
) -> dict[str, np.ndarray]:
    """The scores in float64, once they fit groups and leaves."""
    if not groups and not scores:
        raise ValueError("`groups` is empty: there are no units to select.")
    counts = {group.name: (group.count,) for group in groups}
    shapes = counts if rule != "rank" else leaf_shapes(params) | counts
    if missing := [name for name in counts if name not in scores]:
        raise ValueError(f"`scores` has no entry for the unit group {missing[0]!r}.")
    values = {name: np.asarray(score, np.float64) for name, score in scores.items()}
    for name, score in values.items():
        if name not in shapes:
            raise ValueError(f"The scores name {name!r}, which is neither a unit group nor a leaf.")
        if score.shape != shapes[name]:
            raise ValueError(f"The scores of {name!r} need the shape {shapes[name]}, got {score.shape}.")
        if not np.isfinite(score).all():
            raise ValueError(f"The scores of {name!r} hold NaN or Inf.")
        if not signed and not (score >= 0).all():
            raise ValueError(f"The scores of {name!r} must not be negative, got {score.tolist()}.")
    return values


def _check_disjoint(groups: Sequence[UnitGroup]) -> None:
    owners: dict[str, str] = {}
    for group in groups:
        for path in {part.path for part in group.slices}:
            if owners.setdefault(path, group.name) != group.name:
                raise ValueError(
                    f"Unit groups {owners[path]!r} and {group.name!r} both own weights of {path!r}: select units of "
                    "one of them, `shrink`, and then those of the other."
                )
