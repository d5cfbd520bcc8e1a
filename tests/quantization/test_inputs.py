"""Ranges of inputs, `quantize_inputs`, and the transforms of inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress._src.arrays.protocol import KINDS
from jaxcompress._src.quantization.entropy import entropy_clip
from jaxcompress._src.quantization.input_transforms import quantized_inputs
from jaxcompress._src.quantization.inputs import InputRange, InputRounding
from jaxcompress.arrays import InputQuantizedArray, component_shardings
from jaxcompress.checkpoint import restore, save
from jaxcompress.quantization import (
    QuantSpec,
    fake_quantize,
    input_ranges,
    lsq_inputs,
    pact_inputs,
    quantize,
    quantize_inputs,
)
from jaxcompress.tree import Unselected, leaves_with_paths

SPEC = QuantSpec(bits=8, per_tensor=True)
KEY = jax.random.key(0)


def apply(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def params():
    rng = np.random.default_rng(0)
    return {
        "first": jnp.asarray(rng.normal(size=(20, 12)), jnp.float32),
        "second": jnp.asarray(rng.normal(size=(12, 3)), jnp.float32),
    }


def batches(count=3):
    rng = np.random.default_rng(1)
    return [(jnp.asarray(rng.normal(size=(8, 5, 20)) * (1 + i) + 0.5, jnp.float32),) for i in range(count)]


def values():
    return np.concatenate([np.ravel(x) for (x,) in batches()]).astype(np.float64)


@functools.cache
def ranges(rule, symmetric=True, **options):
    spec = QuantSpec(bits=4, per_tensor=True, symmetric=symmetric, convention="narrow", range_rule=rule, **options)
    return input_ranges(apply, params(), batches(), spec)["first"], spec


def test_extreme_values():
    found, _ = ranges("min-max")
    np.testing.assert_allclose(found.scale, np.abs(values()).max() / 7, rtol=1e-6)
    found, _ = ranges("min-max", symmetric=False)
    low, high = values().min(), values().max()
    np.testing.assert_allclose(found.scale, (high - low) / 15, rtol=1e-6)
    assert int(found.zero_point) == round(-low / (high - low) * 15)


def test_percentiles_are_within_a_bin():
    width = 2.0 ** np.ceil(np.log2(np.abs(values()).max())) / 2048
    found, _ = ranges("percentile", percentile=98.0)
    np.testing.assert_allclose(found.scale * 7, np.percentile(np.abs(values()), 98), atol=1.5 * width)
    found, _ = ranges("percentile", symmetric=False, percentile=98.0)
    wanted = np.percentile(values(), 98) - np.percentile(values(), 2)
    np.testing.assert_allclose(found.scale * 15, wanted, atol=3 * width)


@pytest.mark.parametrize("symmetric", [True, False])
def test_least_squares(symmetric):
    """The factor of least error over the values themselves, or one of as little error."""
    found, _ = ranges("mse", symmetric)
    x, low, high = values(), values().min(), values().max()

    def error(scale, zero):
        codes = np.clip(np.round(x / scale) + (0 if symmetric else zero), *((-7, 7) if symmetric else (0, 15)))
        return np.square((codes - (0 if symmetric else zero)) * scale - x).sum()

    grid = []
    for factor in 1 - np.arange(80) / 100:
        scale = factor * (max(high, -low) / 7 if symmetric else (high - low) / 15)
        grid.append(error(scale, np.round(-factor * low / scale)))
    zero = 0 if symmetric else int(found.zero_point)
    assert error(float(found.scale), zero) < 1.002 * min(grid)
    assert min(grid) < grid[0]


def test_entropy():
    found, _ = ranges("entropy")
    limit = 2.0 ** np.ceil(np.log2(np.abs(values()).max()))
    counts, edges = np.histogram(np.abs(values()), bins=2048, range=(0, limit))
    clip = edges[entropy_clip(counts, levels=8)]
    np.testing.assert_allclose(found.scale * 7, min(clip, np.abs(values()).max()), rtol=2e-3)


def test_running_ranges():
    spec = QuantSpec(bits=8, per_tensor=True, symmetric=False)
    found = input_ranges(apply, params(), batches(), spec, momentum=0.75)["first"]
    low = high = None
    for (x,) in batches():
        own = np.float64(x).min(), np.float64(x).max()
        low, high = own if low is None else (0.75 * low + 0.25 * own[0], 0.75 * high + 0.25 * own[1])
    np.testing.assert_allclose(found.scale, (high - low) / 255, rtol=1e-5)


def test_learned_steps_begin_at_the_mean():
    spec = QuantSpec(bits=4, per_tensor=True, convention="full")
    found = input_ranges(apply, params(), batches(), spec, initial_scales="mean")["first"]
    np.testing.assert_allclose(found.scale * 7.5 / 7, 2 * np.abs(values()).mean() / np.sqrt(7), rtol=2e-3)


def test_stacks_have_a_range_for_each_entry():
    model = zoo.scanned()
    layouts = jc.trace.layouts(model.apply, model.params, *model.inputs)
    select = jc.tree.by_path(".*kernel")
    found = input_ranges(model.apply, model.params, [model.inputs], SPEC, select=select)
    assert found["Dense_1"]["kernel"].scale.shape == (3,)
    stored, _ = quantize_inputs(model.params, SPEC, ranges=found, select=select, layouts=layouts)
    got = jax.jit(jc.execute(model.apply))(stored, *model.inputs)
    plain = model.apply(model.params, *model.inputs)
    assert 0 < float(jnp.abs(got - plain).max()) < 0.05 * float(jnp.abs(plain).max())


def test_padding_does_not_count():
    x = jnp.ones((2, 4, 20)).at[1, 2:].set(1000.0)
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = input_ranges(lambda p, x, m: apply(p, x), params(), [(x, mask)], SPEC, row_mask=lambda x, m: m)
    np.testing.assert_allclose(found["first"].scale, 1 / 127, rtol=1e-6)


def test_dynamic_ranges_are_one_for_each_token():
    (x,) = batches(1)[0]
    stored, _ = quantize_inputs(quantize(params(), QuantSpec(bits=8))[0], QuantSpec(bits=8))
    scale = np.abs(np.float64(x)).max(-1, keepdims=True) / 127
    first = np.round(np.float64(x) / scale) * scale @ np.float64(stored["first"].materialize())
    hidden = np.tanh(first)
    scale = np.abs(hidden).max(-1, keepdims=True) / 127
    wanted = np.round(hidden / scale) * scale @ np.float64(stored["second"].materialize())
    np.testing.assert_allclose(jax.jit(jc.execute(apply))(stored, x), wanted, atol=0.02 * np.abs(wanted).max())
    exact = jax.jit(jc.execute(lambda p, x: x @ p["first"]))(stored, x)
    np.testing.assert_allclose(exact, first, rtol=1e-5, atol=1e-5)


def test_weights_are_quantized_in_any_order():
    spec = QuantSpec(bits=4)
    first, _ = quantize_inputs(quantize(params(), spec)[0], QuantSpec(bits=8))
    second, _ = quantize(quantize_inputs(params(), QuantSpec(bits=8))[0], spec)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(x, y)
    faked = fake_quantize(quantize_inputs(params(), QuantSpec(bits=8))[0], spec)["first"]
    assert isinstance(faked, InputQuantizedArray)
    np.testing.assert_array_equal(faked.weight, first["first"].materialize())


def test_tables_that_are_looked_up_are_left_alone():
    model = zoo.embed()
    with pytest.raises(ValueError, match="only looked up have no range"):
        input_ranges(model.apply, model.params, [model.inputs], SPEC)
    stored, _ = quantize_inputs({"embedding": jnp.ones((4, 3)), "kernel": jnp.ones((3, 2))}, QuantSpec(bits=8))
    assert [type(leaf).__name__ for _, leaf in leaves_with_paths(stored)] == ["ArrayImpl", "InputQuantizedArray"]


def test_survives_a_checkpoint(tmp_path):
    spec = QuantSpec(bits=8, symmetric=False, per_tensor=True)
    found = input_ranges(apply, params(), batches(), spec)
    mx, _ = quantize_inputs(
        quantize(params(), QuantSpec(format="mxfp4", group_size=4))[0], QuantSpec(format="mxfp8_e4m3", group_size=4)
    )
    stored = {"static": quantize_inputs(quantize(params(), QuantSpec(bits=8))[0], spec, ranges=found)[0], "mx": mx}
    save(tmp_path / "model", stored)
    back, _ = restore(tmp_path / "model")
    assert jax.tree.structure(back) == jax.tree.structure(stored)
    for x, y in zip(jax.tree.leaves(stored), jax.tree.leaves(back), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(*(np.atleast_1d(part).view(np.uint8) for part in (x, y)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_learn(symmetric):
    """The gradient reaches scales and zero points through `execute`; what is trained is what is served."""
    spec = QuantSpec(bits=3, symmetric=symmetric, per_tensor=True)
    found = input_ranges(apply, params(), batches(), spec)
    transform = lsq_inputs(spec)
    state = transform.init(params(), key=KEY, statistics=found)
    (x,) = batches(1)[0]

    def loss(trainable):
        effective = transform.apply(params(), state._replace(trainable=trainable))
        return jnp.square(jc.execute(apply)(effective, x) - apply(params(), x)).mean()

    step = jax.jit(jax.value_and_grad(loss))
    trainable, losses = state.trainable, []
    for _ in range(20):
        value, grads = step(trainable)
        losses.append(float(value))
        assert all(bool((grad != 0).all()) for grad in jax.tree.leaves(grads.scale))
        trainable = jax.tree.map(lambda t, g: t - 0.02 * jnp.sign(g), trainable, grads)
    assert min(losses) < 0.8 * losses[0]
    _, state = transform.project(params(), state._replace(trainable=trainable))
    final = transform.finalize(params(), state)
    served, trained = (jax.jit(jc.execute(apply))(tree, x) for tree in (final, transform.apply(params(), state)))
    np.testing.assert_allclose(served, trained, rtol=1e-6, atol=1e-6)
    assert final["first"].zero_point is None if symmetric else final["first"].zero_point.dtype == jnp.uint8


def test_pact_pays_for_its_range():
    found = {"first": InputRange(jnp.float32(0.1), jnp.uint8(5)), "second": Unselected}
    transform = pact_inputs(4, strength=0.5, select=jc.tree.by_path("first"))
    state = transform.init(params(), key=KEY, statistics=found)
    np.testing.assert_allclose(state.trainable["first"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(transform.penalty(state, params(), loss=0.0), 0.5, rtol=1e-6)
    effective = transform.apply(params(), state)["first"]
    out = effective.inputs.rounded(jnp.array([[-1.0, 0.2, 3.0]]), (1,), *effective.input_parameters(2, ()))
    np.testing.assert_allclose(out, [[0.0, 0.2, 1.0]], rtol=1e-6)


def test_a_description_in_a_checkpoint_that_makes_no_sense_is_an_error():
    codec = checkpoint_codec()
    good = codec.encode(InputRounding(spec=SPEC))
    assert codec.decode(good) == InputRounding(spec=SPEC)
    for bad in ("int8", {}, {"spec": {"bits": 4, "colour": 1}, "gradient": "lsq"}, {"spec": {"bits": 99}}):
        with pytest.raises(ValueError, match=r"describe how inputs are rounded|must be an integer|expected dict"):
            codec.decode(bad)


def checkpoint_codec():
    return KINDS["InputQuantizedArray"].static["inputs"]


def test_shards_follow_the_weight():
    """Stacked ranges along the stacked axis; the model split over the outputs computes the same."""
    mesh = jax.make_mesh((2, 4), ("layers", "model"), axis_types=(AxisType.Auto,) * 2)
    layout = jc.trace.LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 8)), jnp.float32)
    ranges = {"w": InputRange(jnp.array([0.02, 0.03]))}
    small, _ = quantize({"w": w}, QuantSpec(bits=8), layouts={"w": layout})
    leaf = quantize_inputs(small, SPEC, ranges=ranges, layouts={"w": layout})[0]["w"]
    shardings = component_shardings(leaf, NamedSharding(mesh, PartitionSpec("layers", None, "model")))
    assert shardings.scale.spec == PartitionSpec("layers")
    placed = jax.device_put(leaf, shardings)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 16)), jnp.float32)
    apply = jax.jit(jc.execute(lambda p, x: jnp.einsum("tei,eio->teo", x, p["w"]), kernels=()))
    np.testing.assert_array_equal(apply({"w": placed}, x), apply({"w": leaf}, x))
    assert jc.report.describe_leaf(leaf) == "int8 per-channel, static inputs"


def test_bad_settings_are_named():
    found = input_ranges(apply, params(), batches(1), SPEC)
    with pytest.raises(ValueError, match="set `per_tensor=True`"):
        quantize_inputs(params(), QuantSpec(bits=8), ranges=found)
    with pytest.raises(ValueError, match="'second' is selected, but `ranges` has none"):
        quantize_inputs(params(), SPEC, ranges=found | {"second": Unselected})
    with pytest.raises(ValueError, match="is for static ranges"):
        quantized_inputs(QuantSpec(bits=8, range_rule="entropy"))
    with pytest.raises(ValueError, match="leave `scale_dtype`"):
        quantized_inputs(QuantSpec(bits=8, scale_dtype="bfloat16"))
    with pytest.raises(ValueError, match="begin with calibrated ones"):
        lsq_inputs(SPEC).init(params(), key=KEY)
    with pytest.raises(ValueError, match=r"'first' has the stacked axes \(\) of sizes \(\)"):
        lsq_inputs(SPEC).init(params(), key=KEY, statistics=dict.fromkeys(params(), InputRange(jnp.ones(3))))
    with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\)"):
        input_ranges(apply, params(), batches(), SPEC, momentum=1.0)
    with pytest.raises(ValueError, match="`bits` must be an integer in"):
        pact_inputs(1)
    with pytest.raises(ValueError, match="`batches` is empty"):
        input_ranges(apply, params(), [], SPEC, momentum=0.5)
