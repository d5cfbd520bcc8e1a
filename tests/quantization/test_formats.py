"""Number formats against float64, `ml_dtypes`, and brute force."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcompress._src.arrays.quantized import dequantize
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.quantization.blocks import scale_shape
from jaxcompress._src.quantization.fake_quant import fake_quantize_array
from jaxcompress._src.quantization.formats.fixed_point import fixed_point_decode, fixed_point_encode
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress._src.quantization.rounding import round_to_codes
from jaxcompress._src.quantization.scales import block_scales
from jaxcompress._src.quantization.spec import FORMATS
from jaxcompress.quantization import QuantSpec
from jaxcompress.trace import LeafLayout
from jaxcompress.tree import partition_trainable

LAYOUT = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
STACKED = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
FLOATS = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}
SPECS = {
    "ternary": QuantSpec(format="ternary"),
    "ternary groups": QuantSpec(format="ternary", group_size=8, scale_dtype="bfloat16"),
    "fixed point": QuantSpec(bits=6, format="fixed_point"),
    "power of two": QuantSpec(bits=4, format="power_of_two"),
    "power of two, e8m0": QuantSpec(bits=3, format="power_of_two", group_size=8, scale_dtype="e8m0"),
    "nf4": QuantSpec(format="nf4", group_size=8),
    "nf4 e8m0": QuantSpec(format="nf4", group_size=8, scale_dtype="e8m0"),
    "fp4": QuantSpec(format="fp4_e2m1", group_size=8, scale_dtype="bfloat16"),
    "fp8": QuantSpec(format="fp8_e4m3"),
    "fp8 wide": QuantSpec(format="fp8_e5m2", per_tensor=True),
    "mxfp4": QuantSpec(format="mxfp4", group_size=8),
    "mxfp8": QuantSpec(format="mxfp8_e4m3", group_size=8),
    "mxfp8 wide": QuantSpec(format="mxfp8_e5m2", group_size=8),
    "int8 e8m0": QuantSpec(bits=8, group_size=8, scale_dtype="e8m0"),
    "uint4 e8m0": QuantSpec(bits=4, group_size=8, symmetric=False, scale_dtype="e8m0"),
    "tiles": QuantSpec(bits=4, group_size=8, group_outputs=3),
    "tiles, zero points": QuantSpec(bits=3, group_size=4, group_outputs=2, symmetric=False),
    "mse": QuantSpec(bits=3, range_rule="mse"),
    "mse, zero points": QuantSpec(bits=2, group_size=8, symmetric=False, range_rule="mse"),
    "percentile": QuantSpec(bits=4, range_rule="percentile", percentile=90.0),
    "percentile, zero points": QuantSpec(bits=4, symmetric=False, range_rule="percentile", percentile=90.0),
}

SPECS |= {
    name: QuantSpec(format=name, bits=format.bits or 4)
    for name, format in FORMATS.items()
    if name not in {spec.format for spec in SPECS.values()}
}


def weights(shape=(24, 6), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / 4


def spread(parameter, shape):
    out = np.asarray(parameter, np.float64)
    for axis, size in enumerate(shape):
        out = np.repeat(out, size // out.shape[axis], axis)
    return out


@pytest.mark.parametrize("name", FLOATS)
def test_small_floats_have_the_bit_patterns_of_ml_dtypes(name):
    """Random values, every level, every half-way point and its neighbours, and what saturates."""
    spec, dtype = QuantSpec(format=name), FLOATS[name]
    levels = np.unique(np.asarray(spec.levels, np.float32))
    middles = (levels[1:] + levels[:-1]) / 2
    near = [levels, middles, np.nextafter(middles, -np.inf), np.nextafter(middles, np.inf)]
    random = np.random.default_rng(0).normal(size=5000) * np.exp(np.random.default_rng(1).normal(size=5000) * 4)
    x = np.concatenate([*near, random]).astype(np.float32)
    x = x[np.abs(x) <= levels.max()]
    codes = round_to_codes(jnp.asarray(x), jnp.ones(1), None, spec)
    wanted = x.astype(dtype)
    patterns = wanted.view(np.uint8)
    np.testing.assert_array_equal(np.where(x == 0, 0, codes), np.where(x == 0, 0, patterns))
    np.testing.assert_array_equal(dequantize(codes, jnp.ones(1), levels=spec.levels), wanted.astype(np.float32))
    beyond = jnp.array([2.0, -2.0, 1e30, -jnp.inf]) * float(levels.max())
    ends = dequantize(round_to_codes(beyond, jnp.ones(1), None, spec), jnp.ones(1), levels=spec.levels)
    np.testing.assert_array_equal(ends, levels.max() * np.array([1, -1, 1, -1]))


def test_the_tables_are_those_of_ml_dtypes():
    for name, dtype in FLOATS.items():
        patterns = np.arange(2 ** QuantSpec(format=name).bits, dtype=np.uint8).view(dtype).astype(np.float32)
        table = np.asarray(QuantSpec(format=name).levels, np.float32)
        np.testing.assert_array_equal(table, np.where(np.isfinite(patterns), patterns, 0))


@pytest.mark.parametrize(
    "spec", [QuantSpec(format="nf4"), *(QuantSpec(bits=b, format="power_of_two") for b in range(2, 7))]
)
def test_codes_are_the_nearest_levels(spec):
    levels = np.asarray(spec.levels, np.float64)
    x = np.concatenate([np.linspace(-1.2, 1.2, 4001), np.exp2(-np.random.default_rng(0).uniform(0, 40, 2000))]).astype(
        np.float32
    )
    codes = np.asarray(round_to_codes(jnp.asarray(x), jnp.ones(1), None, spec))
    off = np.abs(x.astype(np.float64)[:, None] - levels)
    np.testing.assert_allclose(off[np.arange(len(x)), codes], off.min(1), rtol=1e-6, atol=1e-9)
    assert (levels[np.asarray(round_to_codes(jnp.zeros(1), jnp.ones(1), None, spec))] == 0).all()


def _bits_of_zero_points(shape, bits):
    """In blocks that fill whole bytes along the best axis that is not stacked, or a byte each."""
    block = 8 // bits if 8 % bits == 0 else 8
    return min(8 * math.prod(shape), *(math.prod(shape) // n * -(-n // block) * block * bits for n in shape[1:]))


@pytest.mark.parametrize("name", SPECS)
def test_stored_equals_fake(name):
    """Bit for bit; and every contract of a compressed leaf."""
    spec = SPECS[name]
    w = jnp.asarray(weights((2, 24, 6)))
    if spec.number_format.has_zero:  # otherwise they are stored apart from the codes
        w = w.at[0, 5, 2].set(0.0)
    leaf = quantize_array(w, spec, STACKED)
    validate_array(leaf)
    fake, plain = jax.jit(lambda w, leaf: (fake_quantize_array(w, spec, STACKED), leaf.materialize()))(w, leaf)
    np.testing.assert_array_equal(np.asarray(plain).view(np.uint8), np.asarray(fake).view(np.uint8))
    assert leaf.scale.shape == scale_shape(w.shape, spec, STACKED)
    assert (leaf.shape, leaf.dtype, leaf.bits) == (w.shape, w.dtype, spec.bits)
    parameters = leaf.scale.size * leaf.scale.dtype.itemsize * 8 + (
        0 if leaf.zero_point is None else _bits_of_zero_points(leaf.scale.shape, spec.bits)
    )
    assert leaf.nbits == w.size * spec.bits + parameters
    assert (plain[w == 0] == 0).all()
    grad = jax.grad(lambda w: fake_quantize_array(w, spec, STACKED).sum())(w)
    np.testing.assert_array_equal(grad, jnp.ones_like(w))


@pytest.mark.parametrize("name", SPECS)
def test_extremes(name):
    """Zero, subnormal and huge blocks in three dtypes; nothing becomes infinite, and zeros stay."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        top = float(jnp.finfo(dtype).max)
        w = np.array(weights(), np.float64) * 4
        w[:, 0], w[:, 1] = 0, w[:, 1] * (1e-39 if dtype != jnp.float16 else 1e-7)
        w[:, 2], w[:12, 2] = top, -top
        w[:, 3] = top * np.clip(w[:, 3], -1, 1)
        w = jnp.asarray(np.clip(w, -top, top), jnp.float32).astype(dtype)
        plain = np.asarray(fake_quantize_array(w, SPECS[name], LAYOUT), np.float64)
        assert np.isfinite(plain).all(), dtype
        assert (plain[np.asarray(w == 0)] == 0).all(), dtype


@pytest.mark.parametrize("name", [name for name in SPECS if "fixed" not in name and "percentile" not in name])
def test_nan_and_inf_stay_visible(name):
    for bad in (jnp.nan, jnp.inf):
        w = jnp.asarray(weights()).at[3, 2].set(bad)
        scale, _ = block_scales(w, SPECS[name], LAYOUT)
        assert not np.isfinite(np.asarray(scale, np.float32)).all()


@pytest.mark.parametrize("shape", [(0, 5), (24, 0)])
@pytest.mark.parametrize("name", SPECS)
def test_empty_leaves(name, shape):
    if "tiles" in name and shape[1] == 5:
        return
    leaf = quantize_array(jnp.zeros(shape), SPECS[name], LAYOUT)
    validate_array(leaf)
    assert leaf.materialize().shape == shape


def test_block_scales_of_mx_are_powers_of_two():
    """OCP MX: 2^(⌊log2 max|w|⌋ - e_max), and elements saturate."""
    w = weights((64, 5)) * np.exp2(np.arange(-10, 15, 5))[None]
    for format, e_max, largest in (("mxfp4", 2, 6.0), ("mxfp8_e4m3", 8, 448.0), ("mxfp8_e5m2", 15, 57344.0)):
        spec = QuantSpec(format=format)
        leaf = quantize_array(jnp.asarray(w, jnp.float32), spec, LAYOUT)
        largest_in_block = np.abs(w.astype(np.float32)).reshape(2, 32, 5).max(1).astype(np.float64)
        wanted = np.exp2(np.floor(np.log2(largest_in_block)) - e_max)
        np.testing.assert_array_equal(np.asarray(leaf.scale, np.float64), wanted)
        assert leaf.scale.dtype == jnp.float8_e8m0fnu
        element = FLOATS[{"mxfp4": "fp4_e2m1"}.get(format, format.removeprefix("mx"))]
        scaled = np.clip(w.astype(np.float32) / spread(wanted, w.shape), -largest, largest).astype(np.float32)
        np.testing.assert_array_equal(
            leaf.materialize(), scaled.astype(element).astype(np.float64) * spread(wanted, w.shape)
        )


def test_scales_of_mx_are_never_given_to_an_optimizer():
    trainable, _ = partition_trainable(
        {"w": quantize_array(jnp.asarray(weights((64, 5))), QuantSpec(format="mxfp4"), LAYOUT)}
    )
    assert jax.tree.leaves(trainable) == []


def test_integers_under_powers_of_two_are_not_cut():
    w = weights((64, 5))
    for symmetric in (True, False):
        leaf = quantize_array(
            jnp.asarray(w), QuantSpec(bits=8, group_size=32, symmetric=symmetric, scale_dtype="e8m0"), LAYOUT
        )
        scale = spread(np.asarray(leaf.scale, np.float32), w.shape)
        np.testing.assert_array_equal(np.log2(scale) % 1, 0)
        assert (np.abs(np.asarray(leaf.materialize()) - w) <= scale / 2 * 1.0001).all()


def test_powers_of_two_times_a_power_of_two():
    """INQ: with e8m0 scales every weight is 0 or a power of two, the largest one the nearest to the largest weight."""
    w = weights((64, 5))
    spec = QuantSpec(bits=5, format="power_of_two", group_size=32, scale_dtype="e8m0")
    plain = np.abs(np.asarray(quantize_array(jnp.asarray(w), spec, LAYOUT).materialize(), np.float64))
    np.testing.assert_array_equal(np.log2(plain[plain > 0]) % 1, 0)
    largest = np.abs(w).reshape(2, 32, 5).max(1).astype(np.float64)
    np.testing.assert_array_equal(plain.reshape(2, 32, 5).max(1), np.exp2(np.floor(np.log2(4 * largest / 3))))


def test_ternary_scale_is_that_of_ternary_weight_networks():
    w = weights((64, 5))
    w[:7, 1] = 0
    leaf = quantize_array(jnp.asarray(w), QuantSpec(format="ternary"), LAYOUT)
    for column in range(5):
        size = np.abs(w[:, column].astype(np.float64))
        threshold = 0.7 * size[size > 0].mean()
        scale = size[size > threshold].mean()
        np.testing.assert_allclose(leaf.scale[0, column], scale, rtol=1e-6)
        wanted = np.sign(w[:, column]) * (size > scale / 2)
        np.testing.assert_array_equal(leaf.codes()[:, column], wanted)
    assert leaf.bits == 2


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_fixed_point_is_fixed_point(bits):
    w = jnp.asarray(weights() * 2)
    leaf = quantize_array(w, QuantSpec(bits=bits, format="fixed_point"), LAYOUT)
    wanted = fixed_point_decode(fixed_point_encode(w, bits, overflow="saturate"), bits)
    np.testing.assert_array_equal(leaf.materialize(), wanted)
    np.testing.assert_array_equal(leaf.scale, [[2.0**-bits]])


def test_tiles_share_scales():
    w = weights((4, 6, 10))
    layout = LeafLayout(kind="matmul", input_axes=(0, 1), output_axes=(2,))
    spec = QuantSpec(bits=8, group_size=12, group_outputs=5)
    scale, _ = block_scales(jnp.asarray(w), spec, layout)
    tiles = np.abs(w).reshape(2, 2, 6, 2, 5).max((1, 2, 4))
    np.testing.assert_allclose(scale, tiles[:, None] / 127, rtol=1e-6)
    with pytest.raises(ValueError, match=r"`group_outputs` 4 does not divide the output axes of sizes \(10,\)"):
        scale_shape(w.shape, QuantSpec(bits=8, group_size=12, group_outputs=4), layout)


@pytest.mark.parametrize("variant", [{}, {"symmetric": False}, {"error_norm": 2.4}, {"format": "fp4_e2m1"}])
def test_the_mse_range_is_the_best_of_its_grid(variant):
    w = weights((32, 5), seed=3) ** 3
    bits = 4 if "format" in variant else 3
    plain = QuantSpec(bits=bits, **variant | {"error_norm": 2.0})
    norm = variant.get("error_norm", 2.0)

    def errors(scaled):
        scale, zero = block_scales(jnp.asarray(scaled), plain, LAYOUT)
        found = dequantize(round_to_codes(jnp.asarray(w), scale, zero, plain), scale, zero, levels=plain.levels)
        return (np.abs(np.asarray(found, np.float64) - w) ** norm).sum(0)

    grid = np.array([errors(w * np.float32(1 - step / 100)) for step in range(80)])
    spec = QuantSpec(bits=bits, range_rule="mse", **variant)
    found = np.asarray(quantize_array(jnp.asarray(w), spec, LAYOUT).materialize(), np.float64)
    np.testing.assert_allclose((np.abs(found - w) ** norm).sum(0), grid.min(0), rtol=2e-4)
    assert (grid.min(0) < 0.9 * grid[0]).any()


def test_percentiles_of_blocks():
    w = weights((40, 3))
    scale, _ = block_scales(jnp.asarray(w), QuantSpec(bits=8, range_rule="percentile", percentile=95.0), LAYOUT)
    np.testing.assert_allclose(scale[0], np.percentile(np.abs(w), 95, axis=0) / 127, rtol=1e-5)
    spec = QuantSpec(bits=8, range_rule="percentile", percentile=95.0, symmetric=False)
    scale, zero = block_scales(jnp.asarray(w), spec, LAYOUT)
    low, high = np.percentile(w, 5, axis=0), np.percentile(w, 95, axis=0)
    np.testing.assert_allclose(scale[0], (high - low) / 255, rtol=1e-5)
    np.testing.assert_array_equal(zero[0], np.round(-low / (high - low) * 255))


@pytest.mark.parametrize("convention", ["narrow", "full"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_traced_bits_are_static_bits(convention, symmetric):
    w = jnp.asarray(weights())
    traces = []

    @jax.jit
    def traced(w, bits):
        traces.append(bits)
        return fake_quantize_array(w, spec, LAYOUT, bits=bits)

    spec = QuantSpec(bits=2, convention=convention, symmetric=symmetric)
    for bits in range(2, 9):
        own = QuantSpec(bits=bits, convention=convention, symmetric=symmetric)
        np.testing.assert_array_equal(traced(w, jnp.float32(bits)), fake_quantize_array(w, own, LAYOUT))
    assert len(traces) == 1


def test_traced_bits_choose_the_mse_range():
    w, spec = jnp.asarray(weights()), QuantSpec(bits=2, range_rule="mse", convention="narrow")
    own = dataclasses.replace(spec, bits=4)
    traced = jax.jit(lambda w, bits: fake_quantize_array(w, spec, LAYOUT, bits=bits))(w, jnp.float32(4))
    np.testing.assert_array_equal(traced, fake_quantize_array(w, own, LAYOUT))


BAD = {
    "have 4 bits, got `bits` 8": {"format": "nf4", "bits": 8},
    "have 2 to 6 bits": {"format": "power_of_two", "bits": 8},
    "Tiles need a `group_size`": {"bits": 4, "group_outputs": 2},
    "must be a positive integer, got 0": {"bits": 4, "group_size": 2, "group_outputs": 0},
    "are of dtype 'e8m0'": {"format": "mxfp4", "scale_dtype": "bfloat16"},
    "`per_tensor=True` has no groups": {"format": "fixed_point", "bits": 4, "group_size": 8},
    "are no powers of two": {"format": "ternary", "scale_dtype": "e8m0"},
    "`percentile` must be in": {"bits": 4, "percentile": 0.0},
    "`error_norm` must be positive": {"bits": 4, "error_norm": 0.0},
    "has a scale of its own": {"bits": 1, "range_rule": "mse"},
    "are choices of integers": {"format": "nf4", "symmetric": False},
    r"`bits` must be an integer in \[1, 8\], got 0": {},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_specs_are_named(message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**BAD[message])


def test_entropy_is_for_inputs():
    with pytest.raises(ValueError, match="for weights take 'mse'"):
        block_scales(jnp.ones((4, 2)), QuantSpec(bits=4, range_rule="entropy"), LAYOUT)
