"""Inputs that calibration never saw: an expert without rows, a feature that is always 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import clustering, lowrank, pruning, quantization
from jaxcompress._src.weights.unseen import fill_unseen
from jaxcompress.calibration import InputStatistics, LookupCounts, input_statistics, sequential
from jaxcompress.quantization import QuantSpec
from jaxcompress.trace import LeafLayout, folds

DEPTH, WIDTH = 12, 5
RNG = np.random.default_rng(0)
W = RNG.normal(size=(2, DEPTH, WIDTH))
ROWS = RNG.normal(size=(40, DEPTH)) @ (RNG.normal(size=(DEPTH, DEPTH)) / np.sqrt(DEPTH) + 0.5)
# The third feature is 0 in every row of expert 0; no row reaches expert 1.
X = np.stack([ROWS * (np.arange(DEPTH) != 2), 0 * ROWS])
LAYOUT = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
PARAMS = {"experts": jnp.asarray(W, jnp.float32)}
GRAM = jnp.asarray(np.einsum("sni,snj->sij", X, X), jnp.float32)
STATISTICS = {
    "experts": InputStatistics(
        count=jnp.array([40.0, 0.0]),
        gram=GRAM,
        squared_sum=jnp.diagonal(GRAM, axis1=1, axis2=2),
        absolute_sum=jnp.asarray(np.abs(X).sum(1), jnp.float32),
    )
}
OPTIONS = {"layouts": {"experts": LAYOUT}}
SPEC = QuantSpec(bits=4, convention="narrow")
REACHED = r"No row .* reached 'experts' \(stack entries \[1\]\)"


def _nearest(weights):
    scale = np.abs(weights).max(axis=-2, keepdims=True) / 7
    return scale * np.round(weights / scale)


def _check(info):
    reached, unreached = info["experts[0]"], info["experts[1]"]
    assert (reached.unseen_inputs, reached.unseen_entries) == (1, 0)
    assert (unreached.unseen_inputs, unreached.unseen_entries) == (DEPTH, 1)
    assert (unreached.error, getattr(unreached, "error_before", None)) == (None, None)
    assert reached.error is not None


def test_rounding_is_to_nearest_where_nothing_was_seen():
    with pytest.warns(UserWarning, match=REACHED + ": their weights were rounded to nearest"):
        found, info = quantization.gptq(PARAMS, STATISTICS, SPEC, range_search=None, refine=0, **OPTIONS)
    values = np.asarray(found["experts"].materialize())
    np.testing.assert_allclose(values[1], _nearest(W)[1], atol=1e-6)
    np.testing.assert_allclose(values[0, 2], _nearest(W)[0, 2], atol=1e-6)
    _check(info)
    lost = [np.linalg.norm(X[0] @ (W[0] - w[0])) / np.linalg.norm(X[0] @ W[0]) for w in (values, _nearest(W))]
    np.testing.assert_allclose([info["experts[0]"].error, info["experts[0]"].error_before], lost, rtol=2e-3)
    with pytest.warns(UserWarning, match=REACHED + ": their weights were set to 0"):
        published, _ = quantization.gptq(PARAMS, STATISTICS, SPEC, unseen="zero", **OPTIONS)
    published = np.asarray(published["experts"].materialize())
    assert not published[1].any()
    assert not published[0, 2].any()


@pytest.mark.parametrize("method", [pruning.wanda, pruning.sparsegpt, pruning.alps])
def test_pruning_is_by_magnitude_where_nothing_was_seen(method):
    own = {"scope": "leaf"} if method is pruning.wanda else {}
    with pytest.warns(UserWarning, match=REACHED + ": their weights were ranked by magnitude"):
        pruned, info = method(PARAMS, STATISTICS, sparsity=0.5, **own, **OPTIONS)
    kept = np.asarray(pruned["experts"]) != 0
    _check(info)
    # Exactly what was asked for, in every entry.
    counts = kept.sum((1, 2))
    assert counts.sum() == W.size // 2
    assert method is pruning.wanda or counts.tolist() == [30, 30]
    magnitudes = np.abs(W[1])
    np.testing.assert_array_equal(kept[1], magnitudes >= np.sort(magnitudes.ravel())[-counts[1]])
    assert (W[1][kept[1]] ** 2).sum() > 0.85 * (W[1] ** 2).sum()
    assert kept[0, 2].any()


def test_scores_of_wanda_use_the_mean_energy():
    with pytest.warns(UserWarning, match=REACHED):
        scores = np.asarray(pruning.wanda_scores(PARAMS, STATISTICS, **OPTIONS)["experts"])
    energy = (X[0] ** 2).mean(0)
    mean = energy.sum() / (DEPTH - 1)
    expected = np.abs(W) * np.sqrt(np.stack([np.where(energy > 0, energy, mean), np.full(DEPTH, mean)]))[..., None]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    with pytest.warns(UserWarning, match="given a score of 0"):
        published = pruning.wanda_scores(PARAMS, STATISTICS, unseen="zero", **OPTIONS)["experts"]
    assert not published[1].any()


def test_awq_rounds_to_nearest_and_its_factors_leave_unseen_features_alone():
    with pytest.warns(UserWarning, match=REACHED):
        found, info = quantization.awq(PARAMS, STATISTICS, SPEC, range_search=None, **OPTIONS)
    np.testing.assert_allclose(found["experts"].materialize()[1], _nearest(W)[1], atol=1e-6)
    _check(info)
    params = {"scale": jnp.ones(DEPTH), "kernel": PARAMS["experts"][0]}
    apply = lambda p, x: (x * p["scale"][None]) @ p["kernel"]  # noqa: E731
    x = jnp.asarray(X[0], jnp.float32)
    statistics = input_statistics(apply, params, [(x,)])
    moves = folds(apply, params, x)
    small, _ = quantization.awq(params, statistics, QuantSpec(bits=3), folds=moves)
    own = np.asarray(small["kernel"].materialize())[2] * np.asarray(small["scale"])[2]
    assert np.linalg.norm(own - W[0, 2]) < 0.5 * np.linalg.norm(W[0, 2])
    smoothed, factors = quantization.smooth(params, statistics, moves)
    others = np.delete(np.asarray(factors["kernel"]), 2)
    assert 0.3 * others.min() < factors["kernel"][2] < 3 * others.max()
    np.testing.assert_allclose(apply(smoothed, x), apply(params, x), rtol=1e-4, atol=1e-4)


def test_reconstruction_keeps_weights_without_evidence():
    params = {"w": PARAMS["experts"][0], "b": jnp.zeros(WIDTH)}
    x = jnp.asarray(X[0], jnp.float32)
    apply = lambda p, x: x @ p["w"] + p["b"][None]  # noqa: E731
    for options in ({}, {"targets": "weights", "bias": False}):
        found, info = quantization.reconstruct(apply, params, [(x,)], SPEC, range_search=None, refine=0, **options)
        np.testing.assert_allclose(found["w"].materialize()[2], _nearest(W[0])[2], atol=0.51 * np.abs(W).max() / 7)
        assert info["w"].unseen_inputs == 1
    found, _ = quantization.reconstruct(apply, params, [(x,)], SPEC, unseen="zero")
    assert not np.asarray(found["w"].materialize())[2].any()


def test_importance_of_what_was_not_seen_is_that_of_the_others():
    with pytest.warns(UserWarning, match=REACHED):
        h = clustering.input_importance(PARAMS, STATISTICS, layouts=OPTIONS["layouts"])["experts"]
    assert (np.asarray(h) > 0).all()
    np.testing.assert_allclose(h[1], np.asarray(h[0]).mean(), rtol=1e-5)
    spec = clustering.AdditiveSpec(length=4, tables=1, values=8)
    found, _ = clustering.additive_quantize(PARAMS, spec, importance={"experts": h}, **OPTIONS)
    gap = np.asarray(found["experts"].materialize())[1] - W[1]
    assert np.linalg.norm(gap) < 0.8 * np.linalg.norm(W[1])
    table = {"t": jnp.asarray(W[0], jnp.float32)}
    counts = {"t": LookupCounts(count=jnp.float32(4), rows=jnp.zeros(DEPTH).at[0].set(4.0))}
    lookup = {"t": LeafLayout(kind="lookup", input_axes=(1,), output_axes=(0,))}
    rows = clustering.input_importance(table, counts, layouts=lookup)["t"]
    np.testing.assert_allclose(rows.ravel(), [1.0] + [0.25] * (DEPTH - 1))


def test_factors_of_what_was_not_seen_are_those_of_the_weights():
    with pytest.warns(UserWarning, match=REACHED + ": their weights were factored"):
        found, info = lowrank.activation_svd(PARAMS, STATISTICS, rank=2, **OPTIONS)
    u, s, v = np.linalg.svd(W[1], full_matrices=False)
    np.testing.assert_allclose(found["experts"].materialize()[1], (u[:, :2] * s[:2]) @ v[:2], atol=1e-4)
    change = X[0] @ (np.asarray(found["experts"].materialize())[0] - W[0])
    assert info["experts[0]"].error == pytest.approx(np.linalg.norm(change) / np.linalg.norm(X[0] @ W[0]), rel=1e-3)
    _check(info)


def test_rows_of_tables_that_were_never_looked_up_get_the_best_scales_of_their_own():
    table = {"t": jnp.asarray(W[0], jnp.float32)}
    lookup = {"t": LeafLayout(kind="lookup", input_axes=(1,), output_axes=(0,))}
    search = quantization.RangeSearch(norm=2.0, weighted=True)
    apply = lambda rows: quantization.gptq(  # noqa: E731
        table, {"t": LookupCounts(count=rows.sum(), rows=rows)}, QuantSpec(bits=2), range_search=search, layouts=lookup
    )[0]["t"].materialize()
    some, every = apply(jnp.zeros(DEPTH).at[0].set(4.0)), apply(jnp.ones(DEPTH))
    np.testing.assert_array_equal(some, every)


def test_layer_after_layer_counts_each_entry():
    params = {"layers": PARAMS["experts"][:, :, :1] * jnp.ones((2, DEPTH, DEPTH))}
    apply = lambda p, x: jax.lax.scan(lambda x, w: (jnp.maximum(x @ w, 0), None), x, p["layers"])[0]  # noqa: E731
    x = jnp.asarray(-ROWS @ np.sign(W[0, :, :1]) @ W[0, :, :1].T, jnp.float32)

    def prune(p, s, at):
        return pruning.sparsegpt(p, s, sparsity=0.5, layouts=at)

    with pytest.warns(UserWarning, match="No row"):
        _, info = sequential(apply, params, [(-jnp.abs(x @ params["layers"][0]) @ params["layers"][0].T,)], prune)
    assert {entry.sparsity for entry in info.values()} == {0.5}


def test_filling_is_from_the_entry_then_from_the_leaf():
    marks = np.array([[False, True], [True, True]])
    filled = fill_unseen(jnp.array([[3.0, 0.0], [0.0, 0.0]]), jnp.asarray(marks))
    np.testing.assert_array_equal(filled, [[3, 3], [3, 3]])
    np.testing.assert_array_equal(fill_unseen(jnp.zeros((1, 2)), jnp.ones((1, 2), bool)), [[1, 1]])
