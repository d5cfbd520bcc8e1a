"""GPTQ, range search and reconstruction: layouts, stacks, tables, dtypes, bad input, and that they help."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress import quantization, tree
from jaxcompress._src.solvers.descent import coordinate_descent, least_squares_scales
from jaxcompress.calibration import InputStatistics, LookupCounts, input_statistics
from jaxcompress.quantization import QuantSpec, RangeSearch, gptq, reconstruct
from jaxcompress.trace import LeafLayout

RNG = np.random.default_rng(0)
DEPTH, WIDTH = 12, 5
SPEC = QuantSpec(bits=3, group_size=4, symmetric=False)
PUBLISHED = {"range_search": None, "refine": 0}
X = RNG.normal(size=(60, DEPTH)) @ (RNG.normal(size=(DEPTH, DEPTH)) / np.sqrt(DEPTH) + 0.5)
W = RNG.normal(size=(DEPTH, WIDTH))


def _statistics(rows, cross=None):
    rows = np.asarray(rows, np.float32)
    cross = None if cross is None else jnp.asarray(np.asarray(cross, np.float32).T @ rows)
    return InputStatistics(count=jnp.float32(len(rows)), gram=jnp.asarray(rows.T @ rows), cross=cross)


PARAMS = {"kernel": jnp.asarray(W, jnp.float32), "bias": jnp.ones(WIDTH)}
STATISTICS = {"kernel": _statistics(X), "bias": tree.Unselected}


def _error(found, rows=X, weights=W):
    rows, found = np.asarray(rows, np.float64), np.asarray(found, np.float64)
    return np.linalg.norm(rows @ (weights - found)) / np.linalg.norm(rows @ weights)


def _by_hand(w, gram, spec, damping=0.01):
    """Algorithm 1 of the paper, one input at a time, in float64; groups are static, the order is by energy."""
    hessian = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
    order = np.argsort(-np.diag(gram), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    blocks = w.reshape(-1, spec.group_size, w.shape[1])
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    scale = (high - low) / (2**spec.bits - 1)
    zero = np.round(-low / scale)
    left, found = w[order].copy(), np.zeros_like(w)
    for i, at in enumerate(order):
        s, z = scale[at // spec.group_size], zero[at // spec.group_size]
        found[at] = (np.clip(np.round(left[i] / s) + z, 0, 2**spec.bits - 1) - z) * s
        left[i:] -= upper[i, i:][:, None] * ((left[i] - found[at]) / upper[i, i])[None]
    return found


def test_weights_and_errors_are_those_of_the_algorithm():
    found, info = gptq(PARAMS, STATISTICS, SPEC, **PUBLISHED)
    expected = _by_hand(W, X.T @ X, SPEC)
    np.testing.assert_allclose(found["kernel"].materialize(), expected, rtol=1e-4, atol=1e-5)
    nearest = quantization.quantize({"kernel": PARAMS["kernel"]}, SPEC)[0]["kernel"].materialize()
    assert info["kernel"].error == pytest.approx(_error(expected), abs=2e-3)
    assert info["kernel"].error_before == pytest.approx(_error(nearest), abs=2e-3)
    assert info["kernel"].error < info["kernel"].error_before
    assert found["bias"] is PARAMS["bias"]
    # 3 bits are packed by eights: 16 codes for 12 inputs, and 8 zero points for 5 outputs of each of the 3 groups.
    assert info["kernel"].bits_per_weight == (WIDTH * 16 * 3 + WIDTH * 3 * 32 + 3 * 8 * 3) / W.size


def test_no_float_weights_are_left():
    found, _ = gptq(PARAMS, STATISTICS, SPEC)
    sizes = [leaf.size for leaf in jax.tree.leaves(found["kernel"]) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert sizes == [3 * WIDTH]


def test_refining_and_better_ranges_lower_the_error():
    search = RangeSearch(grid_size=8, shrink=0.64, norm=2.0, weighted=True, two_sided=True)
    errors = [
        gptq(PARAMS, STATISTICS, SPEC, **PUBLISHED | options)[1]["kernel"].error
        for options in ({}, {"refine": 3}, {"range_search": search, "refine": 3})
    ]
    assert errors[0] > errors[1]
    assert errors[0] > errors[2]


def test_updated_groups_weigh_their_ranges_by_their_own_inputs():
    """Inputs that are uncorrelated make up for nothing: updated groups must find what static ones do."""
    rows = np.diag(np.r_[1, 30, 2, 5, 0.1, 3, 40, 1, 9, 1, 1, 0.2])
    statistics = {"kernel": _statistics(rows)}
    search = RangeSearch(grid_size=20, shrink=0.8, norm=2.0, weighted=True)
    params = {"kernel": PARAMS["kernel"]}
    for spec in (SPEC, dataclasses.replace(SPEC, symmetric=True)):
        options = {"order": "natural", "range_search": search, "refine": 0}
        updated, static = (
            gptq(params, statistics, spec, group_scales=g, **options)[0]["kernel"] for g in ("updated", "static")
        )
        plain, _ = gptq(
            params,
            statistics,
            spec,
            group_scales="updated",
            order="natural",
            range_search=RangeSearch(norm=2.0, grid_size=20),
            refine=0,
        )
        np.testing.assert_array_equal(updated.codes(), static.codes())
        np.testing.assert_array_equal(updated.scale, static.scale)
        assert (updated.scale != plain["kernel"].scale).any()


def test_any_layout_gives_the_same_codes():
    expected, _ = gptq({"kernel": PARAMS["kernel"]}, {"kernel": STATISTICS["kernel"]}, SPEC, **PUBLISHED)
    out_in = LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,))
    turned, _ = gptq({"w": PARAMS["kernel"].T}, {"w": STATISTICS["kernel"]}, SPEC, layouts={"w": out_in}, **PUBLISHED)
    np.testing.assert_array_equal(turned["w"].codes(), np.asarray(expected["kernel"].codes()).T)
    # Two input axes, two output axes, between them a stack of two; groups of 4 run along the second input axis.
    stacked = np.stack([W.reshape(3, 4, WIDTH), 2 * W.reshape(3, 4, WIDTH)], axis=2)[..., None]
    layout = LeafLayout(kind="matmul", stack_axes=(2,), input_axes=(0, 1), output_axes=(3, 4))
    both = jax.tree.map(lambda part: jnp.stack([part, part]), STATISTICS["kernel"])
    found, _ = gptq({"w": jnp.asarray(stacked, jnp.float32)}, {"w": both}, SPEC, layouts={"w": layout}, **PUBLISHED)
    for entry in (0, 1):
        got = np.asarray(found["w"].materialize())[:, :, entry].reshape(DEPTH, WIDTH)
        np.testing.assert_allclose(got, (1 + entry) * expected["kernel"].materialize(), rtol=1e-5, atol=1e-6)


def test_tables_are_rounded_for_the_rows_that_are_looked_up():
    params = {"table": jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32).at[8].mul(20.0)}
    counts = LookupCounts(count=jnp.float32(8), rows=jnp.ones(9).at[8].set(0.0))
    layouts = {"table": LeafLayout(kind="lookup", input_axes=(1,), output_axes=(0,))}
    spec = QuantSpec(bits=4, per_tensor=True)
    search = RangeSearch(norm=2.0, shrink=0.98, grid_size=50, weighted=True)
    found, info = gptq(params, {"table": counts}, spec, range_search=search, layouts=layouts)
    rows = np.asarray(params["table"])[:8]
    lost = np.linalg.norm(np.asarray(found["table"].materialize())[:8] - rows) / np.linalg.norm(rows)
    assert info["table"].error == pytest.approx(lost, abs=1e-4)
    assert info["table"].error < 0.3 * info["table"].error_before
    with pytest.raises(ValueError, match=r"'table' of shape .* has 4 rows, its statistics count 9"):
        gptq(params, {"table": counts}, spec)


def test_bfloat16_and_unseen_inputs_and_singular_matrices():
    rows = X[:4].copy()
    rows[:, [2, 7]] = 0
    params = {"kernel": PARAMS["kernel"].astype(jnp.bfloat16)}
    found, info = gptq(params, {"kernel": _statistics(rows)}, SPEC, damping=0.0)
    assert found["kernel"].dtype == jnp.bfloat16
    assert info["kernel"].unseen_inputs == 2
    assert info["kernel"].retries > 0
    published, _ = gptq(params, {"kernel": _statistics(rows)}, SPEC, damping=0.0, unseen="zero")
    np.testing.assert_array_equal(np.asarray(published["kernel"].materialize(), np.float32)[[2, 7]], 0)
    found, info = gptq({"kernel": 0 * PARAMS["kernel"]}, {"kernel": _statistics(X)}, SPEC)
    assert info["kernel"].error == 0
    assert not np.asarray(found["kernel"].materialize()).any()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="`group_scales='updated'` needs `order='natural'`"):
        gptq(PARAMS, STATISTICS, SPEC, group_scales="updated")
    with pytest.raises(ValueError, match="`damping` must be at least 0, got -1"):
        gptq(PARAMS, STATISTICS, SPEC, damping=-1.0)
    with pytest.raises(ValueError, match="`ridge` must not be negative, got -1"):
        gptq(PARAMS, STATISTICS, SPEC, ridge=-1.0)
    with pytest.raises(ValueError, match="`group_size` 5 does not divide") as caught:
        gptq(PARAMS, STATISTICS, QuantSpec(bits=4, group_size=5))
    assert "at leaf 'kernel'" in caught.value.__notes__
    with pytest.raises(ValueError, match="Leaf 'kernel' holds 1 NaN"):
        gptq({"kernel": PARAMS["kernel"].at[0, 0].set(jnp.nan)}, {"kernel": STATISTICS["kernel"]}, SPEC)
    with pytest.raises(ValueError, match=r"has stack \[\] and 5 inputs"):
        gptq({"kernel": PARAMS["kernel"].T}, {"kernel": STATISTICS["kernel"]}, SPEC)
    with pytest.raises(ValueError, match="`grid_size` must be at least 1"):
        RangeSearch(grid_size=0)


def test_equal_on_one_and_on_eight_devices():
    kernel = jnp.asarray(RNG.normal(size=(DEPTH, 16)), jnp.float32)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(None, "model")))
    statistics = {"kernel": STATISTICS["kernel"]}
    everywhere = jax.device_put(statistics, NamedSharding(mesh, PartitionSpec()))
    expected, _ = gptq({"kernel": kernel}, statistics, SPEC, **PUBLISHED)
    found, _ = gptq({"kernel": placed}, everywhere, SPEC, **PUBLISHED)
    np.testing.assert_array_equal(found["kernel"].codes(), expected["kernel"].codes())


def _two_layers(params, x):
    hidden = x @ params["up"] + params["shift"][None]
    # Read twice, as a GELU does.
    return x + (hidden * jax.nn.sigmoid(hidden)) @ params["down"]


def _layers():
    rng = np.random.default_rng(1)
    return {
        "up": jnp.asarray(rng.normal(size=(12, 24)) / 3, jnp.float32),
        "shift": jnp.zeros(24),
        "down": jnp.asarray(rng.normal(size=(24, 12)) / 5, jnp.float32),
    }


def test_targets_that_undo_earlier_errors_come_closer_to_the_dense_model():
    params, rows = _layers(), jnp.asarray(RNG.normal(size=(400, 12)), jnp.float32)
    spec = dataclasses.replace(SPEC, bits=2)
    wanted = _two_layers(params, rows)
    published = {"targets": "weights", "bias": False, **PUBLISHED}
    gaps = []
    for options in (published, {"ridge": 0.01}):
        found, info = reconstruct(_two_layers, params, [(rows[:200],), (rows[200:],)], spec, **options)
        plain = jc.materialize(found)
        gaps.append(float(jnp.linalg.norm(_two_layers(plain, rows) - wanted)))
        assert set(info) == {"up", "down"}
    assert gaps[1] < 0.9 * gaps[0]
    alone = {"up": params["up"]}
    statistics = input_statistics(lambda p, x: x @ p["up"], alone, [(rows,)])
    first = reconstruct(_two_layers, params, [(rows,)], spec, **published)[0]["up"]
    np.testing.assert_array_equal(gptq(alone, statistics, spec, **PUBLISHED)[0]["up"].codes(), first.codes())


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(bits=4)])
def test_one_program_reconstructs_at_all_bits(spec):
    params, rows = {"kernel": PARAMS["kernel"]}, jnp.asarray(X, jnp.float32)
    compiled = []

    def listen(event, duration, **details):
        if event.endswith("backend_compile_duration") and details.get("fun_name") == "jit(_rounded)":
            compiled.append(duration)

    published = {"targets": "weights", "bias": False, **PUBLISHED}
    statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(rows,)])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for bits in (2, 3, 5):
            at = dataclasses.replace(spec, bits=bits)
            found, _ = reconstruct(lambda p, x: x @ p["kernel"], params, [(rows,)], at, **published)
            expected = gptq(params, statistics, at, **PUBLISHED)[0]["kernel"]
            np.testing.assert_array_equal(found["kernel"].codes(), expected.codes())
            np.testing.assert_allclose(found["kernel"].scale, expected.scale, rtol=1e-6)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # None, where it is compiled already.
    assert len(compiled) <= 1


def test_reconstruction_names_what_it_cannot_do():
    params, rows = _layers(), jnp.ones((3, 12))
    with pytest.raises(ValueError, match="`batches` is empty"):
        reconstruct(_two_layers, params, [], SPEC)
    with pytest.raises(ValueError, match="`ridge` must not be negative"):
        reconstruct(_two_layers, params, [(rows,)], SPEC, ridge=-1.0)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        reconstruct(_two_layers, params, [(rows * jnp.nan,)], SPEC)


def test_descent_and_scales_against_float64():
    hessian = X.T @ X
    step = 0.7
    start = step * np.round(W / step)
    gram = jnp.asarray(hessian, jnp.float32)
    to_step = lambda w, i: step * jnp.round(w / step)  # noqa: E731
    found, slope = coordinate_descent(jnp.asarray(start), jnp.asarray(W), gram, to_step, sweeps=3, block_size=5)
    expected = start.copy()
    for _ in range(3):
        for i in range(DEPTH):
            want = expected[i] - (hessian[i] @ (expected - W)) / hessian[i, i]
            expected[i] = step * np.round(want / step)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(slope, hessian @ (expected - W), rtol=1e-4, atol=1e-3)
    values = np.round(W / step)
    start, targets = jnp.ones((3, WIDTH)), jnp.asarray(W, jnp.float32)
    scales = least_squares_scales(jnp.asarray(values, jnp.float32), targets, gram, start, damping=0.0)
    for r in range(WIDTH):
        columns = np.zeros((DEPTH, 3))
        for g in range(3):
            columns[4 * g : 4 * g + 4, g] = values[4 * g : 4 * g + 4, r]
        best = np.linalg.lstsq(X @ columns, X @ W[:, r], rcond=None)[0]
        np.testing.assert_allclose(scales[:, r], best, rtol=2e-3)


def _correlated(seed, depth=128, width=16):
    """Inputs that share a direction, and weights with heavy tails."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(512, depth)) @ (rng.normal(size=(depth, depth)) / np.sqrt(depth) + 0.5)
    return rows, rng.standard_t(4, size=(depth, width))


def _as_published(w, gram, bits, group=32, damping=0.01):
    """The defaults of llm-compressor: scales of max|w| / (2^b - 1) / 2, all codes, inputs by energy, static groups."""
    hessian = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
    order = np.argsort(-np.diag(gram), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    scale = np.abs(w.reshape(-1, group, w.shape[1])).max(1) / (2 ** (bits - 1) - 0.5)
    left, found = w[order].copy(), np.zeros_like(w)
    for i, at in enumerate(order):
        own = scale[at // group]
        found[at] = np.clip(np.round(left[i] / own), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * own
        left[i:] -= upper[i, i:][:, None] * ((left[i] - found[at]) / upper[i, i])[None]
    return found


@pytest.mark.parametrize(("bits", "symmetric", "asymmetric"), [(4, 0.88, 0.7), (3, 0.86, 0.7), (2, 0.7, 0.58)])
def test_the_defaults_lose_less_than_those_of_the_public_tools(bits, symmetric, asymmetric):
    ratios = []
    for seed in range(2):
        rows, weights = _correlated(seed)
        lost = _error(_as_published(weights, rows.T @ rows, bits), rows, weights)
        params, statistics = {"kernel": jnp.asarray(weights, jnp.float32)}, {"kernel": _statistics(rows)}
        specs = [QuantSpec(bits=bits, group_size=32, symmetric=s) for s in (True, False)]
        found = [gptq(params, statistics, spec)[0]["kernel"].materialize() for spec in specs]
        ratios.append([_error(values, rows, weights) / lost for values in found])
    means = np.mean(ratios, axis=0)
    assert means[0] < symmetric, ratios
    assert means[1] < asymmetric, ratios


def test_block_by_block_beats_the_statistics_of_the_dense_model():
    rng, depth = np.random.default_rng(0), 16
    shape = (4, depth, depth)
    params = {name: jnp.asarray(rng.normal(size=shape) / np.sqrt(depth), jnp.float32) for name in ("up", "down")}

    def apply(params, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        return jax.lax.scan(layer, x, params)[0]

    mixing = rng.normal(size=(depth, depth)) / np.sqrt(depth) + 0.2
    x, held_out = (jnp.asarray(rng.normal(size=(256, depth)) @ mixing, jnp.float32) for _ in range(2))
    spec = QuantSpec(bits=2, group_size=8)
    layouts = jc.trace.layouts(apply, params, x)
    plain, _ = gptq(params, input_statistics(apply, params, [(x,)]), spec, layouts=layouts)
    found, info = quantization.gptq_sequential(apply, params, [(x,)], spec)
    assert set(info) == {f"{name}[{i}]" for name in params for i in range(4)}
    for rows in (x, held_out):
        gaps = [float(jnp.linalg.norm(apply(jc.materialize(p), rows) - apply(params, rows))) for p in (plain, found)]
        assert gaps[1] < 0.9 * gaps[0]


def test_targets_of_the_dense_model_do_not_lose_on_inputs_unlike_those_of_calibration():
    depth, spec, gaps = 32, QuantSpec(bits=2, group_size=8, symmetric=False), []

    def apply(params, x):
        for up, down in params:
            x = x + jnp.tanh(x @ up) @ down
        return x

    for seed in range(4):
        rng = np.random.default_rng(seed)
        draw = [rng.normal(size=(depth, depth)) / np.sqrt(depth) for _ in range(8)]
        params = [tuple(jnp.asarray(w, jnp.float32) for w in draw[i : i + 2]) for i in range(0, 8, 2)]
        seen, other = (
            jnp.asarray(rng.normal(size=(rows, depth)) @ (rng.normal(size=(depth, depth)) / np.sqrt(depth) + 0.2))
            for rows in (40, 512)
        )
        for options in ({"dense_inputs": False}, {}):
            found = jc.materialize(quantization.gptq_sequential(apply, params, [(seen,)], spec, **options)[0])
            gaps.append([float(jnp.linalg.norm(apply(found, x) - apply(params, x))) for x in (seen, other)])
    weights, dense = np.mean(gaps[::2], axis=0), np.mean(gaps[1::2], axis=0)
    assert dense[0] < 0.75 * weights[0]
    assert dense[1] < weights[1]


def test_a_ridge_holds_the_targets_to_the_weights():
    crossed = {"kernel": _statistics(X, RNG.normal(size=X.shape)), "bias": tree.Unselected}
    own, held, free = (
        gptq(PARAMS, statistics, SPEC, ridge=ridge)[0]["kernel"].codes()
        for statistics, ridge in ((STATISTICS, 0.1), (crossed, 1e6), (crossed, 0.0))
    )
    np.testing.assert_array_equal(held, own)
    assert (np.asarray(free) != np.asarray(own)).any()
