"""Packing: any width, any axis, any number of bits, against Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress._src.arrays.packed import PackedArray, pack
from jaxcompress._src.arrays.validate import validate_array

BLOCK = {1: 8, 2: 4, 3: 8, 4: 2, 5: 8, 6: 8, 7: 8, 8: 1}


def codes_of(shape, bits, signed, seed=0):
    rng = np.random.default_rng(seed)
    low = -(2 ** (bits - 1)) if signed else 0
    return rng.integers(low, low + 2**bits, shape).astype(np.int8 if signed else np.uint8)


def planes(bits):
    return [width for width in (4, 2, 1) if bits & width]


def reference(codes, bits):
    """The bytes of one line of codes, bit by bit."""
    block = BLOCK[bits]
    line = [int(code) % 2**bits for code in codes] + [0] * (-len(codes) % block)
    out = []
    for start in range(0, len(line), block):
        offset = 0
        for width in planes(bits):
            fields = [(code >> offset) % 2**width for code in line[start : start + block]]
            whole = sum(field << (width * place) for place, field in enumerate(fields))
            out += [(whole >> (8 * byte)) % 256 for byte in range(block * width // 8)]
            offset += width
    return out


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray], ids=["host", "device"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 8))
def test_bytes_are_those_of_the_docstring(bits, signed, place):
    codes = codes_of((13,), bits, signed)
    packed = pack(place(codes), bits=bits)
    assert isinstance(packed.data, jax.Array)
    np.testing.assert_array_equal(packed.data, reference(codes, bits))
    np.testing.assert_array_equal(packed.materialize(), codes)
    assert packed.materialize().dtype == packed.dtype == codes.dtype
    validate_array(packed)


# Few shapes, because each compiles anew; many contents.
SHAPES = [((13,), 0), ((3, 9), 0), ((3, 9), -1), ((2, 5, 3), 1), ((16, 1), 0)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from([1, 3, 4, 6]), st.booleans(), st.integers(0, 2**32 - 1))
def test_round_trip(case, bits, signed, seed):
    shape, axis = case
    codes = codes_of(shape, bits, signed, seed)
    packed = _pack(jnp.asarray(codes), bits=bits, axis=axis)
    np.testing.assert_array_equal(_materialize(packed), codes)
    assert packed.shape == shape
    assert packed.axis == axis % len(shape) - len(shape)
    lines = np.moveaxis(codes, axis, -1).reshape(-1, shape[axis])
    wanted = [reference(line, bits) for line in lines]
    np.testing.assert_array_equal(np.moveaxis(np.asarray(packed.data), axis, -1).reshape(len(lines), -1), wanted)


_pack = jax.jit(pack, static_argnames=("bits", "axis"))
_materialize = jax.jit(lambda packed: packed.materialize())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7])
def test_take(bits):
    codes = codes_of((3, 21), bits, bits % 2 == 0)
    positions = np.random.default_rng(1).integers(0, 21, (3, 40))
    found = jax.jit(lambda packed, at: packed.take(at))(pack(jnp.asarray(codes), bits=bits), jnp.asarray(positions))
    np.testing.assert_array_equal(found, np.take_along_axis(codes, positions, -1))
    assert found.dtype == codes.dtype


@pytest.mark.parametrize("axis", [-1, -2])
def test_leading_axes_come_and_go(axis):
    codes = codes_of((4, 3, 9), 5, True)
    packed = pack(jnp.asarray(codes), bits=5, axis=axis)
    for i in range(4):
        np.testing.assert_array_equal(jax.tree.map(lambda part, i=i: part[i], packed).materialize(), codes[i])
    np.testing.assert_array_equal(jax.vmap(lambda one: one.materialize())(packed), codes)
    _, scanned = jax.lax.scan(lambda carry, one: (carry, one.materialize()), 0, packed)
    np.testing.assert_array_equal(scanned, codes)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), packed, packed)
    assert stacked.shape == (2, 4, 3, 9)


def test_eight_bits_stay_plain():
    assert pack(jnp.array([-128, 127], jnp.int8), bits=8).dtype == jnp.int8
    assert pack(jnp.array([0, 255], jnp.uint8), bits=8).dtype == jnp.uint8


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
@pytest.mark.parametrize("axis", [0, -1])
def test_empty(shape, axis):
    packed = pack(jnp.zeros(shape, jnp.int8), bits=3, axis=axis)
    validate_array(packed)
    assert packed.shape == packed.materialize().shape == shape


def test_stored_bits_are_whole_blocks():
    for bits in range(1, 8):
        packed = pack(jnp.zeros((3, 20), jnp.uint8), bits=bits)
        assert packed.nbits == 3 * bits * -(-20 // BLOCK[bits]) * BLOCK[bits]


def test_errors():
    codes = jnp.zeros((2, 3), jnp.int8)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"`bits` must be in .1, 8., got {bits}"):
            pack(codes, bits=bits)
    for axis in (2, -3):
        with pytest.raises(ValueError, match=f"`axis` must be an axis of an array of shape .*got {axis}"):
            pack(codes, bits=4, axis=axis)


def test_packed_arrays_pass_through_jit_as_arguments():
    packed = pack(jnp.arange(6, dtype=jnp.uint8), bits=3)
    assert isinstance(jax.jit(lambda leaf: leaf)(packed), PackedArray)
