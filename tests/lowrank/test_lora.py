"""Factors that are trained beside frozen weights, plain (LoRA) or quantized (QLoRA)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress._src.execution.execute import fallbacks
from jaxcompress.arrays import LowRankArray, QuantizedArray
from jaxcompress.distillation import make_train_step
from jaxcompress.lowrank import lora
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.trace import LeafLayout
from jaxcompress.tree import Unselected, by_path

RNG = np.random.default_rng(0)
LAYERS, WIDTH, HIDDEN = 3, 8, 24
X, Y = (jnp.asarray(RNG.normal(size=size), jnp.float32) for size in ((16, WIDTH), (16, 5)))
SPEC = QuantSpec(bits=4, group_size=8, scale_dtype="bfloat16")
LAYOUTS = {
    "up": LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,)),
    # Outputs first.
    "down": LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(2,), output_axes=(1,)),
    "head": LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,)),
    "bias": LeafLayout(kind="other"),
}
BODY = by_path("up|down")


def _params(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    sizes = {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, WIDTH, HIDDEN), "head": (WIDTH, 5), "bias": (5,)}
    return {name: jnp.asarray(rng.normal(size=size) / 4, dtype) for name, size in sizes.items()}


def _model(params, x):
    def layer(x, weights):
        return x + jnp.tanh(x @ weights[0]) @ weights[1].T, None

    return jax.lax.scan(layer, x, (params["up"], params["down"]))[0] @ params["head"] + params["bias"][None]


def _squared(student, teacher, batch):
    return 0.5 * jnp.square(student["y"].astype(jnp.float32) - batch["y"]).sum(), jnp.float32(batch["y"].shape[0])


def _trained(params, transform, batch=None, *, model=_model, steps=3, optimizer=None, rate=0.1, **options):
    traces = []

    def apply(params, batch, *, key, train):
        traces.append(train)
        return {"y": model(params, batch["x"].astype(jax.tree.leaves(params["head"])[0].dtype))}

    init_state, step = make_train_step(
        apply,
        None,
        optimizer or optax.adamw(1e-2, weight_decay=0.5),
        losses={"y": _squared},
        transform=transform,
        transform_optimizer=optax.sgd(rate),
        **options,
    )
    state, losses = init_state(params, key=jax.random.key(0)), []
    start = jax.tree.map(np.array, state.transform_state)
    for _ in range(steps):
        state, metrics = step(state, None, {"x": X, "y": Y} if batch is None else batch)
        losses.append(float(metrics["loss"][0]))
    assert traces == [True]
    assert losses[-1] < losses[0]
    return start, state


@pytest.mark.parametrize("base", ["plain", "bfloat16", "quantized"])
def test_the_base_keeps_its_bits_and_has_no_moments(base):
    params = _params(jnp.bfloat16 if base == "bfloat16" else jnp.float32)
    if base == "quantized":
        params, _ = quantize(params, SPEC, select=BODY, layouts=LAYOUTS)
    transform = lora(rank=2, alpha=4.0, select=BODY, layouts=LAYOUTS, train=by_path("head"))
    start, state = _trained(params, transform)
    moments = state.optimizer_state[0].mu
    for name in params:
        same = name != "head"
        for old, new in zip(*(jax.tree.leaves(tree[name]) for tree in (params, state.params)), strict=True):
            assert np.array_equal(old, new) == same, name
        assert bool(jax.tree.leaves(moments[name])) == (not same), name
    for side, factors in state.transform_state.trainable.items():
        for path, factor in factors.items():
            assert factor.dtype == jnp.float32
            assert not np.array_equal(factor, start.trainable[side][path]), (side, path)
    effective = transform.apply(state.params, state.transform_state)
    # The base is read as it is stored, in the loop over layers, too.
    assert all(type(effective[name]) is LowRankArray for name in ("up", "down"))
    assert fallbacks(_model, effective, X.astype(params["head"].dtype)) == ()
    served = jc.execute(_model)(transform.finalize(state.params, state.transform_state), X.astype(params["head"].dtype))
    wanted = jc.execute(_model)(effective, X.astype(params["head"].dtype))
    tolerance = 0.1 if base == "bfloat16" else 1e-4
    np.testing.assert_allclose(np.asarray(served, np.float32), np.asarray(wanted, np.float32), atol=tolerance)


def test_two_steps_against_float64():
    """dA = s Xᵀ G Bᵀ and dB = s Aᵀ Xᵀ G, by hand."""
    params = {"head": _params()["head"]}
    transform, rate, scale = lora(rank=2, alpha=6.0), 0.05, 3.0
    start, state = _trained(params, transform, model=lambda p, x: x @ p["head"], steps=2, rate=rate)
    a, b = (np.asarray(start.trainable[side]["head"], np.float64) for side in ("left", "right"))
    a, b = a[:, 0], b[0].T
    assert not b.any()
    assert 0.2 < a.std() * np.sqrt(WIDTH) < 2
    x, y, w = (np.asarray(leaf, np.float64) for leaf in (X, Y, params["head"]))
    for _ in range(2):
        g = (x @ (w + scale * a @ b) - y) / len(x)
        a, b = a - rate * scale * x.T @ g @ b.T, b - rate * scale * a.T @ x.T @ g
    np.testing.assert_allclose(state.transform_state.trainable["left"]["head"][:, 0], a, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.transform_state.trainable["right"]["head"][0].T, b, rtol=1e-4, atol=1e-6)
    merged = transform.finalize(state.params, state.transform_state)["head"]
    np.testing.assert_allclose(merged, w + scale * a @ b, rtol=1e-4, atol=1e-6)


def _filled(params, **options):
    transform = lora(rank=2, select=BODY, layouts=LAYOUTS, **options)
    state = transform.init(params, key=jax.random.key(0))
    rng = np.random.default_rng(5)
    trainable = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), state.trainable)
    dense = {name: np.asarray(jc.materialize(params)[name], np.float64) for name in ("up", "down")}
    left, right = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), trainable[side]) for side in ("left", "right")
    )
    wanted = {
        "up": dense["up"] + np.einsum("lik,lok->lio", left["up"][:, :, 0], right["up"][:, 0]),
        "down": dense["down"] + np.einsum("lik,lok->loi", left["down"][:, 0], right["down"][:, :, 0]),
    }
    return transform.finalize(params, state._replace(trainable=trainable)), wanted


def test_what_is_stored_of_plain_and_of_quantized_bases():
    plain, (quantized, _) = _params(), quantize(_params(), SPEC, select=BODY, layouts=LAYOUTS)

    def again(params, statistics, layouts):
        assert all(entry is Unselected for entry in statistics.values())
        return quantize(params, dataclasses.replace(SPEC, bits=8, group_size=None), layouts=layouts)

    kinds = {
        (None, None): (jax.Array, LowRankArray),
        ("merged", None): (jax.Array, jax.Array),
        ("factors", None): (LowRankArray, LowRankArray),
        (None, again): (QuantizedArray, QuantizedArray),
    }
    for (store, requantize), wanted_kinds in kinds.items():
        for params, kind in zip((plain, quantized), wanted_kinds, strict=True):
            small, wanted = _filled(params, store=store, requantize=requantize)
            for name in ("up", "down"):
                assert isinstance(small[name], kind), (store, name)
                found = np.asarray(jc.materialize(small)[name], np.float64)
                # 8 bits have steps of 1/127 of the largest.
                tolerance = np.abs(wanted[name]).max() / 127 if requantize else 1e-5
                np.testing.assert_allclose(found, wanted[name], atol=tolerance)
                if kind is LowRankArray:
                    small[name].validate()
                    assert small[name].residual is params[name]
            np.testing.assert_array_equal(small["head"], params["head"])


def test_factors_lie_along_the_weights_and_bases_stay_sharded():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    quantized, _ = quantize(_params(), SPEC, select=BODY, layouts=LAYOUTS)
    split = {"up": P(None, None, "data"), "down": P(None, "data"), "head": P("data"), "bias": P()}
    spread = {
        name: jax.device_put(leaf, jc.arrays.component_shardings(leaf, NamedSharding(mesh, split[name])))
        for name, leaf in quantized.items()
    }
    rows = NamedSharding(mesh, P("data"))
    transform = lora(rank=2, select=BODY, layouts=LAYOUTS)
    _, state = _trained(spread, transform, batch=jax.device_put({"x": X, "y": Y}, rows))
    _, alone = _trained(quantized, transform)
    trainable = state.transform_state.trainable
    shares = {
        (side, name): trainable[side][name].addressable_shards[0].data.shape
        for side in trainable
        for name in split
        if name in trainable[side]
    }
    assert shares["right", "up"] == (LAYERS, 1, HIDDEN // 8, 2)
    assert shares["right", "down"] == (LAYERS, WIDTH // 8, 1, 2)
    # What has no axis that is cut is cut along the one that it has.
    assert shares["left", "up"] == (LAYERS, WIDTH // 8, 1, 2)
    for x, y in zip(*(jax.tree.leaves(each.transform_state.trainable) for each in (state, alone)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    for x, y in zip(*(jax.tree.leaves(each) for each in (state.params, quantized)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"rank": 2, "alpha": 0.0}, "`alpha` must be positive, got 0.0"),
        ({"rank": 2, "store": "plain"}, "`store` must be 'merged' or 'factors', got 'plain'"),
        ({"rank": 2, "store": "merged", "requantize": quantize}, "leave out `store`"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        lora(**options)


def test_mistakes_in_the_tree_are_named():
    with pytest.raises(ValueError, match="Leaf 'up' gets factors, so it is frozen, but `train` has it"):
        lora(rank=1, select=BODY, train=by_path("up")).init(_params(), key=jax.random.key(0))
    params = {"ids": jnp.zeros((3, 4), jnp.int32)}
    with pytest.raises(ValueError, match="Leaf 'ids' holds int32: only floats get factors"):
        lora(rank=1).init(params, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"`requantize` returned nothing for leaf 'down'"):
        _filled(_params(), requantize=lambda params, statistics, layouts: ({"up": params["up"]}, None))
