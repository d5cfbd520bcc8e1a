"""Values that are computed twice instead of being kept: the same step in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from optimized import OPTIONS

from jaxcompress._src.distillation.remat import rematerialized
from jaxcompress.distillation import make_train_step
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.trace import LeafLayout
from jaxcompress.tree import by_path

LAYERS, WIDTH, ROWS = 6, 16, 256
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(ROWS, WIDTH)), jnp.float32)
POLICIES = jax.checkpoint_policies


def _params():
    rng = np.random.default_rng(1)
    sizes = {"up": (LAYERS, WIDTH, 4 * WIDTH), "down": (LAYERS, 4 * WIDTH, WIDTH)}
    return {name: jnp.asarray(rng.normal(size=size) / 6, jnp.float32) for name, size in sizes.items()}


def _layer(x, layer, key):
    hidden = jax.nn.gelu(x @ layer["up"])
    keep = jax.random.bernoulli(key, 0.9, hidden.shape)
    return checkpoint_name(jnp.tanh(x + jnp.where(keep, hidden, 0.0) @ layer["down"]), "block")


def _scanned(params, batch, *, key, train):
    keys = jax.random.split(key, LAYERS)
    # A search by bisection: a loop, but none over layers.
    bins = jnp.searchsorted(jnp.linspace(-1.0, 1.0, 5), batch["x"])
    run = jax.jit(lambda x: jax.lax.scan(lambda x, each: (_layer(x, *each), x.mean()), x, (params, keys)))
    x, means = run(batch["x"] + 0.01 * bins)
    return {"y": x, "means": means}


def _unrolled(params, batch, *, key, train):
    x = batch["x"]
    for i in range(2):
        x = _layer(x, {name: leaf[i] for name, leaf in params.items()}, key)
    return {"y": x}


def _squared(student, teacher, batch):
    return jnp.square(student["y"] - 1.0).sum(), student["y"].size


def _step(apply, params, **options):
    init_state, step = make_train_step(apply, None, optax.sgd(0.5), losses={"y": _squared}, **options)
    state = init_state(params, key=jax.random.key(0))
    compiled = step.lower(state, None, {"x": X}).compile(compiler_options=OPTIONS)
    state, metrics = compiled(state, None, {"x": X})
    return (state.params, metrics), compiled.memory_analysis().temp_size_in_bytes


def _assert_close(found, expected):
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stored", ["plain", "quantized"])
def test_the_same_step_in_less_memory(stored):
    params = _params()
    if stored == "quantized":
        layouts = {"up": LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,)), "down": None}
        params, _ = quantize(params, QuantSpec(bits=8), select=by_path("up"), layouts=layouts)
    expected, kept = _step(_scanned, params)
    found, temporary = _step(_scanned, params, remat=POLICIES.nothing_saveable)
    _assert_close(found, expected)
    # Of every layer, several values of the hidden width are not kept.
    assert temporary <= kept - 2 * LAYERS * ROWS * 4 * WIDTH * 4
    assert temporary <= 0.6 * kept


def test_models_without_scans_and_parts_of_a_batch():
    for options in ({}, {"micro_batches": 2}):
        expected, _ = _step(_unrolled, _params(), **options)
        for policy in (POLICIES.save_only_these_names("block"), POLICIES.nothing_saveable):
            found, _ = _step(_unrolled, _params(), remat=policy, **options)
            _assert_close(found, expected)


def test_a_policy_is_obeyed():
    """By what the vector-Jacobian product holds."""
    batch, sizes = {"x": X}, {}
    for name, policy in {"all": None, "block": POLICIES.save_only_these_names("block")}.items():
        apply = _unrolled if policy is None else rematerialized(_unrolled, policy)

        def run(params, apply=apply):
            return apply(params, batch, key=jax.random.key(0), train=True)["y"]

        _, pull = jax.vjp(run, _params())
        sizes[name] = [leaf.shape for leaf in jax.tree.leaves(pull)]
    assert (ROWS, 4 * WIDTH) in sizes["all"]
    assert (ROWS, 4 * WIDTH) not in sizes["block"]
    assert (ROWS, WIDTH) in sizes["block"]
