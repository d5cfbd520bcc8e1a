"""k-means on a line against brute force, scikit-learn (golden) and its own definition."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from jaxcompress._src.solvers.kmeans import kmeans_line, nearest_center

GOLDEN = np.load(Path(__file__).parent / "golden" / "kmeans.npz")


def loss(x, h, centers):
    return (h * (x - centers[nearest_center(x, centers)]) ** 2).sum()


def best_by_enumeration(x, h, count):
    order = np.argsort(x)
    x, h, least = x[order], h[order], np.inf
    for cuts in itertools.combinations(range(1, len(x)), count - 1):
        runs = [slice(a, b) for a, b in itertools.pairwise([0, *cuts, len(x)])]
        means = [np.average(x[run], weights=h[run]) for run in runs]
        least = min(least, sum((h[run] * (x[run] - mean) ** 2).sum() for run, mean in zip(runs, means, strict=True)))
    return least


@pytest.mark.parametrize("case", range(3))
def test_scikit_learn(case):
    x, h, centers, labels, inertia = (
        GOLDEN[f"{case}/{name}"] for name in ("values", "weights", "centers", "labels", "inertia")
    )
    np.testing.assert_array_equal(nearest_center(x, centers), labels)
    found = kmeans_line(x, len(centers), weights=h)
    own = loss(x, h, found)
    if case == 1:
        # Eight clusters: none of scikit-learn's starts leads to the optimum.
        assert own < inertia
        return
    assert own == pytest.approx(inertia, rel=1e-12)
    np.testing.assert_array_equal(nearest_center(x, found), labels)
    np.testing.assert_allclose(found, centers, rtol=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_no_partition_is_better(seed):
    rng = np.random.default_rng(seed)
    size, count = int(rng.integers(5, 11)), int(rng.integers(1, 5))
    x, h = rng.normal(size=size) + 1e3, rng.uniform(0.1, 2, size)
    assert loss(x, h, kmeans_line(x, count, weights=h)) == pytest.approx(best_by_enumeration(x, h, count), abs=1e-9)


def test_beyond_the_exact_sizes_lloyd_is_as_good_to_a_millionth():
    x = np.random.default_rng(0).normal(size=9000)
    exact, quick = kmeans_line(x, 8), kmeans_line(x, 8, exact_up_to=100)
    one = np.ones_like(x)
    assert loss(x, one, exact) <= loss(x, one, quick) <= loss(x, one, exact) * (1 + 1e-5)
    borders = np.searchsorted(np.sort(x), (quick[1:] + quick[:-1]) / 2)
    np.testing.assert_allclose(quick, [part.mean() for part in np.split(np.sort(x), borders)], rtol=1e-9)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], [0, 0, 0]),
        ([2.0], [2, 2, 2]),
        ([3.0, 1.0, 3.0], [1, 3, 3]),
        ([0.0, 0.0], [0, 0, 0]),
        ([1, 2, 3], [1, 2, 3]),
    ],
)
def test_fewer_values_than_clusters(values, expected):
    found = kmeans_line(np.array(values), 3)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found[nearest_center(np.array(values), found)], values)


def test_weights():
    x = np.array([0.0, 1.0, 10.0])
    np.testing.assert_allclose(kmeans_line(x, 1, weights=np.array([1.0, 3.0, 0.0])), [0.75])
    np.testing.assert_allclose(kmeans_line(x, 1, weights=np.zeros(3)), [11 / 3])
    for wrong in (np.array([1.0, -1.0, 1.0]), np.ones(2), np.array([1.0, np.nan, 1.0])):
        with pytest.raises(ValueError, match="Weights must be one finite number"):
            kmeans_line(x, 2, weights=wrong)


def test_bad_values_and_counts():
    with pytest.raises(ValueError, match="2 of 3 values are NaN or Inf"):
        kmeans_line(np.array([np.nan, 1.0, np.inf]), 2)
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        kmeans_line(np.ones(3), 0)
