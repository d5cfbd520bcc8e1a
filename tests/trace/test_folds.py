"""Factors that move between leaves: what is found, and that the function stays the same."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.calibration import input_statistics
from jaxcompress.quantization import QuantSpec, awq, quantize, smooth
from jaxcompress.trace import folds, layouts
from jaxcompress.tree import by_path

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 12)) * np.linspace(0.1, 9.0, 12), jnp.float32)


class _Block(nn.Module):
    """Norm before attention and before a gated layer, as in decoders."""

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(num_heads=3, name="attention", broadcast_dropout=False)
        x = x + attention(nn.LayerNorm(name="first")(x))
        y = nn.LayerNorm(name="second", use_bias=False)(x)
        gated = nn.silu(nn.Dense(20, name="gate")(y)) * nn.Dense(20, name="up")(y)
        x = x + nn.Dense(12, name="down")(gated)
        return nn.Dense(7, name="head")(nn.relu(nn.Dense(9, name="hidden")(x)))


def _model():
    module = _Block()
    params = jax.jit(module.init)(jax.random.key(0), X)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    return (lambda params, x: module.apply({"params": params}, x)), params


APPLY, PARAMS = _model()


def test_what_feeds_what_is_found_by_tracing():
    with jax.numpy_rank_promotion("allow"):
        found = {
            frozenset(leaf.path for leaf in fold.consumers): {leaf.path for leaf in fold.producers}
            for fold in folds(APPLY, PARAMS, X)
        }
    expected = {
        ("attention/query/kernel", "attention/key/kernel", "attention/value/kernel"): {"first/scale", "first/bias"},
        ("attention/out/kernel",): {"attention/value/kernel", "attention/value/bias"},
        ("gate/kernel", "up/kernel"): {"second/scale"},
        ("down/kernel",): {"up/kernel", "up/bias"},
        ("head/kernel",): {"hidden/kernel", "hidden/bias"},
    }
    # The residual stream that feeds `hidden` goes elsewhere, too, and has no fold.
    assert found == {frozenset(consumers): producers for consumers, producers in expected.items()}


def test_the_function_stays_and_the_inputs_get_even():
    with jax.numpy_rank_promotion("allow"):
        found = folds(APPLY, PARAMS, X)
        statistics = input_statistics(APPLY, PARAMS, [(X,)], statistics=("absolute_max",))
        smoothed, factors = smooth(PARAMS, statistics, found)
        np.testing.assert_allclose(APPLY(smoothed, X), APPLY(PARAMS, X), rtol=2e-3, atol=2e-3)
        after = input_statistics(APPLY, smoothed, [(X,)], statistics=("absolute_max",))
    largest = statistics["down"]["kernel"].absolute_max
    weights = jnp.abs(PARAMS["down"]["kernel"]).max(axis=1)
    np.testing.assert_allclose(factors["down/kernel"], jnp.sqrt(largest / weights), rtol=1e-4)
    np.testing.assert_allclose(after["down"]["kernel"].absolute_max, jnp.sqrt(largest * weights), rtol=1e-2)
    with pytest.raises(ValueError, match="`folds` is empty"):
        smooth(PARAMS, statistics, [])
    with pytest.raises(ValueError, match="`alpha` must be in"):
        smooth(PARAMS, statistics, found, alpha=2.0)


def test_awq_is_better_than_rounding_to_nearest():
    spec = QuantSpec(bits=3, group_size=4, symmetric=False)
    kernel = "down"
    with jax.numpy_rank_promotion("allow"):
        found = [fold for fold in folds(APPLY, PARAMS, X) if fold.consumers[0].path == "down/kernel"]
        select = by_path(f"{kernel}/kernel")
        axes = layouts(APPLY, PARAMS, X)
        statistics = input_statistics(APPLY, PARAMS, [(X,)], select=select)
        small, info = awq(PARAMS, statistics, spec, folds=found, select=select, layouts=axes)
        plain, _ = quantize(PARAMS, spec, select=select, layouts=axes)
        wanted = APPLY(PARAMS, X)
        gaps = [
            float(jnp.linalg.norm(APPLY({**tree, kernel: jax.tree.map(jnp.asarray, _plain(tree[kernel]))}, X) - wanted))
            for tree in (small, plain)
        ]
    assert info["down/kernel"].error < info["down/kernel"].error_before
    assert gaps[0] < gaps[1]


def _plain(layer):
    return {name: leaf.materialize() if hasattr(leaf, "nbits") else leaf for name, leaf in layer.items()}


def test_smoothing_names_what_is_spoilt():
    def apply(p, x):
        return (x * p["scale"][None]) @ p["kernel"]

    params, x = {"scale": jnp.array([8.0, 1.0]), "kernel": jnp.ones((2, 2))}, jnp.ones((1, 2))
    found, statistics = folds(apply, params, x), input_statistics(apply, params, [(x,)])
    narrow = dataclasses.replace(statistics["kernel"], absolute_max=jnp.ones(1))
    with pytest.raises(ValueError, match=r"Leaf 'kernel' has 2 inputs, its statistics have shape \(1,\)"):
        smooth(params, {**statistics, "kernel": narrow}, found)
    spoilt = dataclasses.replace(statistics["kernel"], absolute_max=jnp.full(2, jnp.nan))
    with pytest.raises(ValueError, match="The statistics of leaf 'kernel' hold NaN"):
        smooth(params, {**statistics, "kernel": spoilt}, found)
    with pytest.raises(ValueError, match="Leaf 'kernel' holds 1 NaN"):
        smooth({**params, "kernel": params["kernel"].at[0, 0].set(jnp.nan)}, statistics, found)
