"""Least squares under masks, and masks found by alternating directions."""

import itertools

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.solvers.alternating import alternating_mask
from jaxcompress._src.solvers.masked import masked_least_squares
from jaxcompress._src.solvers.rank import keep_largest
from jaxcompress._src.solvers.runs import keep_in_runs

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 6)) @ (RNG.normal(size=(6, 6)) / 2 + 0.6)
HESSIAN = X.T @ X / 30 + 0.01 * np.eye(6)
W = RNG.normal(size=(6, 3))


def _best(mask, column):
    """The least error of one output under a mask, and its weights."""
    kept = np.flatnonzero(mask)
    found = np.zeros(6)
    found[kept] = np.linalg.solve(HESSIAN[np.ix_(kept, kept)], (HESSIAN @ W[:, column])[kept])
    lost = W[:, column] - found
    return lost @ HESSIAN @ lost, found


def test_masked_least_squares_solves_every_output():
    mask = np.array([[1, 0, 0], [1, 0, 1], [1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0]], bool)
    expected = np.stack([_best(mask[:, r], r)[1] for r in range(3)], axis=1)
    for most, batch_size in ((6, 32), (6, 2)):
        found = masked_least_squares(
            jnp.asarray(W), jnp.asarray(HESSIAN), jnp.asarray(mask), most=most, batch_size=batch_size
        )
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert not masked_least_squares(jnp.asarray(W), jnp.asarray(HESSIAN), jnp.zeros((6, 3), bool), most=0).any()


def test_alternating_masks_come_close_to_the_best_of_all_masks():
    keep = lambda scores: jnp.stack([keep_largest([scores[:, r]], 3)[0] for r in range(3)], axis=1)  # noqa: E731
    mask = np.asarray(alternating_mask(jnp.asarray(W), jnp.asarray(HESSIAN), keep, iterations=60))
    np.testing.assert_array_equal(mask.sum(0), 3)
    for r in range(3):
        every = [np.isin(np.arange(6), kept) for kept in itertools.combinations(range(6), 3)]
        errors = sorted(_best(candidate, r)[0] for candidate in every)
        largest = np.argsort(np.argsort(np.abs(W[:, r]))) >= 3
        error = _best(mask[:, r], r)[0]
        assert error <= min(errors[1], _best(largest, r)[0]) * (1 + 1e-6)


def test_alternating_masks_obey_the_pattern():
    keep = lambda scores: keep_in_runs(scores, 1, 3, axis=0)  # noqa: E731
    mask = np.asarray(alternating_mask(jnp.asarray(W), jnp.asarray(HESSIAN), keep))
    np.testing.assert_array_equal(mask.reshape(2, 3, 3).sum(1), 1)
