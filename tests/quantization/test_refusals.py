"""Options and leaves that quantization refuses, by name."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.calibration import input_statistics
from jaxcompress.quantization import QuantSpec, fake_quantize, gptq, hqq, input_ranges, lsq, quantize, quantize_inputs

RNG = np.random.default_rng(0)
PARAMS = {"k": jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)}
ZERO = {"k": PARAMS["k"].at[2, 1].set(0)}
X = jnp.asarray(RNG.normal(size=(20, 8)), jnp.float32)


def _statistics(params):
    return input_statistics(lambda p, x: x @ p["k"], params, [(X,)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hqq(PARAMS, QuantSpec(bits=4, symmetric=False, group_size=4, scale_dtype="e8m0")), "got 'e8m0'"),
        (lambda: hqq(PARAMS, QuantSpec(bits=4, symmetric=False, range_rule="mse")), "and 'mse'"),
        (
            lambda: quantize_inputs(PARAMS, QuantSpec(bits=8, group_size=3)),
            r"3 does not divide the inputs \[8\] of leaf 'k'",
        ),
        (
            lambda: quantize_inputs(PARAMS, QuantSpec(bits=8, group_size=4, group_outputs=2)),
            "leave `group_outputs` at 1",
        ),
        (lambda: fake_quantize(PARAMS, QuantSpec(format="nf4"), bits=3), "`bits` is for integers"),
        (lambda: fake_quantize(PARAMS, QuantSpec(bits=4), bits=12), r"`bits` must be in \[2, 8\], got 12"),
        (
            lambda: input_ranges(lambda p, x: x @ p["k"], PARAMS, [(X,)], QuantSpec(bits=1, per_tensor=True)),
            "One bit has the mean",
        ),
        (lambda: gptq(ZERO, _statistics(ZERO), QuantSpec(bits=1)), "Leaf 'k' holds zeros, which one bit does not have"),
    ],
)
def test_what_cannot_be_done_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_bit_without_zeros_is_fine():
    found, _ = gptq(PARAMS, _statistics(PARAMS), QuantSpec(bits=1))
    assert float(jnp.abs(found["k"].materialize()).min()) > 0


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
def test_hqq_does_not_depend_on_the_size_of_weights(size):
    spec = QuantSpec(bits=4, symmetric=False, group_size=4)
    _, info = hqq({"k": PARAMS["k"] * size}, spec)
    nearest = quantize({"k": PARAMS["k"] * size}, spec)[0]["k"].materialize() - PARAMS["k"] * size
    assert info["k"].error < 1.1 * float(jnp.linalg.norm(nearest) / jnp.linalg.norm(PARAMS["k"] * size))
    constant = {"k": jnp.full((8, 4), 3.0) * size}
    np.testing.assert_allclose(hqq(constant, spec)[0]["k"].materialize(), constant["k"], rtol=1e-6)


def test_learned_steps_do_not_hide_nan():
    transform = lsq(QuantSpec(bits=4))
    state = transform.init(PARAMS, key=None)
    with pytest.raises(ValueError, match="Leaf 'k' holds 1 NaN"):
        transform.finalize({"k": PARAMS["k"].at[0, 0].set(jnp.nan)}, state)
