"""HQQ where one input has most of the energy: what a zero point that is no whole number costs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.quantization import QuantSpec, hqq, quantize


def layer():
    """64 inputs, one of which has most of the energy and small weights, some of them 0."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(64, 16)), rng.normal(size=(400, 64))
    w[5] = 0.02 * rng.normal(size=16)
    w[5, :4] = w[9, 3] = 0.0
    x[:, 5] *= 12
    return jnp.asarray(w, jnp.float32), x


def lost(x, w, leaf):
    w, small = (np.asarray(part, np.float64) for part in (w, leaf.materialize()))
    return float(np.linalg.norm(x @ (w - small)) / np.linalg.norm(x @ w))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [None, 32])
def test_with_an_exact_zero_it_does_not_lose_to_rounding_to_nearest(bits, group):
    w, x = layer()
    spec = QuantSpec(bits=bits, group_size=group, symmetric=False, scale_dtype="bfloat16")
    assert (x[:, 5] ** 2).sum() > 0.6 * (x**2).sum()
    nearest = quantize({"w": w}, spec)[0]["w"]
    plain, exact = (hqq({"w": w}, spec, exact_zero=exact)[0]["w"] for exact in (False, True))
    assert lost(x, w, plain) > 1.1 * lost(x, w, nearest)
    assert lost(x, w, exact) <= lost(x, w, nearest)
    assert not np.any(np.asarray(exact.materialize())[np.asarray(w) == 0])
    assert np.all(np.asarray(plain.materialize())[np.asarray(w) == 0] != 0)
    assert exact.nbits < plain.nbits


def test_the_scale_is_no_worse_than_that_of_the_range_in_any_block():
    w, _ = layer()
    spec = QuantSpec(bits=3, group_size=16, symmetric=False)
    found, info = hqq({"w": w}, spec, exact_zero=True)
    nearest = quantize({"w": w}, spec)[0]["w"]
    np.testing.assert_array_equal(found["w"].zero_points(), nearest.zero_points())
    gaps = [np.abs(np.asarray(leaf.materialize(), np.float64) - np.asarray(w)) for leaf in (found["w"], nearest)]
    better, before = (gap.reshape(4, 16, 16).mean(1) for gap in gaps)
    assert (better <= before * (1 + 1e-5)).all()
    assert better.mean() < 0.99 * before.mean()
    small = np.linalg.norm(gaps[0]) / np.linalg.norm(w)
    np.testing.assert_allclose(info["w"].error, small, rtol=1e-5)


def test_the_public_solver_has_no_such_variant():
    with pytest.raises(ValueError, match="no `exact_zero`"):
        hqq({"w": layer()[0]}, QuantSpec(bits=4, symmetric=False), iterate="legacy", exact_zero=True)
