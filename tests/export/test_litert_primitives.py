"""Primitives in LiteRT files: what is written otherwise gives what XLA gives, and what cannot be written is named."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert import interpreter

from jaxcompress.export import save_litert

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
FLOATS = ("float32", "float16", "bfloat16")
SHIFTS = ("shift_left", "shift_right_logical", "shift_right_arithmetic")
ORDERS = ("lt", "le", "gt", "ge", "eq", "ne")
BITS = ("bitwise_and", "bitwise_or", "bitwise_xor")
PAIRS = {
    **dict.fromkeys(INTEGERS, ("add", "sub", "mul", "max", "min", "div", "rem", *ORDERS, *BITS, *SHIFTS)),
    **dict.fromkeys(FLOATS, ("add", "sub", "mul", "max", "min", "rem", *ORDERS)),
    "bool": ("max", "min", *ORDERS, *BITS),
}
NUMBERS = [0.0, 1, -1, 0.5, -0.5, 1.5, -2.5, 0.49999997, 3e4, -3.3, 7.75]


def _saved(tmp_path, apply, *inputs):
    """The outputs of the runtime in the order of their leaves."""
    info = save_litert(tmp_path / "m.tflite", apply, {}, *inputs)
    runner = interpreter.Interpreter(model_path=str(info.path), num_threads=1).get_signature_runner()
    read = runner.get_input_details()
    given = dict(zip(info.inputs, map(np.asarray, jax.tree.leaves(inputs)), strict=True))
    outputs = runner(**{name: value for name, value in given.items() if name in read})
    return [outputs[name] for name in info.outputs]


def _same(tmp_path, apply, *inputs):
    wanted = jax.tree.leaves(jax.jit(apply)({}, *inputs))
    for found, right in zip(_saved(tmp_path, apply, *inputs), map(np.asarray, wanted), strict=True):
        assert (found.shape, found.dtype) == (right.shape, right.dtype)
        if right.dtype.kind in "biu":
            np.testing.assert_array_equal(found, right)
        else:
            tolerance = 1e-2 if right.dtype.itemsize < 4 else 1e-5
            np.testing.assert_allclose(
                found.astype(np.float32), right.astype(np.float32), rtol=tolerance, atol=tolerance
            )


def _pairs(dtype):
    """Every pair of some numbers of a dtype, the extremes among them."""
    if dtype == "bool":
        numbers = [False, True]
    elif dtype in FLOATS:
        numbers = NUMBERS
    else:
        limits = np.iinfo(dtype)
        numbers = [0, 1, 2, 7, 31, 32, 33, limits.max, limits.min, limits.max // 3]
        numbers += [-1, -7, limits.min // 3] if limits.min else []
    return [np.array(side, jnp.dtype(dtype)) for side in zip(*itertools.product(numbers, numbers), strict=True)]


@pytest.mark.parametrize("dtype", PAIRS)
def test_pairs_of_numbers(tmp_path, dtype):
    x, y = _pairs(dtype)
    names = [name for name in PAIRS[dtype] if dtype != "uint32" or name not in ("div", "rem")]
    if dtype in FLOATS:
        y = np.where(y == 0, y.dtype.type(1), y)

    def apply(_, x, y):
        constants = {name: getattr(jax.lax, name)(x, jnp.full_like(x, 7)) for name in names}
        return {name: getattr(jax.lax, name)(x, y) for name in names}, constants

    _same(tmp_path, apply, x, y)


@pytest.mark.parametrize("dtype", PAIRS)
def test_single_arrays(tmp_path, dtype):
    x, _ = _pairs(dtype)

    def apply(_, x):
        moved = (x[jnp.array([2, 0, 1])], jnp.concatenate([x, x[::-1]]), jnp.pad(x, 2), jnp.where(x != 0, x, x[::-1]))
        casts = (x.astype(bool), x.astype(jnp.int32), x.astype(jnp.float32), x.at[1].set(x[0]))
        orders = (jnp.sort(x), jnp.argsort(x), jnp.argmax(x), x.max(), (x != 0).any())
        sums = () if dtype == "bool" else (x[:5].sum(dtype=x.dtype), jnp.cumsum(x[:5]), -x, jnp.sign(x))
        bits = () if dtype in FLOATS else (~x,)
        return moved, casts, orders, sums, bits

    _same(tmp_path, apply, x)


@pytest.mark.parametrize("dtype", ["int32", "float32", "bfloat16"])
def test_division_to_the_floor_and_remainders(tmp_path, dtype):
    x, y = _pairs(dtype)
    y = np.where(y == 0, y.dtype.type(1), y)
    if dtype == "bfloat16":
        x, y = x[:9], y[:9]
    _same(tmp_path, lambda _, x, y: (x // y, x % y, jnp.fmod(x, y), x // 3, x % 3, jnp.divmod(x, y)), x, y)


def test_rounding_away_from_zero_and_cube_roots(tmp_path):
    x = np.array([0.5, -0.5, 1.5, 2.5, 0.49999997, -3.7, 8388609.0, -27.0, 0.0], np.float32)
    _same(tmp_path, lambda _, x: (jax.lax.round(x, jax.lax.RoundingMethod.AWAY_FROM_ZERO), jnp.cbrt(x)), x)


def test_sorting_is_stable_and_takes_others_along(tmp_path):
    keys = np.array([[3, 1, 3, 1, 2], [0, 0, -1, -(2**31), 2**31 - 1]], np.int32)
    values = np.arange(10, dtype=np.float32).reshape(2, 5)

    def apply(_, keys, values):
        along = jax.lax.sort((keys, values), dimension=1, num_keys=1)
        return along, jnp.sort(values, 0), jnp.argsort(keys, 0), jnp.sort(-values, -1, descending=True)

    _same(tmp_path, apply, keys, values)


@pytest.mark.parametrize("name", ["add", "multiply", "max", "min", "set"])
def test_scatters_combine(tmp_path, name):
    x, i = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([2, 0], np.int32)
    _same(tmp_path, lambda _, x, i: (getattr(x.at[:, i], name)(5.0), getattr(x.at[0, i], name)(2.0)), x, i)


def test_random_numbers_of_keys_that_are_known_are_constants(tmp_path):
    def apply(_, x):
        key, other = jax.random.split(jax.random.key(0))
        dropped = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)
        _, noise = jax.lax.scan(lambda c, k: (c, jax.random.normal(k, (3,))), 0, jax.random.split(other, 2))
        return dropped, x + noise, jax.random.bits(key, (3,)), jax.random.permutation(other, 5)

    _same(tmp_path, apply, np.ones((2, 3), np.float32))


@pytest.mark.parametrize("mode", ["fill", "clip"])
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint32", "bfloat16"])
def test_rows_that_are_not_there(tmp_path, mode, dtype):
    table = jnp.arange(12).reshape(4, 3).astype(dtype)
    rows = np.array([[0, 3], [4, -1], [-4, 2**31 - 1]], np.int32)

    def apply(_, rows):
        return jnp.take(table, rows, axis=0, mode=mode), jnp.take(table, rows[0], axis=1, mode=mode)

    _same(tmp_path, apply, rows)


def _line_of_the_model(x):
    return jax.lax.population_count(x.astype(jnp.int32))


REFUSED = {
    "`fft`": lambda x: jnp.abs(jnp.fft.fft(x)),
    "`population_count`": _line_of_the_model,
    "`nextafter`": lambda x: jnp.nextafter(x, 2 * x),
    "`random_wrap`": lambda x: jax.random.uniform(jax.random.wrap_key_data(x[0, :2].astype(jnp.uint32)), (3,)),
    "`while` loops": lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: 2 * x, x),
    "`dot_general`": lambda x: x.astype(jnp.int32) @ x.astype(jnp.int32),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_litert_lacks_is_named_with_its_line_and_nothing_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=rf"LiteRT.*{name}.*at .*test_litert_primitives.py:\d+:\d+ \(") as caught:
        save_litert(tmp_path / "m.tflite", lambda _, x: REFUSED[name](x) + 1, {}, jnp.ones((4, 4)))
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())
