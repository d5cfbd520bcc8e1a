"""Zero points in as many bits as a code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.execution.execute import execute
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress.arrays import component_shardings
from jaxcompress.calibration import input_statistics
from jaxcompress.quantization import QuantSpec, gptq, hqq, quantize
from jaxcompress.trace import LeafLayout

KERNEL = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
STACKED = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
TABLE = LeafLayout(kind="lookup", input_axes=(1,), output_axes=(0,))


def weights(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) + 0.2, jnp.float32)


def spec(bits, group_size=32):
    return QuantSpec(bits=bits, group_size=group_size, symmetric=False, scale_dtype="bfloat16")


def formula(leaf):
    """(code - zero point) scale, block by block, in float64."""
    parts = [np.asarray(part, np.float64) for part in (leaf.zero_points(), leaf.scale)]
    for axis, size in enumerate(leaf.shape):
        parts = [np.repeat(part, size // part.shape[axis], axis) for part in parts]
    return (np.asarray(leaf.codes(), np.float64) - parts[0]) * parts[1]


@pytest.mark.parametrize(("bits", "wanted"), [(2, 2.5625), (3, 3.59375), (4, 4.625), (5, 5.65625), (8, 8.75)])
def test_bits_of_a_weight_in_groups_of_32(bits, wanted):
    leaf = quantize_array(weights(64, 16), spec(bits), KERNEL)
    validate_array(leaf)
    assert leaf.nbits / leaf.size == wanted
    assert isinstance(leaf.zero_point, PackedArray) == (bits < 8)
    np.testing.assert_allclose(leaf.materialize(), formula(leaf), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "layout", "bits", "axis"),
    [
        ((64, 16), KERNEL, 2, -1),  # equal bytes along either axis of (8, 16): the longer one
        ((64, 5), KERNEL, 3, -2),  # (8, 5): five outputs would take a block of eight
        ((3, 32, 16), STACKED, 4, -1),
        ((17, 32), TABLE, 2, -1),  # (17, 4): rows of whole bytes
        ((17, 24), TABLE, 3, -2),  # (17, 3)
        ((8, 1), KERNEL, 3, None),  # a single block: three bytes for one
    ],
)
def test_packed_along_the_axis_that_needs_the_fewest_bytes(shape, layout, bits, axis):
    leaf = quantize_array(weights(*shape), spec(bits, 8), layout)
    validate_array(leaf)
    assert (leaf.zero_point.axis if isinstance(leaf.zero_point, PackedArray) else None) == axis
    plain = dataclasses.replace(leaf, zero_point=leaf.zero_points())
    assert leaf.nbits <= plain.nbits
    rows = jnp.array([[2, 0], [1, 2]])
    np.testing.assert_array_equal(leaf.take_rows(rows), plain.materialize()[rows])
    if layout is STACKED:
        x = weights(5, shape[1])

        def layers(w, x):
            return jax.lax.scan(lambda carry, kernel: (carry, carry @ kernel), x, w)[1]

        np.testing.assert_allclose(execute(layers)(leaf, x), layers(plain.materialize(), x), rtol=1e-4, atol=1e-4)


def test_where_shares_are_not_whole_bytes_every_device_holds_all():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    for width, wanted in ((32, P(None, "model")), (12, P(None, None))):
        leaf = quantize_array(weights(64, width), spec(3), KERNEL)
        parts = component_shardings(leaf, NamedSharding(mesh, P(None, "model")))
        assert (parts.zero_point.data.spec, parts.scale.spec) == (wanted, P(None, "model"))
        np.testing.assert_array_equal(jax.device_put(leaf, parts).materialize(), leaf.materialize())


def test_methods_that_solve_pack_them_and_those_that_need_fractions_do_not():
    params, x = {"kernel": weights(16, 4)}, weights(32, 16)
    statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(x,)])
    small, info = gptq(params, statistics, spec(2, 8))
    assert small["kernel"].zero_point.bits == 2
    assert info["kernel"].bits_per_weight == quantize(params, spec(2, 8))[0]["kernel"].nbits / 64 == 4.25
    fractions, _ = hqq(params, spec(2, 8))
    assert fractions["kernel"].zero_point.dtype == jnp.bfloat16
