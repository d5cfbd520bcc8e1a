"""Sparse arrays: what goes in comes out, row by row, layer by layer, shard by shard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.arrays.sparse import sparsify_like
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress.arrays import BitmaskSparseArray, NMSparseArray, sparsify

plain = jax.jit(lambda leaf: (leaf.materialize(), leaf.mask()))
take = jax.jit(lambda leaf, rows: (leaf.take_rows(rows), leaf.take_mask_rows(rows)))

# Few shapes, because each compiles anew; many contents.
CASES = [((8, 6), 0, 1), ((2, 4, 3), 1, 2), ((6, 2, 3), 0, 1), ((7,), 0, 1)]


def arrays(shape, density, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 50).astype(dtype), rng.random(shape) < density


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(CASES), st.sampled_from([0.0, 0.4, 1.0]), st.integers(0, 2**32 - 1))
def test_bit_mask(case, density, seed):
    shape, stack_ndim, shards = case
    x, _ = arrays(shape, 1, seed)
    # A fixed count, or every example would compile anew.
    mask = np.random.default_rng(seed).permutation(x.size).reshape(shape) < round(density * x.size)
    leaf = sparsify(jnp.asarray(x), jnp.asarray(mask), stack_ndim=stack_ndim, shards=shards)
    validate_array(leaf)
    values, stored = plain(leaf)
    np.testing.assert_array_equal(values, np.where(mask, x, 0))
    np.testing.assert_array_equal(stored, mask)
    assert (leaf.shape, leaf.dtype, leaf.ndim) == (shape, x.dtype, len(shape))


def n_of_m_mask(shape, axis, kept, run, seed, density):
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    lines = np.moveaxis(mask, axis, -1)
    for index in np.ndindex(lines.shape[:-1]):
        for start in range(0, lines.shape[-1], run):
            width = min(run, lines.shape[-1] - start)
            chosen = rng.permutation(width)[: min(kept, width)]
            lines[(*index, start + chosen[rng.random(len(chosen)) < density])] = True
    return mask


PATTERNS = [((3, 8), -1, 1, 2), ((10, 3), 0, 2, 4), ((2, 8, 3), 1, 3, 8)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PATTERNS), st.sampled_from([0.0, 0.6, 1.0]), st.integers(0, 2**32 - 1))
def test_n_of_m(case, density, seed):
    shape, axis, kept, run = case
    x, _ = arrays(shape, 1, seed)
    mask = n_of_m_mask(shape, axis, kept, run, seed, density)
    leaf = sparsify(jnp.asarray(x), jnp.asarray(mask), pattern=(kept, run), axis=axis)
    validate_array(leaf)
    values, stored = plain(leaf)
    np.testing.assert_array_equal(values, np.where(mask, x, 0))
    # Runs with fewer entries have unused slots, which count as stored.
    assert (np.asarray(stored) | ~mask).all()
    assert leaf.shape == shape
    again = sparsify_like(jnp.asarray(2 * np.where(mask, x, 0)), leaf)
    np.testing.assert_array_equal(plain(again)[0], np.where(mask, 2 * x, 0))
    np.testing.assert_array_equal(again.index.data, leaf.index.data)


@pytest.mark.parametrize(("stack_ndim", "shards"), [(0, 1), (0, 2), (1, 1), (1, 3)])
def test_sparsify_like_keeps_the_index(stack_ndim, shards):
    x, mask = arrays((2, 6, 4), 0.4, 0)
    leaf = sparsify(jnp.asarray(x), jnp.asarray(mask), stack_ndim=stack_ndim, shards=shards)
    again = sparsify_like(jnp.asarray(-x), leaf)
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    for name in ("index", "starts"):
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), getattr(again, name), getattr(leaf, name))
        assert jax.tree.all(same)
    np.testing.assert_array_equal(again.values, -leaf.values)


@pytest.mark.parametrize("dtype", [np.int8, bool, jnp.bfloat16])
def test_dtypes(dtype):
    x, mask = arrays((4, 8), 0.5, 3)
    x = jnp.asarray(x).astype(dtype)
    narrow = jnp.asarray(n_of_m_mask((4, 8), 1, 2, 4, 0, 1.0))
    for leaf, kept in (
        (sparsify(x, jnp.asarray(mask)), mask),
        (sparsify(x, narrow, pattern=(2, 4), axis=1), narrow),
    ):
        values, _ = plain(leaf)
        assert values.dtype == x.dtype
        np.testing.assert_array_equal(values, jnp.where(kept, x, jnp.zeros((), x.dtype)))


@pytest.mark.parametrize(("bits", "shards"), [(3, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("rows", [np.array([[5, 0, 5]]), np.array(3)])
def test_take_rows_of_a_bit_mask(rows, shards, bits):
    x, mask = arrays((8, 2, 3), 0.5, 1, np.int8)
    x = x % 2 ** (bits - 1)
    leaf = sparsify(jnp.asarray(x), jnp.asarray(mask), shards=shards)
    packed = type(leaf)(
        values=pack(leaf.values, bits=bits), index=leaf.index, starts=leaf.starts, row_shape=leaf.row_shape
    )
    validate_array(packed)
    for one in (leaf, packed):
        values, kept = take(one, jnp.asarray(rows))
        np.testing.assert_array_equal(values, np.where(mask, x, 0)[rows])
        np.testing.assert_array_equal(kept, mask[rows])


@pytest.mark.parametrize("axis", [0, 1])
def test_take_rows_of_a_pattern(axis):
    x, _ = arrays((8, 12), 1, 1)
    mask = n_of_m_mask((8, 12), axis, 2, 4, 0, 1.0)
    leaf = sparsify(jnp.asarray(x), jnp.asarray(mask), pattern=(2, 4), axis=axis)
    rows = np.array([[5, 0], [7, 5]])
    values, kept = take(leaf, jnp.asarray(rows))
    np.testing.assert_array_equal(values, np.where(mask, x, 0)[rows])
    np.testing.assert_array_equal(kept, mask[rows])


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_stacked_leaves_are_cut_scanned_and_mapped(pattern):
    x, mask = arrays((3, 8, 5), 0.4, 2)
    mask[1] = False
    if pattern:
        mask = n_of_m_mask((3, 8, 5), 1, 2, 4, 0, 0.8)
    leaf = sparsify(jnp.asarray(x), jnp.asarray(mask), pattern=pattern, axis=1, stack_ndim=1)
    wanted = np.where(mask, x, 0)
    for i in range(3):
        layer = jax.tree.map(lambda part, i=i: part[i], leaf)
        validate_array(layer)
        np.testing.assert_array_equal(plain(layer)[0], wanted[i])
    np.testing.assert_array_equal(jax.vmap(lambda one: one.materialize())(leaf), wanted)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, one: (c, one.materialize()), 0, leaf)[1], wanted)


def test_stored_bits_are_exact():
    x, _ = arrays((16, 8), 1, 0)
    mask = n_of_m_mask((16, 8), 0, 2, 4, 0, 1.0)
    leaf = sparsify(jnp.asarray(x), jnp.asarray(mask), pattern=(2, 4), axis=0)
    assert isinstance(leaf, NMSparseArray)
    assert leaf.nbits == 8 * 8 * (32 + 2)
    leaf = sparsify(jnp.asarray(x), jnp.asarray(mask))
    assert isinstance(leaf, BitmaskSparseArray)
    assert leaf.nbits == 64 * 32 + 16 * 8 + 16 * 32


def test_errors():
    x = jnp.ones((6, 4))
    with pytest.raises(ValueError, match=r"mask of shape \(4, 6\) do not fit"):
        sparsify(x, jnp.ones((4, 6), bool))
    with pytest.raises(ValueError, match="2 stacked axes"):
        sparsify(x, x > 0, stack_ndim=2)
    for shards in (0, 4):
        with pytest.raises(ValueError, match=f"`shards` must divide the 6 rows .* got {shards}"):
            sparsify(x, x > 0, shards=shards)
    with pytest.raises(ValueError, match="keeps more than 2 of 4 entries along axis -1"):
        sparsify(x, x > 0, pattern=(2, 4))
    with pytest.raises(ValueError, match=r"`pattern` .* got \(5, 4\)"):
        sparsify(x, x > 0, pattern=(5, 4))
