"""Low rank beside a sparse or quantized residual, and compressed factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import pruning
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress.arrays import LowRankArray, QuantizedArray, sparsify
from jaxcompress.calibration import InputStatistics, input_statistics
from jaxcompress.lowrank import compress_factors, svd, with_residual
from jaxcompress.quantization import QuantSpec, gptq, quantize
from jaxcompress.trace import LeafLayout

SPEC = QuantSpec(bits=3, group_size=8)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rounded(params, statistics, layouts):
    del statistics
    return quantize(params, SPEC, layouts=layouts)


def largest(params, statistics, layouts):
    """The tenth of the weights that is largest, behind a bit mask."""
    masks = pruning.masks_from_scores(pruning.magnitude_scores(params, layouts=layouts), sparsity=0.9, layouts=layouts)
    return jax.tree.map(sparsify, params, masks), None


def statistics_of(x):
    return InputStatistics(count=jnp.float32(len(x)), gram=jnp.asarray(x.T @ x, jnp.float32))


def test_one_turn_is_the_error_of_rounding_made_low_rank():
    """LoftQ's first step: factors of W - Q, by float64 NumPy."""
    params = {"w": normal(16, 12)}
    small, info = with_residual(params, rounded, rank=4, iterations=1)
    leaf = small["w"]
    validate_array(leaf)
    quantized = quantize(params, SPEC)[0]["w"].materialize()
    u, s, vt = np.linalg.svd(np.asarray(params["w"] - quantized, np.float64))
    wanted = np.asarray(quantized, np.float64) + (u[:, :4] * s[:4]) @ vt[:4]
    np.testing.assert_allclose(leaf.materialize(), wanted, atol=1e-5)
    assert isinstance(leaf.residual, QuantizedArray)
    assert info["w"].loss == pytest.approx((s[4:] ** 2).sum(), rel=1e-4)
    assert info["w"].parameters == 4 * 28


@pytest.mark.parametrize("first", ["residual", "low rank"])
@pytest.mark.parametrize("compress", [rounded, largest])
def test_more_turns_are_no_worse_and_the_best_one_is_kept(compress, first):
    params = {"w": normal(24, 16), "v": normal(16, 24, seed=1)}
    errors = []
    for iterations in (1, 2, 6):
        small, info = with_residual(params, compress, rank=3, iterations=iterations, first=first)
        for path in params:
            gap = np.asarray(small[path].materialize(), np.float64) - np.asarray(params[path])
            assert info[path].loss == pytest.approx((gap**2).sum(), rel=1e-4)
        errors.append([info[path].error for path in params])
    assert (np.array(errors[1]) <= np.array(errors[0]) + 1e-7).all()
    assert (np.array(errors[2]) <= np.array(errors[1]) + 1e-7).all()
    assert (np.array(errors[2]) < np.array(errors[0])).any()


def test_both_parts_are_better_than_either_alone():
    """A matrix that is low rank plus a few large entries: each part alone misses the other."""
    rng = np.random.default_rng(0)
    spikes = np.where(rng.random((32, 24)) < 0.05, 8.0, 0.0)
    matrix = rng.normal(size=(32, 3)) @ rng.normal(size=(3, 24)) + spikes
    params = {"w": jnp.asarray(matrix, jnp.float32)}
    small, info = with_residual(params, largest, rank=3, iterations=30, first="low rank")
    assert isinstance(small["w"].residual, SparseArray)
    alone = svd(params, rank=3)[1]["w"].error
    assert info["w"].error < 0.05 < 0.3 < alone
    x = normal(5, 32)
    np.testing.assert_allclose(jc.execute(lambda p, x: x @ p["w"])(small, x), x @ small["w"].materialize(), atol=1e-3)


def test_the_norm_is_that_of_the_outputs_where_there_are_statistics():
    x = np.asarray(normal(80, 16, seed=2), np.float64) * np.geomspace(1, 0.01, 16)
    params, found = {"w": normal(16, 12)}, {"w": statistics_of(x)}
    seen = []

    def compress(params, statistics, layouts):
        seen.append(statistics["w"])
        return rounded(params, statistics, layouts)

    small, info = with_residual(params, compress, rank=3, statistics=found, iterations=2)
    assert all(own is found["w"] for own in seen)
    plain, _ = with_residual(params, rounded, rank=3, iterations=2)

    def lost(leaf):
        return ((x @ (np.asarray(leaf.materialize(), np.float64) - np.asarray(params["w"]))) ** 2).sum()

    assert info["w"].loss == pytest.approx(lost(small["w"]), rel=1e-3)
    assert lost(small["w"]) < 0.8 * lost(plain["w"])


def test_sparsegpt_makes_the_residual():
    """A sibling's method on W - L, with the statistics of the leaf."""
    x = np.asarray(normal(80, 16, seed=2) @ normal(16, 16, seed=3), np.float64)
    params, found = {"a": {"w": normal(16, 12)}, "bias": jnp.ones(3)}, {"a": {"w": statistics_of(x)}, "bias": 0}
    found["bias"] = jc.tree.Unselected

    def compress(params, statistics, layouts):
        return pruning.sparsegpt(params, statistics, sparsity=0.8, layouts=layouts)

    small, info = with_residual(params, compress, rank=4, statistics=found, iterations=3)
    assert float((small["a"]["w"].residual == 0).mean()) == pytest.approx(0.8, abs=0.01)
    alone = pruning.sparsegpt(params, found, sparsity=0.8)[1]["a/w"].error
    assert info["a/w"].error < alone
    assert small["bias"] is params["bias"]


def test_gptq_makes_residual_and_factors():
    """Each on the inputs that it gets: better than rounding both."""
    x = np.asarray(normal(96, 32, seed=2) @ normal(32, 32, seed=3), np.float64)
    params, found = {"w": normal(32, 16)}, {"w": statistics_of(x)}

    def by_gptq(params, statistics, layouts):
        return gptq(params, statistics, SPEC, layouts=layouts)

    errors = []
    for compress in (rounded, by_gptq):
        small, _ = with_residual(params, compress, rank=8, statistics=found, iterations=2)
        small, _ = compress_factors(small, compress, statistics=found)
        assert isinstance(small["w"].left, QuantizedArray)
        gap = np.asarray(small["w"].materialize(), np.float64) - np.asarray(params["w"])
        errors.append(np.linalg.norm(x @ gap) / np.linalg.norm(x @ np.asarray(params["w"])))
    assert errors[1] < 0.9 * errors[0]


def test_rank_zero_and_dense_leaves_keep_the_residual_alone():
    params = {"w": normal(16, 12), "v": normal(16, 12)}
    small, info = with_residual(params, rounded, rank={"w": 0, "v": None}, iterations=2)
    assert all(isinstance(leaf, QuantizedArray) for leaf in small.values())
    assert info["w"].rank is None
    assert info["w"].parameters == 0


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        (
            lambda p, s, at: ({"w": p["w"].T}, None),
            r"returned float32\(12, 16\) for leaf 'w', expected float32\(16, 12\)",
        ),
        (lambda p, s, at: ({}, None), "returned nothing for leaf 'w'"),
        (lambda p, s, at: ({"w": p["w"].astype("bfloat16")}, None), "returned bfloat16"),
    ],
)
def test_what_compress_returns_is_checked(compress, message):
    with pytest.raises(ValueError, match=message):
        with_residual({"w": normal(16, 12)}, compress, rank=2)


def test_options_out_of_range():
    with pytest.raises(ValueError, match="`iterations`"):
        with_residual({"w": normal(4, 3)}, rounded, rank=2, iterations=0)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((16, 24), LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))),
        ((24, 16), LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,))),
        ((3, 16, 24), LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))),
        ((2, 8, 4, 6), LeafLayout(kind="matmul", input_axes=(0, 1), output_axes=(2, 3))),
    ],
)
def test_factors_are_quantized_like_two_kernels(shape, layout):
    layouts = {"w": layout}
    small, _ = svd({"w": normal(*shape)}, rank=8, layouts=layouts)
    spec = QuantSpec(bits=8, group_size=4)
    found, _ = compress_factors(small, lambda p, s, at: quantize(p, spec, layouts=at), layouts=layouts)
    leaf = found["w"]
    validate_array(leaf)
    assert isinstance(leaf.left, QuantizedArray)
    assert isinstance(leaf.right, QuantizedArray)
    stack, depth, width = (
        int(np.prod([shape[axis] for axis in axes]))
        for axes in (layout.stack_axes, layout.input_axes, layout.output_axes)
    )
    # Groups of four inputs: of the left factor along the leaf's inputs, of the right one along the rank.
    assert leaf.left.scale.size == stack * depth // 4 * 8
    assert leaf.right.scale.size == stack * width * 8 // 4
    np.testing.assert_allclose(leaf.materialize(), small["w"].materialize(), atol=0.05)


def test_factors_get_statistics_of_their_own():
    """Of the right factor, the inputs are what the left one makes of those of the leaf."""
    params, x = {"w": normal(16, 12)}, normal(40, 16, seed=1)
    small, _ = svd(params, rank=5)
    found = input_statistics(lambda p, x: x @ p["w"], params, [(x,)])
    seen = []

    def compress(params, statistics, layouts):
        seen.append(statistics["w"])
        return params, {"w": 1}

    _, info = compress_factors(small, compress, statistics=found)
    hidden = np.asarray(x, np.float64) @ np.asarray(small["w"].left[:, 0], np.float64)
    assert info == {"w": 1}
    np.testing.assert_allclose(seen[0]["left"].gram, x.T @ x, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(seen[0]["right"].gram, hidden.T @ hidden, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(seen[0]["right"].squared_sum, (hidden**2).sum(0), rtol=1e-3)
    pruned, _ = compress_factors(
        small, lambda p, s, at: pruning.sparsegpt(p, s, sparsity=0.5, layouts=at), statistics=found
    )
    assert float((pruned["w"].right == 0).mean()) == pytest.approx(0.5, abs=0.02)


def test_factors_of_nothing_and_of_other_layouts_are_refused():
    with pytest.raises(ValueError, match="No leaf is a LowRankArray"):
        compress_factors({"w": normal(4, 3)}, lambda p, s, at: (p, None))
    small, _ = svd({"w": normal(4, 3)}, rank=2)
    turned = {"w": LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,))}
    with pytest.raises(ValueError, match=r"left factor of leaf 'w', \(4, 1, 2\), does not have the inputs"):
        compress_factors(small, lambda p, s, at: (p, None), layouts=turned)
    with pytest.raises(ValueError, match="returned nothing for factor 'w/right'"):
        compress_factors(small, lambda p, s, at: ({"w": {"left": p["w"]["left"]}}, None))


def test_all_of_it_together_is_smaller_than_the_factors():
    params = {"kernel": normal(64, 48)}
    small, _ = with_residual(params, lambda p, s, at: quantize(p, QuantSpec(bits=2), layouts=at), rank=8)
    small, _ = compress_factors(small, lambda p, s, at: quantize(p, QuantSpec(bits=8), layouts=at))
    assert isinstance(small["kernel"], LowRankArray)
    report = jc.report.size_report(small)
    # 2 bits and a scale per output; 8 bits for each of the factors' numbers and a scale for each of their columns.
    assert report.total.stored_bytes == 64 * 48 // 4 + 4 * 48 + 8 * (64 + 48) + 4 * (8 + 48)
    assert report.leaves[0].kind == "rank 8 int8 per-channel + int2 per-channel"
    assert not any(is_unselected(part) for part in jax.tree.leaves(small))
