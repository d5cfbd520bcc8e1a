"""Choosing one option for each item under a budget, at the least loss: the multiple-choice knapsack, exactly."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Choice(NamedTuple):
    """What `cheapest_choice` finds.

    Attributes:
        options: the chosen option of every item.
        loss: the sum of their losses.
        cost: the sum of their costs, at most the budget.
        bound: no choice has a smaller loss than this; equal to `loss` when the search was exhaustive.
    """

    options: tuple[int, ...]
    loss: float
    cost: int
    bound: float


def cheapest_choice(costs: Sequence[Any], losses: Sequence[Any], budget: int, *, max_states: int = 200_000) -> Choice:
    """Minimises Σ losses[i][o_i] subject to Σ costs[i][o_i] <= budget, over one option o_i for every item i.

    Dynamic programming over the items. A state is what some choice for the first items costs and loses. States that
    another one beats in both are dropped, and so are states that cannot beat the best known choice: what the remaining
    items lose at least follows from their lower convex hulls (the linear relaxation, which a greedy walk solves).
    Runs on the host.

    Args:
        costs: for each item, the integer costs of its options, in any order, not negative.
        losses: for each item, the losses of its options; any finite numbers, not necessarily monotone.
        budget: integer.
        max_states: beyond that many states after an item, those with the largest bounds are dropped: the result may
            then miss the optimum, by at most `loss - bound`.

    Returns:
        The options, their loss and cost, and the lower bound.

    Raises:
        ValueError: an item without options, or with as many costs as not losses, or with losses that are not finite or
            negative costs; or the cheapest options together cost more than the budget.

    Example:
        >>> choice = cheapest_choice([[0, 2, 4], [0, 3]], [[9.0, 3.0, 0.0], [5.0, 0.0]], 5)
        >>> choice.options, choice.loss, choice.cost
        ((1, 1), 3.0, 5)

    References:
        Kellerer, Pferschy and Pisinger 2004, "Knapsack problems", chapter 11.
    """
    items = [_item(costs[i], losses[i], i) for i in range(_same_length(costs, losses))]
    least = sum(int(item.costs[0]) for item in items)
    if least > budget:
        raise ValueError(f"The cheapest options together cost {least}, more than the budget of {budget}.")
    hulls = [_hull(item.costs, item.losses) for item in items]
    # Items whose loss varies most come first: their options decide, and the bound on the rest is tight.
    order = sorted(range(len(items)), key=lambda i: -(items[i].losses[0] - items[i].losses[-1]))
    rests = [_Relaxed([hulls[i] for i in order[place:]]) for place in range(len(items) + 1)]
    known = rests[0].round_down(budget)
    states = _States(np.zeros(1, np.int64), np.zeros(1), [])
    missed = math.inf
    for place, i in enumerate(order):
        states = _extend(states, items[i])
        reach = states.losses + rests[place + 1].least(budget - states.costs)
        # A bound that equals the best known loss up to rounding must not drop the state that attains it.
        states, reach = states.take(hopeful := reach <= known + 1e-9 * (1 + abs(known))), reach[hopeful]
        if len(states.costs) > max_states:
            cut = np.sort(np.argpartition(reach, max_states)[:max_states])
            missed = min(missed, float(np.delete(reach, cut).min()))
            states = states.take(cut)
        known = min(known, float((states.losses + rests[place + 1].upper(budget - states.costs)).min()))
    best = int(np.argmin(states.losses))
    loss, cost = float(states.losses[best]), int(states.costs[best])
    options = [0] * len(items)
    for place, option in enumerate(states.path(best)):
        options[order[place]] = int(items[order[place]].original[option])
    return Choice(tuple(options), loss, cost, min(loss, missed))


class _Item(NamedTuple):
    """The options of one item that no other one beats: costs rise, losses fall."""

    costs: np.ndarray
    losses: np.ndarray
    original: np.ndarray


class _States(NamedTuple):
    """Choices for the items so far; `steps` leads back: one (parent, option) pair of arrays per item."""

    costs: np.ndarray
    losses: np.ndarray
    steps: list[tuple[np.ndarray, np.ndarray]]

    def take(self, which: np.ndarray) -> "_States":
        *before, (parents, options) = self.steps
        return _States(self.costs[which], self.losses[which], [*before, (parents[which], options[which])])

    def path(self, state: int) -> list[int]:
        path_options = []
        for parents, options in reversed(self.steps):
            path_options.append(int(options[state]))
            state = int(parents[state])
        return path_options[::-1]


class _Relaxed:
    """The linear relaxation of some items: from the cheapest options on, the steepest steps of all hulls first."""

    def __init__(self, hulls: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        steps = [
            (dl / dc, dc, dl)
            for costs, losses in hulls
            for dc, dl in zip(np.diff(costs).tolist(), np.diff(losses).tolist(), strict=True)
        ]
        steps.sort()
        self.base_cost = sum(int(costs[0]) for costs, _ in hulls)
        self.costs = np.array(list(itertools.accumulate((dc for _, dc, _ in steps), initial=0)), np.float64)
        base_loss = sum(float(losses[0]) for _, losses in hulls)
        self.losses = np.array(list(itertools.accumulate((dl for _, _, dl in steps), initial=base_loss)))

    def least(self, left: np.ndarray) -> np.ndarray:
        """A lower bound of the loss at what is left of the budget; inf where even the cheapest options cost more."""
        spare = left - self.base_cost
        return np.where(spare < 0, np.inf, np.interp(spare, self.costs, self.losses))

    def upper(self, left: np.ndarray) -> np.ndarray:
        """The loss of whole steps only, which some choice attains."""
        spare = left - self.base_cost
        whole = np.searchsorted(self.costs, spare, side="right") - 1
        return np.where(spare < 0, np.inf, self.losses[np.maximum(whole, 0)])

    def round_down(self, left: int) -> float:
        return float(self.upper(np.array([left]))[0])


def _same_length(costs: Sequence[Any], losses: Sequence[Any]) -> int:
    if len(costs) != len(losses):
        raise ValueError(f"`costs` has {len(costs)} items, `losses` {len(losses)}.")
    return len(costs)


def _item(costs: Any, losses: Any, place: int) -> _Item:
    cost, loss = np.asarray(costs, np.int64), np.asarray(losses, np.float64)
    if cost.ndim != 1 or cost.shape != loss.shape or not cost.size:
        raise ValueError(f"Item {place} needs one loss for each of its options, got {cost.shape} and {loss.shape}.")
    if not np.isfinite(loss).all() or (cost < 0).any():
        raise ValueError(f"Item {place} has a loss that is not finite, or a negative cost.")
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    efficient = order[np.concatenate([[True], best[1:] < best[:-1]])]
    return _Item(cost[efficient], loss[efficient], efficient)


def _hull(costs: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    corners: list[int] = []
    for i in range(len(costs)):
        while len(corners) > 1 and _is_above(costs, losses, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(i)
    return costs[corners], losses[corners]


def _is_above(costs: np.ndarray, losses: np.ndarray, a: int, b: int, c: int) -> bool:
    """Whether point b lies on or above the line from a to c."""
    left = (losses[b] - losses[a]) * float(costs[c] - costs[a])
    return bool(left >= (losses[c] - losses[a]) * float(costs[b] - costs[a]))


def _extend(states: _States, item: _Item) -> _States:
    """All states with one more item, without those that another state beats."""
    costs = (states.costs[:, None] + item.costs).reshape(-1)
    losses = (states.losses[:, None] + item.losses).reshape(-1)
    order = np.lexsort((losses, costs))
    best = np.minimum.accumulate(losses[order])
    efficient = order[np.concatenate([[True], best[1:] < best[:-1]])]
    options = len(item.costs)
    return _States(costs[efficient], losses[efficient], [*states.steps, (efficient // options, efficient % options)])
