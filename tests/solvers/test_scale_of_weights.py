"""Weights of any size: what is found for weights times a power of two is that of the weights, times it."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import clustering, lowrank, pruning, quantization
from jaxcompress._src.solvers.outputs import not_worse, unit_of
from jaxcompress.calibration import InputStatistics, LookupCounts
from jaxcompress.quantization import QuantSpec
from jaxcompress.trace import LeafLayout

DEPTH, WIDTH = 12, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, DEPTH)) @ (RNG.normal(size=(DEPTH, DEPTH)) / np.sqrt(DEPTH) + 0.5)
W = jnp.asarray(RNG.normal(size=(DEPTH, WIDTH)), jnp.float32)
SPEC = QuantSpec(bits=3, group_size=4, symmetric=False)
LOOKUP = {"k": LeafLayout(kind="lookup", input_axes=(1,), output_axes=(0,))}


def _statistics(rows):
    rows = jnp.asarray(rows, jnp.float32)
    gram = rows.T @ rows
    return {
        "k": InputStatistics(
            count=jnp.float32(len(rows)), gram=gram, squared_sum=jnp.diagonal(gram), absolute_sum=jnp.abs(rows).sum(0)
        )
    }


STATISTICS = _statistics(X)
COUNTS = {"k": LookupCounts(count=jnp.float32(DEPTH), rows=jnp.ones(DEPTH))}
H = {"k": jnp.asarray(RNG.uniform(0.5, 2.0, size=(DEPTH, 1)), jnp.float32)}
METHODS = {
    "gptq": lambda p: quantization.gptq(p, STATISTICS, SPEC),
    "gptq of a table": lambda p: quantization.gptq(p, COUNTS, QuantSpec(bits=3), layouts=LOOKUP),
    "awq": lambda p: quantization.awq(p, STATISTICS, SPEC),
    "least squares of ranges": lambda p: (quantization.quantize(p, QuantSpec(bits=3, range_rule="mse"))[0], {}),
    "wanda": lambda p: pruning.wanda(p, STATISTICS, sparsity=0.5),
    "sparsegpt": lambda p: pruning.sparsegpt(p, STATISTICS, sparsity=0.5),
    "alps": lambda p: pruning.alps(p, STATISTICS, sparsity=0.5),
    "svd": lambda p: lowrank.svd(p, rank=2),
    "activation_svd": lambda p: lowrank.activation_svd(p, STATISTICS, rank=2),
    "cluster": lambda p: clustering.cluster(p, clustering.CodebookSpec(values=4)),
    "cluster with a rate": lambda p: clustering.cluster(p, clustering.CodebookSpec(values=4, rate=0.05), importance=H),
    "additive": lambda p: clustering.additive_quantize(p, clustering.AdditiveSpec(length=4, tables=2, values=4)),
}


@pytest.mark.parametrize("method", METHODS)
def test_results_scale_with_the_weights(method):
    expected, expected_info = METHODS[method]({"k": W})
    expected = np.asarray(jc.materialize(expected)["k"])
    assert np.linalg.norm(expected - np.asarray(W)) < 0.95 * np.linalg.norm(W)
    for exponent in (-66, 66):
        found, info = METHODS[method]({"k": W * jnp.float32(2.0**exponent)})
        values = np.asarray(jc.materialize(found)["k"], np.float64) * 2.0**-exponent
        np.testing.assert_allclose(values, expected, rtol=2e-4, atol=2e-5)
        for path in expected_info:
            assert info[path].error == pytest.approx(expected_info[path].error, rel=1e-3)
            assert info[path].error > 0


def test_importance_may_be_of_any_size():
    wide = clustering.cluster({"k": W}, clustering.CodebookSpec(values=4, rate=0.05), importance=H)[0]["k"]
    for size in (1e-36, 1e36):
        tiny = {"k": H["k"] * jnp.float32(size)}
        found = clustering.cluster({"k": W}, clustering.CodebookSpec(values=4, rate=0.05), importance=tiny)[0]["k"]
        np.testing.assert_allclose(found.materialize(), wide.materialize(), rtol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("options", [{}, {"range_search": None, "refine": 0}])
def test_dependent_inputs_without_damping_are_no_worse_than_rounding_to_nearest(damping, options):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(40, 3)) @ rng.normal(size=(3, DEPTH))
        for symmetric in (True, False):
            spec = QuantSpec(bits=3, group_size=4, symmetric=symmetric)
            found, info = quantization.gptq({"k": W}, _statistics(rows), spec, damping=damping, **options)
            lost = np.linalg.norm(rows @ (np.asarray(found["k"].materialize(), np.float64) - np.asarray(W)))
            nearest = quantization.quantize({"k": W}, spec)[0]["k"].materialize()
            plain = np.linalg.norm(rows @ (np.asarray(nearest, np.float64) - np.asarray(W)))
            assert lost <= plain * (1 + 1e-4)
            assert info["k"].error <= info["k"].error_before * (1 + 1e-3)


@pytest.mark.parametrize("method", [pruning.sparsegpt, pruning.alps])
def test_dependent_inputs_without_damping_are_no_worse_than_masking(method):
    rows = RNG.normal(size=(40, 3)) @ RNG.normal(size=(3, DEPTH))
    _, info = method({"k": W}, _statistics(rows), sparsity=0.5, damping=0.0)
    assert info["k"].error <= info["k"].error_before * (1 + 1e-3)


def test_units_are_powers_of_two():
    assert unit_of(jnp.array([3.0, -5.0])) == 8
    assert unit_of(jnp.zeros(3)) == 1
    assert unit_of(jnp.array([1.0, jnp.nan])) == 1
    worse = not_worse(jnp.full((2, 1), jnp.nan), jnp.ones((2, 1)), jnp.zeros((2, 1)), jnp.eye(2))
    np.testing.assert_array_equal(worse, 1)
