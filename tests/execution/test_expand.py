"""Sparse leaves with their zeros stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import KINDS, parts_within

import jaxcompress as jc
from jaxcompress._src.types import is_compressed
from jaxcompress.arrays import BitmaskSparseArray, InputQuantizedArray, NMSparseArray, QuantizedArray
from jaxcompress.execution import expand_sparse
from jaxcompress.quantization import QuantSpec, quantize_inputs
from jaxcompress.trace import LeafLayout

LAYOUT = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
STACKED = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
SPARSE = (BitmaskSparseArray, NMSparseArray)


@pytest.mark.parametrize("layout", [LAYOUT, STACKED], ids=["matrix", "stack"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_stay_and_nothing_sparse_is_left(kind, layout):
    shape = (16, 8) if layout is LAYOUT else (3, 16, 8)
    leaf = KINDS[kind](jax.random.normal(jax.random.key(0), shape), layout)
    params, info = expand_sparse({"w": leaf, "b": jnp.ones(3)})
    was_sparse = any(isinstance(part, SPARSE) for part in parts_within(leaf))
    assert (set(info) == {"w"}) == was_sparse
    np.testing.assert_array_equal(jc.materialize(params["w"]), jc.materialize(leaf))
    assert not any(isinstance(part, SPARSE) for part in parts_within(params["w"]))
    before, after = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in ({"w": leaf, "b": jnp.ones(3)}, params))
    assert after - before == sum(info.values())
    if not was_sparse:
        assert params["w"] is leaf


@pytest.mark.parametrize("kind", ["int4 2:4 groups", "int4 bit mask", "codebook bit mask"])
def test_codes_stay_codes_that_kernels_take(kind):
    leaf = KINDS[kind](jax.random.normal(jax.random.key(0), (32, 8)), LAYOUT)
    marked, _ = quantize_inputs({"w": leaf}, QuantSpec(bits=8))
    whole = expand_sparse(marked)[0]["w"]
    assert isinstance(whole, InputQuantizedArray)
    assert is_compressed(whole.weight)
    assert whole.weight.nbytes < 32 * 8 * 2
    if isinstance(whole.weight, QuantizedArray):
        assert whole.weight.data.axis == -2


def test_only_what_fits_and_what_is_asked():
    leaf = KINDS["2:4"](jax.random.normal(jax.random.key(0), (16, 8)), LAYOUT)
    params = {"a": leaf, "b": leaf}
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    more = 16 * 8 * 4 - leaf.nbytes
    small, info = expand_sparse(params, max_bytes=size + more)
    assert (info, is_compressed(small["a"]), is_compressed(small["b"])) == ({"a": more}, False, True)
    assert expand_sparse(params, max_bytes=size)[1] == {}
    assert set(expand_sparse(params, select=jc.tree.by_path("b"))[1]) == {"b"}
    with pytest.raises(ValueError, match=f"`max_bytes` must be at least what the tree takes, {size}, got {size - 1}"):
        expand_sparse(params, max_bytes=size - 1)
    with pytest.raises(ValueError, match="nothing"):
        expand_sparse(params, select=jc.tree.by_path("nothing"))
