"""Which units to keep under a budget."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.types import Params
from jaxcompress._src.units.count import unit_sizes
from jaxcompress._src.units.group import UnitGroup
from jaxcompress._src.units.shrink import check_entries

Within = Literal["all", "kind", "group"]

# All combinations of counts are tried up to this number; more are found greedily.
_MOST_COMBINATIONS = 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What was selected.

    Attributes:
        keep: name of a group -> bool (count,), True = kept.
        cost: of what is left, all counted leaves together.
        total: of everything.
        least: of what stays even when no unit does.
        exact: whether no other choice within the budget has a higher total score.
    """

    keep: Mapping[str, np.ndarray]
    cost: float
    total: float
    least: float
    exact: bool

    @property
    def share(self) -> float:
        """`cost / total`: the share that is left."""
        return self.cost / self.total


def select_units(
    scores: Mapping[str, Any],
    groups: Sequence[UnitGroup],
    params: Params,
    *,
    share: float,
    costs: Mapping[str, float] | None = None,
    within: Within = "all",
    uniform: bool = False,
) -> Selection:
    """The units with the highest total score whose cost, with all that stays anyway, is within a budget.

    Maximises Σ score of kept units, subject to: cost of what is left <= share · cost of everything. Among units of one
    cost the best are those with the highest scores, so only the number kept of each cost has to be found: all
    combinations of numbers are tried (heads and columns: two costs). With too many of them, greedily by score per
    cost. Among equal scores the earlier group, then the lower index, is kept.

    Args:
        scores: name -> (count,), from a score function; finite, not negative.
        groups: the units; no leaf may belong to two of them.
        params: gives the sizes.
        share: of the total cost that may be left, in [0, 1].
        costs: path -> cost of one weight, from `parameter_costs` or `flop_costs`; paths without an entry cost nothing.
            By default every weight of the tree costs 1.
        within: "all": units compete with all others. "kind" or "group": every kind, or group, keeps the same share of
            its units (for scores that cannot be compared across them, such as magnitudes).
        uniform: all groups of a kind keep the same number of units: equal widths in all layers, as one configuration
            for all of them (Hugging Face) and a scan over layers need. Each group keeps its best.

    Returns:
        The selection. Units cannot be split: its cost is at most the budget, and less than one unit below it (where
        there are units left to keep).

    Raises:
        ValueError: `share` is not in [0, 1], or below what stays when all units go (names that least share); scores
            are missing, of the wrong length, negative or not finite; two groups own the same leaf; with `uniform`,
            groups of one kind with different numbers of units, or units of different sizes in one group.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress._src.units.group import UnitSlices
        >>> group = UnitGroup(name="rows", count=3, slices=(UnitSlices(path="w", axis=0),))
        >>> params = {"w": jnp.ones((3, 10)), "b": jnp.ones(10)}
        >>> found = select_units({"rows": [0.5, 2.0, 1.0]}, [group], params, share=0.8)
        >>> found.keep, found.cost, found.share
        ({'rows': array([False,  True,  True])}, 30.0, 0.75)

    References:
        Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", algorithm 1: all numbers of heads.
    """
    check_entries(params, groups, scores)
    values = _values(scores, groups)
    _check_disjoint(groups)
    if within not in get_args(Within):
        raise ValueError(f"`within` must be one of {', '.join(map(repr, get_args(Within)))}, got {within!r}.")
    sizes = np.concatenate([unit_sizes(group, params, weights=costs) for group in groups])
    total = _total(params, costs)
    least = total - float(sizes.sum())
    _check_share(share, least, total)
    # The product may be an ulp below the size that the share was computed from.
    budget = share * total * (1 + 1e-12) - least
    if uniform:
        kept, exact = _equal_widths(values, sizes, budget, groups, within)
    elif within == "all":
        kept, exact = _best(values, sizes, budget)
    else:
        kept, exact = _same_share(values, sizes, _pools(groups, within), budget), False
    borders = np.cumsum([group.count for group in groups])[:-1]
    keep = {group.name: part for group, part in zip(groups, np.split(kept, borders), strict=True)}
    return Selection(keep=keep, cost=least + float(sizes[kept].sum()), total=total, least=least, exact=exact)


def _best(values: np.ndarray, sizes: np.ndarray, budget: float) -> tuple[np.ndarray, bool]:
    classes = [np.flatnonzero(sizes == size) for size in np.unique(sizes)[::-1] if size]
    ranked = [members[np.argsort(-values[members], kind="stable")] for members in classes]
    kept = sizes == 0  # what costs nothing stays
    if not ranked:
        return kept, True
    *large, small = ranked
    if np.prod([len(members) + 1.0 for members in large]) > _MOST_COMBINATIONS:
        return _greedy(values, sizes, budget), False
    for members, number in zip(ranked, _numbers(values, sizes, large, small, budget), strict=True):
        kept[members[:number]] = True
    return kept, True


def _numbers(
    values: np.ndarray, sizes: np.ndarray, large: list[np.ndarray], small: np.ndarray, budget: float
) -> tuple[int, ...]:
    """How many of each class to keep: every combination of the large ones, and as many small ones as then fit."""
    gains = [np.concatenate([[0.0], np.cumsum(values[members])]) for members in (*large, small)]
    counts = np.meshgrid(*[np.arange(len(members), -1, -1) for members in large], indexing="ij")
    spent = sum((number * sizes[members[0]] for number, members in zip(counts, large, strict=True)), np.zeros(()))
    rest = np.floor((budget - spent) / sizes[small[0]] + 1e-9)
    last = np.clip(rest, 0, len(small)).astype(int)
    gain = sum((g[number] for g, number in zip(gains, counts, strict=False)), np.zeros(())) + gains[-1][last]
    # Of equally good choices the first: that with most of the largest units, which are the fewest.
    place = np.unravel_index(np.argmax(np.where(rest < 0, -np.inf, gain)), gain.shape)
    return (*(int(number[place]) for number in counts), int(last[place]))


def _greedy(values: np.ndarray, sizes: np.ndarray, budget: float) -> np.ndarray:
    kept = sizes == 0
    for place in np.argsort(-values / np.where(kept, 1.0, sizes), kind="stable"):
        if not kept[place] and sizes[place] <= budget:
            kept[place] = True
            budget -= float(sizes[place])
    return kept


def _same_share(values: np.ndarray, sizes: np.ndarray, pools: list[np.ndarray], budget: float) -> np.ndarray:
    """The largest common share, rounded down in each pool, that fits; then one more unit of a pool while one fits."""
    ranked = [pool[np.argsort(-values[pool], kind="stable")] for pool in pools]
    share = min(max(budget, 0.0) / max(float(sizes.sum()), 1.0), 1.0)
    kept, numbers = np.zeros(len(values), bool), [int(share * len(pool) + 1e-9) for pool in pools]
    for members, number in zip(ranked, numbers, strict=True):
        kept[members[:number]] = True
    budget -= float(sizes[kept].sum())
    for members, number in sorted(zip(ranked, numbers, strict=True), key=lambda pair: pair[1] / len(pair[0])):
        if number < len(members) and sizes[members[number]] <= budget + 1e-9:
            kept[members[number]] = True
            budget -= float(sizes[members[number]])
    return kept


def _equal_widths(
    values: np.ndarray, sizes: np.ndarray, budget: float, groups: Sequence[UnitGroup], within: Within
) -> tuple[np.ndarray, bool]:
    """The same number of units in all groups of a kind: what is selected is the n-th best of each, together."""
    members = np.split(np.arange(len(values)), np.cumsum([group.count for group in groups])[:-1])
    ranked = [own[np.argsort(-values[own], kind="stable")] for own in members]
    kinds: dict[str, list[np.ndarray]] = {}
    for group, order in zip(groups, ranked, strict=True):
        together = kinds.setdefault(group.kind or group.name, [])
        if together and len(together[0]) != len(order):
            raise ValueError(
                f"`uniform`: unit group {group.name!r} has {len(order)} units, another of kind {group.kind!r} has "
                f"{len(together[0])}."
            )
        if len(set(sizes[order])) > 1:
            raise ValueError(f"`uniform`: the units of group {group.name!r} differ in size.")
        together.append(order)
    levels = [np.stack(orders) for orders in kinds.values()]
    gains = np.concatenate([values[level].sum(axis=0) for level in levels])
    prices = np.concatenate([sizes[level].sum(axis=0) for level in levels])
    borders = np.cumsum([level.shape[1] for level in levels])[:-1]
    if within == "all":
        chosen, exact = _best(gains, prices, budget)
    else:
        chosen, exact = _same_share(gains, prices, np.split(np.arange(len(gains)), borders), budget), False
    kept = np.zeros(len(values), bool)
    for level, own in zip(levels, np.split(chosen, borders), strict=True):
        kept[level[:, own]] = True
    return kept, exact


def _pools(groups: Sequence[UnitGroup], within: Within) -> list[np.ndarray]:
    names = list(itertools.chain.from_iterable([g.kind if within == "kind" else g.name] * g.count for g in groups))
    return [np.flatnonzero(np.array(names) == name) for name in dict.fromkeys(names)]


def _total(params: Params, costs: Mapping[str, float] | None) -> float:
    leaves = [(path, leaf) for path, leaf in leaves_with_paths(params) if hasattr(leaf, "shape")]
    return float(sum(leaf.size * (1.0 if costs is None else costs.get(path, 0.0)) for path, leaf in leaves))


def _values(scores: Mapping[str, Any], groups: Sequence[UnitGroup]) -> np.ndarray:
    if not groups:
        raise ValueError("`groups` is empty: there are no units to select.")
    for group in groups:
        if group.name not in scores:
            raise ValueError(f"`scores` has no entry for the unit group {group.name!r}.")
        values = np.asarray(scores[group.name], np.float64)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"The scores of {group.name!r} must be finite and not negative, got {values.tolist()}.")
    return np.concatenate([np.asarray(scores[group.name], np.float64) for group in groups])


def _check_share(share: float, least: float, total: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be in [0, 1], got {share}.")
    if total <= 0:
        raise ValueError("No counted leaf costs anything: check the paths in `costs`.")
    if share * total * (1 + 1e-12) < least:
        raise ValueError(
            f"`share` is {share}, but {least:.0f} of the total cost of {total:.0f} belong to no unit: the least "
            f"possible is {least / total:.6f}."
        )


def _check_disjoint(groups: Sequence[UnitGroup]) -> None:
    owners: dict[str, str] = {}
    for group in groups:
        for path in {part.path for part in group.slices}:
            if owners.setdefault(path, group.name) != group.name:
                raise ValueError(
                    f"Unit groups {owners[path]!r} and {group.name!r} both own weights of {path!r}: select units of "
                    "one of them, `shrink`, and then those of the other."
                )
