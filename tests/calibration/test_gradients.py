"""Gradients and Fisher sums against formulas in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import calibration, tree

RNG = np.random.default_rng(2)
W = RNG.normal(size=(3, 2))
BATCHES = [RNG.normal(size=(4, 3)), RNG.normal(size=(4, 3)), RNG.normal(size=(2, 3))]


def _loss(params, x):
    return jnp.mean(jnp.sum((x @ params["w"]) ** 2, axis=-1))


def _by_example(x):
    return np.stack([2 * np.outer(row, row @ W) for row in x])


def _params(dtype="float32"):
    return {"w": jnp.asarray(W, dtype), "codes": jnp.ones(2, jnp.int8)}


def _batches():
    return (jnp.asarray(x, jnp.float32) for x in BATCHES)


def test_gradients_are_means_over_batches():
    found = calibration.gradients(_loss, _params(), _batches())
    np.testing.assert_allclose(found["w"], np.mean([_by_example(x).mean(0) for x in BATCHES], 0), rtol=1e-5)
    assert found["codes"] is tree.Unselected


def test_fisher_by_example_and_by_batch():
    every = np.concatenate([_by_example(x) for x in BATCHES])
    found = calibration.fisher(_loss, _params(), _batches())
    np.testing.assert_allclose(found["w"], (every**2).mean(0), rtol=1e-5)
    found = calibration.fisher(_loss, _params(), _batches(), per_example=False)
    np.testing.assert_allclose(found["w"], np.mean([_by_example(x).mean(0) ** 2 for x in BATCHES], 0), rtol=1e-5)


def test_sums_are_float32_whatever_the_params_are():
    assert calibration.fisher(_loss, _params("bfloat16"), _batches())["w"].dtype == jnp.float32


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="`batches` is empty"):
        calibration.fisher(_loss, _params(), [])
    with pytest.raises(ValueError, match="gradient of leaf 'w' holds NaN"):
        calibration.gradients(lambda p, x: jnp.sum(jnp.sqrt(p["w"] - p["w"])), _params(), _batches())
    with pytest.raises(ValueError, match="one common leading axis"):
        calibration.fisher(lambda p, b: _loss(p, b[0]), _params(), [(jnp.ones((2, 3)), jnp.ones(3))])
