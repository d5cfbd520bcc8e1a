"""Ranks by share, energy and budget, against brute force."""

import itertools

import numpy as np
import pytest

from jaxcompress._src.lowrank.ranks import fixed_rank, spectrum
from jaxcompress.lowrank import budget, energy, parameter_share


def leaves(seed=0, shapes=((3, 5), (4, 4), (6, 2)), stack=1):
    rng = np.random.default_rng(seed)
    return [
        spectrum(str(i), np.sort(rng.exponential(size=(stack, min(shape))))[:, ::-1], inputs=shape[0], outputs=shape[1])
        for i, shape in enumerate(shapes)
    ]


def test_losses_are_the_sums_of_dropped_squares_over_the_stack():
    found = spectrum("w", [[3.0, 2.0], [1.0, 0.5]], inputs=4, outputs=2)
    assert found.losses.tolist() == [14.25, 4.25, 0.0]
    assert (found.most, found.dense, found.parameters(2)) == (2, 16, 24)


def brute_force(found, limit, weight):
    best = np.inf
    options = [[*(k for k in range(1, leaf.most + 1) if leaf.parameters(k) < leaf.dense), None] for leaf in found]
    for ranks in itertools.product(*options):
        cost = sum(leaf.dense if k is None else leaf.parameters(k) for leaf, k in zip(found, ranks, strict=True))
        loss = sum(0.0 if k is None else weight(leaf) * leaf.losses[k] for leaf, k in zip(found, ranks, strict=True))
        best = min(best, loss) if cost <= limit else best
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("relative", [False, True])
def test_a_budget_is_spent_as_well_as_possible(seed, relative):
    found = leaves(seed, shapes=((9, 7), (12, 5), (8, 8)), stack=1 + seed % 2)

    def weight(leaf):
        return 1 / leaf.losses[0] if relative else 1.0

    for share in (0.3, 0.5, 0.81, 1.0):
        limit = int(share * sum(leaf.dense for leaf in found))
        ranks = budget(share, relative=relative)(found)
        spent = [leaf.dense if ranks[leaf.path] is None else leaf.parameters(ranks[leaf.path]) for leaf in found]
        loss = [0.0 if ranks[leaf.path] is None else weight(leaf) * leaf.losses[ranks[leaf.path]] for leaf in found]
        assert sum(spent) <= limit
        assert sum(loss) == pytest.approx(brute_force(found, limit, weight), rel=1e-9, abs=1e-12)


def test_a_budget_loses_no_more_than_equal_shares():
    found = leaves(3, shapes=((30, 20), (16, 40), (24, 24)))
    for share in (0.4, 0.6):
        losses = []
        for rule in (parameter_share(share), budget(share)):
            ranks = rule(found)
            losses.append(sum(0.0 if (k := ranks[leaf.path]) is None else leaf.losses[k] for leaf in found))
        assert losses[1] <= losses[0]


def test_the_whole_size_keeps_every_leaf_dense():
    assert set(budget(1.0)(leaves()).values()) == {None}


def test_multiples_and_importance_and_bytes():
    found = leaves(1, shapes=((32, 32), (32, 32)))
    ranks = budget(0.5, multiple_of=4)(found)
    assert all(k is None or k % 4 == 0 for k in ranks.values())
    skewed = budget(0.5, importance={"0": 1e6})(found)
    assert skewed["0"] is None or skewed["0"] > (budget(0.5, importance={"1": 1e6})(found)["0"] or 0)
    halves = [
        spectrum("a", np.ones((1, 8)), inputs=8, outputs=8, itemsize=2),
        spectrum("b", np.ones((1, 8)), inputs=8, outputs=8, itemsize=4),
    ]
    # 256 bytes: the leaf of two-byte numbers is kept whole (128 bytes), and two directions of the other fit (2 * 64).
    assert budget(total=256, unit="bytes")(halves) == {"a": None, "b": 2}


def test_energy_keeps_the_least_rank_that_is_enough():
    found = spectrum("w", [[4.0, 2.0, 1.0, 0.0]], inputs=40, outputs=40)
    for share, rank in ((0.5, 1), (16 / 21, 1), (0.77, 2), (20 / 21 - 1e-9, 2), (1.0, 3)):
        assert energy(share)([found]) == {"w": rank}
    assert energy(0.999)([spectrum("w", [[1.0, 1.0]], inputs=2, outputs=2)]) == {"w": None}
    assert energy(0.9)([spectrum("zeros", [[0.0, 0.0]], inputs=4, outputs=4)]) == {"zeros": 0}


def test_shares_count_as_the_reference_does():
    assert parameter_share(0.5)([spectrum("w", [[1.0] * 7], inputs=13, outputs=7)]) == {"w": int(13 * 7 * 0.5 / 20)}
    # One direction of 2 x 2 takes as much as the leaf.
    assert parameter_share(0.5)([spectrum("w", [[1.0, 1.0]], inputs=2, outputs=2)]) == {"w": None}


def test_fixed_ranks():
    found = leaves()
    assert fixed_rank(3)(found) == {"0": 3, "1": 3, "2": 2}
    assert fixed_rank({"0": 1, "1": None, "2": 0})(found) == {"0": 1, "1": None, "2": 0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fixed_rank(-1), "at least 0"),
        (lambda: fixed_rank({"w": 1})(leaves()), "no entry for leaf '0'"),
        (lambda: energy(0.0), r"\(0, 1\]"),
        (lambda: parameter_share(1.5), r"\(0, 1\]"),
        (lambda: budget(), "one of `share` and `total`"),
        (lambda: budget(0.5, total=3), "one of `share` and `total`"),
        (lambda: budget(0.5, multiple_of=0), "`multiple_of`"),
        (lambda: budget(0.5, least=-1), "`least`"),
        (lambda: budget(total=3)(leaves()), "cheapest options together cost"),
    ],
)
def test_options_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
