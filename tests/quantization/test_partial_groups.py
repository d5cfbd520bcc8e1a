"""Group sizes that do not divide a leaf: left out, refused, or a last group that is shorter."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.quantization.fake_quant import fake_quantize_array
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress._src.types import is_compressed
from jaxcompress.arrays import component_shardings, sparsify
from jaxcompress.calibration import input_statistics
from jaxcompress.clustering import CodebookSpec, cluster
from jaxcompress.quantization import (
    QuantSpec,
    awq,
    fake_quantize,
    gptq,
    hqq,
    learned_rounding,
    lsq,
    quantize,
    quantize_inputs,
    reconstruct,
)
from jaxcompress.trace import BlockError, LeafLayout, LeftOutWarning
from jaxcompress.tree import by_path

KERNEL = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
PARTIAL = QuantSpec(bits=4, group_size=8, partial_groups=True)


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def reference(w, axis, group, spec):
    """Rounded to nearest, group by group along one axis, in float64."""
    w = np.moveaxis(np.asarray(w, np.float64), axis, 0)
    out = np.empty_like(w)
    for start in range(0, len(w), group):
        part = w[start : start + group]
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        if spec.symmetric:
            top = 2 ** (spec.bits - 1) - (1 if spec.convention == "narrow" else 0.5)
            scale, zero, codes = np.maximum(high, -low) / top, 0, spec.code_range
        else:
            scale = (high - low) / (2**spec.bits - 1)
            zero, codes = np.round(-low / scale), (0, 2**spec.bits - 1)
        out[start : start + group] = (np.clip(np.round(part / scale) + zero, *codes) - zero) * scale
    return np.moveaxis(out, 0, axis)


@pytest.mark.parametrize(
    ("shape", "layout", "axis", "group", "blocks"),
    [
        ((20, 5), KERNEL, 0, 8, (3, 5)),  # 8 + 8 + 4
        ((12, 5), KERNEL, 0, 8, (2, 5)),  # two groups divide 12 evenly, and must not
        ((5, 5), KERNEL, 0, 5, (1, 5)),
        ((16, 5), KERNEL, 0, 8, (2, 5)),
        ((3, 10, 5), LeafLayout(kind="matmul", input_axes=(0, 1), output_axes=(2,)), 1, 8, (3, 2, 5)),
        ((3, 4, 5), LeafLayout(kind="matmul", input_axes=(0, 1), output_axes=(2,)), 0, 2, (2, 1, 5)),
        ((2, 12, 5), LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,)), 1, 8, (2, 2, 5)),
        ((5, 12), LeafLayout(kind="lookup", input_axes=(1,), output_axes=(0,)), 1, 8, (5, 2)),
        ((12, 5), LeafLayout(kind="lookup", input_axes=(0,), output_axes=(1,)), 0, 8, (2, 5)),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_last_group_is_shorter(shape, layout, axis, group, blocks, symmetric):
    spec = QuantSpec(bits=4, group_size=8, partial_groups=True, symmetric=symmetric, convention="narrow")
    w = weights(*shape)
    leaf = quantize_array(w, spec, layout)
    validate_array(leaf)
    assert leaf.shape == shape
    assert leaf.scale.shape == blocks
    wanted = reference(w, axis, group if shape != (3, 4, 5) else 2, spec)
    if shape == (3, 4, 5):
        # A group of 8 spans two rows of 4: they share a scale.
        flat = reference(np.asarray(w).reshape(12, 5), 0, 8, spec)
        wanted = flat.reshape(shape)
    np.testing.assert_allclose(leaf.materialize(), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(fake_quantize_array(w, spec, layout), leaf.materialize())
    rows = jnp.array([1, 0, 2])
    np.testing.assert_array_equal(leaf.take_rows(rows), leaf.materialize()[rows])


def test_moved_cut_and_multiplied_as_the_plain_array():
    spec = QuantSpec(bits=3, group_size=8, partial_groups=True, symmetric=False)
    stacked = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
    leaf, x = quantize_array(weights(3, 12, 6), spec, stacked), weights(4, 12, seed=1)

    def apply(w, x):
        scanned = jax.lax.scan(lambda carry, kernel: (carry, x @ kernel), 0.0, w)[1]
        cut = w[1][3:7].reshape(2, 2, 6).sum()
        return scanned, x @ w[2], w[0].T @ x.T, x @ w[0][:, 1:4], jax.vmap(lambda k: x @ k)(w), cut

    got, wanted = jax.jit(jc.execute(apply))(leaf, x), jax.jit(apply)(leaf.materialize(), x)
    for ours, plain in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_shares_of_a_partial_axis_keep_all_scales():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    leaf = quantize_array(weights(20, 6), QuantSpec(bits=8, group_size=8, partial_groups=True), KERNEL)
    parts = component_shardings(leaf, NamedSharding(mesh, P("model", None)))
    assert (parts.data.spec, parts.scale.spec) == (P("model", None), P(None, None))
    np.testing.assert_array_equal(jax.device_put(leaf, parts).materialize(), leaf.materialize())


def test_methods_round_partial_groups_and_checkpoints_keep_them(tmp_path):
    params, x = {"k": weights(12, 4)}, weights(40, 12, seed=1) @ weights(12, 12, seed=2)
    statistics = input_statistics(lambda p, x: x @ p["k"], params, [(x,)])
    asymmetric = QuantSpec(bits=3, group_size=8, partial_groups=True, symmetric=False)
    small = {
        "gptq": gptq(params, statistics, asymmetric)[0]["k"],
        "updated": gptq(params, statistics, asymmetric, order="natural", group_scales="updated")[0]["k"],
        "hqq": hqq(params, asymmetric)[0]["k"],
        "awq": awq(params, statistics, asymmetric)[0]["k"],
        "sparse": quantize({"k": sparsify(params["k"], params["k"] > 0)}, PARTIAL)[0]["k"],
    }
    nearest = quantize(params, asymmetric)[0]["k"]

    def lost(leaf):
        gap = np.asarray(x, np.float64) @ (np.asarray(leaf.materialize(), np.float64) - np.asarray(params["k"]))
        return float(np.linalg.norm(gap))

    for leaf in small.values():
        validate_array(leaf)
        assert (leaf.shape, leaf.scale.shape, leaf.partial) == ((12, 4), (2, 4), (-2, 8))
    assert lost(small["gptq"]) < lost(nearest)
    assert lost(small["awq"]) <= lost(nearest)
    np.testing.assert_array_equal(
        small["sparse"].materialize() != 0, (params["k"] > 0) & (small["sparse"].codes() != 0)
    )
    jc.checkpoint.save(tmp_path / "small", small)
    found, _ = jc.checkpoint.restore(tmp_path / "small")
    for name, leaf in small.items():
        np.testing.assert_array_equal(found[name].materialize(), leaf.materialize())
    with pytest.raises(ValueError, match=r"'k' has groups that are not whole"):
        learned_rounding(lambda p, x: x @ p["k"], params, {"k": nearest}, [(x,)], together=lambda _: 0)


def _calls():
    params = {"bias_table": weights(10, 4), "even": weights(16, 4)}
    x = (weights(9, 10), weights(9, 16))
    statistics = input_statistics(lambda p, x, y: x @ p["bias_table"] + y @ p["even"], params, [x])
    spec = QuantSpec(bits=4, group_size=8)
    fractions = QuantSpec(bits=4, group_size=8, symmetric=False)
    return params, {
        "quantize": lambda **k: quantize(params, spec, **k)[0],
        "fake_quantize": lambda **k: fake_quantize(params, spec, **k),
        "gptq": lambda **k: gptq(params, statistics, spec, **k)[0],
        "awq": lambda **k: awq(params, statistics, spec, **k)[0],
        "hqq": lambda **k: hqq(params, fractions, **k)[0],
        "quantize_inputs": lambda **k: quantize_inputs(params, spec, **k)[0],
        "cluster": lambda **k: cluster(params, CodebookSpec(values=4, group_size=8), **k)[0],
        "lsq": lambda **k: lsq(spec, **k).init(params, key=jax.random.key(0)).trainable.scale,
    }


def test_what_the_group_size_does_not_divide_is_left_out_and_named_unless_it_was_asked_for():
    params, calls = _calls()
    for name, call in calls.items():
        with pytest.warns(LeftOutWarning, match="'bias_table': `group_size` 8 does not divide") as caught:
            found = call()
        assert len(caught) == 1, name
        assert not is_compressed(found["bias_table"]), name
        assert name in ("fake_quantize", "lsq") or is_compressed(found["even"])
        with pytest.raises(BlockError, match="`group_size` 8 does not divide") as error:
            call(select=by_path("bias.*|even"))
        assert "at leaf 'bias_table'" in error.value.__notes__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(select=by_path("even"))
    np.testing.assert_array_equal(calls_plain(params), params["bias_table"])
    with pytest.raises(BlockError, match="`group_size` 8 does not divide"):
        quantize({"bias_table": params["bias_table"]}, QuantSpec(bits=4, group_size=8))


def calls_plain(params):
    with pytest.warns(LeftOutWarning):
        return quantize(params, QuantSpec(bits=4, group_size=8))[0]["bias_table"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QuantSpec(bits=4, partial_groups=True), "needs a `group_size`"),
        (lambda: QuantSpec(bits=4, group_size=8, partial_groups=True, range_rule="percentile"), "percentiles"),
        (lambda: lsq(PARTIAL), "whole groups only"),
        (lambda: quantize_inputs({"k": weights(8, 4)}, PARTIAL), "whole ones"),
    ],
)
def test_partial_groups_that_are_not_offered_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("symmetric", [True, False])
def test_reconstruct_rounds_partial_groups_as_gptq_does(symmetric):
    def apply(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0] @ params["out"]

    params = {"layers": weights(2, 10, 10) / 3, "out": weights(10, 6, seed=1)}
    x = weights(40, 10, seed=2) * jnp.linspace(0.5, 2, 10)[None]
    spec = QuantSpec(bits=4, group_size=8, symmetric=symmetric, partial_groups=True)
    found, info = reconstruct(apply, params, [(x,)], spec)
    assert found["layers"].scale.shape == (2, 2, 10)
    assert set(info) == {"layers[0]", "layers[1]", "out"}
    for entry in info.values():
        assert entry.error < entry.error_before
    # Targets that are the weights make it GPTQ, one kernel after another, on the inputs that the rounded ones give.
    plain = {"targets": "weights", "bias": False}
    found, info = reconstruct(apply, params, [(x,)], spec, **plain)
    first = input_statistics(lambda p, x: x @ p["w"], {"w": params["layers"][0]}, [(x,)])
    wanted, known = gptq({"w": params["layers"][0]}, first, spec)
    np.testing.assert_array_equal(found["layers"].codes()[0], wanted["w"].codes())
    np.testing.assert_allclose(found["layers"].scale[0], wanted["w"].scale, rtol=1e-4)
    assert info["layers[0]"].error == pytest.approx(known["w"].error, rel=1e-3)
    with pytest.raises(BlockError, match="does not divide the input axes"):
        reconstruct(apply, params, [(x,)], QuantSpec(bits=4, group_size=8), select=by_path("out"))
