"""Masks against a stable sort in NumPy: counts, ties, scopes, patterns, traced sparsities, shards."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress import pruning, tree
from jaxcompress._src.pruning.masks import magnitude_masks
from jaxcompress.trace import LeafLayout

IN_OUT = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
OUT_IN = LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,))
STACKED = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1, 2), output_axes=(3,))


def _keep(scores, dropped):
    """The oracle: a stable sort from the last index on, so that among ties the highest indices go first."""
    flat = np.asarray(scores, np.float64).reshape(-1)
    order = np.lexsort((-np.arange(flat.size), flat))
    kept = np.ones(flat.size, bool)
    kept[order[:dropped]] = False
    return kept.reshape(np.shape(scores))


def _grid(rng, *shape):
    """Scores with many ties."""
    return rng.integers(0, 5, size=shape).astype(np.float32)


@hypothesis.given(st.integers(0, 40), st.integers(0, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=12, deadline=None)
def test_global_masks_equal_a_stable_sort_of_everything(a, b, sparsity, seed):
    rng = np.random.default_rng(seed)
    scores = {"a": _grid(rng, a), "b": {"c": _grid(rng, 2, b)}}
    everything = np.concatenate([scores["a"], scores["b"]["c"].reshape(-1)])
    expected = _keep(everything, round(sparsity * everything.size))
    masks = pruning.masks_from_scores(jax.tree.map(jnp.asarray, scores), sparsity=sparsity, scope="global")
    np.testing.assert_array_equal(masks["a"], expected[:a])
    np.testing.assert_array_equal(masks["b"]["c"], expected[a:].reshape(2, b))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_leaf_masks_are_exact(sparsity, dtype):
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=(37, 21)), np.zeros((4, 3)), np.full((5, 5), -2.0), rng.normal(size=(1, 1))):
        scores = jnp.asarray(values, dtype)
        mask = pruning.masks_from_scores({"w": scores}, sparsity=sparsity)["w"]
        np.testing.assert_array_equal(mask, _keep(scores.astype(jnp.float32), round(sparsity * scores.size)))


@pytest.mark.parametrize(("layout", "axes"), [(IN_OUT, (0,)), (OUT_IN, (1,))])
def test_rows_are_the_inputs_of_one_output(layout, axes):
    scores = _grid(np.random.default_rng(1), 12, 7)
    mask = pruning.masks_from_scores({"w": jnp.asarray(scores)}, sparsity=0.3, scope="row", layouts={"w": layout})["w"]
    lines, kept = (scores.T, np.asarray(mask).T) if axes == (0,) else (scores, np.asarray(mask))
    for line, found in zip(lines, kept, strict=True):
        np.testing.assert_array_equal(found, _keep(line, round(0.3 * line.size)))


def test_rows_of_a_stack_of_attention_outputs():
    scores = _grid(np.random.default_rng(2), 2, 3, 5, 4)
    masks = pruning.masks_from_scores({"w": jnp.asarray(scores)}, sparsity=0.4, scope="row", layouts={"w": STACKED})
    for layer in range(2):
        for output in range(4):
            expected = _keep(scores[layer, :, :, output], 6)
            np.testing.assert_array_equal(masks["w"][layer, :, :, output], expected)


@pytest.mark.parametrize(("layout", "axis"), [(IN_OUT, 0), (OUT_IN, 1)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 3)])
def test_n_of_m_along_the_input_axis(layout, axis, n, m):
    scores = _grid(np.random.default_rng(3), 24, 48)
    masks = pruning.masks_from_scores(
        {"w": jnp.asarray(scores)}, sparsity=1 - n / m, pattern=pruning.n_of_m(n, m), layouts={"w": layout}
    )
    runs = np.moveaxis(scores, axis, -1).reshape(-1, m)
    kept = np.moveaxis(np.asarray(masks["w"]), axis, -1).reshape(-1, m)
    for run, found in zip(runs, kept, strict=True):
        np.testing.assert_array_equal(found, _keep(run, m - n))


def test_a_schedule_towards_two_of_four_prunes_exactly_and_only_losers():
    scores = jnp.asarray(np.random.default_rng(4).normal(size=(16, 12)) ** 2, jnp.float32)
    pattern = pruning.n_of_m(2, 4)
    final = pruning.masks_from_scores({"w": scores}, sparsity=0.5, pattern=pattern)["w"]
    for sparsity in (0.0, 0.1, 0.25, 0.49):
        mask = pruning.masks_from_scores({"w": scores}, sparsity=sparsity, pattern=pattern)["w"]
        assert int((~mask).sum()) == round(sparsity * scores.size)
        assert not bool((final & ~mask).any())
        pruned, losers = np.asarray(scores)[~np.asarray(mask)], np.asarray(scores)[~np.asarray(final)]
        np.testing.assert_array_equal(np.sort(pruned), np.sort(losers)[: pruned.size])


def test_a_short_last_run_keeps_what_it_can():
    mask = pruning.masks_from_scores({"w": jnp.ones((6, 3))}, sparsity=0.5, pattern=pruning.n_of_m(2, 4))["w"]
    np.testing.assert_array_equal(np.asarray(mask).sum(0), [4, 4, 4])


@pytest.mark.parametrize("scope", ["leaf", "global", "row"])
def test_blocks_live_and_die_together(scope):
    scores = np.random.default_rng(5).normal(size=(10, 9)).astype(np.float32)
    masks = pruning.masks_from_scores(
        {"w": jnp.asarray(scores)}, sparsity=0.5, scope=scope, pattern=pruning.block(4, 3)
    )
    mask = np.asarray(masks["w"])
    tiles = [[(slice(4 * i, 4 * i + 4), slice(3 * j, 3 * j + 3)) for j in range(3)] for i in range(3)]
    kept = np.array([[mask[tile].all() for tile in row] for row in tiles])
    dead = np.array([[not mask[tile].any() for tile in row] for row in tiles])
    np.testing.assert_array_equal(kept, ~dead)
    means = np.array([[scores[tile].mean() for tile in row] for row in tiles])
    rows = np.stack([_keep(column, 2) for column in means.T]).T
    np.testing.assert_array_equal(kept, rows if scope == "row" else _keep(means, round(0.5 * 9)))


def test_a_traced_sparsity_compiles_once():
    scores = {"w": jnp.asarray(np.random.default_rng(6).normal(size=(20, 10)), jnp.float32)}
    traces = []

    @jax.jit
    def masks(scores, sparsity):
        traces.append(1)
        return pruning.masks_from_scores(scores, sparsity=sparsity, scope="global")

    for sparsity in (0.0, 0.25, 0.9, 1.0):
        np.testing.assert_array_equal(masks(scores, sparsity)["w"], _keep(scores["w"], round(sparsity * 200)))
    assert len(traces) == 1


def test_sharded_scores_give_the_same_masks_and_are_not_gathered():
    rng = np.random.default_rng(7)
    scores = {"a": jnp.asarray(rng.normal(size=(1024, 64)), jnp.float32), "b": jnp.asarray(_grid(rng, 64, 512))}
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    specs = {"a": PartitionSpec("model", None), "b": PartitionSpec(None, "model")}
    placed = {name: jax.device_put(scores[name], NamedSharding(mesh, spec)) for name, spec in specs.items()}

    @jax.jit
    def masks(scores, sparsity):
        return pruning.masks_from_scores(scores, sparsity=sparsity, scope="global")

    got, wanted = masks(placed, 0.37), masks(scores, 0.37)
    for name in scores:
        np.testing.assert_array_equal(got[name], wanted[name])
    text = masks.lower(placed, 0.37).compile().as_text()
    gathered = [line for line in text.splitlines() if "all-gather" in line and "=" in line]
    whole = ("[1024,64]", "[64,512]", "[65536]", "[32768]")
    assert not [line for line in gathered if any(shape in line.split("all-gather")[0] for shape in whole)]


def test_thresholds_and_quantiles():
    weights = {"w": jnp.array([[0.005, -0.01], [0.02, -3.0]]), "b": jnp.array([0.5])}
    np.testing.assert_array_equal(pruning.threshold_masks(weights, threshold=0.01)["w"], [[False, True], [True, True]])
    np.testing.assert_array_equal(pruning.threshold_masks(weights, quantile=0.5)["w"], [[False, False], [True, True]])
    for wrong in ({}, {"threshold": 1.0, "quantile": 0.5}):
        with pytest.raises(ValueError, match="either `threshold` or `quantile`"):
            pruning.threshold_masks(weights, **wrong)
    with pytest.raises(ValueError, match=r"`quantile` must be in \[0, 1\], got 2"):
        pruning.threshold_masks(weights, quantile=2.0)


def test_applying_masks_leaves_the_rest_alone_and_stops_nan():
    params = {"w": jnp.array([jnp.nan, 2.0], jnp.bfloat16), "b": jnp.ones(2)}
    masked = pruning.apply_masks(params, {"w": jnp.array([False, True]), "b": tree.Unselected})
    assert masked["w"].dtype == jnp.bfloat16
    assert masked["w"].tolist() == [0.0, 2.0]
    assert masked["b"] is params["b"]
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), the leaf \(2,\)") as caught:
        pruning.apply_masks(params, {"w": jnp.ones(3, bool), "b": tree.Unselected})
    assert "at leaf 'w'" in caught.value.__notes__


def test_clipping_touches_floats_only():
    params = {"w": jnp.array([-3.0, 0.25, 9.0]), "codes": jnp.array([100], jnp.int8)}
    clipped = pruning.clip_weights(params, 1.0)
    assert clipped["w"].tolist() == [-1.0, 0.25, 1.0]
    assert clipped["codes"] is params["codes"]
    assert pruning.clip_weights(params, 1.0, select=tree.by_path("codes"))["w"] is params["w"]
    with pytest.raises(ValueError, match="`limit` must not be negative"):
        pruning.clip_weights(params, -1.0)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_sparsities_outside_the_range_are_errors(sparsity):
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\]"):
        pruning.masks_from_scores({"w": jnp.ones((4, 4))}, sparsity=sparsity)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match=r"at most 0.5, got 0.75"):
        pruning.masks_from_scores({"w": jnp.ones((4, 4))}, sparsity=0.75, pattern=pruning.n_of_m(2, 4))
    with pytest.raises(ValueError, match="Leaf 'w' holds 1 NaN"):
        pruning.masks_from_scores({"w": jnp.array([jnp.nan, 1.0])}, sparsity=0.5)
    with pytest.raises(ValueError, match="1 <= n <= m"):
        pruning.n_of_m(5, 4)
    with pytest.raises(ValueError, match="positive sizes"):
        pruning.block(0, 4)


def test_magnitude_scores_name_leaves_that_cannot_be_pruned():
    assert jc.pruning.magnitude_scores({"w": jnp.array([[-2.0]])})["w"].tolist() == [[2.0]]
    with pytest.raises(ValueError, match="Leaf 'w' holds 0 NaN and 1 Inf"):
        pruning.magnitude_scores({"w": jnp.array([[jnp.inf]])})
    with pytest.raises(ValueError, match="Leaf 'w' holds int32: only floats"):
        pruning.magnitude_scores({"w": jnp.ones((2, 2), jnp.int32)})


def test_gradient_scores_against_gradients_by_hand():
    params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "b": jnp.array([1.0, 1.0])}
    batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, -1.0]])]

    def loss(params, x):
        return jnp.sum((x @ params["w"] + params["b"][None]) ** 2)

    w, b = np.asarray(params["w"], np.float64), np.asarray(params["b"], np.float64)
    gradients_w, gradients_b = [], []
    for x in map(np.asarray, batches):
        residual = 2 * (x @ w + b)
        gradients_w.append(x.T @ residual)
        gradients_b.append(residual[0])
    g = np.mean(gradients_w, axis=0)
    norm = np.sqrt((g**2).sum() + (np.mean(gradients_b, axis=0) ** 2).sum())
    for variant, expected in (("normalized", g / norm), ("absolute", np.abs(g) / norm), ("taylor", np.abs(w * g))):
        scores = pruning.gradient_scores(loss, params, iter(batches), variant=variant)
        np.testing.assert_allclose(scores["w"], expected, rtol=1e-5)
        assert scores["b"] is tree.Unselected
    with pytest.raises(ValueError, match="`batches` is empty"):
        pruning.gradient_scores(loss, params, [])
    with pytest.raises(ValueError, match="The gradient of leaf 'w' holds NaN or Inf"):
        pruning.gradient_scores(lambda p, x: jnp.sum(jnp.sqrt(p["w"] - p["w"])), params, batches)


def test_the_selection_says_which_scores_become_masks():
    scores = {"a": jnp.asarray([[3.0, 1.0], [2.0, 4.0]]), "b": jnp.ones((2, 2)), "c": tree.Unselected}
    found = pruning.masks_from_scores(scores, sparsity=0.5, select=tree.by_path("a"))
    np.testing.assert_array_equal(found["a"], [[True, False], [False, True]])
    assert found["b"] is tree.Unselected
    assert found["c"] is tree.Unselected
    by_leaf = pruning.masks_from_scores(
        scores, sparsity={"a": 0.25, "b": 0.5, "c": tree.Unselected}, select=tree.by_path("a")
    )
    np.testing.assert_array_equal(by_leaf["a"], [[True, False], [True, True]])
    with pytest.raises(ValueError, match="nothing is selected"):
        pruning.masks_from_scores(scores, sparsity=0.5, select=lambda scores: jax.tree.map(lambda _: False, scores))


def test_only_a_pattern_implies_a_sparsity():
    scores = {"w": jnp.asarray([[4.0], [3.0], [2.0], [1.0]])}
    masks = pruning.masks_from_scores(scores, pattern=pruning.n_of_m(1, 4))
    np.testing.assert_array_equal(masks["w"].ravel(), [True, False, False, False])
    np.testing.assert_array_equal(magnitude_masks(scores, pattern=pruning.n_of_m(1, 4))["w"], masks["w"])
    for call in (pruning.masks_from_scores, magnitude_masks):
        with pytest.raises(ValueError, match="`sparsity` is needed"):
            call(scores, pattern=pruning.block(2, 1))
