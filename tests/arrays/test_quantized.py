"""`QuantizedArray` against the formula, for every kind of codes, scales and zero points."""

import dataclasses

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.arrays.quantized import dequantize, per_block, split_blocks
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.types import CompressedArray, is_compressed
from jaxcompress.arrays import QuantizedArray, sparsify
from jaxcompress.trace import LeafLayout

PLAIN = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
STACKED = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))


def weights(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def spread(parameter, shape):
    out = np.asarray(parameter, np.float64)
    for axis, size in enumerate(shape):
        out = np.repeat(out, size // out.shape[axis], axis)
    return out


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_materialize_is_the_formula(kind):
    shape = (64, 8)
    leaf = kinds.KINDS[kind](weights(shape), PLAIN)
    validate_array(leaf)
    assert is_compressed(leaf)
    assert isinstance(leaf, CompressedArray)
    values, codes, mask = jax.jit(_parts)(leaf)
    assert (leaf.shape, leaf.ndim, leaf.dtype, values.dtype) == (shape, 2, jnp.float32, jnp.float32)
    if isinstance(leaf, QuantizedArray):
        codes, scale = np.asarray(codes, np.float64), spread(leaf.scale, shape)
        zero = 0 if leaf.zero_point is None else spread(leaf.zero_points(), shape)
        table = None if leaf.levels is None else np.asarray(leaf.levels, np.float32)
        wanted = (codes - zero if table is None else table[codes.astype(int)].astype(np.float64)) * scale
        np.testing.assert_array_equal(values, np.where(mask, wanted, 0).astype(np.float32))


def _parts(leaf):
    codes = leaf.codes() if isinstance(leaf, QuantizedArray) else 0
    return leaf.materialize(), codes, leaf.data.mask() if hasattr(leaf, "data") and hasattr(leaf.data, "mask") else True


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_stacked_leaves_are_cut_scanned_and_mapped(kind):
    leaf = kinds.KINDS[kind](weights((4, 64, 8)), STACKED)

    @jax.jit
    def all_ways(leaf):
        by_slice = jnp.stack([jax.tree.map(lambda part, i=i: part[i], leaf).materialize() for i in range(4)])
        by_scan = jax.lax.scan(lambda carry, layer: (carry, layer.materialize()), 0, leaf)[1]
        return leaf.materialize(), by_slice, by_scan, jax.vmap(lambda layer: layer.materialize())(leaf)

    whole, *others = all_ways(leaf)
    for other in others:
        np.testing.assert_array_equal(other, whole)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_take_rows(kind):
    leaf = kinds.KINDS[kind](weights((64, 8)), LeafLayout(kind="lookup", input_axes=(1,), output_axes=(0,)))
    rows = jnp.array([[3, 63], [0, 3]])
    found, wanted = jax.jit(lambda leaf, rows: (leaf.take_rows(rows), leaf.materialize()[rows]))(leaf, rows)
    np.testing.assert_array_equal(found, wanted)


def test_take_rows_across_blocks_of_rows():
    """Scales, and packed codes, that lie along the axis of the rows."""
    codes = jnp.asarray(np.random.default_rng(0).integers(-7, 8, (12, 5)), jnp.int8)
    scale = jnp.asarray(np.random.default_rng(1).random((3, 5)), jnp.float32)
    leaf = QuantizedArray(data=pack(codes, bits=4, axis=0), scale=scale, dtype=jnp.dtype("float32"))
    rows = jnp.array([11, 0, 4, 3])
    np.testing.assert_array_equal(leaf.take_rows(rows), leaf.materialize()[rows])


def test_blocks_on_several_axes():
    codes = np.random.default_rng(0).integers(-7, 8, (4, 6, 5)).astype(np.int8)
    scale = np.random.default_rng(1).random((2, 3, 5)).astype(np.float32)
    values = dequantize(jnp.asarray(codes), jnp.asarray(scale))
    np.testing.assert_array_equal(values, (codes * spread(scale, codes.shape)).astype(np.float32))
    zero = np.array([[[3]], [[5]]], np.uint8)
    values = dequantize(jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(zero))
    wanted = (codes - spread(zero, codes.shape)) * spread(scale, codes.shape)
    np.testing.assert_array_equal(values, wanted.astype(np.float32))


def test_split_blocks_and_per_block_fit_together():
    x = jnp.arange(24.0).reshape(4, 6)
    blocks = split_blocks(x, (2, 1))
    assert blocks.shape == (2, 2, 6)
    assert per_block(jnp.ones((2, 1)), (4, 6), (2, 1)).shape == (2, 1, 1)
    assert per_block(jnp.ones((1, 1)), (4, 6), (2, 1)).shape == (1, 1, 1)
    for scale_shape in ((3, 1), (0, 1), (2,)):
        with pytest.raises(ValueError, match="do not divide an array of shape"):
            split_blocks(x, scale_shape)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_logical_dtype(dtype):
    leaf = QuantizedArray(data=jnp.array([[3, -7]], jnp.int8), scale=jnp.full((1, 1), 0.3), dtype=jnp.dtype(dtype))
    values = leaf.materialize()
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, (jnp.array([[3.0, -7.0]]) * 0.3).astype(dtype))


def test_sparse_codes_are_zero_where_nothing_is_stored():
    mask = jnp.array([[True, False], [False, True]])
    data = sparsify(jnp.array([[9, 9], [9, 0]], jnp.uint8), mask)
    half = jnp.full((1, 1), 4, jnp.uint8)
    leaf = QuantizedArray(data=data, scale=jnp.ones((1, 1)), zero_point=half, dtype=jnp.dtype("float32"))
    np.testing.assert_array_equal(leaf.materialize(), [[5, 0], [0, -4]])


def test_stored_bits_are_exact():
    codes = jnp.zeros((64, 6), jnp.int8)
    leaf = QuantizedArray(
        data=pack(codes, bits=4, axis=0), scale=jnp.ones((2, 6), jnp.bfloat16), dtype=jnp.dtype("float32")
    )
    assert leaf.nbits == 64 * 6 * 4 + 2 * 6 * 16
    assert leaf.bits == 4
    assert dataclasses.replace(leaf, data=codes, zero_point=jnp.zeros((2, 6), jnp.uint8)).nbits == 64 * 6 * 8 + 12 * 24


def test_gradients_reach_the_scales():
    leaf = kinds.KINDS["int4 groups"](weights((64, 8)), PLAIN)
    grad = jax.grad(lambda scale: dataclasses.replace(leaf, scale=scale).materialize().sum())(leaf.scale)
    wanted = np.asarray(leaf.codes(), np.float64).reshape(16, 4, 8).sum(1)
    np.testing.assert_allclose(grad, wanted, rtol=1e-6)
