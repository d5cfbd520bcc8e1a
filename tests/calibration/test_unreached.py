"""Stack entries that no row reaches, such as experts without tokens: counted as 0, and no reason to fail."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import calibration, clustering, lowrank, quantization, trace

RNG = np.random.default_rng(0)
PARAMS = {"experts": jnp.asarray(RNG.normal(size=(3, 4, 6)), jnp.float32)}
X = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)


def _apply(params, x):
    """Nothing reaches expert 1."""
    return x @ params["experts"][0] + (2 * x[:3] @ params["experts"][2]).sum()


@pytest.fixture(scope="module")
def statistics():
    return calibration.input_statistics(_apply, PARAMS, [(X,)])


def test_counts_and_sums_are_exact(statistics):
    found, x = statistics["experts"], np.asarray(X, np.float64)
    np.testing.assert_array_equal(found.count, [5, 0, 3])
    np.testing.assert_allclose(found.gram, [x.T @ x, 0 * x.T @ x, 4 * x[:3].T @ x[:3]], rtol=1e-5, atol=1e-6)
    means = [np.abs(x).mean(0), 0 * x[0], 2 * np.abs(x[:3]).mean(0)]
    np.testing.assert_allclose(found.absolute_mean, means, rtol=1e-5)


def test_nothing_of_its_inputs_is_assumed(statistics):
    layouts = trace.layouts(_apply, PARAMS, X)
    with pytest.warns(UserWarning, match=r"reached 'experts' \(stack entries \[1\]\): their weights were factored"):
        small, _ = lowrank.activation_svd(PARAMS, statistics, rank=2, layouts=layouts)
    plain, _ = lowrank.svd(PARAMS, rank=2, layouts=layouts)
    found, expected = small["experts"].materialize(), plain["experts"].materialize()
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(found[0] - expected[0]).max()) > 1e-3
    with pytest.warns(UserWarning, match=r"reached 'experts' \(stack entries \[1\]\)"):
        importance = np.asarray(clustering.input_importance(PARAMS, statistics, layouts=layouts)["experts"])[..., 0]
    x = np.asarray(X, np.float64)
    seen = np.stack([(x**2).mean(0), 4 * (x[:3] ** 2).mean(0)])
    np.testing.assert_allclose(importance, [seen[0], np.full(4, seen.mean()), seen[1]], rtol=1e-5)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_its_range_holds_those_of_the_others(momentum):
    spec = quantization.QuantSpec(bits=8, per_tensor=True)
    found = quantization.input_ranges(_apply, PARAMS, [(X,), (X,)], spec, momentum=momentum)["experts"]
    scale = np.asarray(found.scale).reshape(-1)
    assert scale[1] == max(scale[0], scale[2])
    assert scale[0] == pytest.approx(np.abs(X).max() / 127, rel=1e-2)
