"""Compiled CPU kernels against float64 NumPy, for every instruction set of this processor, and under transformations.

With a C++ compiler these tests fail if the library is missing (`pip install -e .` builds it); without one they skip.
"""

import dataclasses
import functools
import re
import tomllib
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress._src.execution.kernels.native import build_hook, library
from jaxcompress._src.execution.kernels.native.matmul import (
    WeightOnlyFormat,
    integer_matmul,
    plain_weight_only,
    weight_only_matmul,
    why_not_integer,
    why_not_weight_only,
)

needs_library = pytest.mark.skipif(
    build_hook.compiler() is None and library.why_missing() is not None,
    reason="no C++ compiler here, and no library that was built elsewhere",
)
NF4 = tuple(np.sort(np.random.default_rng(4).normal(size=16)).astype(np.float32).tolist())
FORMATS = {
    "int8": WeightOnlyFormat(),
    "uint8": WeightOnlyFormat(signed=False),
    "int4": WeightOnlyFormat(bits=4),
    "uint4": WeightOnlyFormat(bits=4, signed=False),
    "levels": WeightOnlyFormat(bits=4, signed=False, levels=NF4),
}


def test_where_there_is_a_compiler_there_is_a_library():
    if build_hook.compiler() is None:
        pytest.skip("no C++ compiler here")
    assert library.why_missing() is None
    assert library.instruction_set() in library.INSTRUCTION_SETS


# ---- a reference


@dataclasses.dataclass
class Weights:
    """Stored weights, and what they stand for in float64, (in, out)."""

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    dense: np.ndarray
    magnitude: np.ndarray


def packed(codes):
    """Pairs of 4-bit codes along the first axis, the even one in the low nibble."""
    padded = np.pad(codes.astype(np.uint8) & 15, ((0, codes.shape[0] % 2), (0, 0)))
    return padded[0::2] | (padded[1::2] << 4)


def drawn(rng, storage, inputs, outputs, groups=1, *, scales=None, zeros=None, zero_groups=None, scale_dtype="float32"):
    low = -(2 ** (storage.bits - 1)) if storage.signed else 0
    codes = rng.integers(low, low + 2**storage.bits, size=(inputs, outputs))
    scale = jnp.asarray(rng.uniform(0.1, 1, size=(groups, outputs if scales is None else scales)), scale_dtype)
    values = codes.astype(np.float64) if storage.levels is None else np.asarray(storage.levels)[codes]
    wide = np.repeat(np.asarray(scale, np.float64), inputs // groups, axis=0)
    zero_point, shift = None, np.zeros(1)
    if zeros is not None:
        count = zero_groups or groups
        zero_point = rng.integers(0, 2**storage.bits, size=(count, outputs)).astype(zeros)
        zero_point = zero_point if zeros == "uint8" else zero_point + zero_point.dtype.type(0.25)
        shift = np.repeat(zero_point.astype(np.float64), inputs // count, axis=0)
    stored = packed(codes) if storage.bits == 4 else codes.astype("int8" if storage.signed else "uint8")
    zero_point = None if zero_point is None else jnp.asarray(zero_point)
    # What the sums are made of bounds their rounding, not what is left of them.
    magnitude = (np.abs(values) + np.abs(shift) + 8) * wide
    if storage.out_major:
        stored, scale, zero_point = stored.T, scale.T, None if zero_point is None else zero_point.T
    return Weights(jnp.asarray(stored), scale, zero_point, (values - shift) * wide, magnitude)


def check(storage, weights, x):
    product = jax.jit(functools.partial(weight_only_matmul, storage=storage))
    expected = x.astype(np.float64) @ weights.dense
    bound = np.abs(x).astype(np.float64) @ weights.magnitude
    for name in library.INSTRUCTION_SETS:
        with library.limited_to(name):
            y = product(jnp.asarray(x), weights.codes, weights.scale, weights.zero_point)
        assert y.dtype == jnp.float32
        assert np.all(np.abs(y - expected) <= 5e-7 * bound + 1e-30), f"{name}: {np.max(np.abs(y - expected) / bound)}"


# ---- numbers

# Rows, inputs, outputs, groups. The last ones are spread over threads.
SHAPES = [
    (1, 1, 1, 1),
    (1, 37, 3, 1),
    (2, 40, 5, 5),
    (3, 96, 17, 2),
    (4, 48, 33, 2),
    (5, 63, 9, 1),
    (17, 64, 70, 2),
    (1, 128, 1100, 1),
    (7, 256, 150, 8),
]


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("out_major", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_products_with_stored_weights(name, out_major, shape):
    rows, inputs, outputs, groups = shape
    storage = dataclasses.replace(FORMATS[name], out_major=out_major)
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    zeros = "uint8" if name == "uint8" else "float32" if name == "uint4" else None
    check(storage, drawn(rng, storage, inputs, outputs, groups, zeros=zeros), x)


@needs_library
@pytest.mark.parametrize("out_major", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"scale_dtype": "bfloat16"},
        {"scale_dtype": "bfloat16", "scales": 1},
        {"scales": 1},
        {"groups": 1, "scales": 1},
        {"zeros": "uint8", "zero_groups": 1},
        {"groups": 1, "zeros": "float32", "zero_groups": 4},
        {"groups": 1, "zeros": "uint8", "scales": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["int8", "uint4"])
def test_shared_scales_and_zero_points(name, options, out_major):
    storage = dataclasses.replace(FORMATS[name], out_major=out_major)
    rng = np.random.default_rng(0)
    weights = drawn(rng, storage, 128, 37, **({"groups": 4} | options))
    check(storage, weights, rng.normal(size=(3, 128)).astype(np.float32))


@needs_library
@pytest.mark.parametrize("group", [8, 16, 24, 32, 40, 64, 128])
@pytest.mark.parametrize("name", ["int8", "int4", "levels"])
def test_groups_of_any_multiple_of_8(name, group):
    rng = np.random.default_rng(group)
    for out_major in (False, True):
        storage = dataclasses.replace(FORMATS[name], out_major=out_major)
        x = rng.normal(size=(2, 3 * group)).astype(np.float32)
        check(storage, drawn(rng, storage, 3 * group, 20, 3), x)


@needs_library
@pytest.mark.parametrize("out_major", [False, True])
@pytest.mark.parametrize("shape", [*(s[:3] for s in SHAPES), (70, 130, 66), (33, 600, 70), (16, 1030, 12)], ids=str)
def test_integers_are_exact(shape, out_major):
    rows, inputs, outputs = shape
    rng = np.random.default_rng(rows)
    x, w = (rng.integers(-128, 128, size=size).astype(np.int8) for size in ((rows, inputs), (inputs, outputs)))
    # -128 times -128, everywhere: what saturates, and what has no absolute value.
    x[0], w[:, 0] = -128, -128
    product = jax.jit(functools.partial(integer_matmul, out_major=out_major))
    for codes in (w, w.view(np.uint8)):
        expected = x.astype(np.int64) @ codes.astype(np.int64)
        stored = np.ascontiguousarray(codes.T) if out_major else codes
        for name in library.INSTRUCTION_SETS:
            with library.limited_to(name):
                y = product(x, stored)
            assert y.dtype == jnp.int32
            np.testing.assert_array_equal(y, expected, err_msg=name)


@needs_library
def test_sums_beyond_int32_wrap_around():
    x, w = jnp.full((1, 131_073), -128, jnp.int8), jnp.full((131_073, 1), -128, jnp.int8)
    for name in library.INSTRUCTION_SETS:
        with library.limited_to(name):
            assert integer_matmul(x, w).tolist() == [[131_073 * 16384 - 2**32]]


@needs_library
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_floats_are_rounded_once(dtype):
    rng = np.random.default_rng(0)
    weights = drawn(rng, FORMATS["int4"], 64, 20, 2)
    x = jnp.asarray(rng.normal(size=(2, 3, 64)), dtype)
    y = weight_only_matmul(x, weights.codes, weights.scale, storage=FORMATS["int4"])
    exact = jnp.asarray(np.asarray(x, np.float64) @ weights.dense, jnp.float32)
    assert (y.shape, y.dtype) == ((2, 3, 20), dtype)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2 ** (-8 if dtype == "bfloat16" else -11) * 1.01)


@needs_library
@pytest.mark.parametrize("rows", [1, 5, 39])
@pytest.mark.parametrize("name", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("out_major", [False, True])
def test_quantized_inputs_and_grouped_weights(out_major, name, rows):
    """Sums of products of codes are whole numbers, so that scales of powers of two leave nothing to round."""
    rng = np.random.default_rng(rows)
    storage = dataclasses.replace(FORMATS[name], out_major=out_major)
    low = -(2 ** (storage.bits - 1)) if storage.signed else 0
    codes = rng.integers(low, low + 2**storage.bits, size=(96, 83))
    x = rng.integers(-128, 128, size=(rows, 96)).astype(np.int8)
    # Where products of bytes, or sums of pairs of them, would saturate.
    x[0], codes[:, 0], codes[:, 1] = -128, low, low + 2**storage.bits - 1
    scale = 2.0 ** rng.integers(-1, 2, size=(3, 83))
    zeros = None if storage.signed else rng.integers(0, 2**storage.bits, size=(3, 83)).astype(np.uint8)
    shift = 0 if zeros is None else np.repeat(zeros.astype(np.float64), 32, axis=0)
    expected = x.astype(np.float64) @ ((codes - shift) * np.repeat(scale, 32, axis=0))
    stored = packed(codes) if storage.bits == 4 else codes.astype("int8" if storage.signed else "uint8")
    parts = [part if part is None else part.T if out_major else part for part in (stored, scale.astype("f4"), zeros)]
    product = jax.jit(functools.partial(weight_only_matmul, storage=storage))
    for instructions in library.INSTRUCTION_SETS:
        with library.limited_to(instructions):
            y = product(x, *parts)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(y, expected, err_msg=instructions)


@needs_library
@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 0, 3), (2, 8, 0)])
def test_nothing_to_multiply(shape):
    rows, inputs, outputs = shape
    x, codes = jnp.ones((rows, inputs)), jnp.ones((inputs, outputs), jnp.int8)
    y = weight_only_matmul(x, codes, jnp.ones((1, outputs)), storage=FORMATS["int8"])
    np.testing.assert_array_equal(y, np.zeros((rows, outputs)) + inputs)
    np.testing.assert_array_equal(integer_matmul(x.astype(jnp.int8), codes), np.zeros((rows, outputs)) + inputs)


@needs_library
def test_nan_and_infinity_stay_in_their_rows():
    weights = drawn(np.random.default_rng(0), FORMATS["int8"], 64, 40)
    x = np.ones((3, 64), np.float32)
    x[1, 5], x[2, 7] = np.nan, np.inf
    y = np.asarray(weight_only_matmul(jnp.asarray(x), weights.codes, weights.scale, storage=FORMATS["int8"]))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    assert not np.isfinite(y[2]).any()


def assert_as_plain(y, expected):
    """What is not finite is the same, and the rest close."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.asarray(y)[~finite], expected[~finite].astype(np.float32))
    np.testing.assert_allclose(np.asarray(y)[finite], expected[finite], rtol=1e-4, atol=5e-3)


@needs_library
@pytest.mark.parametrize("rows", [6, 40])
@pytest.mark.parametrize("out_major", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_infinite_inputs_and_scales_are_multiplied_as_the_widened_weights_would_be(name, groups, out_major, rows):
    storage = dataclasses.replace(FORMATS[name], out_major=out_major)
    rng = np.random.default_rng(0)
    zeros = "uint8" if name == "uint8" else "float32" if name == "uint4" else None
    weights = drawn(rng, storage, 64, 70, groups, zeros=zeros)
    x = rng.normal(size=(rows, 64)).astype(np.float32)
    x[1, 5], x[2, 7], x[3, 20], x[4, [1, 2]] = np.nan, np.inf, -np.inf, (np.inf, -np.inf)
    scale, dense = np.array(weights.scale), weights.dense.copy()
    wide = scale.T if out_major else scale
    for column, value in ((3, np.inf), (40, np.nan)):
        wide[-1, column] = value
        share = slice(64 - 64 // groups, None)
        dense[share, column] = np.where(dense[share, column] == 0, np.nan, np.copysign(value, dense[share, column]))
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ weights.dense, x.astype(np.float64) @ dense
    assert np.isinf(expected[0][2]).any()
    product = jax.jit(functools.partial(weight_only_matmul, storage=storage))
    for instructions in library.INSTRUCTION_SETS:
        with library.limited_to(instructions):
            assert_as_plain(product(x, weights.codes, weights.scale, weights.zero_point), expected[0])
            assert_as_plain(product(x, weights.codes, scale, weights.zero_point), expected[1])


@needs_library
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("out_major", [False, True])
@pytest.mark.parametrize("name", ["int8", "uint8", "int4", "uint4"])
def test_infinite_scales_of_whole_inputs(name, out_major, rows):
    storage = dataclasses.replace(FORMATS[name], out_major=out_major)
    rng = np.random.default_rng(0)
    weights = drawn(rng, storage, 64, 70, 4, zeros=None if storage.signed else "uint8")
    x = rng.integers(1, 128, size=(rows, 64)).astype(np.int8)
    scale, dense = np.array(weights.scale), weights.dense.copy()
    (scale.T if out_major else scale)[1, 3] = np.inf
    dense[16:32, 3] = np.where(dense[16:32, 3] == 0, np.nan, np.copysign(np.inf, dense[16:32, 3]))
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ dense
    product = jax.jit(functools.partial(weight_only_matmul, storage=storage))
    for instructions in library.INSTRUCTION_SETS:
        with library.limited_to(instructions):
            y = product(x, weights.codes, scale, weights.zero_point)
            assert_as_plain(y, expected)


@needs_library
@pytest.mark.parametrize("shape", [(1, 64, 40, 4), (7, 63, 33, 1), (20, 1088, 130, 34), (50, 600, 17, 1)], ids=str)
@pytest.mark.parametrize("out_major", [False, True])
@pytest.mark.parametrize("name", ["int8", "uint8", "int4", "uint4"])
def test_zero_points_of_whole_inputs(name, out_major, shape):
    rows, inputs, outputs, groups = shape
    storage = dataclasses.replace(FORMATS[name], out_major=out_major)
    rng = np.random.default_rng(rows)
    weights = drawn(rng, storage, inputs, outputs, groups, zeros=None if storage.signed else "uint8")
    x = rng.integers(-128, 128, size=(rows, inputs)).astype(np.int8)
    zero = rng.integers(-128, 128, size=(rows, 1)).astype(np.int8)
    zero[0] = -128  # every input is above it
    centred = x.astype(np.float64) - zero
    x, zero = jnp.asarray(x), jnp.asarray(zero)
    for instructions in library.INSTRUCTION_SETS:
        with library.limited_to(instructions):
            y = weight_only_matmul(
                x, weights.codes, weights.scale, weights.zero_point, storage=storage, x_zero_point=zero
            )
        bound = np.abs(centred) @ weights.magnitude
        assert np.all(np.abs(y - centred @ weights.dense) <= 3e-7 * bound + 1e-30), instructions
    plain = plain_weight_only(x, weights.codes, weights.scale, weights.zero_point, storage=storage, x_zero_point=zero)
    np.testing.assert_allclose(plain, centred @ weights.dense, rtol=1e-4, atol=1e-6 * bound.max())


@needs_library
def test_zero_points_of_whole_inputs_in_batches():
    storage = FORMATS["int4"]
    rng = np.random.default_rng(0)
    weights = drawn(rng, storage, 64, 24, 4)
    x = rng.integers(-128, 128, size=(3, 5, 64)).astype(np.int8)
    zero = rng.integers(-128, 128, size=(3, 5, 1)).astype(np.int8)

    @jax.jit
    def product(x, zero, scale):
        return weight_only_matmul(x, weights.codes, scale, storage=storage, x_zero_point=zero)

    expected = (x.astype(np.float64) - zero) @ weights.dense
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-3)
    close(product(x, zero, weights.scale), expected)
    close(jax.vmap(product, (0, 0, None))(x, zero, weights.scale), expected)
    close(jax.vmap(product, (0, None, None))(x, zero[0], weights.scale), (x - zero[0].astype(float)) @ weights.dense)
    scales = jnp.stack([weights.scale, 2 * weights.scale, weights.scale])
    close(jax.vmap(product)(x, zero, scales), expected * np.array([1, 2, 1])[:, None, None])
    by_scale = jax.grad(lambda scale: product(x, zero, scale).sum())(weights.scale)
    ratio = weights.dense / np.repeat(np.asarray(weights.scale, np.float64), 16, axis=0)
    total = (x.astype(np.float64) - zero).sum((0, 1))
    close(by_scale, (total[:, None] * ratio).reshape(4, 16, 24).sum(1))


@needs_library
def test_calls_from_several_threads():
    rng = np.random.default_rng(0)
    weights = drawn(rng, FORMATS["int4"], 256, 600, 8)
    x = rng.normal(size=(4, 256)).astype(np.float32)
    product = jax.jit(functools.partial(weight_only_matmul, storage=FORMATS["int4"]))
    first = np.asarray(product(x, weights.codes, weights.scale))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: np.asarray(product(x, weights.codes, weights.scale)), range(40)))
    assert all(np.array_equal(result, first) for result in results)


# ---- transformations, against the formula in jnp


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    weights = drawn(rng, FORMATS["uint8"], 64, 24, 4, zeros="float32")
    codes = weights.codes

    def formula(x, scale, zero_point):
        spread = functools.partial(jnp.repeat, repeats=16, axis=0)
        dense = (codes.astype(jnp.float32) - spread(zero_point)) * spread(scale)
        return jnp.matmul(x, dense, precision="highest")

    def kernel(x, scale, zero_point):
        return weight_only_matmul(x, codes, scale, zero_point, storage=FORMATS["uint8"])

    x = jnp.asarray(rng.normal(size=(6, 64)), jnp.float32)
    return kernel, formula, (x, weights.scale, weights.zero_point)


def assert_close(actual, expected):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5 * np.abs(np.asarray(b)).max(initial=1e-30))

    jax.tree.map(compare, actual, expected)


def loss(product, *arguments):
    return jnp.mean(jnp.sin(product(*arguments) / 100) ** 2)


TRANSFORMED = {
    "derivatives": lambda f, x, s, z: jax.grad(functools.partial(loss, f), (0, 1, 2))(x, s, z),
    "jvp": lambda f, x, s, z: jax.jvp(f, (x, s, z), (x + 1, s * 2, z - 1)),
    "second derivatives": lambda f, x, s, z: jax.hessian(lambda a: loss(f, x * a, s, z))(1.1),
    "batch of inputs": lambda f, x, s, z: jax.vmap(f, (0, None, None))(jnp.stack([x, x + 1]), s, z),
    "batch on the last axis": lambda f, x, s, z: jax.vmap(f, (2, None, None), 1)(jnp.stack([x, x + 1], 2), s, z),
    "batch of weights": lambda f, x, s, z: jax.vmap(f, (None, 0, None))(x, jnp.stack([s, 2 * s]), z),
    "batch of both": lambda f, x, s, z: jax.vmap(f, (0, 0, None))(jnp.stack([x, x + 1]), jnp.stack([s, 2 * s]), z),
    "two batches": lambda f, x, s, z: jax.vmap(jax.vmap(f, (0, None, None)), (None, 0, None))(
        jnp.stack([x, x + 1, x]), jnp.stack([s, 2 * s]), z
    ),
    "derivatives of a batch": lambda f, x, s, z: jax.grad(lambda b: loss(jax.vmap(f, (0, None, None)), b, s, z))(
        jnp.stack([x, x + 1])
    ),
    "batch of derivatives": lambda f, x, s, z: jax.vmap(jax.grad(lambda b: loss(f, b, s, z)))(jnp.stack([x, x + 1])),
    "scan": lambda f, x, s, z: jax.lax.scan(
        lambda h, scale: (jnp.tanh(jnp.tile(f(h, scale, z) / 100, 3)[:, :64]), h), x, jnp.stack([s, s / 2])
    ),
    "checkpoint": lambda f, x, s, z: jax.grad(lambda b: loss(jax.checkpoint(f), b, s, z))(x),
    "one row": lambda f, x, s, z: f(x[0], s, z),
}


@needs_library
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(name, jit, problem):
    kernel, formula, arguments = problem
    actual, expected = (functools.partial(TRANSFORMED[name], f) for f in (kernel, formula))
    assert_close((jax.jit(actual) if jit else actual)(*arguments), expected(*arguments))


@needs_library
def test_derivatives_of_inputs_multiply_nothing_with_zeros(problem):
    kernel, _, (x, scale, zero_point) = problem
    text = str(jax.make_jaxpr(jax.grad(lambda x: kernel(x, scale, zero_point).sum()))(x))
    # One of them is what an exported program would hold.
    assert len(re.findall(r"dot_general\[", text)) <= 3


@needs_library
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("out_major", [False, True])
def test_the_plain_formula(name, out_major):
    storage = dataclasses.replace(FORMATS[name], out_major=out_major)
    rng = np.random.default_rng(0)
    weights = drawn(rng, storage, 63, 10)
    x = jnp.asarray(rng.normal(size=(2, 63)), jnp.float32)
    y = plain_weight_only(x, weights.codes, weights.scale, None, storage=storage)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ weights.dense, rtol=1e-4, atol=1e-3)


@needs_library
def test_integers_in_a_batch():
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-128, 128, size=size).astype(np.int8) for size in ((3, 2, 16), (3, 16, 5)))
    np.testing.assert_array_equal(jax.vmap(integer_matmul)(x, w), x.astype(np.int32) @ w)
    alike = jax.vmap(integer_matmul, (0, None))(x, jnp.asarray(w[0]))
    np.testing.assert_array_equal(alike, x.astype(np.int32) @ w[0])


# ---- devices

# Shardings of x, of codes, of scales; of the result; and the collectives of the program.
SHARDED = {
    "rows": (P("a"), P(), P(), P("a"), set()),
    "outputs": (P(), P(None, "a"), P(None, "a"), P(None, "a"), set()),
    "rows and outputs": (P("a"), P(None, "b"), P(None, "b"), P("a", "b"), set()),
    "inputs": (P(None, "a"), P("a"), P("a"), P(), {"all-reduce"}),
    "inputs and outputs": (P(None, "a"), P("a", "b"), P("a", "b"), P(None, "b"), {"all-reduce"}),
    "rows and inputs": (P("b", "a"), P("a"), P("a"), P("b"), {"all-reduce"}),
    "inputs in less than a group": (P(None, ("a", "b")), P(("a", "b")), P(), P(), {"all-gather"}),
}


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))


@needs_library
@pytest.mark.parametrize("out_major", [False, True])
@pytest.mark.parametrize("name", ["int8", "uint4"])
@pytest.mark.parametrize("case", SHARDED)
def test_on_8_devices(case, name, out_major, mesh):
    *specs, of_result, collectives = SHARDED[case]
    storage = dataclasses.replace(FORMATS[name], out_major=out_major)
    rng = np.random.default_rng(0)
    weights = drawn(rng, storage, 64, 48, 4, zeros=None if name == "int8" else "uint8")
    x = rng.normal(size=(8, 64)).astype(np.float32)
    turned = [specs[0], *(P(*reversed((*spec, None, None)[:2])) if out_major else spec for spec in specs[1:])]
    parts = [x, weights.codes, weights.scale]
    arrays = [jax.device_put(part, NamedSharding(mesh, spec)) for part, spec in zip(parts, turned, strict=True)]
    if weights.zero_point is not None:
        arrays.append(jax.device_put(weights.zero_point, NamedSharding(mesh, turned[2])))
    program = jax.jit(functools.partial(weight_only_matmul, storage=storage)).lower(*arrays).compile()
    y = program(*arrays)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, of_result), 2)
    assert set(re.findall("all-gather|all-reduce|all-to-all|collective-permute", program.as_text())) == collectives
    np.testing.assert_allclose(y, x.astype(np.float64) @ weights.dense, rtol=1e-4, atol=2e-3)


@needs_library
@pytest.mark.parametrize("case", SHARDED)
def test_zero_points_of_inputs_on_8_devices(case, mesh):
    *specs, of_result, collectives = SHARDED[case]
    storage = FORMATS["int4"]
    rng = np.random.default_rng(0)
    weights = drawn(rng, storage, 64, 48, 4)
    x, zero = (rng.integers(-128, 128, size=(8, size)).astype(np.int8) for size in (64, 1))
    parts = zip([x, weights.codes, weights.scale], specs, strict=True)
    arrays = [jax.device_put(part, NamedSharding(mesh, spec)) for part, spec in parts]
    zeros = jax.device_put(zero, NamedSharding(mesh, P(specs[0][0] if specs[0] else None)))
    product = jax.jit(lambda *arrays: weight_only_matmul(*arrays[1:], storage=storage, x_zero_point=arrays[0]))
    program = product.lower(zeros, *arrays).compile()
    y = program(zeros, *arrays)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, of_result), 2)
    assert set(re.findall("all-gather|all-reduce|all-to-all|collective-permute", program.as_text())) == collectives
    np.testing.assert_allclose(y, (x.astype(np.float64) - zero) @ weights.dense, rtol=1e-4, atol=2e-3)


@needs_library
@pytest.mark.parametrize("spec", [P(None, "a"), P("b", "a")])
def test_integers_on_8_devices(spec, mesh):
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-128, 128, size=size).astype(np.int8) for size in ((8, 16), (16, 6)))
    arrays = jax.device_put(x, NamedSharding(mesh, spec)), jax.device_put(w, NamedSharding(mesh, P("a")))
    np.testing.assert_array_equal(jax.jit(integer_matmul)(*arrays), x.astype(np.int32) @ w)


@needs_library
def test_inside_shard_map(mesh, problem):
    kernel, formula, (x, scale, zero_point) = problem
    rows = jnp.tile(x, (4, 1))
    mapped = jax.shard_map(lambda x: kernel(x, scale, zero_point), mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    assert_close(jax.jit(mapped)(rows), formula(rows, scale, zero_point))


@needs_library
def test_on_explicit_axes(problem):
    kernel, formula, (x, scale, zero_point) = problem
    mesh = jax.make_mesh((8,), ("a",))
    rows = jax.device_put(jnp.tile(x, (4, 1)), NamedSharding(mesh, P("a")))
    y = jax.jit(lambda x: kernel(x, scale, zero_point))(rows)
    assert y.sharding.spec == P("a")
    assert_close(y, formula(jnp.tile(x, (4, 1)), scale, zero_point))


# ---- refusals


def of(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


REFUSED = {
    "20 is no multiple of 8": (of((1, 60)), of((60, 4), "int8"), of((3, 4)), None, "int8"),
    "7 groups do not divide 60 inputs": (of((1, 60)), of((60, 4), "int8"), of((7, 4)), None, "int8"),
    r"codes of shape \(60, 4\) do not fit 61 inputs": (of((1, 61)), of((60, 4), "int8"), of((1, 4)), None, "int8"),
    "inputs are int32": (of((1, 60), "int32"), of((60, 4), "int8"), of((1, 4)), None, "int8"),
    "codes of 8 bits are uint8, not int8": (of((1, 60)), of((60, 4), "uint8"), of((1, 4)), None, "int8"),
    "scales are float8_e8m0fnu": (of((1, 60)), of((60, 4), "int8"), of((1, 4), "float8_e8m0fnu"), None, "int8"),
    "zero points are int32": (of((1, 60)), of((60, 4), "uint8"), of((1, 4)), of((1, 4), "int32"), "uint8"),
    "matrices here": (of((1, 60)), of((2, 60, 4), "int8"), of((1, 4)), None, "int8"),
    "one for each group or output": (of((1, 60)), of((60, 4), "int8"), of((1, 3)), None, "int8"),
}


@needs_library
@pytest.mark.parametrize("reason", REFUSED)
def test_what_kernels_refuse(reason):
    *arrays, name = REFUSED[reason]
    assert re.search(reason, why_not_weight_only(*arrays, storage=FORMATS[name]))
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(lambda *parts: weight_only_matmul(*parts, storage=FORMATS[name]), *arrays)


@needs_library
def test_what_zero_points_of_inputs_ask_for():
    whole = of((2, 64), "int8"), of((64, 4), "int8"), of((4, 4)), None
    refused = functools.partial(why_not_weight_only, *whole, storage=FORMATS["int8"])
    assert refused(x_zero_point=of((2, 1), "int8")) is None
    assert "float32 of shape (2, 1), not int8 of (2, 1)" in refused(x_zero_point=of((2, 1)))
    assert "int8 of shape (1, 1), not int8 of (2, 1)" in refused(x_zero_point=of((1, 1), "int8"))
    floats = why_not_weight_only(of((2, 64)), *whole[1:], storage=FORMATS["int8"], x_zero_point=of((2, 1), "int8"))
    assert floats == "only inputs of int8 to weights without levels have zero points"


@needs_library
def test_what_the_integer_kernel_refuses():
    assert why_not_integer(of((2, 4), "int8"), of((4, 3), "int8")) is None
    assert "not int8" in why_not_integer(of((2, 4)), of((4, 3), "int8"))
    assert "not int8 or uint8" in why_not_integer(of((2, 4), "int8"), of((4, 3), "int4"))
    assert "do not fit" in why_not_integer(of((2, 4), "int8"), of((4, 3), "int8"), out_major=True)


def test_formats_check_themselves():
    with pytest.raises(ValueError, match="`bits` must be 4 or 8, got 3"):
        WeightOnlyFormat(bits=3)
    with pytest.raises(ValueError, match="`levels`"):
        WeightOnlyFormat(bits=8, levels=(0.0, 1.0))


# ---- the library


def test_without_a_library_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "absent.so")
    missing = library._load.__wrapped__()
    monkeypatch.setattr(library, "_load", lambda: missing)
    assert library.why_missing() == "the compiled library was not built when jaxcompress was installed"
    assert library.instruction_set() is None
    assert why_not_integer(of((2, 4), "int8"), of((4, 3), "int8")) == library.why_missing()
    with pytest.raises(ValueError, match="was not built"):
        weight_only_matmul(jnp.ones((1, 2)), jnp.ones((2, 2), "int8"), jnp.ones((1, 2)), storage=FORMATS["int8"])


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "broken.so")
    assert "does not load" in library._load.__wrapped__().reason


def test_the_reason_that_the_installation_recorded(monkeypatch, tmp_path):
    (tmp_path / build_hook.REASON).write_text("no compiler was found\n")
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "absent.so")
    assert library._load.__wrapped__().reason.endswith("was installed: no compiler was found")


@needs_library
def test_the_environment_lowers_the_instruction_set(monkeypatch):
    try:
        monkeypatch.setenv(library.VARIABLE, "portable")
        with library.limited_to("avx512vnni"):
            pass
        assert library.instruction_set() == "portable"
        monkeypatch.setenv(library.VARIABLE, "sse9")
        with pytest.raises(ValueError, match="'sse9'"):
            library._limit_of_environment()
    finally:
        monkeypatch.undo()
        with library.limited_to("portable"):
            pass


def test_the_build_hook_without_a_compiler(monkeypatch, tmp_path):
    """The installation goes on, says so, and the reason is part of the wheel."""
    warnings = []
    root = str(Path(build_hook.__file__).parents[5])
    hook = types.SimpleNamespace(root=root, app=types.SimpleNamespace(display_warning=warnings.append))
    monkeypatch.setattr(build_hook.tempfile, "tempdir", str(tmp_path))
    for command, reason in (("absent-compiler", "no C++ compiler was found"), ("false", "false failed")):
        monkeypatch.setenv("CXX", command)
        build_data = {"force_include": {}}
        build_hook.NativeBuildHook.initialize(hook, "standard", build_data)
        assert reason in warnings.pop()
        (source, target), *others = build_data.pop("force_include").items()
        assert reason in Path(source).read_text()
        assert target.endswith("native/why_missing.txt")
        assert (others, build_data) == ([], {})


def test_the_header_is_that_of_jaxlib(monkeypatch, tmp_path):
    assert build_hook.header_folder() == Path(jax.ffi.include_dir())
    monkeypatch.setattr(build_hook.importlib.util, "find_spec", lambda name: None)
    assert build_hook.header_folder() is None
    with pytest.raises(build_hook.BuildError, match="no jaxlib with" if build_hook.compiler() else "no C"):
        build_hook.compile_library(tmp_path / "library")


def test_the_build_depends_on_jaxlib_where_there_is_a_compiler(monkeypatch):
    project = tomllib.loads((Path(build_hook.__file__).parents[5] / "pyproject.toml").read_text())["project"]
    (of_jax,) = (text for text in project["dependencies"] if text.startswith("jax>"))
    assert of_jax.replace("jax", "jaxlib") == build_hook.HEADERS
    depends = functools.partial(build_hook.NativeBuildHook.dependencies, types.SimpleNamespace())
    assert depends() == ([build_hook.HEADERS] if build_hook.compiler() else [])
    monkeypatch.setenv("CXX", "absent-compiler")
    assert depends() == []
