"""Float32 masters of narrow parameters: training float32 weights whose forward pass uses their casts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress._src.transforms import chain, identity
from jaxcompress.distillation import make_train_step
from jaxcompress.pruning import group_lasso
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.tree import Unselected, by_path, leaves_with_paths

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 8)), jnp.bfloat16)
SIZES = {"first": (8, 24), "second": (24, 3), "bias": (3,)}


def _params():
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.normal(size=size) / 3, jnp.bfloat16) for name, size in SIZES.items()}
    # A leaf that is wide already has no master.
    return params | {"bias": params["bias"].astype(jnp.float32), "stats": {"mean": jnp.zeros((), jnp.bfloat16)}}


def _cast(params):
    return {
        name: leaf if name == "bias" else jax.tree.map(lambda x: x.astype(jnp.bfloat16), leaf)
        for name, leaf in params.items()
    }


def _apply(params, batch, *, key, train):
    hidden = jnp.tanh(batch["x"] @ params["first"])
    y = (hidden @ params["second"]).astype(jnp.float32) + params["bias"][None]
    return {"y": y, "stats": {"mean": (params["stats"]["mean"] + hidden.mean()).astype(jnp.bfloat16)}}


def _squared(student, teacher, batch):
    return jnp.square(student["y"] - 1.0).sum(), student["y"].size


def _trained(params, transform, steps=4, batch=None, **options):
    traces = []

    def apply(params, batch, *, key, train):
        traces.append(train)
        return _apply(params, batch, key=key, train=train)

    optimizer = optax.adamw(1e-3, weight_decay=0.1)
    init_state, step = make_train_step(
        apply, None, optimizer, losses={"y": _squared}, transform=transform, mutable=("stats",), **options
    )
    state = init_state(params, key=jax.random.key(0))
    for _ in range(steps):
        state, metrics = step(state, None, {"x": X} if batch is None else batch)
    assert traces == [True]
    assert float(metrics["skipped"][0]) == 0
    return state


def _lasso():
    return group_lasso(strength=0.003, select=by_path("first"))


def test_masters_are_float32_weights_whose_casts_run():
    """Bit for bit: optimizer, weight decay, and a proximal step that bfloat16 would round away."""
    found = _trained(_params(), _lasso(), master_dtype=jnp.float32)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _params()) | {"stats": _params()["stats"]}
    casting = identity()._replace(apply=lambda params, state, *, key=None: _cast(params))
    wanted = _trained(wide, chain(casting, _lasso()))
    for name in ("first", "second"):
        np.testing.assert_array_equal(found.masters[name], wanted.params[name])
        np.testing.assert_array_equal(found.params[name], wanted.params[name].astype(jnp.bfloat16))
        assert not np.array_equal(found.masters[name], found.params[name])
        assert found.optimizer_state[0].mu[name].dtype == jnp.float32
        np.testing.assert_array_equal(found.optimizer_state[0].nu[name], wanted.optimizer_state[0].nu[name])
    np.testing.assert_array_equal(found.params["bias"], wanted.params["bias"])
    assert found.masters["bias"] is Unselected
    assert found.masters["stats"]["mean"] is Unselected
    assert float(found.params["stats"]["mean"]) == float(wanted.params["stats"]["mean"]) != 0


def test_small_steps_add_up():
    """Against float64: 100 steps of 1/1000 of a weight, each of which bfloat16 rounds away."""

    def apply(params, batch, *, key, train):
        return dict(params)

    def drop(student, teacher, batch):
        return student["w"].astype(jnp.float32).sum(), jnp.float32(1)

    found = {}
    for dtype in (None, "float32"):
        init_state, step = make_train_step(apply, None, optax.sgd(1e-3), losses={"w": drop}, master_dtype=dtype)
        state = init_state({"w": jnp.ones(3, jnp.bfloat16)}, key=jax.random.key(0))
        for _ in range(100):
            state, _ = step(state, None, {})
        found[dtype] = state
    np.testing.assert_array_equal(found[None].params["w"], 1.0)
    np.testing.assert_allclose(found["float32"].masters["w"], np.float64(1 - 100 * 1e-3), rtol=1e-5)
    np.testing.assert_allclose(found["float32"].params["w"].astype(jnp.float32), 0.9, rtol=2**-8)


def test_scales_of_compressed_leaves_have_masters_and_frozen_leaves_none():
    params = _params()
    params["first"] = quantize(params, QuantSpec(bits=8, scale_dtype="bfloat16"), select=by_path("first"))[0]["first"]
    codes = np.asarray(params["first"].data)
    state = _trained(params, identity(), master_dtype="float32", trainable=jc.tree.exclude(by_path("second|stats/.*")))
    assert state.masters["second"] is Unselected
    assert state.masters["first"].scale.dtype == jnp.float32
    np.testing.assert_array_equal(state.params["first"].scale, state.masters["first"].scale.astype(jnp.bfloat16))
    np.testing.assert_array_equal(state.params["first"].data, codes)
    np.testing.assert_array_equal(state.params["second"], _params()["second"])
    assert not np.array_equal(state.params["first"].scale, params["first"].scale)


def test_masters_lie_where_their_weights_do():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"first": P(None, "data"), "second": P("data"), "bias": P(), "stats": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    batch = {"x": jax.device_put(X, NamedSharding(mesh, P("data")))}
    placed = {name: jax.device_put(leaf, shardings[name]) for name, leaf in _params().items()}
    spread = _trained(placed, identity(), batch=batch, master_dtype="float32", ema=0.9)
    alone = _trained(_params(), identity(), master_dtype="float32", ema=0.9)
    for path, leaf in leaves_with_paths((spread.masters, spread.ema.params)):
        name = path.split("/")[-1]
        assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), path
    for name in ("first", "second"):
        np.testing.assert_allclose(spread.masters[name], alone.masters[name], atol=5e-4)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int32", "`master_dtype` must be a float, got int32"),
        ("bfloat16", "`master_dtype` is bfloat16, but the trained leaves are bfloat16, float32"),
    ],
)
def test_mistakes_are_named(dtype, message):
    init_state, _ = make_train_step(_apply, None, optax.sgd(0.1), losses={"y": _squared}, master_dtype=dtype)
    with pytest.raises(ValueError, match=message):
        init_state(_params(), key=jax.random.key(0))
