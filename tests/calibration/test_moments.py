"""Sums of rows that count more or less, against rows that stand there several times."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.calibration.layer_by_layer import Rows
from jaxcompress._src.calibration.moments import flat_weights, moments, targets

RNG = np.random.default_rng(0)
KERNEL, BIAS = RNG.normal(size=(3, 2)).astype(np.float32), RNG.normal(size=2).astype(np.float32)
NAMES = ("count", "inputs", "targets", "gram", "cross", "square")


def _pair(dense, pruned, residuals) -> Any:
    with np.errstate(invalid="ignore"):
        written = dense @ KERNEL + BIAS + residuals[0]
    rows = (dense, residuals[0], written), (pruned, residuals[1], None)
    parts: Any = [[None if part is None else jnp.asarray(part) for part in own] for own in rows]
    return tuple(Rows(*own) for own in parts)


def _rows(count):
    dense, pruned = (RNG.normal(size=(count, 3)).astype(np.float32) for _ in "12")
    residuals = tuple(RNG.normal(size=(count, 2)).astype(np.float32) for _ in "12")
    return dense, pruned, residuals


def _found(pairs, weights):
    sums = moments("w", pairs, jnp.asarray(KERNEL), jnp.asarray(BIAS), weights)
    found = targets(sums, KERNEL, BIAS)
    # The targets' squares, from Σ |t - b|², and from those of the gaps.
    kernel, bias = KERNEL.astype(np.float64), BIAS.astype(np.float64)
    whole = {field: np.asarray(value, np.float64) for field, value in vars(sums).items()}
    square = whole["energy"] + 2 * found.targets @ bias - found.count * np.square(bias).sum()
    gaps = whole["square"] + 2 * (kernel * whole["cross"]).sum() + 2 * bias @ whole["gaps"]
    gaps += np.trace(kernel.T @ found.gram @ kernel) + 2 * found.inputs @ kernel @ bias
    gaps += found.count * np.square(bias).sum()
    np.testing.assert_allclose(gaps, square, rtol=1e-5, atol=1e-4)
    return SimpleNamespace(**vars(found), square=square)


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
