"""One rule for tables that are looked up and contracted: every one-shot method takes them, or names them."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import clustering, pruning, quantization, trace
from jaxcompress.quantization import QuantSpec

RNG = np.random.default_rng(0)
PARAMS = {
    "embedding": jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32),
    "kernel": jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32),
}
SHAPES = {"even": (8, 10), "odd": (10, 3)}
IDS = jnp.asarray(RNG.integers(0, 12, (6, 5)))
SPEC = QuantSpec(bits=4, symmetric=False)


def apply(params, ids):
    return jnp.tanh(params["embedding"][ids] @ params["kernel"]) @ params["embedding"].T


LAYOUTS = trace.layouts(apply, PARAMS, IDS)


@functools.cache
def statistics():
    return jc.calibration.input_statistics(apply, PARAMS, [(IDS,)])


METHODS = {
    "quantize": lambda **k: quantization.quantize(PARAMS, SPEC, **k)[0],
    "fixed_point": lambda **k: quantization.fixed_point(PARAMS, 4, **k)[0],
    "hqq": lambda **k: quantization.hqq(PARAMS, SPEC, **k)[0],
    "gptq": lambda **k: quantization.gptq(PARAMS, statistics(), SPEC, **k)[0],
    "awq": lambda **k: quantization.awq(PARAMS, statistics(), SPEC, **k)[0],
    "cluster": lambda **k: clustering.cluster(PARAMS, clustering.CodebookSpec(values=4), **k)[0],
    "wanda": lambda **k: pruning.wanda(PARAMS, statistics(), sparsity=0.5, **k)[0],
    "sparsegpt": lambda **k: pruning.sparsegpt(PARAMS, statistics(), sparsity=0.5, **k)[0],
}


def test_every_method_takes_a_tied_table_by_default_and_leaves_it_when_told():
    assert LAYOUTS["embedding"].kind == "tied"
    kernel = jc.tree.by_path("kernel")
    for name, method in METHODS.items():
        found = jc.materialize(method(layouts=LAYOUTS))
        assert np.any(found["embedding"] != PARAMS["embedding"]), name
        assert np.any(found["kernel"] != PARAMS["kernel"]), name
        kept = jc.materialize(method(layouts=LAYOUTS, select=kernel))
        np.testing.assert_array_equal(kept["embedding"], PARAMS["embedding"], err_msg=name)


def test_reconstruct_cannot_stop_at_one_and_names_it():
    with pytest.warns(trace.LeftOutWarning, match="'embedding': it is looked up and contracted") as caught:
        found, info = quantization.reconstruct(apply, PARAMS, [(IDS,)], SPEC)
    assert (len(caught), set(info)) == (1, {"kernel"})
    np.testing.assert_array_equal(found["embedding"], PARAMS["embedding"])


@pytest.mark.parametrize("method", [quantization.reconstruct, quantization.gptq_sequential])
def test_passes_through_the_model_leave_out_what_the_group_size_does_not_divide(method):
    def two(params, x):
        return jnp.tanh(x @ params["even"]) @ params["odd"]

    params = {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    x, spec = jnp.asarray(RNG.normal(size=(20, 8)), jnp.float32), QuantSpec(bits=4, group_size=8)
    with pytest.warns(trace.LeftOutWarning, match="'odd': `group_size` 8 does not divide") as caught:
        found, info = method(two, params, [(x,)], spec)
    assert (len(caught), set(info)) == (1, {"even"})
    np.testing.assert_array_equal(found["odd"], params["odd"])
    with pytest.raises(trace.BlockError, match="`group_size` 8 does not divide"):
        method(two, params, [(x,)], spec, select=jc.tree.by_path(".*"))
