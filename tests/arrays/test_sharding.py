"""Every kind of array on 8 devices equals itself on one; cuts that are not possible are refused."""

import functools

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress._src.arrays.packed import pack
from jaxcompress.arrays import (
    AdditiveCodebookArray,
    CodebookArray,
    LowRankArray,
    QuantizedArray,
    component_shardings,
    sparsify,
)
from jaxcompress.trace import LeafLayout

PLAIN = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
STACKED = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
plain = jax.jit(lambda leaf: leaf.materialize())


@functools.cache
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def sharding(*spec):
    return NamedSharding(mesh(), PartitionSpec(*spec))


def weights(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def check(leaf, logical):
    shardings = component_shardings(leaf, logical)
    assert jax.tree.structure(shardings) == jax.tree.structure(leaf)
    placed = jax.device_put(leaf, shardings)
    np.testing.assert_array_equal(plain(placed), plain(leaf))
    return placed


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_outputs_and_inputs_cut(kind):
    """4 groups on 4 devices; a bit mask is cut along its rows only."""
    bit_mask = "bit mask" in kind
    leaf = kinds.KINDS[kind](weights((64, 8)), PLAIN)
    if bit_mask:
        with pytest.raises(ValueError, match=r"along its rows \(axis 0\) only"):
            component_shardings(leaf, sharding("data", "model"))
        placed = check(leaf, sharding(None, None))
    else:
        placed = check(leaf, sharding("data", "model"))
        if isinstance(placed, LowRankArray):
            parts = [jax.tree.leaves(part)[0].sharding.spec for part in (placed.left, placed.right)]
            assert parts == [PartitionSpec("data", None, None), PartitionSpec(None, "model", None)]
            return
        coded = QuantizedArray | CodebookArray | AdditiveCodebookArray
        codes = placed.data if isinstance(placed, coded) else placed
        while hasattr(codes, "materialize"):
            codes = codes.values if hasattr(codes, "values") else codes.data
        assert tuple(codes.sharding.spec)[:2] == ("data", "model")
        assert len(codes.sharding.device_set) == 8


@pytest.mark.parametrize(
    "kind",
    ["one bit", "levels", "bit mask", "2:4", "int4 2:4 groups", "uint4 bit mask zero point", "additive codebooks"],
)
def test_stacked_axes_cut(kind):
    check(kinds.KINDS[kind](weights((4, 64, 8)), STACKED), sharding("data"))


@pytest.mark.parametrize("codes", [None, 4])
def test_a_bit_mask_is_cut_into_its_shards(codes):
    x = weights((16, 6))
    mask = jnp.abs(x) > 0.4
    if codes is None:
        leaf = sparsify(x, mask, shards=4)
    else:
        data = sparsify(jnp.round(x).astype(jnp.int8), mask, shards=4)
        data = type(data)(
            values=pack(data.values, bits=codes), index=data.index, starts=data.starts, row_shape=data.row_shape
        )
        leaf = QuantizedArray(data=data, scale=jnp.ones((1, 6)), dtype=jnp.dtype("float32"))
    check(leaf, sharding("data", None))
    check(leaf, sharding(None, None))
    with pytest.raises(ValueError, match=r"built for 4 shards .* rebuild it with `shards=`"):
        component_shardings(leaf, sharding("model", None))


def test_axes_of_size_one_are_replicated():
    leaf = kinds.KINDS["int8 per channel"](weights((64, 8)), PLAIN)
    shardings = component_shardings(leaf, sharding("data", "model"))
    assert shardings.data.spec == PartitionSpec("data", "model")
    assert shardings.scale.spec == PartitionSpec(None, "model")


def test_abstract_leaves_and_plain_arrays():
    leaf = jax.eval_shape(
        lambda: kinds.QuantizedArray(
            data=jnp.ones((8, 6), jnp.int8), scale=jnp.ones((1, 6)), dtype=jnp.dtype("float32")
        )
    )
    assert component_shardings(leaf, sharding("data", "model")).data.spec == PartitionSpec("data", "model")
    assert component_shardings(jnp.ones((8, 6)), sharding("data")).spec == PartitionSpec("data", None)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (lambda: pack(jnp.ones((12, 6), jnp.int8), bits=3, axis=0), "blocks of 8; 4 devices cannot hold whole blocks"),
        (lambda: kinds.KINDS["2:4"](weights((24, 6)), PLAIN), "blocks of 4; 4 devices"),
        (lambda: kinds.KINDS["int4 groups"](weights((24, 6)), PLAIN), "cannot be cut into 4 whole shares"),
        (lambda: kinds.KINDS["additive codebooks"](weights((24, 6)), PLAIN), "blocks of 4; 4 devices"),
        (lambda: jnp.ones((6, 6)), "cannot be cut into 4 whole shares"),
        (lambda: jnp.ones(8), "more axes than an array of 1 axes"),
    ],
)
def test_cuts_that_are_not_possible(leaf, message):
    with pytest.raises(ValueError, match=message):
        component_shardings(leaf(), sharding("data", None))
