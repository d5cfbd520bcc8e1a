"""The choice under a budget, against trying everything."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxcompress._src.solvers.budget import cheapest_choice


def _best_of_all(costs, losses, budget):
    found = [
        sum(loss[o] for loss, o in zip(losses, options, strict=True))
        for options in itertools.product(*(range(len(cost)) for cost in costs))
        if sum(cost[o] for cost, o in zip(costs, options, strict=True)) <= budget
    ]
    return min(found) if found else None


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(-0.1, 1.1), st.booleans())
@hypothesis.settings(max_examples=150, deadline=None)
def test_equals_trying_everything(seed, items, share, convex):
    """Any order of options, equal costs and losses, losses that rise with cost, hulls that miss the optimum."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, size=items)
    costs = [rng.integers(0, 12, size=size) for size in sizes]
    losses = [np.round(rng.normal(size=size), rng.integers(0, 3)) for size in sizes]
    if convex:
        losses = [(12.0 - cost) ** 2 * rng.random() for cost in costs]
    budget = round(share * sum(cost.max() for cost in costs))
    expected = _best_of_all(costs, losses, budget)
    if expected is None:
        with pytest.raises(ValueError, match="more than the budget"):
            cheapest_choice(costs, losses, budget)
        return
    choice = cheapest_choice(costs, losses, budget)
    picked = list(enumerate(choice.options))
    assert choice.loss == pytest.approx(expected, abs=1e-9)
    assert sum(losses[i][o] for i, o in picked) == pytest.approx(choice.loss, abs=1e-9)
    assert sum(costs[i][o] for i, o in picked) == choice.cost <= budget
    assert choice.bound == choice.loss


def test_many_items_of_real_sizes_are_solved_exactly():
    """36 kernels of a BERT, ten sparsities each, noisy losses: a bound that equals the loss proves it."""
    rng = np.random.default_rng(0)
    sizes = [384 * 384, 384 * 384, 384 * 384, 384 * 384, 384 * 1536, 1536 * 384] * 6
    kept = [[size - round(s * size) for s in np.linspace(0, 0.9, 10)] for size in sizes]
    losses = [rng.random() * np.linspace(0, 1, 10) ** rng.uniform(1, 4) + 0.01 * rng.random(10) for _ in sizes]
    choice = cheapest_choice(kept, losses, round(0.4 * sum(sizes)))
    assert choice.bound == choice.loss
    assert 0.39 * sum(sizes) < choice.cost <= 0.4 * sum(sizes)


def test_a_cut_search_says_how_far_off_it_may_be():
    rng = np.random.default_rng(1)
    costs = [rng.integers(1, 10**6, size=8) for _ in range(12)]
    losses = [rng.random(8) for _ in range(12)]
    budget = sum(int(cost.mean()) for cost in costs)
    exact = cheapest_choice(costs, losses, budget)
    cut = cheapest_choice(costs, losses, budget, max_states=3)
    assert exact.bound == exact.loss
    assert cut.bound <= exact.loss <= cut.loss


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="cost 3, more than the budget of 2"):
        cheapest_choice([[3, 5]], [[1.0, 0.0]], 2)
    with pytest.raises(ValueError, match=r"Item 1 needs one loss .* got \(2,\) and \(1,\)"):
        cheapest_choice([[1], [1, 2]], [[1.0], [1.0]], 2)
    with pytest.raises(ValueError, match="Item 0 has a loss that is not finite"):
        cheapest_choice([[1]], [[float("nan")]], 2)
    with pytest.raises(ValueError, match="`costs` has 1 items, `losses` 0"):
        cheapest_choice([[1]], [], 2)
    assert cheapest_choice([], [], 0).options == ()
