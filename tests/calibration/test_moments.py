"""Sums of rows that count more or less, against rows that stand there several times."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.calibration.moments import flat_weights, moments
from jaxcompress._src.calibration.site import LeafPart, Site

RNG = np.random.default_rng(0)
KERNEL, BIAS = RNG.normal(size=(3, 2)).astype(np.float32), RNG.normal(size=2).astype(np.float32)
NAMES = ("count", "inputs", "targets", "gram", "cross", "square")


def _site(inputs, residual):
    return Site(kernel=LeafPart(path="w"), inputs=jnp.asarray(inputs), residual=jnp.asarray(residual), bias=None)


def _pair(dense, pruned, residuals):
    return _site(dense, residuals[0]), _site(pruned, residuals[1])


def _rows(count):
    dense, pruned = (RNG.normal(size=(count, 3)).astype(np.float32) for _ in "12")
    residuals = tuple(RNG.normal(size=(count, 2)).astype(np.float32) for _ in "12")
    return dense, pruned, residuals


def _found(pairs, weights):
    return moments(pairs, jnp.asarray(KERNEL), jnp.asarray(BIAS), weights)


def test_sums_are_those_of_float64():
    dense, pruned, residuals = _rows(7)
    weights = np.array([0.5, 0, 2, 1, 0.25, 0, 3], np.float32)
    x, a = pruned.astype(np.float64), weights[:, None].astype(np.float64)
    t = dense.astype(np.float64) @ KERNEL + BIAS + residuals[0] - residuals[1]
    wanted = (a.sum(), (a * x).sum(0), (a * t).sum(0), (a * x).T @ x, (a * x).T @ t, (a * t * t).sum())
    found = _found([_pair(dense, pruned, residuals)], [weights])
    for name, value in zip(NAMES, wanted, strict=True):
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_weight_is_how_often_a_row_stands_there():
    dense, pruned, residuals = _rows(5)
    times = np.array([2, 0, 1, 3, 1])
    repeated = (part.repeat(times, axis=0) for part in (dense, pruned, *residuals))
    several = _found([_pair(*(next(repeated), next(repeated)), tuple(repeated))], [None])
    weighted = _found([_pair(dense, pruned, residuals)], [times.astype(np.float32)])
    for name in NAMES:
        np.testing.assert_allclose(getattr(weighted, name), getattr(several, name), rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_row_of_weight_0_may_be_nan():
    dense, pruned, residuals = _rows(4)
    pruned[1], dense[1] = np.nan, np.inf
    weights = np.array([1, 0, 1, 1], np.float32)
    rest = [np.delete(part, 1, axis=0) for part in (dense, pruned, *residuals)]
    kept = _found([_pair(rest[0], rest[1], rest[2:])], [None])
    found = _found([_pair(dense, pruned, residuals)], [weights])
    for name in NAMES:
        np.testing.assert_allclose(getattr(found, name), getattr(kept, name), rtol=1e-5, atol=1e-5, err_msg=name)


def test_weights_of_masks():
    ids, mask = np.ones((2, 2)), np.array([[True, False], [True, True]])
    (found,) = flat_weights(lambda ids, mask: mask, [(ids, mask)])
    np.testing.assert_array_equal(found, np.array([1, 0, 1, 1], np.float32))
    (found,) = flat_weights(lambda ids, mask: mask * np.array([[0.5], [-1.0]]), [(ids, mask)])
    np.testing.assert_array_equal(found, np.array([0.5, 0, 0, 0], np.float32))
    assert flat_weights(None, [(ids,), (ids,)]) == [None, None]


def test_no_row_counts():
    dense, pruned, residuals = _rows(2)
    with pytest.raises(ValueError, match="`row_mask` leaves no row of the input of 'w'"):
        _found([_pair(dense, pruned, residuals)], [np.zeros(2, np.float32)])
