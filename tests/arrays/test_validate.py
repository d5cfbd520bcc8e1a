"""`validate_array` accepts what the library makes, and says what is broken."""

import dataclasses

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.types import CompressedArray
from jaxcompress.arrays import sparsify
from jaxcompress.quantization import QuantSpec, quantize_inputs
from jaxcompress.trace import LeafLayout

PLAIN = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
W = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)


def make(kind):
    return kinds.KINDS[kind](W, PLAIN)


def change(leaf, **parts):
    return dataclasses.replace(leaf, **parts)


def packed():
    return pack(jnp.ones((13, 3), jnp.uint8), bits=3, axis=0)


def pattern():
    return make("2:4")


def bit_mask():
    return sparsify(W, W > 0.3, shards=2)


def with_places(places):
    leaf = pattern()
    return change(leaf, index=pack(jnp.asarray(places, jnp.uint8), bits=2, axis=0))


def quantized(**parts):
    return change(make("uint4 groups zero point"), **parts)


BROKEN = {
    "Packed codes have 1 to 7 bits, got 8": lambda: change(packed(), bits=8),
    "packed axis is negative and in range, got 0": lambda: change(packed(), axis=0),
    "Packed codes are uint8, got int8": lambda: change(packed(), data=packed().data.view(jnp.int8)),
    "17 codes of 3 bits fill 9 bytes, got 6": lambda: change(packed(), width=17),
    r"pattern \(N, M\) needs": lambda: change(pattern(), pattern=(5, 4)),
    r"Values \(4, 6\) and places \(8, 6\) differ": lambda: change(pattern(), values=pattern().values[:4]),
    "20 entries of pattern 2:4 store 10 values, got 8": lambda: change(pattern(), width=20),
    "Places must be below 3": lambda: change(with_places(np.full((8, 6), 3)), pattern=(2, 3), width=12),
    "distinct and ascending": lambda: with_places(np.ones((8, 6))),
    "do not have 6 columns": lambda: change(bit_mask(), row_shape=(5,)),
    "One start per row": lambda: change(bit_mask(), starts=bit_mask().starts[:-1]),
    "3 shards do not divide 16 rows": lambda: change(bit_mask(), values=jnp.zeros((3, 40))),
    "starts do not count the mask": lambda: change(bit_mask(), starts=bit_mask().starts + 1),
    "keeps more values than the 2 stored": lambda: change(bit_mask(), values=jnp.zeros((2, 2))),
    r"Scales of shape \(3, 6\) do not divide": lambda: quantized(scale=jnp.ones((3, 6))),
    "Zero points have the size of the scales or 1": lambda: quantized(zero_point=jnp.ones((2, 6), jnp.uint8)),
    "logical dtype is a float, got int8": lambda: quantized(dtype=jnp.dtype("int8")),
    "must be finite": lambda: quantized(scale=jnp.full((4, 6), jnp.nan)),
    "levels has no zero point": lambda: quantized(levels=(0.0,) * 16),
    "exceeds the 3 levels": lambda: change(make("levels"), levels=(0.0, 1.0, 2.0)),
    "16 codes of 4 bits fill 8 bytes, got 7": lambda: quantized(
        data=change(quantized().data, data=quantized().data.data[:7])
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_arrays_are_refused(message):
    leaf = BROKEN[message]()
    with pytest.raises(ValueError, match=message):
        validate_array(leaf)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_good_arrays_pass(kind):
    validate_array(make(kind))


@pytest.mark.parametrize("kind", [*kinds.KINDS, "quantized inputs", "packed"])
def test_sizes_are_those_of_the_logical_array_and_bytes_those_that_are_stored(kind):
    if kind == "quantized inputs":
        leaf = quantize_inputs({"w": make("int4 groups")}, QuantSpec(bits=8))[0]["w"]
    else:
        leaf = packed() if kind == "packed" else make(kind)
    plain = leaf.materialize()
    assert (leaf.shape, leaf.ndim, leaf.size, leaf.dtype) == (plain.shape, plain.ndim, plain.size, plain.dtype)
    stored = sum(np.asarray(part).nbytes for part in jax.tree.leaves(leaf))
    assert (leaf.nbytes, leaf.nbits) == (stored, 8 * stored)
    assert isinstance(leaf, CompressedArray)


def test_plain_arrays_pass():
    validate_array(W)
