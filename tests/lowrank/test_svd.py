"""Factors by SVD, against float64 NumPy and the formula of SVD-LLM."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress.arrays import LowRankArray
from jaxcompress.calibration import InputStatistics, LookupCounts, input_statistics
from jaxcompress.lowrank import activation_svd, budget, fisher_svd, parameter_share, svd
from jaxcompress.trace import LeafLayout
from jaxcompress.tree import Unselected

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "svd_llm.npz"))
LAYERS = ("wide", "tall", "square")


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def statistics_of(x):
    gram = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
    return InputStatistics(count=jnp.float32(len(x)), gram=jnp.asarray(gram, jnp.float32))


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


@pytest.mark.parametrize("whitening", ["cholesky", "eigen"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("layer", LAYERS)
def test_golden_svd_llm(layer, ratio, whitening):
    weight, x = GOLDEN[f"{layer}/weight"], GOLDEN[f"{layer}/inputs"]
    params, key = {"kernel": jnp.asarray(weight.T)}, f"{layer}/{ratio}"
    small, info = activation_svd(params, {"kernel": statistics_of(x)}, rank=parameter_share(ratio), whitening=whitening)
    found, leaf = info["kernel"], small["kernel"]
    assert found.rank == leaf.rank == GOLDEN[f"{key}/rank"]
    np.testing.assert_allclose(leaf.materialize().T, GOLDEN[f"{key}/weight"], atol=2e-3)
    change = np.asarray(x, np.float64) @ (np.asarray(leaf.materialize(), np.float64) - weight.T)
    for loss in (found.loss, (change**2).sum(), (GOLDEN[f"{key}/values"][found.rank :] ** 2).sum()):
        assert loss == pytest.approx(float(GOLDEN[f"{key}/loss"]), rel=2e-4)
    assert found.error == pytest.approx(
        np.sqrt((change**2).sum() / ((x.astype(np.float64) @ weight.T) ** 2).sum()), rel=1e-3
    )


@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (9, 9), (1, 5), (5, 1)])
def test_plain_svd_is_the_closest_matrix(shape):
    params = {"kernel": normal(*shape)}
    for rank in range(min(shape) + 1):
        small, info = svd(params, rank=rank)
        validate_array(small["kernel"])
        wanted, values = truncated(params["kernel"], rank)
        np.testing.assert_allclose(small["kernel"].materialize(), wanted, atol=1e-5)
        assert info["kernel"].loss == pytest.approx((values[rank:] ** 2).sum(), rel=1e-5, abs=1e-10)
        assert info["kernel"].parameters == rank * sum(shape) == small["kernel"].nbits // 32


def test_no_other_factors_of_that_rank_come_closer_on_the_inputs():
    """The optimum of a rank-constrained problem: small moves of the factors only hurt."""
    rng = np.random.default_rng(0)
    params, x = {"kernel": normal(12, 9)}, rng.normal(size=(50, 12)) @ rng.normal(size=(12, 12))
    small, info = activation_svd(params, {"kernel": statistics_of(x)}, rank=3)
    leaf = small["kernel"]

    def loss(left, right):
        return ((x @ (left @ right.T - np.asarray(params["kernel"], np.float64))) ** 2).sum()

    left, right = np.asarray(leaf.left[:, 0], np.float64), np.asarray(leaf.right[0], np.float64)
    best = loss(left, right)
    assert best == pytest.approx(info["kernel"].loss, rel=1e-4)
    for _ in range(50):
        moved = loss(left + 1e-2 * rng.normal(size=left.shape), right + 1e-2 * rng.normal(size=right.shape))
        assert moved > best


def test_factors_are_balanced():
    small, _ = svd({"kernel": 1e4 * normal(12, 9)}, rank=4)
    leaf = small["kernel"]
    np.testing.assert_allclose(
        jnp.linalg.norm(leaf.left[:, 0], axis=0), jnp.linalg.norm(leaf.right[0], axis=0), rtol=1e-4
    )


LAYOUTS = {
    "in, out": LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,)),
    "out, in": LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,)),
    "two inputs, two outputs": LeafLayout(kind="matmul", input_axes=(0, 1), output_axes=(2, 3)),
    "mixed axes": LeafLayout(kind="matmul", input_axes=(1, 3), output_axes=(0, 2)),
    "stack": LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,)),
    "stack in the middle": LeafLayout(kind="matmul", stack_axes=(1,), input_axes=(2,), output_axes=(0,)),
    "convolution": LeafLayout(kind="conv", input_axes=(0, 1, 2), output_axes=(3,)),
}
SHAPES = {2: (6, 10), 3: (3, 6, 5), 4: (2, 3, 4, 5)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_leaves_of_any_layout(name):
    layout = LAYOUTS[name]
    axes = (*layout.stack_axes, *layout.input_axes, *layout.output_axes)
    kernel = normal(*SHAPES[len(axes)])
    stack, inputs, outputs = (
        int(np.prod([kernel.shape[a] for a in part]))
        for part in (layout.stack_axes, layout.input_axes, layout.output_axes)
    )
    small, info = svd({"w": kernel}, rank=2, layouts={"w": layout})
    leaf = small["w"]
    validate_array(leaf)
    assert (leaf.shape, leaf.rank) == (kernel.shape, 2)
    assert len(info) == stack
    assert sum(own.parameters for own in info.values()) == 2 * stack * (inputs + outputs) == leaf.nbits // 32
    wanted = np.stack([truncated(m, 2)[0] for m in np.transpose(kernel, axes).reshape(stack, inputs, outputs)])
    found = np.transpose(leaf.materialize(), axes).reshape(stack, inputs, outputs)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_stacks_have_a_statistic_for_each_entry():
    kernel, x = normal(3, 6, 5), normal(3, 40, 6, seed=1) * jnp.linspace(0.1, 3, 6)[None, None]
    gram = jnp.einsum("sni,snj->sij", x, x)
    found = InputStatistics(count=jnp.full(3, 40.0), gram=gram)
    layouts = {"w": LAYOUTS["stack"]}
    small, info = activation_svd({"w": kernel}, {"w": found}, rank=2, layouts=layouts)
    for entry in range(3):
        alone, own = activation_svd({"w": kernel[entry]}, {"w": statistics_of(x[entry])}, rank=2)
        np.testing.assert_allclose(small["w"].materialize()[entry], alone["w"].materialize(), atol=1e-4)
        assert info[f"w[{entry}]"].loss == pytest.approx(own["w"].loss, rel=1e-4)


@pytest.mark.parametrize("weighting", ["inputs", "outputs", "both"])
def test_fisher_weighs_rows_and_columns(weighting):
    kernel, fisher = np.asarray(normal(8, 6), np.float64), np.square(np.asarray(normal(8, 6, seed=1), np.float64))
    rows = np.sqrt(fisher.sum(1)) if weighting != "outputs" else np.ones(8)
    columns = np.sqrt(fisher.sum(0)) if weighting != "inputs" else np.ones(6)
    wanted, values = truncated(rows[:, None] * kernel * columns, 3)
    wanted = wanted / rows[:, None] / columns
    params, given = {"w": jnp.asarray(kernel, jnp.float32)}, {"w": jnp.asarray(fisher, jnp.float32)}
    small, info = fisher_svd(params, given, rank=3, weighting=weighting)
    np.testing.assert_allclose(small["w"].materialize(), wanted, atol=1e-5)
    assert info["w"].error == pytest.approx(np.sqrt((values[3:] ** 2).sum() / (values**2).sum()), rel=1e-4)


def test_activations_and_fisher_together():
    kernel, fisher = np.asarray(normal(8, 6), np.float64), np.square(np.asarray(normal(8, 6, seed=1), np.float64))
    x = np.asarray(normal(30, 8, seed=2), np.float64)
    columns = np.sqrt(fisher.sum(0) / (x**2).sum())
    root = np.linalg.cholesky(x.T @ x)
    wanted, values = truncated(root.T @ kernel * columns, 3)
    wanted = np.linalg.solve(root.T, wanted) / columns
    params, given = {"w": jnp.asarray(kernel, jnp.float32)}, {"w": jnp.asarray(fisher, jnp.float32)}
    small, info = activation_svd(params, {"w": statistics_of(x)}, rank=3, fisher=given)
    np.testing.assert_allclose(small["w"].materialize(), wanted, atol=1e-4)
    assert info["w"].loss == pytest.approx((values[3:] ** 2).sum(), rel=1e-4)


def test_a_table_weighs_rows_by_their_lookups():
    table, rows = normal(20, 6), np.array([9, 0, 3] + [0] * 17, np.float64)
    found = LookupCounts(count=jnp.float32(12), rows=jnp.asarray(rows, jnp.float32))
    layouts = {"embedding": LeafLayout(kind="lookup", input_axes=(1,), output_axes=(0,))}
    small, _ = activation_svd({"embedding": table}, {"embedding": found}, rank=2, layouts=layouts)
    root = np.sqrt(rows + 1)[:, None]
    np.testing.assert_allclose(
        small["embedding"].materialize(), truncated(root * np.asarray(table), 2)[0] / root, atol=1e-5
    )
    ids = jnp.array([[0, 2], [19, 0]])
    got = jc.execute(lambda p, ids: p["embedding"][ids])(small, ids)
    np.testing.assert_allclose(got, small["embedding"].materialize()[ids], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_with_cross_statistics_the_dense_outputs_are_the_target(ridge):
    """Inputs that an earlier layer changed: the outputs should come close to Y W, not to X W."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(200, 8))
    x = y + 0.3 * rng.normal(size=y.shape)
    kernel = normal(8, 6)
    found = dataclasses.replace(statistics_of(x), cross=jnp.asarray(y.T @ x, jnp.float32))
    errors = []
    for given in (found, statistics_of(x)):
        small, _ = activation_svd({"w": kernel}, {"w": given}, rank=3, ridge=ridge)
        errors.append(((y @ np.asarray(kernel) - x @ np.asarray(small["w"].materialize())) ** 2).sum())
    held = ridge * np.trace(x.T @ x) / 8 * np.eye(8)
    best = np.linalg.solve(x.T @ x + held, x.T @ y @ np.asarray(kernel) + held @ np.asarray(kernel))
    root = np.linalg.cholesky(x.T @ x)
    wanted = np.linalg.solve(root.T, truncated(root.T @ best, 3)[0])
    assert errors[0] == pytest.approx(((y @ np.asarray(kernel) - x @ wanted) ** 2).sum(), rel=1e-4)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("whitening", ["cholesky", "eigen"])
def test_singular_inputs_lose_nothing_that_is_seen(whitening):
    """Inputs in a plane: two directions carry all outputs, whatever the weights do elsewhere."""
    x = np.asarray(normal(40, 2), np.float64) @ np.asarray(normal(2, 10, seed=1), np.float64)
    kernel = normal(10, 7, seed=2)
    small, info = activation_svd({"w": kernel}, {"w": statistics_of(x)}, rank=2, whitening=whitening)
    np.testing.assert_allclose(x @ np.asarray(small["w"].materialize()), x @ np.asarray(kernel), atol=1e-2)
    assert info["w"].error < 2e-3
    assert (info["w"].retries > 0) == (whitening == "cholesky")
    assert bool(jnp.isfinite(small["w"].materialize()).all())


def test_dead_inputs_and_no_signal_at_all():
    x = np.asarray(normal(40, 6), np.float64)
    x[:, 3] = 0
    small, _ = activation_svd({"w": normal(6, 5)}, {"w": statistics_of(x)}, rank=5)
    np.testing.assert_allclose(x @ np.asarray(small["w"].materialize()), x @ np.asarray(normal(6, 5)), atol=1e-4)
    # With no signal at all, what is damped counts all inputs alike.
    with pytest.warns(UserWarning, match="No row of the calibration data reached 'w'"):
        small, info = activation_svd({"w": normal(6, 5)}, {"w": statistics_of(0 * x)}, rank=2)
    assert (info["w"].error, info["w"].unseen_inputs) == (None, 6)
    np.testing.assert_allclose(small["w"].materialize(), truncated(normal(6, 5), 2)[0], atol=1e-5)
    small, _ = svd({"w": jnp.zeros((6, 5))}, rank=2)
    np.testing.assert_array_equal(small["w"].materialize(), np.zeros((6, 5)))


def test_bfloat16_leaves_have_bfloat16_factors():
    kernel = normal(24, 17, dtype="bfloat16")
    small, _ = svd({"w": kernel}, rank=17)
    assert small["w"].dtype == small["w"].left.dtype == small["w"].right.dtype == jnp.bfloat16
    left, right = (np.asarray(factor, np.float64).reshape(-1, 17) for factor in (small["w"].left, small["w"].right))
    exact = np.asarray(kernel, np.float64)
    found = np.asarray(small["w"].materialize(), np.float64)
    # Each factor is rounded to 8 bits once, and their product to 8 bits again.
    np.testing.assert_allclose(found, left @ right.T, rtol=2**-8, atol=1e-6)
    assert np.linalg.norm(found - exact) < 2**-7 * np.linalg.norm(exact)


def test_a_rule_may_leave_leaves_dense_and_others_are_not_touched():
    params = {"small": normal(2, 2), "large": normal(24, 30), "bias": normal(5)}
    small, info = svd(params, rank=parameter_share(0.5))
    assert small["small"] is params["small"]
    assert info["small"].rank is None
    assert info["small"].share == 1.0
    assert isinstance(small["large"], LowRankArray)
    assert small["bias"] is params["bias"]
    assert set(info) == {"small", "large"}


def test_empty_leaves_have_rank_zero():
    params = {"none": jnp.zeros((0, 4)), "w": normal(3, 4)}
    small, info = svd(params, rank=2)
    assert (small["none"].shape, small["none"].rank, info["none"].error) == ((0, 4), 0, 0.0)


def test_compressed_leaves_count_as_what_they_stand_for():
    params = {"w": normal(12, 9)}
    once, _ = svd(params, rank=6)
    twice, info = svd(once, rank=6)
    np.testing.assert_allclose(twice["w"].materialize(), once["w"].materialize(), atol=1e-5)
    assert info["w"].error < 1e-3


def test_a_whole_model_under_a_budget_runs_and_is_counted():
    def apply(params, x):
        return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"] + params["b"]["bias"][None]

    params = {"a": {"kernel": normal(20, 30)}, "b": {"kernel": normal(30, 25, seed=1), "bias": normal(25)}}
    x = normal(64, 20, seed=2) * jnp.linspace(0.01, 2, 20)[None]
    found = input_statistics(apply, params, [(x,)])
    small, info = activation_svd(params, found, rank=budget(0.5, relative=True))
    assert sum(leaf.parameters for leaf in info.values()) <= 0.5 * (600 + 750)
    report = jc.report.size_report(small)
    assert report.total.stored_bytes == 4 * (sum(leaf.parameters for leaf in info.values()) + 25)
    assert report.total.weights == 600 + 750 + 25
    assert report.leaves[0].kind == f"rank {info['a/kernel'].rank} float32"
    np.testing.assert_allclose(jc.execute(apply)(small, x), apply(jc.materialize(small), x), rtol=1e-4, atol=1e-4)


GOOD = {"w": statistics_of(np.eye(4))}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: svd(p | {"w": p["w"].at[0, 0].set(jnp.nan)}, rank=1), r"'w' holds 1 NaN and 0 Inf"),
        (lambda p: svd({"w": jnp.ones((4, 3), "int8")}, rank=1), "'w' holds int8"),
        (lambda p: svd({"b": jnp.ones(3)}, rank=1), "nothing is selected"),
        (lambda p: activation_svd(p, {"w": Unselected}, rank=1), "nothing to compress"),
        (lambda p: activation_svd(p, {"w": Unselected}, rank=1, select=jc.tree.by_path("w")), "'w' has no statistic"),
        (
            lambda p: activation_svd({"w": jnp.ones((5, 3))}, GOOD, rank=1),
            r"'w' of shape \(5, 3\) has stack \[\] and 5 inputs",
        ),
        (lambda p: activation_svd(p, GOOD, rank=1, damping=-1.0), "`damping`"),
        (lambda p: activation_svd(p, {"w": statistics_of(np.full((2, 4), np.inf))}, rank=1), "statistics of leaf 'w'"),
        (lambda p: activation_svd(p, GOOD, rank=1, fisher={"w": -jnp.ones((4, 3))}), "'w' is negative"),
        (lambda p: fisher_svd(p, {"w": jnp.ones((3, 4))}, rank=1), r"'w' needs an entry in `fisher` of its shape"),
        (lambda p: fisher_svd(p, {"w": jnp.full((4, 3), jnp.nan)}, rank=1), "`fisher` of leaf 'w' holds NaN"),
        (lambda p: svd(p, rank={"v": 1}), "no entry for leaf 'w'"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bad_input_names_the_leaf(call, message):
    with pytest.raises(ValueError, match=message):
        call({"w": normal(4, 3)})


def test_on_eight_devices_as_on_one():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    kernel = normal(12, 16)
    found = statistics_of(np.asarray(normal(40, 12, seed=1)))
    alone, _ = activation_svd({"w": kernel}, {"w": found}, rank=4)
    spread, _ = activation_svd({"w": jax.device_put(kernel, split)}, {"w": found}, rank=4)
    np.testing.assert_allclose(spread["w"].materialize(), alone["w"].materialize(), atol=1e-4)
