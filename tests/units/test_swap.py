"""Swapping against brute force."""

import itertools

import numpy as np
import pytest

from jaxcompress.structured import swap_units


def _cost(removed, matrix):
    return removed @ matrix @ removed


def _problem(seed, count=7, examples=3):
    gradients = np.random.default_rng(seed).normal(size=(examples, count))
    return gradients, gradients.T @ gradients / examples


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("number", [1, 3, 6])
def test_no_single_swap_helps_any_more(seed, number):
    (gradients, matrix), kept = _problem(seed), np.arange(7) < number
    found = swap_units({"g": kept}, {"g": gradients})["g"]
    assert found.sum() == number
    cost = _cost((~found).astype(float), matrix)
    assert cost <= _cost((~kept).astype(float), matrix)
    for into, out in itertools.product(np.flatnonzero(~found), np.flatnonzero(found)):
        other = found.copy()
        other[into], other[out] = True, False
        assert _cost((~other).astype(float), matrix) >= cost - 1e-9


def test_the_best_of_all_choices_is_never_left():
    gradients, matrix = _problem(3)
    choices = [np.isin(np.arange(7), chosen) for chosen in itertools.combinations(range(7), 3)]
    best = min(choices, key=lambda kept: _cost((~kept).astype(float), matrix))
    np.testing.assert_array_equal(swap_units({"g": best}, {"g": gradients})["g"], best)


def test_copies_share_their_work():
    """Units 0 and 1 do the same: removing both costs four times one of them, which the diagonal does not see."""
    gradients = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.5]])
    found = swap_units({"g": [False, False, True]}, {"g": gradients})["g"]
    assert found.tolist() in ([True, False, False], [False, True, False])


@pytest.mark.parametrize("kept", [[True] * 3, [False] * 3])
def test_nothing_to_swap(kept):
    assert swap_units({"g": kept}, {"g": np.eye(3)})["g"].tolist() == kept


def test_groups_without_gradients_stay_and_the_input_is_not_changed():
    kept = np.array([True, False])
    found = swap_units({"a": kept, "b": kept}, {"b": np.diag([0.0, 1.0])})
    assert found["a"].tolist() == [True, False]
    assert found["b"].tolist() == [False, True]
    assert kept.tolist() == [True, False]
    np.testing.assert_array_equal(swap_units({"a": kept}, {"a": np.zeros((2, 2))})["a"], kept)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="The gradients of 'g' are of 3 units; `keep` has 2"):
        swap_units({"g": [True, False]}, {"g": np.eye(3)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite_are_named(value):
    """The search would never end: no change compares as too small."""
    gradients = np.eye(3)
    gradients[1, 2] = value
    with pytest.raises(ValueError, match="The gradients of 'g' hold NaN or Inf"), np.errstate(invalid="ignore"):
        swap_units({"g": [True, False, False]}, {"g": gradients})
