"""The column solver against a loop in NumPy, and its hooks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.solvers.cholesky import inverse_factor
from jaxcompress._src.solvers.columns import block_sizes, solve_columns
from jaxcompress._src.solvers.runs import keep_in_runs

RNG = np.random.default_rng(0)


def _problem(depth, width):
    x = RNG.normal(size=(3 * depth, depth)) @ (RNG.normal(size=(depth, depth)) / np.sqrt(depth) + np.eye(depth))
    hessian = x.T @ x / len(x)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    return RNG.normal(size=(depth, width)), hessian, factor


def _loop(weights, factor, fix):
    """One input after another; `fix(w, i)` is what the input's weights become."""
    weights = weights.astype(np.float64).copy()
    for i in range(len(weights)):
        found = fix(weights, i)
        error = (weights[i] - found) / factor[i, i]
        weights[i:] -= np.outer(factor[i, i:], error)
        weights[i] = found
    return weights


def _round(w):
    return np.round(w * 4) / 4


@pytest.mark.parametrize("depth", [1, 7, 32, 45])
@pytest.mark.parametrize("block", [1, 8, 128])
def test_rounding_every_column(depth, block):
    weights, _, factor = _problem(depth, 5)
    found = solve_columns(
        jnp.asarray(weights),
        jnp.asarray(factor, jnp.float32),
        block_size=block,
        quantize_column=lambda w, parameters, i: jnp.round(w * 4) / 4,
    )
    np.testing.assert_allclose(found, _loop(weights, factor, lambda w, i: _round(w[i])), atol=1e-4)


def test_a_given_mask_with_rounding():
    weights, _, factor = _problem(20, 3)
    mask = RNG.random((20, 3)) < 0.5
    padded = jnp.asarray(np.pad(mask, ((0, 4), (0, 0))))
    found = solve_columns(
        jnp.asarray(weights),
        jnp.asarray(factor, jnp.float32),
        block_size=8,
        keep_block=lambda w, diagonal, block: jax.lax.dynamic_slice_in_dim(padded, 8 * block, 8),
        quantize_column=lambda w, parameters, i: jnp.round(w * 4) / 4,
    )
    expected = _loop(weights, factor, lambda w, i: np.where(mask[i], _round(w[i]), 0))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(found)[~mask], 0)


@pytest.mark.parametrize(("group", "block"), [(4, 8), (3, 8), (16, 8), (8, 8), (None, 8), (40, 8)])
def test_groups_get_their_parameters_from_updated_weights(group, block):
    weights, _, factor = _problem(22, 3)
    found = solve_columns(
        jnp.asarray(weights),
        jnp.asarray(factor, jnp.float32),
        block_size=block,
        quantize_column=lambda w, scale, i: jnp.round(w / scale) * scale,
        start_group=lambda w, first: jnp.abs(w).max(axis=0) / 4,
        group_size=group,
    )
    scales, size = {}, group or 22

    def fix(w, i):
        if i % size == 0:
            scales[i // size] = np.abs(w[i : i + size]).max(0) / 4
        return np.round(w[i] / scales[i // size]) * scales[i // size]

    np.testing.assert_allclose(found, _loop(weights, factor, fix), atol=1e-4)


def test_runs_are_decided_from_updated_weights():
    weights, _, factor = _problem(26, 4)

    def keep_run(w, diagonal):
        real = diagonal[:, None] > 0
        scores = jnp.where(real, jnp.square(w / jnp.where(real, diagonal[:, None], 1)), -1)
        return scores >= jnp.sort(scores, axis=0)[2:3]

    found = solve_columns(
        jnp.asarray(weights), jnp.asarray(factor, jnp.float32), block_size=6, keep_run=keep_run, run_size=3
    )
    kept = {}

    def fix(w, i):
        if i % 3 == 0:
            run = (w[i : i + 3] / np.diag(factor)[i : i + 3, None]) ** 2
            kept[i // 3] = run >= run.max(0)
        return np.where(kept[i // 3][i % 3], w[i], 0)

    np.testing.assert_allclose(found, _loop(weights, factor, fix), atol=1e-4)


def test_without_hooks_nothing_changes():
    weights, _, factor = _problem(9, 2)
    found = solve_columns(jnp.asarray(weights, jnp.float32), jnp.asarray(factor, jnp.float32))
    np.testing.assert_array_equal(found, weights.astype(np.float32))


def test_the_program_grows_with_the_logarithm_of_the_columns():
    def equations(depth):
        shapes = jax.ShapeDtypeStruct((depth, 5), jnp.float32), jax.ShapeDtypeStruct((depth, depth), jnp.float32)

        def run(weights, hessian):
            factor = inverse_factor(hessian, 0.01).factor
            return solve_columns(weights, factor, keep_block=lambda w, diagonal, block: jnp.abs(w) > 0.5)

        return str(jax.make_jaxpr(run)(*shapes)).count(" = ")

    # The factor's inverse doubles its blocks; the columns are a scan.
    assert equations(2048) - equations(1024) == equations(1024) - equations(512)


def test_sizes_that_do_not_fit():
    weights, _, factor = _problem(22, 3)
    run = lambda **sizes: solve_columns(jnp.asarray(weights), jnp.asarray(factor, jnp.float32), **sizes)  # noqa: E731
    with pytest.raises(ValueError, match="Sizes must be positive, got block_size=0"):
        run(block_size=0)
    with pytest.raises(ValueError, match="`group_size` 12 beyond the block must be a multiple of `block_size` 8"):
        run(block_size=8, group_size=12)
    assert block_sizes(22, 8, multiple=3) == [9, 9, 4]
    assert block_sizes(0, 8) == []
    assert solve_columns(jnp.zeros((0, 3)), jnp.zeros((0, 0))).shape == (0, 3)
    assert solve_columns(jnp.zeros((4, 0)), jnp.eye(4)).shape == (4, 0)


@pytest.mark.parametrize("depth", [1, 3, 6, 7, 10, 21])
def test_runs_that_the_last_one_cuts_short(depth):
    """Runs begin at multiples of four, whatever the number of inputs; the short one keeps two of what it has."""
    weights, _, factor = _problem(depth, 5)
    found = solve_columns(
        jnp.asarray(weights),
        jnp.asarray(factor, jnp.float32),
        keep_run=lambda w, d: keep_in_runs(jnp.where(d[:, None] > 0, jnp.square(w), -1.0), 2, 4, axis=0),
        run_size=4,
    )
    kept = {}

    def fix(w, i):
        if i % 4 == 0:
            order = np.argsort(np.argsort(-np.square(w[i : i + 4]), axis=0), axis=0)
            kept.update({i + j: row < 2 for j, row in enumerate(order)})
        return np.where(kept[i], w[i], 0)

    np.testing.assert_allclose(found, _loop(weights, factor, fix), atol=1e-4)


def test_groups_that_cut_runs_are_refused():
    weights, _, factor = _problem(12, 2)
    with pytest.raises(ValueError, match="`group_size` must be a multiple of `run_size`, got 6 and 4"):
        solve_columns(
            jnp.asarray(weights),
            jnp.asarray(factor, jnp.float32),
            keep_run=lambda w, d: w > 0,
            run_size=4,
            quantize_column=lambda w, scale, i: w,
            start_group=lambda w, first: w.max(axis=0),
            group_size=6,
        )
