"""Trees with leaves that are no arrays, and inputs that are flags: static for all that reads a model's jaxpr."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.trace.traced import split_arrays, traced
from jaxcompress.quantization import QuantSpec, awq, correct_biases, gptq_sequential, learned_rounding, reconstruct
from jaxcompress.structured import UnitGroup, UnitSlices, refit

RNG = np.random.default_rng(0)
ARRAYS = {
    "scale": jnp.ones(4),
    "up": jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32),
    "bias": jnp.zeros(8),
    "down": jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(12, 4)), jnp.float32)
SPEC = QuantSpec(bits=4, group_size=4)
KERNELS = jc.tree.by_path("up|down")
BATCHES = [(X, True), (X[::-1], True)]


def _apply(params, x, residual):
    hidden = params["function"]((x * params["scale"][None]) @ params["up"] + params["bias"][None])
    return hidden @ params["down"] + (x if residual else 0.0)


def _plain(params, x):
    return _apply({**params, "function": jnp.tanh}, x, True)


METHODS = {
    "reconstruct": lambda apply, params, batches: reconstruct(apply, params, batches, SPEC, select=KERNELS),
    "gptq_sequential": lambda apply, params, batches: gptq_sequential(apply, params, batches, SPEC, select=KERNELS),
    "correct_biases": lambda apply, params, batches: correct_biases(
        apply, params, jc.quantization.quantize(params, SPEC, select=KERNELS)[0], batches
    ),
    "awq": lambda apply, params, batches: awq(
        params,
        jc.calibration.input_statistics(apply, params, batches),
        SPEC,
        folds=jc.trace.folds(apply, params, *batches[0]),
        select=KERNELS,
    ),
    "refit": lambda apply, params, batches: refit(
        apply,
        params,
        [UnitGroup(name="units", count=8, slices=(UnitSlices(path="down", axis=0, gated=True),))],
        {"units": np.arange(8) < 5},
        batches,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_give_what_they_do_without_them(name):
    found, info = METHODS[name](_apply, {**ARRAYS, "function": jnp.tanh}, BATCHES)
    wanted, known = METHODS[name](_plain, ARRAYS, [batch[:1] for batch in BATCHES])
    assert found.pop("function") is jnp.tanh
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(found), jc.materialize(wanted))
    assert info == known


def test_learned_rounding_gives_what_it_does_without_them():
    start, _ = jc.quantization.quantize(ARRAYS, SPEC, select=KERNELS)
    with_function = [{**tree, "function": jnp.tanh} for tree in (ARRAYS, start)]
    apply = lambda params, x: _apply(params, x, True)  # noqa: E731
    found, info = learned_rounding(apply, *with_function, [(X,)], together=str)
    wanted, known = learned_rounding(_plain, ARRAYS, start, [(X,)], together=str)
    assert found.pop("function") is jnp.tanh
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(found), jc.materialize(wanted))
    assert info == known


def test_flags_tell_programs_apart():
    batches = [(X, True), (X, False)]
    found, _ = reconstruct(_apply, {**ARRAYS, "function": jnp.tanh}, batches, SPEC, select=KERNELS)
    wanted, _ = reconstruct(_plain, ARRAYS, [(X,)], SPEC, select=KERNELS)
    # What the last kernel is fitted to has no part in what it is added to: both batches ask for the same.
    np.testing.assert_array_equal(found["down"].codes(), wanted["down"].codes())
    # Scales come from least squares over twice as many rows, in float32.
    np.testing.assert_allclose(found["down"].materialize(), wanted["down"].materialize(), rtol=1e-4)


def test_arrays_are_split_from_the_rest():
    arrays, static = split_arrays({"none": None, "flag": False, "name": "x", "array": X})
    assert len(arrays) == 1
    assert hash(static) == hash(split_arrays({"none": None, "flag": False, "name": "x", "array": X + 1})[1])
    assert static != split_arrays({"none": None, "flag": True, "name": "x", "array": X})[1]
    small, _ = jc.quantization.quantize(ARRAYS, SPEC, select=KERNELS)
    model = traced(_apply, {**small, "function": jnp.tanh}, (X, True))
    assert model.paths == ["bias", "down", "scale", "up"]
    assert [var.aval.shape for var in model.closed.jaxpr.invars] == [(8,), (8, 4), (4,), (4, 8), (12, 4)]
