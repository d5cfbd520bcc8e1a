"""Which of many units to keep, by value and cost: arithmetic of arrays, without groups or trees.

Shape letters: N units. All functions return a bool array (N,), True = kept; units that cost nothing are kept.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

# All combinations of counts are tried up to this number; more are found greedily.
_MOST_COMBINATIONS = 2_000_000


def highest_total(
    values: Float[np.ndarray, " N"], costs: Float[np.ndarray, " N"], budget: float
) -> tuple[Bool[np.ndarray, " N"], bool]:
    """The highest total value within the budget, and whether it is known to be the highest.

    Among units of one cost the best are those with the highest values, so only the number kept of each cost has to be
    found: all combinations of numbers are tried (heads and columns: two costs). With too many of them, greedily by
    value per cost. Among equal values the lower index is kept.
    """
    classes = [np.flatnonzero(costs == cost) for cost in np.unique(costs)[::-1] if cost]
    ranked = [members[_descending(values[members])] for members in classes]
    keep = costs == 0
    if not ranked:
        return keep, True
    *large, small = ranked
    if np.prod([len(members) + 1.0 for members in large]) > _MOST_COMBINATIONS:
        return _greedy(values, costs, budget), False
    for members, number in zip(ranked, _numbers(values, costs, large, small, budget), strict=True):
        keep[members[:number]] = True
    return keep, True


def same_share(
    values: Float[np.ndarray, " N"],
    costs: Float[np.ndarray, " N"],
    budget: float,
    pools: Sequence[Int[np.ndarray, " _"]],
) -> Bool[np.ndarray, " N"]:
    """The largest common share, rounded down in each pool, that fits; then one more unit of a pool while one fits.

    Args:
        values: of units; only those of one pool are compared.
        costs: of units.
        budget: of all pools together.
        pools: indices of the units of each pool.
    """
    ranked = [pool[_descending(values[pool])] for pool in pools]
    share = min(max(budget, 0.0) / max(float(costs.sum()), 1.0), 1.0)
    keep, numbers = np.zeros(len(values), bool), [int(share * len(pool) + 1e-9) for pool in pools]
    for members, number in zip(ranked, numbers, strict=True):
        keep[members[:number]] = True
    budget -= float(costs[keep].sum())
    for members, number in sorted(zip(ranked, numbers, strict=True), key=lambda pair: pair[1] / len(pair[0])):
        if number < len(members) and costs[members[number]] <= budget + 1e-9:
            keep[members[number]] = True
            budget -= float(costs[members[number]])
    return keep


def in_order(
    order: Int[np.ndarray, " N"],
    required: int,
    owners: Int[np.ndarray, " N"],
    alike: Sequence[bool],
    fits: Callable[[Bool[np.ndarray, " N"]], bool],
) -> Bool[np.ndarray, " N"]:
    """Unit after unit in a given order, whatever fits; one with no room is passed over for later ones.

    Args:
        order: indices of units, the first to be kept first.
        required: so many of the first are kept in any case.
        owners: the group of each unit.
        alike: of each group, whether its units cost the same, given all others.
        fits: whether a choice of units is within the budget; fewer units always are if more are.
    """

    def first(number: int) -> np.ndarray:
        keep = np.zeros(len(order), bool)
        keep[order[:number]] = True
        return keep

    low, high = required, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(first(middle)) else (low, middle - 1)
    keep, full = first(low), set()
    for place in order[low:]:
        group = int(owners[place])
        if group in full:
            continue
        keep[place] = True
        if not fits(keep):
            keep[place] = False
            # Where one unit did not fit, no other of its group does, now or later, if they cost the same.
            if alike[group]:
                full.add(group)
            if len(full) == len(alike):
                break
    return keep


def _numbers(
    values: np.ndarray, costs: np.ndarray, large: list[np.ndarray], small: np.ndarray, budget: float
) -> tuple[int, ...]:
    """How many of each class to keep: every combination of the large ones, and as many small ones as then fit."""
    gains = [np.concatenate([[0.0], np.cumsum(values[members])]) for members in (*large, small)]
    counts = np.meshgrid(*[np.arange(len(members), -1, -1) for members in large], indexing="ij")
    spent = sum((number * costs[members[0]] for number, members in zip(counts, large, strict=True)), np.zeros(()))
    rest = np.floor((budget - spent) / costs[small[0]] + 1e-9)
    last = np.clip(rest, 0, len(small)).astype(int)
    gain = sum((g[number] for g, number in zip(gains, counts, strict=False)), np.zeros(())) + gains[-1][last]
    # Of equally good choices the first: that with most of the largest units, which are the fewest.
    place = np.unravel_index(np.argmax(np.where(rest < 0, -np.inf, gain)), gain.shape)
    return (*(int(number[place]) for number in counts), int(last[place]))


def _greedy(values: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    keep = costs == 0
    for place in _descending(values / np.where(keep, 1.0, costs)):
        if not keep[place] and costs[place] <= budget:
            keep[place] = True
            budget -= float(costs[place])
    return keep


def _descending(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")
