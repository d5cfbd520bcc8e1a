"""Leaves inside `jax.shard_map`: a device computes with its share of every kind, or is told why it cannot."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.arrays.sharding import entries_here
from jaxcompress.arrays import QuantizedArray, component_shardings, sparsify
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs
from jaxcompress.trace import LeafLayout

LAYOUT = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
BY_AXIS = {0: P("model", None), 1: P(None, "model")}


@pytest.fixture
def mesh():
    return jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


def drawn(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def made(name):
    weight = drawn((64, 48))
    if name == "bit mask of two runs":
        return sparsify(weight, weight > 0.3, shards=2)
    if name == "int4 groups, int8 inputs":
        stored = quantize({"w": weight}, QuantSpec(bits=4, group_size=16))[0]
        return quantize_inputs(stored, QuantSpec(bits=8, per_tensor=True))[0]["w"]
    return kinds.KINDS[name](weight, LAYOUT)


def specs_of(leaf, mesh, axis):
    return jax.tree.map(lambda part: part.spec, component_shardings(leaf, NamedSharding(mesh, BY_AXIS[axis])))


def mapped(function, mesh, specs, out_specs, x_spec=None):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(specs, x_spec or P()), out_specs=out_specs))


NAMES = [name for name in kinds.KINDS if "bit mask" not in name]


# A bit mask is cut along its rows only.
@pytest.mark.parametrize(
    ("name", "axis"), [*((name, axis) for name in NAMES for axis in (0, 1)), ("bit mask of two runs", 0)]
)
def test_a_device_computes_with_its_share(name, axis, mesh):
    leaf, x, rows = made(name), drawn((4, 64)), jnp.array([1, 3, 0])
    specs, dense = specs_of(leaf, mesh, axis), jc.materialize(leaf)

    def product(leaf, x):
        y = jc.execute(lambda leaf, x: x @ leaf)(leaf, x)
        return jax.lax.psum(y, "model") if axis == 0 else y

    sums = (P(), P(None, "model")) if axis == 0 else (P(None, "model"), P())
    y = mapped(product, mesh, specs, *sums)(leaf, x)
    np.testing.assert_allclose(y, x @ dense, rtol=1e-4, atol=1e-4)
    whole = mapped(lambda leaf, _: jc.materialize(leaf), mesh, specs, BY_AXIS[axis])(leaf, x)
    np.testing.assert_array_equal(whole, dense)
    taken = mapped(lambda leaf, _: jc.execute(lambda leaf: leaf[rows])(leaf), mesh, specs, BY_AXIS[axis])(leaf, x)
    shares = np.split(np.asarray(dense), 2, axis=axis)
    np.testing.assert_array_equal(taken, np.concatenate([share[np.asarray(rows)] for share in shares], axis=axis))


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_out_is_whole_again(name, mesh):
    leaf = made(name)
    specs = specs_of(leaf, mesh, 0)
    same = mapped(lambda leaf, _: leaf, mesh, specs, specs)(leaf, jnp.zeros(2))
    assert same.shape == (64, 48)
    np.testing.assert_array_equal(jc.materialize(same), jc.materialize(leaf))


@pytest.mark.parametrize("axis", [0, 1])
def test_whole_products_of_shares(axis, mesh):
    """Ranges of a whole input differ by share along the sums, as they do for plain rounding there."""
    leaf, x = made("int4 groups, int8 inputs"), drawn((4, 64))
    apply = jc.execute(lambda leaf, x: x @ leaf)
    parts = [(0, 64)] if axis == 1 else [(0, 32), (32, 64)]
    rounded = [leaf.inputs.rounded(x[:, a:b], (1,), None, None) @ leaf.materialize()[a:b] for a, b in parts]
    out, x_spec = (P(None, "model"), P()) if axis == 1 else (P(), P(None, "model"))

    def product(leaf, x):
        y = apply(leaf, x)
        return y if axis == 1 else jax.lax.psum(y, "model")

    y = mapped(product, mesh, specs_of(leaf, mesh, axis), out, x_spec)(leaf, x)
    np.testing.assert_allclose(y, sum(rounded), rtol=1e-4, atol=1e-4)


def int4(shape, axis, **fields):
    codes = pack(jnp.ones(shape, "int8"), bits=4, axis=axis)
    fields = {"scale": jnp.ones((1, shape[1])), "dtype": jnp.dtype("float32")} | fields
    return QuantizedArray(data=codes, **fields)


REFUSED = {
    "codes": (
        lambda: int4((7, 4), 0),
        QuantizedArray(data=P("model"), scale=P(), dtype=jnp.dtype("float32")),
        r"2 bytes along axis 0 of codes are no share of 7 codes of 4 bits in whole blocks of 2",
    ),
    "zero points": (
        lambda: int4((8, 6), 0, zero_point=pack(jnp.ones((1, 6), "uint8"), bits=4)),
        QuantizedArray(data=P(None, "model"), scale=P(None, "model"), zero_point=P(), dtype=jnp.dtype("float32")),
        r"6 zero points along axis 1 do not belong to 3 scales",
    ),
    "partial blocks": (
        lambda: int4((12, 4), 1, scale=jnp.ones((3, 4)), partial=(-2, 5)),
        QuantizedArray(data=P("model"), scale=P(), dtype=jnp.dtype("float32")),
        r"3 scales along axis 0 do not belong to 6 codes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_share_that_is_none_names_the_leaf_and_the_axis(case, mesh):
    make, placed, reason = REFUSED[case]
    leaf = make()
    specs = jax.tree.structure(leaf).unflatten(jax.tree.leaves(placed, is_leaf=lambda part: isinstance(part, P)))

    def product(params, x):
        return jc.execute(lambda params, x: x @ params["w"])(params, x)

    x = jnp.ones((2, jax.tree.leaves(leaf)[0].shape[0]))
    with pytest.raises(ValueError, match=rf"Leaf 'w' was cut along \['model'\].*{reason}"):
        mapped(product, mesh, {"w": specs}, P())({"w": leaf}, x)


def test_entries_of_shares():
    here = functools.partial(entries_here, block=8, stored_per_block=3)
    assert [here(32, stored) for stored in (12, 6, 3)] == [32, 16, 8]
    assert here(31, 6) == 31  # the last block is short: no equal shares
    assert here(32, 4) == 32  # no whole blocks
    assert here(32, 9) == 32  # no equal shares


def test_stored_arrays_are_still_checked_as_whole_ones():
    leaf = int4((8, 4), 0)
    half = dataclasses.replace(leaf, data=dataclasses.replace(leaf.data, data=leaf.data.data[:2]))
    with pytest.raises(ValueError, match="8 codes of 4 bits fill 4 bytes, got 2"):
        half.validate()
