"""Low-rank arrays: what they stand for, and their rows, against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest

from jaxcompress._src.arrays.validate import validate_array
from jaxcompress.arrays import LowRankArray
from jaxcompress.trace import LeafLayout
from jaxcompress.tree import partition_trainable


def make(left_shape, right_shape, *, rank=3, dtype="float32", residual=None):
    rng = np.random.default_rng(0)
    left, right = (jnp.asarray(rng.normal(size=(*shape, rank)), dtype) for shape in (left_shape, right_shape))
    return LowRankArray(left=left, right=right, dtype=jnp.dtype(dtype), residual=residual)


def formula(leaf):
    left, right = (np.asarray(part, np.float64) for part in (leaf.left, leaf.right))
    return (left * right).sum(-1)


@pytest.mark.parametrize(
    ("left", "right", "shape"),
    [
        ((5, 1), (1, 7), (5, 7)),
        ((1, 7), (5, 1), (5, 7)),
        ((2, 5, 1, 1), (2, 1, 3, 7), (2, 5, 3, 7)),
        ((3, 4, 1), (1, 1, 6), (3, 4, 6)),
        ((5, 2, 1), (1, 2, 7), (5, 2, 7)),
        ((1, 1), (1, 7), (1, 7)),
        ((1, 1), (1, 1), (1, 1)),
        ((0, 1), (1, 7), (0, 7)),
        ((5, 1), (1, 0), (5, 0)),
    ],
)
def test_materialize_is_the_formula(left, right, shape):
    leaf = make(left, right)
    validate_array(leaf)
    assert (leaf.shape, leaf.ndim, leaf.rank) == (shape, len(shape), 3)
    plain = leaf.materialize()
    assert (plain.shape, plain.dtype) == (shape, jnp.float32)
    np.testing.assert_allclose(plain, np.broadcast_to(formula(leaf), shape), rtol=1e-5, atol=1e-6)


def test_rank_zero_is_the_residual_alone():
    residual = jnp.arange(35.0).reshape(5, 7)
    np.testing.assert_array_equal(make((5, 1), (1, 7), rank=0).materialize(), np.zeros((5, 7)))
    leaf = make((5, 1), (1, 7), rank=0, residual=residual)
    np.testing.assert_array_equal(leaf.materialize(), residual)


def test_sums_in_bfloat16_are_rounded_once():
    leaf = make((64, 1), (1, 48), rank=40, dtype="bfloat16")
    plain = leaf.materialize()
    assert plain.dtype == jnp.bfloat16
    wanted = formula(leaf)
    np.testing.assert_allclose(np.asarray(plain, np.float64), wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(
    ("left", "right"), [((5, 1), (1, 7)), ((1, 7), (5, 1)), ((5, 2, 1), (5, 1, 7)), ((1, 1), (1, 7))]
)
def test_rows_are_those_of_the_plain_array(left, right):
    leaf = make(left, right)
    leaf = dataclasses.replace(leaf, residual=jnp.ones(leaf.shape))
    for rows in ([[0, leaf.shape[0] - 1], [0, 0]], [], 0):
        rows = jnp.asarray(rows, jnp.int32)
        np.testing.assert_allclose(leaf.take_rows(rows), leaf.materialize()[rows], rtol=1e-6)


def test_bits_and_trainable_parts():
    leaf = make((5, 1), (1, 7))
    assert leaf.nbits == 32 * 3 * (5 + 7)
    trainable, rest = partition_trainable({"kernel": leaf, "codes": jnp.ones(3, "int8")})
    assert [part.shape for part in jax.tree.leaves(trainable)] == [(5, 1, 3), (1, 7, 3)]
    assert [part.dtype for part in jax.tree.leaves(rest)] == [jnp.int8]
    layout = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
    small = kinds.KINDS["low rank int4"](jnp.ones((16, 24)), layout)
    # 4 bits for each of 3 (16 + 24) codes, and a scale for each factor.
    assert small.nbits == 8 * (16 * 3 // 2 + 24 * 3 // 2) + 2 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": jnp.ones((5, 1, 2))}, "equal ranks"),
        ({"left": jnp.ones((5, 3, 3))}, "equal sizes or 1"),
        ({"left": jnp.ones((5, 3))}, "equal ranks"),
        ({"right": jnp.ones((1, 7, 3), "int8")}, "dtypes are floats"),
        ({"residual": jnp.ones((7, 5))}, r"residual is float32\(7, 5\)"),
        ({"residual": jnp.ones((5, 7), "bfloat16")}, "residual is bfloat16"),
    ],
)
def test_broken_arrays_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        validate_array(dataclasses.replace(make((5, 1), (1, 7)), **changes))
