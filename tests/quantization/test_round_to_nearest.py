"""Scales and codes against NumPy in float64, for every spec on every kind of axes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.arrays.quantized import dequantize
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.quantization.blocks import scale_shape
from jaxcompress._src.quantization.fake_quant import fake_quantize_array
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress._src.quantization.rounding import round_to_codes
from jaxcompress._src.quantization.scales import block_scales
from jaxcompress.quantization import QuantSpec
from jaxcompress.trace import LeafLayout

# name: (shape, input axes, stacked axes, who shares a scale); the other axes are outputs.
CHANNEL, TENSOR = {}, {"per_tensor": True}
CASES = {
    "in, out": ((12, 5), (0,), (), [CHANNEL, TENSOR, {"group_size": 4}]),
    "out, in": ((5, 12), (1,), (), [{"group_size": 6}]),
    "heads, d, out": ((3, 4, 5), (0, 1), (), [{"group_size": 12}]),
    "stacked": ((2, 12, 5), (1,), (0,), [TENSOR]),
    "stacked heads": ((2, 4, 3, 5), (1, 2), (0,), [CHANNEL, {"group_size": 6}]),
    "conv": ((3, 2, 4, 5), (0, 1, 2), (), [{"group_size": 8}]),
    "depthwise conv": ((3, 3, 1, 6), (0, 1, 2), (), [{"group_size": 3}]),
    "single": ((1, 1), (0,), (), [CHANNEL]),
    "bias": ((6,), (), (), [CHANNEL]),
}
VARIANTS = ({"convention": "narrow"}, {"convention": "full"}, {"symmetric": False})


def layout_of(name):
    shape, inputs, stack, _ = CASES[name]
    outputs = tuple(axis for axis in range(len(shape)) if axis not in (*inputs, *stack))
    return LeafLayout(kind="matmul", stack_axes=stack, input_axes=inputs, output_axes=outputs)


def specs_of(name):
    """Every number of bits on one kind of axes; on the others, where only the blocks differ, some."""
    shares = CASES[name][3]
    bits = range(2, 9) if name == "in, out" else (2, 5, 8)
    for share in shares:
        yield from (QuantSpec(bits=b, **share, **variant) for b, variant in itertools.product(bits, VARIANTS))
        yield QuantSpec(bits=1, **share)


def weights(shape, seed=0, dtype=np.float32):
    w = np.random.default_rng(seed).normal(size=shape) * 0.1
    return jnp.asarray(w.astype(np.float32)).astype(dtype)


def reference_blocks(shape, layout, spec):
    """For every weight the number of its block, worked out from flat indices."""
    numbers = np.zeros(shape, dtype=int)
    for index in np.ndindex(*shape):
        unit = tuple(index[axis] for axis in layout.stack_axes)
        if not spec.per_tensor and layout.input_axes:
            unit += tuple(index[axis] for axis in layout.output_axes)
        place = 0
        for axis in layout.input_axes:
            place = place * shape[axis] + index[axis]
        group = place // spec.group_size if spec.group_size else 0
        numbers[index] = hash((unit, group))
    return np.unique(numbers, return_inverse=True)[1].reshape(shape)


def reference(w, layout, spec):
    """(codes, scale, zero point) of every weight, in float64."""
    blocks = reference_blocks(w.shape, layout, spec)
    codes, scales, zeros = np.zeros(w.shape), np.zeros(w.shape), np.zeros(w.shape)
    for block in np.unique(blocks):
        inside = blocks == block
        values = w[inside].astype(np.float64)
        half = 2 ** (spec.bits - 1)
        if spec.bits == 1:
            scales[inside], zeros[inside], codes[inside] = 2 * np.abs(values).mean(), 0.5, values >= 0
        elif spec.symmetric:
            narrow = spec.convention == "narrow"
            scale = np.float32(np.abs(values).max() / (half - 1 if narrow else half - 0.5))
            scales[inside] = scale
            codes[inside] = np.clip(np.round(values / scale), -(half - 1) if narrow else -half, half - 1)
        else:
            low, high = min(values.min(), 0), max(values.max(), 0)
            scale = np.float32((high - low) / (2 * half - 1))
            zero = np.clip(np.round(-low / scale), 0, 2 * half - 1)
            scales[inside], zeros[inside] = scale, zero
            codes[inside] = np.clip(np.round(values / scale) + zero, 0, 2 * half - 1)
    return codes, scales, zeros


def spread(parameter, shape):
    """A scale or zero point, repeated for every weight."""
    out = np.asarray(parameter, np.float64)
    for axis, size in enumerate(shape):
        out = np.repeat(out, size // out.shape[axis], axis)
    return out


@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name):
    shape, layout = CASES[name][0], layout_of(name)
    w, specs = weights(shape), list(specs_of(name))

    @jax.jit
    def all_specs(w):
        return [(*_scales_and_codes(w, spec, layout), fake_quantize_array(w, spec, layout)) for spec in specs]

    for spec, (scale, zero_point, found, fake) in zip(specs, all_specs(w), strict=True):
        codes, scales, zeros = reference(np.asarray(w), layout, spec)
        assert scale.shape == scale_shape(shape, spec, layout)
        np.testing.assert_allclose(spread(scale, shape), scales, rtol=2e-7, err_msg=str(spec))
        assert (zero_point is None) == spec.signed
        if zero_point is not None:
            np.testing.assert_array_equal(spread(zero_point, shape), zeros, err_msg=str(spec))
        assert found.dtype == (jnp.int8 if spec.signed else jnp.uint8)
        _equal_but_for_ties(np.asarray(found), codes, np.asarray(w) / spread(scale, shape), spec)
        values = (np.asarray(found) - zeros) * spread(scale, shape)
        np.testing.assert_array_equal(fake, values.astype(np.float32), err_msg=str(spec))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("shape", "axis"), [((13, 3), -2), ((3, 5, 2), -3)])
def test_stored_codes_are_the_codes(shape, axis, bits):
    """Widths that fill no whole bytes; packed along the first axis of two and of three."""
    outputs = tuple(range(axis + len(shape) + 1, len(shape)))
    layout = LeafLayout(kind="matmul", input_axes=(0,), output_axes=outputs)
    w, spec = weights(shape), QuantSpec(bits=bits, symmetric=bits % 2 == 0)
    leaf = quantize_array(w, spec, layout)
    validate_array(leaf)
    fake, codes = jax.jit(lambda w: (fake_quantize_array(w, spec, layout), _scales_and_codes(w, spec, layout)[2]))(w)
    stored, plain = jax.jit(lambda leaf: (leaf.codes(), leaf.materialize()))(leaf)
    np.testing.assert_array_equal(stored, codes)
    _equal_bits(plain, fake)
    assert (leaf.shape, leaf.dtype, leaf.bits) == (shape, w.dtype, bits)


def _scales_and_codes(w, spec, layout):
    scale, zero_point = block_scales(w, spec, layout)
    return scale, zero_point, round_to_codes(w, scale, zero_point, spec)


def _equal_but_for_ties(found, wanted, quotients, spec):
    off = found != wanted
    # float32 and float64 may part ways where a quotient is half-way between two codes.
    assert (np.abs(np.abs(quotients[off]) % 1 - 0.5) < 1e-5).all(), spec
    assert (np.abs(found.astype(int) - wanted)[off] <= 1).all(), spec


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_and_scales(dtype):
    layout, w = layout_of("in, out"), weights((12, 5), dtype=dtype)
    for bits, variant in itertools.product((2, 4, 8), VARIANTS):
        spec = QuantSpec(bits=bits, group_size=4, scale_dtype="bfloat16", **variant)
        leaf = quantize_array(w, spec, layout)
        assert leaf.scale.dtype == jnp.bfloat16
        assert leaf.materialize().dtype == dtype
        _, scales, _ = reference(np.asarray(w, np.float32), layout, spec)
        scale = spread(leaf.scale, w.shape)
        np.testing.assert_array_equal(scale, np.asarray(jnp.asarray(scales, jnp.bfloat16), np.float64))
        # The codes are those of the rounded scale.
        low, high = spec.code_range
        zero = 0 if leaf.zero_point is None else spread(leaf.zero_points(), w.shape)
        codes = np.clip(np.round(np.asarray(w, np.float64) / scale) + zero, low, high)
        _equal_but_for_ties(np.asarray(leaf.codes()), codes, np.asarray(w, np.float64) / scale, spec)


def test_stored_bits_are_exact():
    layout = layout_of("in, out")
    for bits in range(1, 9):
        leaf = quantize_array(weights((64, 5)), QuantSpec(bits=bits, group_size=32, scale_dtype="bfloat16"), layout)
        assert leaf.nbits == 64 * 5 * bits + 2 * 5 * 16 + (16 if bits == 1 else 0)
    leaf = quantize_array(weights((64, 5)), QuantSpec(bits=4, symmetric=False), layout)
    assert leaf.nbits == 64 * 5 * 4 + 5 * 32 + 3 * 8


@pytest.mark.parametrize("variant", [*VARIANTS, {"scale_dtype": "bfloat16"}, {"group_size": 4}])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_zeros_and_extremes(bits, variant):
    """Zero blocks, subnormal blocks, and the largest values that a dtype holds."""
    layout = layout_of("in, out")
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        top = float(jnp.finfo(dtype).max)
        w = np.array(weights((12, 6), 3), np.float64) / 0.4
        w[:, 0], w[3:5, 1], w[:, 3] = 0.0, 0.0, 0.3
        w[:, 2] *= 1e-39 if dtype != jnp.float16 else 1e-7
        w[:, 4], w[:3, 4], w[:, 5] = top, -top, top * np.clip(w[:, 5], -1, 1)
        w = jnp.asarray(w, jnp.float32).astype(dtype)
        spec = QuantSpec(bits=bits, **variant)
        with jax.disable_jit():
            scale, _ = block_scales(w, spec, layout)
            plain = np.asarray(fake_quantize_array(w, spec, layout), np.float64)
        assert np.isfinite(np.asarray(scale, np.float64)).all()
        exact = np.asarray(w, np.float64)
        assert np.isfinite(plain).all()
        assert (plain[np.asarray(w == 0)] == 0).all()
        assert (plain[:, 0] == 0).all()
        # A constant block is exact but for the rounding of its scale; full-range codes stop half a step short of it.
        np.testing.assert_allclose(plain[:, 3], exact[:, 3], rtol=0.34 if spec.convention == "full" else 2**-6)
        if bits > 2:
            step = spread(scale, w.shape)
            assert (
                np.abs(plain - exact) <= 0.51 * step + 0.02 * np.abs(exact) + 1.2e-38 + 2.0**-bits * np.abs(exact)
            ).all()


def test_one_bit_stores_no_zeros():
    layout = layout_of("stacked")
    w = np.array(weights((2, 12, 5)))
    w[0, 2:7, 1], w[1, :, 3] = 0, 0
    leaf = quantize_array(jnp.asarray(w), QuantSpec(bits=1), layout)
    validate_array(leaf)
    wanted = np.zeros(w.shape)
    for stack, out in np.ndindex(2, 5):
        kept = w[stack, :, out] != 0
        size = np.abs(w[stack, kept, out].astype(np.float64)).mean() if kept.any() else 0
        wanted[stack, :, out] = size * np.sign(w[stack, :, out])
    np.testing.assert_allclose(leaf.materialize(), wanted, rtol=1e-6)
    layer = jax.tree.map(lambda part: part[1], leaf)
    np.testing.assert_array_equal(layer.materialize(), leaf.materialize()[1])


def test_one_bit_mean_is_exact_enough_for_large_blocks():
    """More than 2^16 weights are summed as integers, fewer as floats."""
    for rows in (2**12, 2**17):
        w = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 2)), jnp.float32)
        scale, _ = block_scales(w, QuantSpec(bits=1), LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,)))
        np.testing.assert_allclose(scale[0], 2 * np.abs(np.asarray(w, np.float64)).mean(0), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (12, 0)])
@pytest.mark.parametrize("spec", [QuantSpec(bits=3, group_size=4), QuantSpec(bits=1)])
def test_empty_leaves(shape, spec):
    layout = layout_of("in, out")
    leaf = quantize_array(jnp.zeros(shape), spec, layout)
    validate_array(leaf)
    assert leaf.materialize().shape == shape
    assert jax.eval_shape(lambda w: fake_quantize_array(w, spec, layout), jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("variant", [{"convention": "narrow"}, {"symmetric": False}])
def test_quantizing_twice_changes_nothing(variant):
    """Where the extreme code stands for the extreme value: narrow, asymmetric; not with full-range codes."""
    layout, w = layout_of("stacked heads"), weights((2, 4, 3, 5))
    with jax.disable_jit():
        for bits in range(2, 9):
            spec = QuantSpec(bits=bits, **variant)
            scale, zero = block_scales(w, spec, layout)
            once = round_to_codes(w, scale, zero, spec)
            plain = dequantize(once, scale, zero)
            again, zero = block_scales(plain, spec, layout)
            np.testing.assert_array_equal(round_to_codes(plain, again, zero, spec), once)
            np.testing.assert_allclose(scale, again, rtol=3e-7)


def test_narrow_codes_are_odd():
    layout = layout_of("in, out")
    w, spec = weights((12, 5)), QuantSpec(bits=4, convention="narrow")
    np.testing.assert_array_equal(quantize_array(-w, spec, layout).codes(), -quantize_array(w, spec, layout).codes())


def test_full_range_uses_the_lowest_code():
    layout = layout_of("in, out")
    leaf = quantize_array(jnp.array([[-3.5], [3.5], [1.2]]), QuantSpec(bits=3, convention="full"), layout)
    np.testing.assert_array_equal(leaf.codes(), [[-4], [3], [1]])
    np.testing.assert_array_equal(leaf.scale, [[1.0]])


def _equal_bits(x, y):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


def test_eval_shape_gives_the_abstract_leaf():
    leaf = jax.eval_shape(lambda w: quantize_array(w, QuantSpec(bits=4), layout_of("in, out")), weights((12, 5)))
    assert (leaf.shape, leaf.bits, leaf.scale.shape) == ((12, 5), 4, (1, 5))
