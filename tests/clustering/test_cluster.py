"""Trees with shared values: against NumPy, in every layout, and with everything that can be wrong with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import trace
from jaxcompress._src.arrays.codebook import look_up
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.clustering import fit as _fit
from jaxcompress.arrays import CodebookArray, sparsify
from jaxcompress.calibration import input_statistics
from jaxcompress.clustering import (
    AdditiveSpec,
    CodebookSpec,
    additive_quantize,
    cluster,
    input_importance,
    trained_codebooks,
)
from jaxcompress.trace import LeafLayout


def weights(*shape, seed=0, zeros=0.0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < zeros, 0, rng.normal(size=shape)).astype(np.float32)


def means(x, codes, h=None):
    """Mean of the weights of every code but 0."""
    h = np.ones_like(x) if h is None else np.broadcast_to(h, x.shape)
    return [
        np.average(x[codes == code].astype(np.float64), weights=h[codes == code]) for code in range(1, codes.max() + 1)
    ]


@pytest.mark.parametrize("shape", [(37, 11), (5, 3, 7), (13,), (3, 3, 2, 5)])
def test_every_weight_has_the_nearest_value_and_every_value_is_the_mean_of_its_weights(shape):
    x = weights(*shape, zeros=0.3)
    found, info = cluster({"w": jnp.asarray(x)}, CodebookSpec(values=5), select=lambda tree: {"w": True})
    leaf = found["w"]
    validate_array(leaf)
    codes, table = np.asarray(leaf.codes()), np.asarray(leaf.table).ravel()
    assert table.shape == (4,)
    np.testing.assert_array_equal(codes == 0, x == 0)
    np.testing.assert_array_equal(codes[x != 0] - 1, np.abs(x[x != 0][:, None] - table).argmin(1))
    np.testing.assert_allclose(table, means(x, codes), rtol=1e-6)
    np.testing.assert_array_equal(leaf.materialize(), np.concatenate([[0], table])[codes].astype(np.float32))
    y = np.asarray(leaf.materialize(), np.float64)
    assert info["w"].error == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))
    shares = np.bincount(codes.ravel()) / codes.size
    assert info["w"].entropy_bits == pytest.approx(-(shares * np.log2(shares)).sum())
    assert (info["w"].values, info["w"].zeros) == (5, pytest.approx((x == 0).mean()))


def test_a_stacked_leaf_is_clustered_copy_by_copy_and_outputs_one_by_one():
    x = jnp.asarray(weights(3, 16, 6, zeros=0.2))
    layouts = {"w": LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))}
    for per in ("leaf", "output"):
        spec = CodebookSpec(values=4, per=per)
        leaf = cluster({"w": x}, spec, layouts=layouts)[0]["w"]
        assert leaf.table.shape == ((3, 1, 1, 3) if per == "leaf" else (3, 1, 6, 3))
        for at in range(3):
            one = {"w": LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))}
            alone = cluster({"w": x[at]}, spec, layouts=one)[0]["w"]
            np.testing.assert_array_equal(leaf.materialize()[at], alone.materialize())


@pytest.mark.parametrize("per", ["leaf", "output"])
@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_groups_of_inputs_have_tables_of_their_own(tmp_path, per, rate):
    x = weights(12, 5, zeros=0.2) * np.repeat([1.0, 10.0, 100.0], 4).astype(np.float32)[:, None]
    spec = CodebookSpec(values=4, per=per, group_size=4, rate=rate)
    leaf = cluster({"w": jnp.asarray(x)}, spec)[0]["w"]
    validate_array(leaf)
    assert leaf.table.shape == (3, 1 if per == "leaf" else 5, 3)
    for group in range(3):
        rows = slice(4 * group, 4 * group + 4)
        alone = cluster({"w": jnp.asarray(x[rows])}, CodebookSpec(values=4, per=per, rate=rate))[0]["w"]
        np.testing.assert_array_equal(leaf.materialize()[rows], alone.materialize())
    jc.checkpoint.save(tmp_path / "c", {"w": leaf}, storage="entropy")
    restored = jc.checkpoint.restore(tmp_path / "c")[0]["w"]
    np.testing.assert_array_equal(restored.materialize(), leaf.materialize())
    inputs = jnp.asarray(weights(7, 12, seed=1))
    run = jc.execute(lambda params, x: x @ params["w"])
    np.testing.assert_allclose(run({"w": leaf}, inputs), inputs @ leaf.materialize(), rtol=1e-5, atol=1e-4)
    transform = trained_codebooks(spec)
    state = transform.init({"w": jnp.asarray(x)}, key=jax.random.key(0))
    np.testing.assert_array_equal(
        transform.finalize({"w": jnp.asarray(x)}, state)["w"].materialize(), leaf.materialize()
    )


def test_groups_that_do_not_divide_the_inputs_are_named():
    with pytest.raises(ValueError, match=r"`group_size` 5 does not divide the input axes of sizes \[12\]") as caught:
        cluster({"w": jnp.asarray(weights(12, 5))}, CodebookSpec(values=4, group_size=5))
    assert "at leaf 'w'" in caught.value.__notes__
    with pytest.raises(ValueError, match="`group_size` must be at least 1"):
        CodebookSpec(values=4, group_size=0)


def test_importance_moves_the_values_to_what_counts():
    x = weights(24, 10, seed=3)
    h = np.random.default_rng(4).gamma(0.3, size=(24, 10)).astype(np.float32)
    spec = CodebookSpec(values=4, zero=False)
    plain, without = cluster({"w": jnp.asarray(x)}, spec)
    found, info = cluster({"w": jnp.asarray(x)}, spec, importance={"w": jnp.asarray(h)})
    own, other = (np.asarray(tree["w"].materialize(), np.float64) for tree in (found, plain))
    assert (h * (x - own) ** 2).sum() < (h * (x - other) ** 2).sum()
    assert info["w"].error == pytest.approx(np.sqrt((h * (x - own) ** 2).sum() / (h * x.astype(np.float64) ** 2).sum()))
    assert without["w"].error < np.linalg.norm(x - own) / np.linalg.norm(x)


def test_importance_of_inputs():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 4, 6)) * np.arange(1, 7), jnp.float32)
    params = {"kernel": jnp.asarray(weights(4, 6, 5))}

    def model(tree, inputs):
        return jnp.einsum("nab,abo->no", inputs, tree["kernel"])

    statistics = input_statistics(model, params, [(x[:8],), (x[8:],)])
    h = input_importance(params, statistics, layouts=trace.layouts(model, params, x))["kernel"]
    np.testing.assert_allclose(h, np.square(np.asarray(x, np.float64)).mean(0)[..., None], rtol=1e-5)
    with pytest.raises(ValueError, match="No leaf has input statistics"):
        input_importance(params, {"kernel": None}, layouts=trace.layouts(model, params, x))


def test_a_rate_buys_shorter_codes():
    x = {"w": jnp.asarray(weights(60, 50))}
    entropies, errors = [], []
    for rate in (0.0, 0.01, 0.05, 0.2):
        _, info = cluster(x, CodebookSpec(values=16, rate=rate))
        entropies.append(info["w"].entropy_bits)
        errors.append(info["w"].error)
    assert entropies == sorted(entropies, reverse=True)
    assert errors == sorted(errors)
    assert entropies[-1] < 0.6 * entropies[0]


@pytest.mark.parametrize("zero", [True, False])
def test_tables_ascend_with_a_rate_as_well(zero):
    spec = CodebookSpec(values=16, rate=0.3, zero=zero)
    for seed in range(8):
        leaf = cluster({"w": jnp.asarray(weights(12, 4, seed=seed))}, spec)[0]["w"]
        assert (np.diff(leaf.table.ravel()) >= 0).all()


def test_sparse_and_half_precision_leaves():
    x = weights(20, 9, zeros=0.7)
    sparse = sparsify(jnp.asarray(x), jnp.asarray(x != 0))
    leaf = cluster({"w": sparse}, CodebookSpec(values=8))[0]["w"]
    validate_array(leaf)
    dense = cluster({"w": jnp.asarray(x)}, CodebookSpec(values=8))[0]["w"]
    np.testing.assert_array_equal(leaf.materialize(), dense.materialize())
    half = cluster({"w": jnp.asarray(x, jnp.bfloat16)}, CodebookSpec(values=8, dtype="bfloat16"))[0]["w"]
    assert half.materialize().dtype == half.table.dtype == jnp.bfloat16
    assert cluster({"w": leaf, "v": jnp.ones((2, 2))}, CodebookSpec(values=2))[0]["w"] is leaf


@pytest.mark.parametrize("x", [np.zeros((0, 4)), np.zeros((5, 0)), np.zeros((5, 3)), np.full((5, 3), 2.0), np.eye(3)])
def test_fewer_values_than_asked(x):
    for zero in (True, False):
        found, info = cluster({"w": jnp.asarray(x, jnp.float32)}, CodebookSpec(values=16, zero=zero, rate=0.01))
        validate_array(found["w"])
        if zero or x.size:
            np.testing.assert_array_equal(found["w"].materialize(), x)
        assert info["w"].error == 0


def test_what_cannot_be_clustered():
    spec = CodebookSpec(values=4)
    with pytest.raises(ValueError, match="'a/w' holds 1 NaN and 1 Inf"):
        cluster({"a": {"w": jnp.array([[jnp.nan, jnp.inf, 1.0]])}}, spec)
    with pytest.raises(ValueError, match="'w' of dtype int32"):
        cluster({"w": jnp.ones((2, 2), jnp.int32)}, spec)
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\), which does not broadcast to \(2, 2\)"):
        cluster({"w": jnp.ones((2, 2))}, spec, importance={"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="'w' is sparse"):
        cluster({"w": sparsify(jnp.ones((2, 2)), jnp.eye(2, dtype=bool))}, CodebookSpec(values=4, zero=False))
    with pytest.raises(ValueError, match="nothing is selected"):
        cluster({"w": jnp.ones(2)}, spec)
    for wrong in ({"values": 1}, {"values": 257}, {"values": 4, "rate": -1.0}):
        with pytest.raises(ValueError, match=r"must be"):
            CodebookSpec(**wrong)


@pytest.mark.parametrize(
    "share",
    [
        lambda params, h=None: cluster(params, CodebookSpec(values=4), importance=h)[0],
        lambda params, h=None: additive_quantize(params, AdditiveSpec(length=2, tables=1, values=3), importance=h)[0],
        lambda params, h=None: trained_codebooks(CodebookSpec(values=4), importance=h).init(params, key=None),
    ],
)
def test_values_are_found_on_the_host_only(share):
    params = {"a": {"w": jnp.asarray(weights(4, 6))}}
    for traced in (share, lambda _: share(params)):
        with pytest.raises(TypeError, match=r"Leaf 'a/w' is met inside a traced function, .* on the host only"):
            jax.jit(traced)(params)
    with pytest.raises(TypeError, match="`importance` of leaf 'a/w' is met inside"):
        jax.jvp(lambda h: share(params, h), (params,), (params,))


@pytest.mark.parametrize("blocks", [(1, 1), (6, 1), (3, 2), (1, 4)])
@pytest.mark.parametrize("zero", [True, False])
def test_look_up_and_its_gradient(blocks, zero):
    rng = np.random.default_rng(0)
    table, codes = rng.normal(size=(*blocks, 5)).astype(np.float32), rng.integers(0, 5 + zero, (6, 4)).astype(np.uint8)
    gradient = rng.normal(size=(6, 4)).astype(np.float32)
    whole = np.concatenate([np.zeros((*blocks, 1)), table], -1) if zero else table
    value, pull = jax.vjp(lambda t: look_up(jnp.asarray(codes), t, zero=zero), jnp.asarray(table))
    expected, sums = np.zeros((6, 4)), np.zeros(whole.shape)
    for i, j in np.ndindex(6, 4):
        at = (i * blocks[0] // 6, j * blocks[1] // 4, codes[i, j])
        expected[i, j] = whole[at]
        sums[at] += gradient[i, j]
    np.testing.assert_array_equal(value, expected.astype(np.float32))
    np.testing.assert_allclose(pull(jnp.asarray(gradient))[0], sums[..., int(zero) :], rtol=1e-5, atol=1e-6)


def test_training_moves_tables_only_and_lowers_the_loss():
    x, target = jnp.asarray(weights(40, 12, seed=5)), jnp.asarray(weights(12, 7, seed=6, zeros=0.5))
    params, transform = {"w": target}, trained_codebooks(CodebookSpec(values=4))
    state = transform.init(params, key=jax.random.key(0))

    def loss(tables):
        w = transform.apply(params, state._replace(trainable=tables))["w"]
        return jnp.square(x @ (w - target)).sum()

    before, tables = loss(state.trainable), state.trainable
    for _ in range(50):
        tables = jax.tree.map(lambda t, g: t - 1e-4 * g, tables, jax.grad(loss)(tables))
    assert loss(tables) < before
    final = transform.finalize(params, state._replace(trainable=tables))["w"]
    assert isinstance(final, CodebookArray)
    np.testing.assert_array_equal(final.codes() == 0, target == 0)


def test_a_stored_table_trains_by_itself_and_zeros_stay():
    """`partition_trainable` finds the table of a finished leaf."""
    leaf = cluster({"w": jnp.asarray(weights(12, 7, zeros=0.5))}, CodebookSpec(values=4))[0]["w"]
    trainable, rest = jc.tree.partition_trainable({"w": leaf})
    moved = jax.tree.map(lambda part: part + 1, trainable)
    now = jc.tree.combine(moved, rest)["w"].materialize()
    np.testing.assert_array_equal(now == 0, leaf.materialize() == 0)
    np.testing.assert_allclose(now[now != 0], leaf.materialize()[now != 0] + 1, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_pruned_weights_stay_0_while_weights_move(rate):
    """No gradient reaches them: with one, the next assignment would give them a value."""
    x, goal = jnp.asarray(weights(12, 7, zeros=0.5)), jnp.asarray(weights(12, 7, seed=1))
    transform = trained_codebooks(CodebookSpec(values=4, rate=rate), until=2)
    params = {"w": x}
    state = transform.init(params, key=jax.random.key(0))
    for _ in range(2):
        grads = jax.grad(lambda p, s: jnp.square(transform.apply(p, s)["w"] - goal).sum())(params, state)
        params = jax.tree.map(lambda weight, slope: weight - 0.1 * slope, params, grads)
        state, _ = transform.update(grads, state, params, key=jax.random.key(1), loss=0.0)
    assert (params["w"] != x)[x != 0].all()
    assert not transform.apply(params, state)["w"][x == 0].any()
    assert not transform.finalize(params, state)["w"].materialize()[x == 0].any()


def test_without_a_zero_every_weight_moves():
    params = {"w": jnp.asarray(weights(12, 7, zeros=0.5))}
    transform = trained_codebooks(CodebookSpec(values=4, zero=False), until=10)
    state = transform.init(params, key=jax.random.key(0))
    grads = jax.grad(lambda p: transform.apply(p, state)["w"].sum())(params)
    np.testing.assert_array_equal(grads["w"], np.ones((12, 7)))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_table_that_diverged_is_not_stored(wrong):
    params, transform = {"a": {"w": jnp.asarray(weights(12, 7))}}, trained_codebooks(CodebookSpec(values=4))
    state = transform.init(params, key=jax.random.key(0))
    tables = jax.tree.map(lambda table: table.at[..., 1].set(wrong), state.trainable)
    with pytest.raises(ValueError, match="table of leaf 'a/w' holds 1 NaN or Inf among 3 values"):
        transform.finalize(params, state._replace(trainable=tables))


def test_transform_options():
    spec = CodebookSpec(values=4)
    for wrong in ({"every": 0}, {"until": -1}):
        with pytest.raises(ValueError, match="must be"):
            trained_codebooks(spec, **wrong)
    with pytest.raises(ValueError, match="'w' holds 1 NaN"):
        trained_codebooks(spec).init({"w": jnp.full((1, 1), jnp.nan)}, key=jax.random.key(0))


def test_a_rate_on_a_long_leaf_is_fitted_on_runs_of_neighbours(monkeypatch):
    """Tables and bits are those of all weights, to the width of a run; zeros and importance are minded."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(64, 80)).astype(np.float32)
    params = {"kernel": jnp.asarray(np.where(np.abs(weights) < 0.4, 0, weights))}
    spec = CodebookSpec(values=6, rate=0.01)
    for importance in (None, {"kernel": jnp.asarray(rng.uniform(0.5, 2.0, (64, 1)), jnp.float32)}):
        found = []
        for limit in (1 << 16, 500):
            monkeypatch.setattr(_fit, "_ENOUGH", limit)
            found.append(cluster(params, spec, importance=importance))
        (exact, of_exact), (short, of_short) = ((tree["kernel"], info["kernel"]) for tree, info in found)
        np.testing.assert_allclose(short.table, exact.table, atol=0.03)
        assert of_short.error < 1.01 * of_exact.error
        assert abs(of_short.entropy_bits - of_exact.entropy_bits) < 0.02
        assert not short.materialize()[params["kernel"] == 0].any()
