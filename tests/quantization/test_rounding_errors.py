"""Errors of leaves that any method compressed, against float64 sums over the rows themselves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.calibration import input_statistics
from jaxcompress.quantization import QuantSpec, fixed_point, gptq, quantize, rounding_errors

RNG = np.random.default_rng(5)
IDS = jnp.asarray(RNG.integers(0, 6, size=(9, 4)))
PARAMS = {
    "table": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32),
    "stack": jnp.asarray(RNG.normal(size=(3, 8, 8)) / 3, jnp.float32),
    "heads": jnp.asarray(RNG.normal(size=(8, 2, 3)), jnp.float32),
    "bias": jnp.asarray(RNG.normal(size=8), jnp.float32),
}


def apply(params, ids):
    x = params["table"][ids] + params["bias"][None, None]
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
    return jnp.einsum("btd,dhk->bthk", x, params["heads"])


def _relative(outputs, changed):
    return np.linalg.norm(outputs - changed) / np.linalg.norm(outputs)


def _references(small):
    """Rows of each leaf, in float64, from the dense model."""
    plain = {name: np.float64(leaf) for name, leaf in jc.materialize(small).items()}
    dense = {name: np.float64(leaf) for name, leaf in PARAMS.items()}
    x = dense["table"][IDS]
    found = {"table": _relative(x, plain["table"][IDS])}
    x = x + dense["bias"]
    for i in range(3):
        before, after = x @ dense["stack"][i], x @ plain["stack"][i]
        found[f"stack[{i}]"] = _relative(before, after)
        x = np.tanh(before)
    heads = [np.einsum("btd,dhk->bthk", x, tree["heads"]) for tree in (dense, plain)]
    return found | {"heads": _relative(*heads)}


@pytest.fixture(scope="module")
def evidence():
    return input_statistics(apply, PARAMS, [(IDS[:5],), (IDS[5:],)]), jc.trace.layouts(apply, PARAMS, IDS)


WEIGHTS = lambda params: {name: name != "bias" for name in params}  # noqa: E731


@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_to_nearest_and_shared_values_and_fixed_point(evidence, bits):
    statistics, layouts = evidence
    nearest, _ = quantize(PARAMS, QuantSpec(bits=bits, group_size=4), select=WEIGHTS, layouts=layouts)
    shared, _ = jc.clustering.cluster(PARAMS, jc.clustering.CodebookSpec(values=2**bits), select=WEIGHTS)
    for small in (nearest, shared, fixed_point(PARAMS, bits, select=WEIGHTS, layouts=layouts)[0]):
        found = rounding_errors(PARAMS, small, statistics, layouts=layouts)
        wanted = _references(small)
        assert set(found) == set(wanted)
        for name, error in wanted.items():
            assert found[name].error == pytest.approx(error, rel=1e-3), name
            leaf = small[name.split("[")[0]]
            assert found[name].bits_per_weight == leaf.nbits / math.prod(leaf.shape)


def test_it_says_what_the_one_shot_methods_say_and_passes_over_what_is_plain(evidence):
    statistics, layouts = evidence
    small, info = gptq(PARAMS, statistics, QuantSpec(bits=3, group_size=4), layouts=layouts)
    found = rounding_errors(PARAMS, small, statistics, layouts=layouts)
    for name, own in info.items():
        assert found[name].error == pytest.approx(own.error, rel=1e-3), name
    some = PARAMS | {"heads": small["heads"]}
    assert set(rounding_errors(PARAMS, some, statistics, layouts=layouts)) == {"heads"}


def test_what_cannot_be_compared_is_named(evidence):
    statistics, layouts = evidence
    with pytest.raises(ValueError, match="nothing to compress"):
        rounding_errors(PARAMS, PARAMS, statistics, layouts=layouts)
    other = PARAMS | {"heads": jnp.ones((8, 2, 2))}
    small, _ = quantize(other, QuantSpec(bits=4), select=WEIGHTS, layouts=layouts)
    with pytest.raises(ValueError, match=r"Leaf 'heads' has shape \(8, 2, 3\) in `params`, \(8, 2, 2\) compressed"):
        rounding_errors(PARAMS, small, statistics, layouts=layouts)
