"""Scores of units against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.units.swap import fisher_matrix
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.structured import (
    UnitGroup,
    UnitSlices,
    fisher_unit_scores,
    gate_gradients,
    magnitude_unit_scores,
    taylor_unit_scores,
)

GROUP = UnitGroup(
    name="g",
    count=3,
    slices=(UnitSlices(path="up", axis=1, width=2), UnitSlices(path="down", axis=0, width=2, gated=True)),
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        "up": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32),
    }


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    return [
        {"x": jnp.asarray(rng.normal(size=(n, 4)), jnp.float32), "y": jnp.asarray(rng.normal(size=(n, 5)), jnp.float32)}
        for n in (3, 2)
    ]


def loss(params, batch):
    return jnp.square(jnp.tanh(batch["x"] @ params["up"]) @ params["down"] - batch["y"]).sum(axis=1).mean()


def _example_gradients(params, batches):
    """By hand: dL/dz_u = 2 (out - y) . (a_u W_u)."""
    up, down = np.float64(params["up"]), np.float64(params["down"])
    x, y = (np.concatenate([np.float64(batch[name]) for batch in batches]) for name in ("x", "y"))
    inner = np.tanh(x @ up)
    parts = np.stack([inner[:, 2 * u : 2 * u + 2] @ down[2 * u : 2 * u + 2] for u in range(3)], axis=1)
    return 2 * np.einsum("nuo,no->nu", parts, inner @ down - y)


def test_gate_gradients_of_examples_and_of_batches(params, batches):
    expected = _example_gradients(params, batches)
    found = gate_gradients(loss, params, [GROUP], batches)["g"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    by_batch = gate_gradients(loss, params, [GROUP], iter(batches), per_example=False)["g"]
    np.testing.assert_allclose(by_batch, [expected[:3].mean(0), expected[3:].mean(0)], rtol=1e-4, atol=1e-4)


def test_taylor_and_fisher_of_the_gradients(params, batches):
    expected = _example_gradients(params, batches)
    found = gate_gradients(loss, params, [GROUP], batches)
    np.testing.assert_allclose(taylor_unit_scores(found)["g"], np.abs(expected.mean(0)), rtol=1e-4)
    np.testing.assert_allclose(fisher_unit_scores(found)["g"], np.square(expected).mean(0), rtol=1e-4)
    np.testing.assert_allclose(fisher_matrix(found)["g"], expected.T @ expected / 5, rtol=1e-3, atol=1e-4)


def test_batches_spread_over_devices_give_the_same(params):
    rng = np.random.default_rng(2)
    batch = {"x": rng.normal(size=(8, 4)).astype(np.float32), "y": rng.normal(size=(8, 5)).astype(np.float32)}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    placed = jax.tree.map(lambda x: jax.device_put(x, sharding), batch)
    for per_example in (True, False):
        found, expected = (
            gate_gradients(loss, params, [GROUP], [given], per_example=per_example)["g"] for given in (placed, batch)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_taylor_is_the_sum_of_weight_times_gradient(params, batches):
    """Σ w g over the gated slices of a unit is the derivative by its gate."""
    gradient = jax.grad(lambda down: loss(params | {"down": down}, batches[0]))(params["down"])
    products = np.asarray(params["down"] * gradient).sum(axis=1).reshape(3, 2).sum(axis=1)
    found = gate_gradients(loss, params, [GROUP], batches[:1], per_example=False)
    np.testing.assert_allclose(taylor_unit_scores(found)["g"], np.abs(products), rtol=1e-4)


@pytest.mark.parametrize("per_weight", [True, False])
@pytest.mark.parametrize("gated_only", [True, False])
def test_magnitudes(params, per_weight, gated_only):
    up, down = np.float64(params["up"]), np.float64(params["down"])
    owned = [
        np.concatenate([down[2 * u : 2 * u + 2].ravel(), [] if gated_only else up[:, 2 * u : 2 * u + 2].ravel()])
        for u in range(3)
    ]
    expected = [np.linalg.norm(w) / (np.sqrt(len(w)) if per_weight else 1) for w in owned]
    found = magnitude_unit_scores(params, [GROUP], per_weight=per_weight, gated_only=gated_only)["g"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_magnitudes_of_whole_leaves_and_of_compressed_ones(params):
    layers = UnitGroup(
        name="l", count=2, slices=(UnitSlices(path="up", axis=1, unit=0), UnitSlices(path="down", axis=0, unit=1))
    )
    found = magnitude_unit_scores(params, [layers])["l"]
    expected = [np.sqrt(np.square(np.float64(params[name])).mean()) for name in ("up", "down")]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    rounded, _ = quantize(params, QuantSpec(bits=8))
    np.testing.assert_allclose(magnitude_unit_scores(rounded, [layers])["l"], expected, rtol=0.02)
    half = {name: leaf.astype(jnp.bfloat16) for name, leaf in params.items()}
    assert magnitude_unit_scores(half, [layers])["l"].dtype == jnp.float32


def test_bad_input_is_named(params, batches):
    with pytest.raises(ValueError, match="`batches` is empty"):
        gate_gradients(loss, params, [GROUP], [])
    bare = UnitGroup(name="bare", count=6, slices=(UnitSlices(path="up", axis=1),))
    with pytest.raises(ValueError, match="'bare' has no gated slices"):
        gate_gradients(loss, params, [bare], batches)
    broken = params | {"up": params["up"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="gates of 'g' holds NaN or Inf"):
        gate_gradients(loss, broken, [GROUP], batches)
    absent = UnitGroup(name="g", count=1, slices=(UnitSlices(path="absent", axis=0, gated=True),))
    with pytest.raises(ValueError, match="needs the leaf 'absent'"):
        magnitude_unit_scores(params, [absent])
