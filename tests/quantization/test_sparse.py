"""Quantizing what pruning left: the index stays, zeros stay, the values are those of the masked dense leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.quantization.fake_quant import fake_quantize_array
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress.arrays import BitmaskSparseArray, NMSparseArray, sparsify
from jaxcompress.quantization import QuantSpec
from jaxcompress.trace import LeafLayout

PLAIN = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
STACKED = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
SPECS = [
    QuantSpec(bits=4, group_size=8),
    QuantSpec(bits=3, symmetric=False),
    QuantSpec(bits=8, per_tensor=True, symmetric=False, scale_dtype="bfloat16"),
    QuantSpec(bits=1),
]


plain = jax.jit(lambda leaf: leaf.materialize())
fake = jax.jit(fake_quantize_array, static_argnames=("spec", "layout"))


def masked(shape, density, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * (rng.random(shape) < density)
    w[..., 1] = 0.0
    return jnp.asarray(w, jnp.float32)


def two_of_four(w, axis):
    runs = np.moveaxis(np.abs(np.asarray(w)), axis, -1)
    order = np.argsort(np.argsort(-runs.reshape(*runs.shape[:-1], -1, 4), axis=-1), axis=-1)
    return jnp.asarray(np.moveaxis((order < 2).reshape(runs.shape), -1, axis))


def equal_bits(x, y):
    np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("spec", SPECS)
def test_bit_mask(spec):
    w = masked((16, 6), 0.4)
    sparse = sparsify(w, w != 0, shards=2)
    leaf = quantize_array(sparse, spec, PLAIN)
    validate_array(leaf)
    equal_bits(plain(leaf), fake(w, spec, PLAIN))
    assert isinstance(leaf.data, BitmaskSparseArray)
    assert leaf.bits == spec.bits
    for part in ("index", "starts"):
        same = jax.tree.map(lambda x, y: bool((x == y).all()), getattr(leaf.data, part), getattr(sparse, part))
        assert jax.tree.all(same)
    if spec.bits < 8:
        assert isinstance(leaf.data.values, PackedArray)
        assert leaf.data.values.axis == -1
    assert (np.asarray(plain(leaf))[np.asarray(w) == 0] == 0).all()


@pytest.mark.parametrize("spec", SPECS)
def test_stacked_bit_mask_is_cut_by_layer(spec):
    w = masked((3, 16, 6), 0.4)
    leaf = quantize_array(sparsify(w, w != 0, stack_ndim=1), spec, STACKED)
    validate_array(leaf)
    equal_bits(plain(leaf), fake(w, spec, STACKED))
    for layer in range(3):
        equal_bits(plain(jax.tree.map(lambda part, i=layer: np.asarray(part)[i], leaf)), plain(leaf)[layer])


@pytest.mark.parametrize(("axis", "spec"), [*((0, spec) for spec in SPECS), (1, SPECS[1])])
def test_two_of_four(spec, axis):
    w = jnp.asarray(np.random.default_rng(2).normal(size=(16, 8)), jnp.float32)
    mask = two_of_four(w, axis)
    w = jnp.where(mask, w, 0)
    sparse = sparsify(w, mask, pattern=(2, 4), axis=axis)
    leaf = quantize_array(sparse, spec, PLAIN)
    validate_array(leaf)
    equal_bits(plain(leaf), fake(w, spec, PLAIN))
    assert isinstance(leaf.data, NMSparseArray)
    if spec.bits < 8:
        assert leaf.data.values.axis == axis - 2


@pytest.mark.parametrize("spec", SPECS)
def test_unused_slots_of_a_pattern_stay_zero(spec):
    """All but one bit keep them: the code of zero stands for exactly zero. One bit has no such code: a bit mask."""
    w = masked((16, 6), 0.2)
    w = jnp.where(two_of_four(w, 0), w, 0)
    leaf = quantize_array(sparsify(w, w != 0, pattern=(2, 4), axis=0), spec, PLAIN)
    validate_array(leaf)
    assert isinstance(leaf.data, BitmaskSparseArray if spec.bits == 1 else NMSparseArray)
    equal_bits(plain(leaf), fake(w, spec, PLAIN))


def test_one_bit_drops_stored_zeros_and_keeps_the_shards():
    w = masked((16, 6), 0.4)
    kept = (w != 0) | (jnp.arange(16)[:, None] < 3)
    leaf = quantize_array(sparsify(w, kept, shards=4), QuantSpec(bits=1), PLAIN)
    validate_array(leaf)
    assert leaf.data.values.shape[-2] == 4
    equal_bits(plain(leaf), fake(w, QuantSpec(bits=1), PLAIN))


def test_everything_pruned():
    w = jnp.zeros((16, 6))
    for spec in (SPECS[1], SPECS[-1]):
        leaf = quantize_array(sparsify(w, w != 0), spec, PLAIN)
        validate_array(leaf)
        assert (plain(leaf) == 0).all()


def test_stored_bits_are_exact():
    w = jnp.asarray(np.random.default_rng(2).normal(size=(64, 8)), jnp.float32)
    mask = two_of_four(w, 0)
    leaf = quantize_array(sparsify(w, mask, pattern=(2, 4), axis=0), QuantSpec(bits=4), PLAIN)
    assert leaf.nbits == 32 * 8 * 4 + 32 * 8 * 2 + 8 * 32
    leaf = quantize_array(sparsify(w, mask), QuantSpec(bits=4), PLAIN)
    assert leaf.nbits == 32 * 8 * 4 + 64 * 8 + 64 * 32 + 8 * 32
