"""Tables and codes of one matrix of runs: against exhaustive search and least squares in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.clustering.additive_fit import fit_additive, least_squares_tables
from jaxcompress._src.clustering.additive_search import search_codes
from jaxcompress.clustering import AdditiveSpec


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gamma(*shape, seed=1):
    return np.random.default_rng(seed).gamma(0.5, size=shape).astype(np.float32)


def energy(h, x):
    return float((np.asarray(h, np.float64) * np.asarray(x, np.float64) ** 2).sum())


@pytest.mark.parametrize(("count", "values"), [(1, 7), (2, 5), (3, 3)])
def test_a_wide_beam_finds_the_best_of_all_codes(count, values):
    x, h, tables = normal(40, 3), gamma(40, 3), normal(count, values, 3, seed=2)
    start = jnp.zeros((40, count), jnp.uint8)
    found = search_codes(jnp.asarray(x), jnp.asarray(h), start, jnp.asarray(tables), values ** (count - 1))
    every = np.array(list(itertools.product(range(values), repeat=count)))
    sums = tables[np.arange(count), every].sum(1, dtype=np.float64)
    costs = (h[:, None] * (x[:, None] - sums) ** 2).sum(-1)
    own = tables[np.arange(count), np.asarray(found)].sum(1, dtype=np.float64)
    np.testing.assert_allclose((h * (x - own) ** 2).sum(-1), costs.min(1), rtol=1e-5, atol=1e-6)


def test_search_never_loses_what_it_is_given_and_exchanges_help():
    x, h, tables = normal(300, 4), gamma(300, 4), normal(4, 6, 4, seed=2)
    start = np.random.default_rng(3).integers(0, 6, (300, 4)).astype(np.uint8)

    def costs(codes):
        return (h * (x - tables[np.arange(4), codes].sum(1, dtype=np.float64)) ** 2).sum(-1)

    narrow = np.asarray(search_codes(*map(jnp.asarray, (x, h, start, tables)), 1))
    again = np.asarray(search_codes(*map(jnp.asarray, (x, h, narrow, tables)), 1))
    wide = np.asarray(search_codes(*map(jnp.asarray, (x, h, start, tables)), 16))
    assert (costs(narrow) <= costs(start)).all()
    assert (costs(again) <= costs(narrow)).all()
    assert costs(wide).sum() < costs(narrow).sum() < 0.2 * costs(start).sum()


@pytest.mark.parametrize(("count", "size"), [(1, 60), (2, 60), (3, 60), (3, 8)])
def test_tables_are_the_least_squares_of_their_codes(count, size):
    """Also where there are fewer runs than unknowns."""
    rng, values = np.random.default_rng(0), 4
    x, h, codes = normal(size, 3), gamma(size, 3), rng.integers(0, values, (size, count)).astype(np.uint8)
    h[:5, 1] = 0
    start = normal(count, values, 3, seed=4)
    found = least_squares_tables(*map(jnp.asarray, (x, h, codes, start)))
    design = np.zeros((size, count * values))
    for m in range(count):
        design[np.arange(size), m * values + codes[:, m]] = 1
    for d in range(3):
        root = np.sqrt(h[:, d].astype(np.float64))
        best = np.linalg.lstsq(root[:, None] * design, root * x[:, d], rcond=None)[0]
        wanted = energy(h[:, d], x[:, d] - design @ best)
        own = energy(h[:, d], x[:, d] - design @ np.asarray(found, np.float64)[..., d].reshape(-1))
        assert own == pytest.approx(wanted, rel=1e-4, abs=1e-6 * energy(h[:, d], x[:, d]))


def test_without_rounds_tables_are_those_of_the_seeds():
    x, h = jnp.asarray(normal(500, 4)), jnp.ones((500, 4))
    fit = fit_additive(x, h, AdditiveSpec(length=4, tables=1, values=16, rounds=0, dtype="float32"))
    assert fit.errors.shape == (1,)
    codes = np.asarray(fit.codes)[:, 0]
    distances = ((np.asarray(x, np.float64)[:, None] - np.asarray(fit.tables, np.float64)[0]) ** 2).sum(-1)
    np.testing.assert_array_equal(codes, distances.argmin(1))
    assert len(np.unique(codes)) == 16
    # Sixteen values for four numbers: one bit each would leave 1 - 2 / pi.
    assert float(fit.errors[0]) / (np.asarray(x) ** 2).sum() < 1 - 2 / np.pi
