"""Damped factors of good, singular and hopeless matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.solvers.cholesky import damped_cholesky, inverse_factor

RNG = np.random.default_rng(0)


def _hessian(depth, rows):
    x = RNG.normal(size=(rows, depth))
    return x.T @ x / rows


def test_factors_are_those_of_numpy():
    hessian = _hessian(9, 40)
    damped = hessian + 0.05 * np.diag(hessian).mean() * np.eye(9)
    found = damped_cholesky(jnp.asarray(hessian, jnp.float32), 0.05)
    np.testing.assert_allclose(found.factor, np.linalg.cholesky(damped), atol=1e-5)
    upper = inverse_factor(jnp.asarray(hessian, jnp.float32), 0.05)
    np.testing.assert_allclose(upper.factor, np.linalg.cholesky(np.linalg.inv(damped)).T, atol=1e-4)
    assert float(upper.damping) == pytest.approx(0.05)
    assert int(upper.retries) == 0


@pytest.mark.parametrize("depth", [128, 129, 300, 515, 770])
def test_factors_of_several_blocks(depth):
    hessian = _hessian(depth, 2 * depth)
    damped = hessian + 0.05 * np.diag(hessian).mean() * np.eye(depth)
    found = np.asarray(inverse_factor(jnp.asarray(hessian, jnp.float32), 0.05).factor)
    np.testing.assert_allclose(found, np.linalg.cholesky(np.linalg.inv(damped)).T, atol=1e-4)
    assert not np.tril(found, -1).any()


def test_damping_grows_tenfold_until_it_is_enough():
    # Eigenvalues 3 and -1: the mean of the diagonal is 1, so a share above 1 is needed.
    matrix = jnp.array([[1.0, 2.0], [2.0, 1.0]])
    found = damped_cholesky(matrix, 0.02)
    assert float(found.damping) == pytest.approx(2.0)
    assert int(found.retries) == 2
    np.testing.assert_allclose(found.factor @ found.factor.T, [[3.0, 2.0], [2.0, 3.0]], atol=1e-5)


def test_from_no_damping_at_all():
    found = inverse_factor(jnp.zeros((3, 3)), 0.0)
    assert int(found.retries) == 1
    assert np.isfinite(np.asarray(found.factor)).all()
    assert inverse_factor(jnp.zeros((0, 0)), 0.01).factor.shape == (0, 0)


def test_a_hopeless_matrix_ends():
    found = damped_cholesky(jnp.full((2, 2), jnp.nan), 0.01)
    assert int(found.retries) == 16
    assert not np.isfinite(np.asarray(found.factor)).all()


def test_solves_of_the_cpu_come_one_at_a_time():
    """jaxlib shares out batches among the threads that the programs of several devices run on: all wait forever."""
    lowered = jax.jit(inverse_factor).lower(jnp.eye(300), 0.0).as_text()
    solves = [line for line in lowered.splitlines() if "strsm" in line]
    assert solves
    assert all('num_batch_dims = "0"' in line for line in solves), solves
