"""SmoothQuant and AWQ on stacked layers: each entry as the same layer unrolled, and as float64 NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.types import is_compressed
from jaxcompress.calibration import input_statistics
from jaxcompress.quantization import QuantSpec, awq, smooth
from jaxcompress.trace import folds, layouts
from jaxcompress.tree import by_path, leaves_with_paths

LAYERS, WIDTH = 3, 12
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, WIDTH)) * np.linspace(0.1, 9.0, WIDTH), jnp.float32)
KERNELS = by_path(".*kernel")


class _Block(nn.Module):
    """A decoder layer."""

    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(num_heads=3, name="attention")
        x = x + attention(nn.LayerNorm(name="first")(x))
        y = nn.RMSNorm(name="second")(x)
        gated = nn.silu(nn.Dense(20, name="gate")(y)) * nn.Dense(20, name="up")(y)
        return x + nn.Dense(WIDTH, name="down")(gated), None


def _scanned(axis, **options):
    """The model, its params, and how to take out the entry of one layer."""
    layer = nn.remat(_Block, prevent_cse=False)
    stack = nn.scan(layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=LAYERS, **options)()
    rng = np.random.default_rng(1)

    def spoilt(leaf):
        # Norms whose features differ much, in every layer in other ways.
        stretched = np.array(leaf) * np.exp(rng.normal(size=leaf.shape)) + 0.1 * rng.normal(size=leaf.shape)
        return jnp.asarray(stretched, leaf.dtype)

    params = jax.tree.map(spoilt, jax.jit(stack.init)(jax.random.key(0), X, None)["params"])
    return (lambda params, x: stack.apply({"params": params}, x, None)[0]), params


def _unrolled(order):
    def apply(params, x):
        for n in order:
            x = _Block().apply({"params": params[n]}, x, None)[0]
        return x

    return apply


def _entries(params, axis):
    host = jax.device_get(params)
    return {n: jax.tree.map(lambda leaf, n=n: jnp.asarray(leaf.take(n, axis=axis)), host) for n in range(LAYERS)}


def _prepared(apply, params, *names):
    statistics = input_statistics(apply, params, [(X,), (0.5 * X[:, ::-1],)], select=KERNELS, statistics=names)
    return folds(apply, params, X), statistics


@functools.cache
def _models(axis, reverse):
    """The scanned model and the unrolled one, each with its params; they agree."""
    apply, params = _scanned(axis, reverse=reverse)
    order = list(reversed(range(LAYERS))) if reverse else list(range(LAYERS))
    by_layer, layers = jax.jit(_unrolled(order)), _entries(params, axis)
    np.testing.assert_allclose(apply(params, X), by_layer(layers, X), rtol=1e-4, atol=1e-4)
    return axis, (apply, params), (by_layer, layers)


@pytest.fixture(params=[(0, False), (1, False), (0, True)], ids=["axis 0", "axis 1", "reversed"])
def models(request):
    with jax.numpy_rank_promotion("allow"):
        yield _models(*request.param)


def test_smoothing_is_that_of_the_layers_one_by_one(models):
    axis, (apply, params), (by_layer, layers) = models
    found, statistics = _prepared(apply, params, "absolute_max")
    own, factors = smooth(params, statistics, found)
    found, statistics = _prepared(by_layer, layers, "absolute_max")
    wanted, wanted_factors = smooth(layers, statistics, found)
    for n, layer in _entries(own, axis).items():
        for (path, leaf), (_, other) in zip(leaves_with_paths(layer), leaves_with_paths(wanted[n]), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-4, err_msg=f"{n}/{path}")
    assert {path: factor.shape[0] for path, factor in factors.items()} == dict.fromkeys(factors, LAYERS)
    assert len(wanted_factors) == LAYERS * len(factors) == LAYERS * 7
    for path, factor in factors.items():
        for n in range(LAYERS):
            np.testing.assert_allclose(factor[n], wanted_factors[f"{n}/{path}"], rtol=1e-4)
    spread = np.ptp(np.log(factors["down/kernel"]), axis=0)
    assert spread.max() > 0.5  # the layers' factors differ


def test_smoothing_leaves_the_outputs(models):
    _, (apply, params), _ = models
    found, statistics = _prepared(apply, params, "absolute_max")
    smoothed, _ = smooth(params, statistics, found, alpha=0.8)
    before, after = apply(params, X), apply(smoothed, X)
    assert float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before)) < 1e-5
    moved = [
        path
        for (path, leaf), (_, old) in zip(leaves_with_paths(smoothed), leaves_with_paths(params), strict=True)
        if not (leaf == old).all()
    ]
    assert {"first/scale", "first/bias", "second/scale", "up/kernel", "down/kernel"} < set(moved)


@pytest.mark.parametrize("models", [(1, True)], indirect=True, ids=["axis 1, reversed"])
def test_awq_is_that_of_the_layers_one_by_one(models):
    axis, (apply, params), (by_layer, layers) = models
    spec = QuantSpec(bits=3, group_size=4, symmetric=False)
    found, statistics = _prepared(apply, params, "gram", "absolute_sum")
    where = {"select": KERNELS, "layouts": layouts(apply, params, X)}
    small, info = awq(params, statistics, spec, folds=found, **where)
    found_there, layer_statistics = _prepared(by_layer, layers, "gram", "absolute_sum")
    where = {"select": KERNELS, "layouts": layouts(by_layer, layers, X)}
    wanted, wanted_info = awq(layers, layer_statistics, spec, folds=found_there, **where)
    for n, layer in _entries(_materialized(small), axis).items():
        for (path, leaf), (_, other) in zip(
            leaves_with_paths(layer), leaves_with_paths(_materialized(wanted[n])), strict=True
        ):
            np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-5, err_msg=f"{n}/{path}")
    assert len(info) == len(wanted_info)
    for name, wanted in wanted_info.items():
        layer, path = name.split("/", 1)
        own = info[f"{path}[{layer}]"]
        np.testing.assert_allclose([own.error, own.error_before], [wanted.error, wanted.error_before], rtol=1e-3)


def _materialized(tree):
    return jax.tree.map(lambda leaf: leaf.materialize() if is_compressed(leaf) else leaf, tree, is_leaf=is_compressed)


def _attention_like(p, x):
    """Two scans, one in the other; features of two axes, which lie in another order in each leaf."""

    def layer(x, own):
        y = jnp.einsum("bd,hfd->bhf", jnp.sin(x), own["value"]) + own["bias"][None]
        return x + jnp.einsum("bhf,foh->bo", y, own["out"]), None

    def group(x, own):
        own = {
            name: jnp.moveaxis(leaf, STACKS[name][1] - (STACKS[name][1] > STACKS[name][0]), 0)
            for name, leaf in own.items()
        }
        return jax.lax.scan(layer, x, own)[0], None

    return jax.lax.scan(group, x, {name: jnp.moveaxis(leaf, STACKS[name][0], 0) for name, leaf in p.items()})[0]


STACKS = {"value": (3, 1), "bias": (0, 1), "out": (2, 0)}
"""The axes of the outer and of the inner scan."""


def _nested_params():
    rng = np.random.default_rng(2)
    shapes = {"value": (2, 4, 3, 2, 5), "bias": (2, 4, 2, 3), "out": (4, 3, 2, 5, 2)}
    return {
        name: jnp.asarray(np.exp(rng.normal(size=shape)) * rng.choice([-1, 1], size=shape) / 4, jnp.float32)
        for name, shape in shapes.items()
    }


def test_factors_of_nested_scans_against_numpy():
    params, x = _nested_params(), jnp.asarray(np.random.default_rng(3).normal(size=(7, 5)), jnp.float32)
    found = folds(_attention_like, params, x)
    assert [(fold.producers, fold.consumers) for fold in found] == [
        ((("value", (0, 2), (3, 1)), ("bias", (2, 3), (0, 1))), (("out", (4, 1), (2, 0)),))
    ]
    statistics = input_statistics(_attention_like, params, [(x,)], statistics=("absolute_max",))
    own, factors = smooth(params, statistics, found, alpha=0.7)
    wanted = {name: np.array(leaf, np.float64) for name, leaf in params.items()}
    h = np.array(x, np.float64)
    for g in range(2):
        for layer in range(4):
            value, bias = wanted["value"][:, layer, :, g], wanted["bias"][g, layer]
            out = wanted["out"][layer, :, g].copy()
            y = np.einsum("bd,hfd->bhf", np.sin(h), value) + bias
            h = h + np.einsum("bhf,foh->bo", y, out)
            factor = np.abs(y).max(axis=0) ** 0.7 / np.abs(out).max(axis=1).T ** 0.3
            wanted["value"][:, layer, :, g] /= factor[:, :, None]
            wanted["bias"][g, layer] /= factor
            wanted["out"][layer, :, g] *= factor.T[:, None]
            np.testing.assert_allclose(factors["out"][g, layer], factor.reshape(-1), rtol=1e-4)
    assert factors["out"].shape == (2, 4, 6)
    for name, leaf in own.items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-4)
    np.testing.assert_allclose(_attention_like(own, x), h, rtol=1e-4, atol=1e-4)


def test_awq_of_nested_scans_helps_and_moves_its_factors():
    params, x = _nested_params(), jnp.asarray(np.random.default_rng(3).normal(size=(50, 5)), jnp.float32)
    params["bias"] = params["bias"] * jnp.exp2(jnp.arange(6.0)).reshape(1, 1, 2, 3)
    found = folds(_attention_like, params, x)
    statistics = input_statistics(_attention_like, params, [(x,)], statistics=("gram", "absolute_sum"))
    where = {"select": by_path("out"), "layouts": layouts(_attention_like, params, x)}
    spec = QuantSpec(bits=3, symmetric=False)
    _, info = awq(params, statistics, spec, folds=found, **where)
    _, plain = awq(params, statistics, spec, **where)
    assert list(info) == list(plain) == [f"out[{layer},{g}]" for layer, g in np.ndindex(4, 2)]
    assert np.mean([own.error for own in info.values()]) < 0.9 * np.mean([own.error for own in plain.values()])
    fine, _ = awq(params, statistics, QuantSpec(bits=8), folds=found, **where)
    out, ratio = fine["out"].materialize(), np.array(params["bias"] / fine["bias"], np.float64)
    for g, layer in np.ndindex(2, 4):
        # What the bias is divided by, entry by entry, the kernel is multiplied by.
        wanted = np.array(params["out"][layer, :, g]) * ratio[g, layer].T[:, None]
        assert np.linalg.norm(out[layer, :, g] - wanted) < 0.01 * np.linalg.norm(wanted)
    assert len(np.unique(ratio.reshape(8, 6).round(5), axis=0)) == 8


def test_a_stack_without_its_statistics_is_named():
    apply, params = _scanned(0)
    with jax.numpy_rank_promotion("allow"):
        found, statistics = _prepared(apply, params, "absolute_max")
        flat = jax.tree.map(lambda leaf: leaf[0], statistics)
    with pytest.raises(
        ValueError, match=r"Leaf '[a-z/]+kernel' has 12 inputs in each of 3 stack entries, its stat.*\(12,\)"
    ):
        smooth(params, flat, found)
