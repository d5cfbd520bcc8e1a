"""Wanda, SparseGPT, ALPS and mask tuning: counts, layouts, stacks, dtypes, errors, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress import pruning, tree
from jaxcompress.calibration import InputStatistics, input_statistics
from jaxcompress.trace import LeafLayout

RNG = np.random.default_rng(0)
DEPTH, WIDTH = 12, 5
OUT_IN = LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,))
METHODS = {"wanda": pruning.wanda, "sparsegpt": pruning.sparsegpt, "alps": pruning.alps}


def _rows(depth=DEPTH):
    return RNG.normal(size=(40, depth)) @ (RNG.normal(size=(depth, depth)) / np.sqrt(depth) + 0.5)


def _statistics(rows, cross=None):
    rows = np.asarray(rows, np.float32)
    cross = None if cross is None else jnp.asarray(np.asarray(cross, np.float32).T @ rows)
    return InputStatistics(
        count=jnp.float32(len(rows)),
        gram=jnp.asarray(rows.T @ rows),
        squared_sum=jnp.asarray((rows**2).sum(0)),
        cross=cross,
    )


X = _rows()
W = RNG.normal(size=(DEPTH, WIDTH))
PARAMS = {"kernel": jnp.asarray(W, jnp.float32), "bias": jnp.ones(WIDTH)}
STATISTICS = {"kernel": _statistics(X), "bias": tree.Unselected}


def _error(found, rows=X, weights=W):
    rows, found = np.asarray(rows, np.float64), np.asarray(found, np.float64)
    return np.linalg.norm(rows @ (weights - found)) / np.linalg.norm(rows @ weights)


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_exact_and_errors_are_those_of_the_outputs(method):
    for sparsity in (0.0, 0.3, 0.5, 1.0):
        pruned, info = METHODS[method](PARAMS, STATISTICS, sparsity=sparsity)
        kernel = np.asarray(pruned["kernel"])
        zeros = WIDTH * round(sparsity * DEPTH) if method == "wanda" else round(sparsity * W.size)
        assert (kernel == 0).sum() == zeros
        assert info["kernel"].sparsity == pytest.approx(zeros / W.size)
        assert info["kernel"].error == pytest.approx(_error(kernel), abs=2e-3)
        assert info["kernel"].error_before == pytest.approx(_error(np.where(kernel == 0, 0, W)), abs=2e-3)
        assert pruned["bias"] is PARAMS["bias"]
    np.testing.assert_allclose(METHODS[method](PARAMS, STATISTICS, sparsity=0.0)[0]["kernel"], W, atol=1e-4)


def test_each_method_is_better_than_the_one_before():
    errors = [METHODS[method](PARAMS, STATISTICS, sparsity=0.5)[1]["kernel"].error for method in METHODS]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_n_of_m_keeps_n_of_every_m_inputs(method):
    pruned, info = METHODS[method](PARAMS, STATISTICS, pattern=pruning.n_of_m(2, 4))
    kept = np.asarray(pruned["kernel"]).reshape(3, 4, WIDTH) != 0
    np.testing.assert_array_equal(kept.sum(1), 2)
    assert info["kernel"].error < pruning.wanda(PARAMS, STATISTICS, pattern=pruning.n_of_m(2, 4))[1]["kernel"].error


def test_wanda_scores_and_rows_in_numpy():
    scores = np.abs(W) * np.sqrt((X**2).mean(0))[:, None]
    found = pruning.wanda_scores(PARAMS, STATISTICS)
    np.testing.assert_allclose(found["kernel"], scores, rtol=1e-5)
    assert found["bias"] is tree.Unselected
    kept = np.argsort(np.argsort(scores, axis=0), axis=0) >= DEPTH // 2
    pruned, _ = pruning.wanda(PARAMS, STATISTICS, sparsity=0.5)
    np.testing.assert_array_equal(pruned["kernel"], np.where(kept, W, 0).astype(np.float32))
    everywhere, _ = pruning.wanda(PARAMS, STATISTICS, sparsity=0.5, scope="leaf")
    np.testing.assert_array_equal(np.asarray(everywhere["kernel"]) != 0, scores >= np.sort(scores.ravel())[W.size // 2])


def test_blocks_of_sparsegpt_lose_the_same_or_what_costs_least():
    pruned, even = pruning.sparsegpt(PARAMS, STATISTICS, sparsity=0.5, block_size=4, scope="block")
    zeros = (np.asarray(pruned["kernel"]) == 0).reshape(3, -1).sum(1)
    np.testing.assert_array_equal(zeros, [10, 10, 10])
    pruned, _ = pruning.sparsegpt(PARAMS, STATISTICS, sparsity=0.5, block_size=4, scope="leaf")
    upper = np.linalg.cholesky(np.linalg.inv(_damped(X))).T
    scores = (W / np.diag(upper)[:, None]) ** 2
    expected = (scores < np.sort(scores.ravel())[30]).reshape(3, -1).sum(1)
    np.testing.assert_array_equal((np.asarray(pruned["kernel"]) == 0).reshape(3, -1).sum(1), expected)
    assert even["kernel"].damping == pytest.approx(0.01)


def _damped(rows, damping=0.01):
    hessian = np.asarray(rows, np.float64).T @ rows
    return hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))


def test_tuning_solves_each_output_exactly():
    mask = RNG.random(W.shape) < 0.6
    mask[:, 0], mask[:, 1] = False, True
    tuned, info = pruning.tune_masked(PARAMS, {"kernel": jnp.asarray(mask), "bias": tree.Unselected}, STATISTICS)
    hessian, expected = _damped(X), np.zeros_like(W)
    for r in range(WIDTH):
        kept = np.flatnonzero(mask[:, r])
        expected[kept, r] = np.linalg.solve(hessian[np.ix_(kept, kept)], (hessian @ W[:, r])[kept])
    np.testing.assert_allclose(tuned["kernel"], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(tuned["kernel"])[~mask], 0)
    assert info["kernel"].error <= info["kernel"].error_before
    with pytest.raises(ValueError, match=r"'kernel' has shape \(12, 5\), its mask \(5, 12\)"):
        pruning.tune_masked(PARAMS, {"kernel": jnp.asarray(mask.T), "bias": tree.Unselected}, STATISTICS)


@pytest.mark.parametrize("method", METHODS)
def test_any_layout_gives_the_same_weights(method):
    run = METHODS[method]
    expected = np.asarray(run(PARAMS, STATISTICS, sparsity=0.5)[0]["kernel"])
    stored, _ = run({"w": PARAMS["kernel"].T}, {"w": STATISTICS["kernel"]}, sparsity=0.5, layouts={"w": OUT_IN})
    np.testing.assert_allclose(stored["w"], expected.T, rtol=1e-4, atol=1e-5)
    # Two input axes, two output axes, between them a stack of two.
    stacked = np.stack([W.reshape(3, 4, WIDTH), 2 * W.reshape(3, 4, WIDTH)], axis=2)[..., None]
    layout = LeafLayout(kind="matmul", stack_axes=(2,), input_axes=(0, 1), output_axes=(3, 4))
    both = jax.tree.map(lambda part: jnp.stack([part, part]), STATISTICS["kernel"])
    found, _ = run({"w": jnp.asarray(stacked, jnp.float32)}, {"w": both}, sparsity=0.5, layouts={"w": layout})
    for entry in (0, 1):
        got = np.asarray(found["w"])[:, :, entry].reshape(DEPTH, WIDTH)
        np.testing.assert_allclose(got, (1 + entry) * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_leaves_stay_bfloat16(method):
    params = {"kernel": PARAMS["kernel"].astype(jnp.bfloat16)}
    pruned, info = METHODS[method](params, {"kernel": STATISTICS["kernel"]}, sparsity=0.5)
    assert pruned["kernel"].dtype == jnp.bfloat16
    assert info["kernel"].sparsity == pytest.approx(0.5)


@pytest.mark.parametrize("method", METHODS)
def test_unseen_inputs_and_singular_matrices(method):
    rows = X[:4].copy()
    rows[:, [2, 7]] = 0
    statistics = {"kernel": _statistics(rows), "bias": tree.Unselected}
    pruned, info = METHODS[method](PARAMS, statistics, sparsity=0.5)
    kernel = np.asarray(pruned["kernel"])
    assert info["kernel"].unseen_inputs == 2
    assert np.isfinite(kernel).all()
    assert info["kernel"].sparsity == pytest.approx(0.5)
    if method != "alps":
        published, _ = METHODS[method](PARAMS, statistics, sparsity=0.5, unseen="zero")
        np.testing.assert_array_equal(published["kernel"][jnp.array([2, 7])], 0)
    nothing = {"kernel": _statistics(np.zeros_like(X)), "bias": tree.Unselected}
    with pytest.warns(UserWarning, match="No row of the calibration data reached 'kernel': their weights were ranked"):
        pruned, info = METHODS[method](PARAMS, nothing, sparsity=0.5)
    assert (info["kernel"].unseen_inputs, info["kernel"].unseen_entries) == (DEPTH, 1)
    assert info["kernel"].error is None
    assert np.isfinite(np.asarray(pruned["kernel"])).all()


def test_damping_that_had_to_grow_is_reported():
    rows = np.repeat(X[:, :1], DEPTH, axis=1)
    _, info = pruning.sparsegpt({"kernel": PARAMS["kernel"]}, {"kernel": _statistics(rows)}, sparsity=0.5, damping=0.0)
    assert info["kernel"].retries > 0
    assert info["kernel"].damping > 0


def test_targets_of_the_dense_model_undo_a_distortion():
    # What the leaf gets now is its input times A: W' = A⁻¹ W gives the dense outputs back.
    distortion = np.eye(DEPTH) + 0.2 * RNG.normal(size=(DEPTH, DEPTH))
    statistics = {"kernel": _statistics(X @ distortion, cross=X)}
    pruned, info = pruning.sparsegpt({"kernel": PARAMS["kernel"]}, statistics, sparsity=0.0, damping=1e-6, ridge=1e-6)
    outputs, wanted = X @ distortion @ np.asarray(pruned["kernel"], np.float64), X @ W
    assert np.linalg.norm(outputs - wanted) < 5e-3 * np.linalg.norm(wanted)
    assert np.linalg.norm(X @ distortion @ W - wanted) > 0.1 * np.linalg.norm(wanted)
    assert info["kernel"].error < 1e-3


@pytest.mark.parametrize("method", [pruning.sparsegpt, pruning.alps], ids=["sparsegpt", "alps"])
def test_a_ridge_holds_the_targets_to_the_weights(method):
    # With a large one, what the dense model got does not matter.
    distortion = np.eye(DEPTH) + 0.2 * RNG.normal(size=(DEPTH, DEPTH))
    crossed, plain = {"kernel": _statistics(X @ distortion, cross=X)}, {"kernel": _statistics(X @ distortion)}

    def pruned(statistics, ridge):
        return np.asarray(method({"kernel": PARAMS["kernel"]}, statistics, sparsity=0.5, ridge=ridge)[0]["kernel"])

    wanted = pruned(plain, 0.1)
    found = {ridge: pruned(crossed, ridge) for ridge in (1e7, 0.1, 0.0)}
    np.testing.assert_allclose(found[1e7], wanted, atol=1e-4)
    assert np.linalg.norm(found[0.1] - wanted) < np.linalg.norm(found[0.0] - wanted)
    with pytest.raises(ValueError, match="`ridge` must not be negative, got -1"):
        pruned(plain, -1.0)


def _to_halves(weights, parameters, index):
    return 0.5 * jnp.round(weights / 0.5)


@pytest.mark.parametrize(("sparsity", "most"), [(0.0, 0.85), (0.5, 0.995)])
def test_pruning_and_rounding_in_one_pass(sparsity, most):
    """Over eight kernels, the joint pass loses less than rounding afterwards; what pruning loses dwarfs the gain."""
    step, ratios = 0.5, []
    for seed in range(8):
        weights = np.random.default_rng(seed).normal(size=(DEPTH, 64))
        params, statistics = {"kernel": jnp.asarray(weights, jnp.float32)}, {"kernel": STATISTICS["kernel"]}
        joint, info = pruning.sparsegpt(params, statistics, sparsity=sparsity, quantize_column=_to_halves)
        kernel = np.asarray(joint["kernel"])
        np.testing.assert_allclose(kernel / step, np.round(kernel / step), atol=1e-5)
        assert (kernel == 0).sum() >= sparsity * weights.size
        pruned, _ = pruning.sparsegpt(params, statistics, sparsity=sparsity)
        afterwards = _error(step * np.round(np.asarray(pruned["kernel"]) / step), weights=weights)
        ratios.append(info["kernel"].error / afterwards)
    assert np.mean(ratios) < most, ratios
    assert sparsity or max(ratios) < 1, ratios


def test_one_sparsity_for_each_leaf():
    params = {"a": PARAMS["kernel"], "b": PARAMS["kernel"]}
    statistics = dict.fromkeys(params, STATISTICS["kernel"])
    for run in METHODS.values():
        _, info = run(params, statistics, sparsity={"a": 0.25, "b": 0.75})
        assert [info[name].sparsity for name in "ab"] == pytest.approx([0.25, 0.75])
    with pytest.raises(ValueError, match="no entry for leaf 'b'"):
        pruning.wanda(params, statistics, sparsity={"a": 0.25, "b": tree.Unselected})


def test_ties_are_counted_exactly():
    params = {"kernel": jnp.ones((DEPTH, WIDTH))}
    statistics = {"kernel": _statistics(np.eye(DEPTH))}
    for run in METHODS.values():
        assert run(params, statistics, sparsity=0.5)[1]["kernel"].sparsity == pytest.approx(0.5)
    pruned, _ = pruning.wanda(params, statistics, sparsity=0.5)
    np.testing.assert_array_equal(pruned["kernel"][:, 0], [1] * 6 + [0] * 6)


def test_equal_on_one_and_on_eight_devices():
    kernel = jnp.asarray(RNG.normal(size=(DEPTH, 16)), jnp.float32)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(None, "model")))
    statistics = {"kernel": STATISTICS["kernel"]}
    everywhere = jax.device_put(statistics, NamedSharding(mesh, PartitionSpec()))
    expected, _ = pruning.sparsegpt({"kernel": kernel}, statistics, sparsity=0.5)
    found, _ = pruning.sparsegpt({"kernel": placed}, everywhere, sparsity=0.5)
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-4, atol=1e-5)


def test_from_statistics_to_pruned_params():
    params = {"up": jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32), "table": jnp.ones((9, 12))}
    apply = lambda p, ids: p["table"][ids] @ p["up"]  # noqa: E731
    ids = jnp.arange(9)
    statistics = input_statistics(apply, params, [(ids,)])
    pruned, info = pruning.sparsegpt(params, statistics, sparsity=0.25)
    assert list(info) == ["up"]
    assert pruned["table"] is params["table"]


def test_mistakes_are_named():
    run = lambda **options: pruning.sparsegpt(PARAMS, STATISTICS, **options)  # noqa: E731
    with pytest.raises(ValueError, match="`sparsity` is needed"):
        run()
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\], got 1.5"):
        run(sparsity=1.5)
    with pytest.raises(ValueError, match=r"implies a `sparsity` of 0.5, got 0.25"):
        run(sparsity=0.25, pattern=pruning.n_of_m(2, 4))
    with pytest.raises(ValueError, match="single weights or n of m"):
        run(sparsity=0.5, pattern=pruning.block(2, 2))
    with pytest.raises(ValueError, match="`damping` must be at least 0, got -1"):
        run(sparsity=0.5, damping=-1.0)
    with pytest.raises(ValueError, match="`block_size` must be at least 1"):
        run(sparsity=0.5, block_size=0)
    with pytest.raises(ValueError, match="`counting='wanda'` counts in rows"):
        pruning.wanda(PARAMS, STATISTICS, sparsity=0.5, scope="leaf", counting="wanda")
    with pytest.raises(ValueError, match="'bias' has no statistic 'gram'"):
        run(sparsity=0.5, select=lambda params: dict.fromkeys(params, True))
    with pytest.raises(ValueError, match="there is nothing to compress"):
        pruning.wanda(PARAMS, dict.fromkeys(PARAMS, tree.Unselected), sparsity=0.5)
    with pytest.raises(ValueError, match=r"'kernel' of shape \(5, 12\) has stack \[\] and 5 inputs.*give `layouts`"):
        pruning.wanda({"kernel": PARAMS["kernel"].T}, {"kernel": STATISTICS["kernel"]}, sparsity=0.5)


def test_values_that_are_not_finite_are_named():
    broken = {"kernel": PARAMS["kernel"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="Leaf 'kernel' holds 1 NaN"):
        pruning.sparsegpt(broken, {"kernel": STATISTICS["kernel"]}, sparsity=0.5)
    with pytest.raises(ValueError, match="statistics of leaf 'kernel' hold NaN or Inf"):
        pruning.sparsegpt({"kernel": PARAMS["kernel"]}, {"kernel": _statistics(np.full_like(X, np.inf))}, sparsity=0.5)


@pytest.mark.parametrize("method", [pruning.wanda, pruning.sparsegpt, pruning.alps])
@pytest.mark.parametrize("width", [1, 3, 6, 9])
def test_n_of_m_holds_in_a_last_run_that_is_short(method, width):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(width, 5)), jnp.float32)}
    pruned, _ = method(params, {"kernel": _statistics(rng.normal(size=(30, width)))}, pattern=pruning.n_of_m(2, 4))
    kept = np.asarray(pruned["kernel"] != 0)
    for start in range(0, width, 4):
        run = kept[start : start + 4]
        np.testing.assert_array_equal(run.sum(axis=0), min(2, len(run)))


@pytest.mark.parametrize("method", [pruning.wanda, pruning.sparsegpt, pruning.alps])
def test_leaves_without_inputs_and_statistics_without_rows(method):
    params = {"kernel": jnp.zeros((0, 4))}
    pruned, info = method(params, {"kernel": _statistics(np.zeros((3, 0)))}, sparsity=0.5)
    assert (pruned["kernel"].shape, info["kernel"].error) == ((0, 4), 0.0)
    none = {"kernel": _statistics(np.zeros((0, X.shape[1])))}
    with pytest.raises(ValueError, match="statistics of leaf 'kernel' are of no rows"):
        method({"kernel": PARAMS["kernel"]}, none, sparsity=0.5)
