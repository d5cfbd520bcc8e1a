"""Which weights share a scale, and along which axis codes are packed."""

import math

import jax.numpy as jnp
import pytest

from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.quantization.blocks import packing_axis, scale_shape
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress.quantization import QuantSpec
from jaxcompress.trace import LeafLayout

IN_OUT = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
OUT_IN = LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,))
HEADS = LeafLayout(kind="matmul", input_axes=(0, 1), output_axes=(2,))
STACKED = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
CONV = LeafLayout(kind="conv", input_axes=(0, 1, 2), output_axes=(3,))


@pytest.mark.parametrize(
    ("shape", "layout", "axis"),
    [((12, 5), IN_OUT, -2), ((5, 12), OUT_IN, -1), ((3, 4, 5), HEADS, -2), ((2, 12, 5), STACKED, -2)],
)
def test_codes_are_packed_along_the_innermost_input_axis(shape, layout, axis):
    leaf = quantize_array(jnp.ones(shape), QuantSpec(bits=4), layout)
    assert isinstance(leaf.data, PackedArray)
    assert leaf.data.axis == axis


def test_a_short_input_axis_is_not_packed_into_padding():
    leaf = quantize_array(jnp.ones((3, 3, 1, 6)), QuantSpec(bits=4), CONV)
    assert leaf.data.nbits == 3 * 3 * 6 * 4
    assert packing_axis((3, 3, 1, 6), 8, CONV) == -2
    assert packing_axis((3, 3, 4, 6), 4, CONV) == -2
    assert packing_axis((3, 3, 4, 6), 3, CONV) == -1


def test_groups_that_do_not_fit_are_listed():
    with pytest.raises(ValueError, match=r"`group_size` 8 .*sizes \(3, 4\).*that do: 1, 2, 4, 12\."):
        scale_shape((3, 4, 5), QuantSpec(bits=4, group_size=8), HEADS)
    with pytest.raises(ValueError, match="no input axes"):
        scale_shape((6,), QuantSpec(bits=4, group_size=2), LeafLayout(kind="other", output_axes=(0,)))
    with pytest.raises(ValueError, match="does not describe the axes"):
        scale_shape((12, 5, 2), QuantSpec(bits=4), IN_OUT)


def test_every_listed_group_size_fits():
    total = math.prod((3, 3, 4))
    fit = []
    for group in range(1, total + 1):
        try:
            fit.append((group, scale_shape((3, 3, 4, 5), QuantSpec(bits=4, group_size=group), CONV)))
        except ValueError:
            continue
    assert [group for group, _ in fit] == [1, 2, 4, 12, 36]
    assert all(math.prod(blocks) == total // group * 5 for group, blocks in fit)


def test_scalars_are_refused():
    with pytest.raises(ValueError, match="scalar"):
        quantize_array(jnp.ones(()), QuantSpec(bits=4), LeafLayout(kind="other"))
