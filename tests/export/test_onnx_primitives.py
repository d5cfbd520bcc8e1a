"""One row for each primitive, or feature of one: what ONNX Runtime computes is what JAX does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from onnx_runs import assert_same, exported

RNG = np.random.default_rng(0)


def floats(*shape, dtype="float32"):
    return RNG.normal(size=shape).astype(dtype)


def positive(*shape):
    return np.abs(floats(*shape)) + 0.1


def ints(*shape, dtype="int32", low=-7, high=8):
    return RNG.integers(low, high, shape).astype(dtype)


def bools(*shape):
    return RNG.random(shape) < 0.5


X, Y = floats(3, 5), floats(3, 5)
SPECIAL = np.array(
    [0.0, -0.0, 1e-8, -1e-8, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 30.0, -30.0, np.inf, -np.inf], "float32"
)
CUBE = floats(2, 3, 5)
IMAGE, KERNEL = floats(2, 7, 9, 4), floats(3, 3, 4, 6)
INDEX = ints(4, low=0, high=3)


def conv(**options):
    def run(x, kernel):
        settings = {
            "window_strides": (1, 1),
            "padding": "SAME",
            "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        } | options
        return lax.conv_general_dilated(x, kernel, **settings)

    return run


def pool(kind, **options):
    start, function = {"max": (-jnp.inf, lax.max), "min": (jnp.inf, lax.min), "sum": (0.0, lax.add)}[kind]

    def run(x):
        settings = {"window_dimensions": (1, 3, 2, 1), "window_strides": (1, 2, 1, 1), "padding": "SAME"} | options
        return lax.reduce_window(x, start, function, **settings)

    return run


def gather_windows(x, starts):
    numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0, 1))
    return lax.gather(x, starts, numbers, slice_sizes=(2, 3), mode="clip")


def scatter_windows(x, starts, updates):
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0, 1)
    )
    return lax.scatter_add(x, starts, updates, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)


def fibonacci(n):
    return lax.while_loop(lambda s: s[2] < n, lambda s: (s[1], s[0] + s[1], s[2] + 1), (0, 1, 0))[0]


UNARY = [
    "abs", "sign", "floor", "ceil", "exp", "exp2", "expm1", "log1p", "tanh", "sqrt", "sin", "cos", "tan", "sinh",
    "cosh",     "arctan", "arcsinh", "cbrt", "square", "isfinite", "isnan", "round", "reciprocal", "log", "negative",
]  # fmt: skip
CASES = {
    **{name: (getattr(jnp, name), SPECIAL if name not in ("tan", "sin", "cos", "arcsinh") else X) for name in UNARY},
    "erf": (lax.erf, SPECIAL),
    "erfc": (lax.erfc, SPECIAL),
    "rsqrt": (lax.rsqrt, positive(3, 4)),
    "logistic": (lax.logistic, SPECIAL),
    "arccos": (jnp.arccos, np.linspace(-1, 1, 7, dtype="float32")),
    "arcsin": (jnp.arcsin, np.linspace(-1, 1, 7, dtype="float32")),
    "arctanh": (jnp.arctanh, np.linspace(-0.9, 0.9, 7, dtype="float32")),
    "arccosh": (jnp.arccosh, 1 + positive(4)),
    "atan2": (jnp.arctan2, np.array([1, -1, 1, -1, 0, 1, -1], "float32"), np.array([1, 1, -1, -1, 1, 0, 0], "float32")),
    "round away": (lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO), SPECIAL),
    "integer_pow": (lambda x: (x**3, x**-2, x**7), positive(5)),
    "pow": (jnp.power, positive(5), floats(5)),
    "arithmetic": (lambda x, y: (x + y, x - y, x * y, x / y, jnp.maximum(x, y), jnp.minimum(x, y)), X, Y),
    "integers": (lambda x, y: (x + y, x - y, x * y, lax.div(x, y), lax.rem(x, y)), ints(9), ints(9, low=1)),
    "signs of rem": (lambda x, y: (lax.rem(x, y), x % y, x // y), ints(9, low=-9, high=-1), ints(9, low=2)),
    "rem of floats": (lambda x, y: (lax.rem(x, y), x % y), X, positive(3, 5)),
    "int8 wraps": (lambda x, y: (x + y, x * y), ints(99, dtype="int8", low=-128, high=127), ints(99, dtype="int8")),
    "uint8 wraps": (
        lambda x, y: (x + y, x - y),
        ints(99, dtype="uint8", low=0, high=255),
        ints(99, dtype="uint8", low=0),
    ),
    "uint32": (
        lambda x, y: (x + y, x - y, x * y, x < y),
        ints(9, dtype="uint32", low=0),
        ints(9, dtype="uint32", low=0),
    ),
    "int16": (lambda x, y: (x + y, x < y, jnp.maximum(x, y)), ints(9, dtype="int16"), ints(9, dtype="int16")),
    "comparisons": (lambda x, y: (x == y, x != y, x < y, x <= y, x > y, x >= y), ints(9), ints(9)),
    "comparisons of floats": (lambda x, y: (x == y, x != y, x < y, x <= y, x > y, x >= y), X, np.where(X > 0, X, Y)),
    "comparisons of bools": (lambda x, y: (x == y, x != y), bools(9), bools(9)),
    "bools": (lambda x, y: (x & y, x | y, x ^ y, ~x), bools(9), bools(9)),
    "bitwise": (lambda x, y: (x & y, x | y, x ^ y, ~x), ints(9), ints(9)),
    "bitwise uint8": (
        lambda x, y: (x & y, x | y, x ^ y, ~x),
        ints(9, dtype="uint8", low=0),
        ints(9, dtype="uint8", low=0),
    ),
    **{
        f"shifts {dtype}": (
            lambda x, y: (x << y, x >> y, lax.shift_right_logical(x, y)),
            ints(40, dtype=dtype, low=0 if dtype[0] == "u" else -99, high=99),
            ints(40, dtype=dtype, low=0, high=40),
        )
        for dtype in ("int8", "uint8", "int32", "uint32")
    },
    **{
        f"population count {dtype}": (
            lax.population_count,
            ints(40, dtype=dtype, low=0 if dtype[0] == "u" else -99, high=120),
        )
        for dtype in ("int8", "uint8", "int32", "uint32")
    },
    "casts": (
        lambda x: [x.astype(t) for t in ("int32", "int8", "uint8", "bool", "float16")],
        np.array([-300.7, 1e10, 2.5, np.nan, -0.2, 0], "float32"),
    ),
    "casts of ints": (
        lambda x: [x.astype(t) for t in ("float32", "int8", "uint8", "bool", "uint32")],
        ints(9, low=-300, high=300),
    ),
    "select": (jnp.where, bools(3, 5), X, Y),
    "select bool": (jnp.where, bools(9), bools(9), bools(9)),
    "select int8": (jnp.where, bools(9), ints(9, dtype="int8"), ints(9, dtype="int8")),
    "select scalar": (lambda x: jnp.where(x > 0, x, 0.0), X),
    "select of three": (lambda i, x: lax.select_n(i, x, -x, 2 * x), ints(3, 5, low=0, high=3), X),
    "clamp": (lambda x, low: (jnp.clip(x, -0.5, 0.5), lax.clamp(low, x, 1.0)), X, np.float32(-0.3)),
    "clip ints": (lambda x: jnp.clip(x, -2, 3), ints(9)),
    "nan_to_num": (jnp.nan_to_num, np.array([np.nan, np.inf, 1.0], "float32")),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, axis=-1), X),
    "softplus": (jax.nn.softplus, SPECIAL[:-2]),
    "gelu": (lambda x: (jax.nn.gelu(x), jax.nn.gelu(x, approximate=False)), X),
    "silu": (jax.nn.silu, X),
    "elu": (jax.nn.elu, X),
    "relu6": (jax.nn.relu6, 9 * X),
    "softmax": (jax.nn.softmax, X),
    "log_softmax": (jax.nn.log_softmax, X),
    "one_hot": (lambda i: jax.nn.one_hot(i, 4), ints(6, low=-1, high=6)),
    # Moves.
    "reshape": (lambda x: (x.reshape(6, 5), x.reshape(2, 1, 15), x.reshape(-1), x[None, :, :, None]), CUBE),
    "transpose": (lambda x: (x.T, x.transpose(1, 0, 2), jnp.moveaxis(x, 0, -1)), CUBE),
    "broadcast": (lambda x: (jnp.broadcast_to(x, (4, 3, 5)), jnp.broadcast_to(x[:, :, None], (3, 5, 2)) + 1), X),
    "broadcast, then moved": (lambda x: jnp.broadcast_to(x[:, None], (3, 4, 5)).transpose(1, 2, 0).reshape(20, 3), X),
    "broadcast, then summed": (lambda x: jnp.broadcast_to(x[:, None], (3, 4, 5)).sum((1, 2)), X),
    "broadcast, then cut": (lambda x: jnp.broadcast_to(x[:, None], (3, 4, 5))[:, 1:3, 2:], X),
    "broadcast, then multiplied": (lambda x: jnp.broadcast_to(x, (4, 3, 5)) @ jnp.broadcast_to(x.T, (4, 5, 3)), X),
    "broadcast, then contracted": (
        lambda x: jnp.broadcast_to(x[:, :1], (3, 6)) @ jnp.broadcast_to(x[:1, :2], (6, 2)),
        X,
    ),
    "squeeze": (lambda x: jnp.squeeze(x[:, :1], 1), X),
    "concatenate": (lambda x, y: (jnp.concatenate([x, y, x[:, :0]], 1), jnp.stack([x, y], 1)), X, Y),
    "split": (lambda x: jnp.split(x, [1, 3], axis=1), X),
    "slice": (lambda x: (x[1:, ::2], x[:2, 1:4], x[-1]), X),
    "rev": (lambda x: (x[::-1], jnp.flip(x, (0, 1))), X),
    "pad": (lambda x: (jnp.pad(x, ((1, 0), (2, 3))), lax.pad(x, 2.0, ((0, 1, 2), (-1, 0, 1)))), X),
    "pad away": (lambda x: lax.pad(x, 0.0, ((-1, -1, 0), (-2, 3, 0))), X),
    "pad ints": (lambda x: jnp.pad(x, 1, constant_values=3), ints(4)),
    "pad bools": (lambda x: jnp.pad(x, 1), bools(4)),
    "pad edge": (lambda x: (jnp.pad(x, 2, mode="edge"), jnp.pad(x, 2, mode="reflect")), X),
    "roll": (lambda x: jnp.roll(x, 2, axis=1), X),
    "tile and repeat": (lambda x: (jnp.tile(x, (2, 3)), jnp.repeat(x, 2, axis=1)), X),
    "iota": (lambda x: x + lax.broadcasted_iota("float32", (3, 5), 1) + jnp.arange(3)[:, None], X),
    "tril": (lambda x: (jnp.tril(x), jnp.triu(x, 1)), X),
    "bitcast": (
        lambda x: (lax.bitcast_convert_type(x, "int8"), lax.bitcast_convert_type(x, "uint8")),
        ints(9, dtype="uint8", low=0, high=255),
    ),
    # Reductions.
    "sums": (lambda x: (x.sum(), x.sum(1), x.mean((0, 2)), x.var(-1), x.prod(0)), CUBE),
    "extremes": (lambda x: (x.max(0), x.min((0, 1)), x.max(), jnp.ptp(x, 1)), CUBE),
    "sums of ints": (lambda x: (x.sum(), x.sum(1), x.max(0)), ints(3, 5)),
    "sums of int8": (lambda x: (x.sum(dtype="int8"), x.max(0), x.min()), ints(3, 50, dtype="int8", low=-100, high=100)),
    "all and any": (lambda x: (x.all(0), x.any(1), x.sum()), bools(3, 5)),
    "argmax": (lambda x: (x.argmax(1), x.argmin(0), x.argmax()), X),
    "argmax of equal": (lambda x: (x.argmax(0), x.argmin(0)), ints(20, low=0, high=3)),
    "cumulative": (
        lambda x: (x.cumsum(1), jnp.cumprod(x, 0), lax.cummax(x, 1), lax.cummin(x, 0), lax.cumlogsumexp(x, 1)),
        X,
    ),
    "cumulative, reversed": (lambda x: (lax.cumsum(x, 1, reverse=True), lax.cummax(x, 0, reverse=True)), X),
    "cumulative ints": (lambda x: (x.cumsum(0), lax.cummax(x, 1), lax.cumprod(x, 1)), ints(3, 5)),
    "cumulative bools": (lambda x: jnp.cumsum(x, dtype=jnp.int32), bools(9)),
    "logcumsumexp": (lambda x: lax.cumlogsumexp(x, 0), 30 * X),
    # Matmuls.
    "matmul": (jnp.matmul, X, floats(5, 4)),
    "matmul of vectors": (lambda x, y: (x @ y, jnp.outer(x, y)), floats(5), floats(5)),
    "matmul, batched": (jnp.matmul, CUBE, floats(2, 5, 4)),
    "einsum": (lambda x, y: jnp.einsum("bqhd,bkhd->bhqk", x, y), floats(2, 3, 4, 5), floats(2, 6, 4, 5)),
    "einsum, two axes": (lambda x, y: jnp.einsum("abc,cbd->da", x, y), CUBE, floats(5, 3, 4)),
    "einsum, constant first": (lambda x: jnp.einsum("ab,cb->ca", KERNEL[0, 0].T, x), floats(3, 4)),
    "einsum of three": (lambda x, y: jnp.einsum("ab,bc,cd->ad", x, y, x), floats(5, 5), floats(5, 5)),
    "tensordot": (lambda x, y: jnp.tensordot(x, y, ((0, 2), (1, 0))), CUBE, floats(5, 2, 4)),
    "matmul of int8": (
        lambda x, y: lax.dot(x, y, preferred_element_type=jnp.int32),
        ints(3, 5, dtype="int8"),
        ints(5, 4, dtype="int8"),
    ),
    "matmul of ints": (jnp.matmul, ints(3, 5), ints(5, 4)),
    # Look-ups.
    "take": (lambda x, i: (jnp.take(x, i, axis=0), jnp.take(x, i, axis=1)), X, INDEX),
    "take, filled": (lambda x, i: jnp.take(x, i, axis=0, fill_value=-1.0), X, ints(6, low=-5, high=6)),
    "take, NaN": (lambda x, i: jnp.take(x, i, axis=1, mode="fill"), X, ints(6, low=-9, high=9)),
    "take, clipped": (lambda x, i: jnp.take(x, i, axis=0, mode="clip"), X, ints(6, low=-5, high=6)),
    "take, wrapped": (lambda x, i: jnp.take(x, i, axis=0, mode="wrap"), X, ints(6, low=-5, high=6)),
    "take ints, filled": (lambda x, i: jnp.take(x, i), ints(5), ints(6, low=-9, high=9)),
    "index": (lambda x, i: (x[i], x[:, i], x[i[0]], x[i, i]), X, INDEX),
    "index of two axes": (lambda x, i: x[i, :, i], CUBE, ints(4, low=0, high=2)),
    "index, one row": (lambda x, i: x[i[0], i[1]], CUBE, ints(2, low=0, high=2)),
    "take_along_axis": (
        lambda x, i: (jnp.take_along_axis(x, i, 1), jnp.take_along_axis(x, i, 1, mode="clip")),
        X,
        ints(3, 2, low=0, high=5),
    ),
    "gather windows": (gather_windows, floats(6, 7), ints(3, 2, low=-1, high=8)),
    "gather under vmap": (jax.vmap(lambda x, i: x[i]), CUBE, ints(2, 4, low=0, high=3)),
    "dynamic_slice": (
        lambda x, i: (lax.dynamic_slice(x, (i, 1), (2, 3)), lax.dynamic_index_in_dim(x, i, 1)),
        X,
        np.int32(2),
    ),
    "dynamic_slice, clamped": (lambda x, i: lax.dynamic_slice(x, (i, -i), (2, 3)), X, np.int32(9)),
    "dynamic_update_slice": (lambda x, y, i: lax.dynamic_update_slice(x, y, (i, 2)), X, floats(2, 2), np.int32(1)),
    "dynamic_update_slice, clamped": (
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i, 0)),
        X,
        floats(2, 5),
        np.int32(7),
    ),
    "dynamic_update_slice bool": (
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i,)),
        bools(7),
        bools(2),
        np.int32(3),
    ),
    "set": (lambda x, i: (x.at[i[0]].set(1.0), x.at[:, i[1]].set(2.0), x.at[i[0], i[1]].set(3.0)), X, INDEX),
    "set rows": (lambda x, i, y: x.at[i].set(y), X, np.array([2, 0], "int32"), floats(2, 5)),
    "add rows": (lambda x, i, y: x.at[i].add(y), X, INDEX, floats(4, 5)),
    "add, dropped": (
        lambda x, i, y: (x.at[i].add(y), x.at[i].set(7.0, mode="drop")),
        X,
        np.array([2, 5, -9, 0], "int32"),
        floats(4, 5),
    ),
    "multiply and extremes": (
        lambda x, i, y: (x.at[i].multiply(y), x.at[i].subtract(y), x.at[i].max(y), x.at[i].min(y)),
        X,
        INDEX,
        floats(4, 5),
    ),
    "add ints": (lambda i: jnp.zeros(5, "int32").at[i].add(1), INDEX),
    "scatter windows": (scatter_windows, floats(6, 7), np.array([[0, 0], [3, 4], [5, 5]], "int32"), floats(3, 2, 3)),
    "scatter under vmap": (jax.vmap(lambda x, i: x.at[i].set(0.0)), CUBE, ints(2, 2, low=0, high=3)),
    "set a slice": (lambda x, y: x.at[1:3, ::2].set(y), X, floats(2, 3)),
    "bincount": (lambda i: jnp.bincount(i, length=5), INDEX),
    "segment_sum": (lambda x, i: jax.ops.segment_sum(x, i, num_segments=4), floats(4, 3), INDEX),
    # Sorting.
    "sort": (lambda x: (jnp.sort(x, 0), jnp.sort(x, 1), jnp.argsort(x, 1)), X),
    "sort ints, stable": (lambda x: (jnp.argsort(x), jnp.sort(x)), ints(30, low=0, high=4)),
    "sort bools": (lambda x: jnp.argsort(x, stable=True), bools(20)),
    "sort by two": (lambda x, y: lax.sort((x, y, x + 1), num_keys=2), ints(20, low=0, high=3), floats(20)),
    "descending": (lambda x: jnp.sort(x, descending=True), floats(9)),
    "median": (lambda x: jnp.median(x, axis=1), X),
    "top_k": (lambda x: lax.top_k(x, 3), X),
    "top_k of equal": (lambda x: lax.top_k(x, 5), ints(20, low=0, high=3)),
    "searchsorted": (lambda x, y: jnp.searchsorted(jnp.sort(x), y), floats(9), floats(4)),
    "unique": (lambda x: jnp.unique(x, size=4, fill_value=9), ints(20, low=0, high=3)),
    # Convolutions and windows.
    "conv": (conv(), IMAGE, KERNEL),
    "conv, valid, strides": (conv(padding="VALID", window_strides=(2, 3)), IMAGE, KERNEL),
    "conv, dilated": (conv(rhs_dilation=(2, 1)), IMAGE, KERNEL),
    "conv, groups": (conv(feature_group_count=2), IMAGE, KERNEL[:, :, :2]),
    "conv, depthwise": (conv(feature_group_count=4), IMAGE, floats(3, 3, 1, 4)),
    "conv, uneven padding": (conv(padding=((0, 3), (2, 1))), IMAGE, KERNEL),
    "conv, negative padding": (conv(padding=((-1, 2), (1, -1))), IMAGE, KERNEL),
    "conv, transposed": (lambda x, k: lax.conv_transpose(x, k, (2, 3), "SAME"), IMAGE, KERNEL),
    "conv, NCHW": (conv(dimension_numbers=("NCHW", "OIHW", "NCHW")), floats(2, 4, 7, 9), floats(6, 4, 3, 2)),
    "conv of a line": (
        conv(window_strides=(2,), dimension_numbers=("NWC", "WIO", "NWC")),
        floats(2, 9, 4),
        floats(3, 4, 5),
    ),
    "conv of a volume": (
        conv(window_strides=(1, 1, 1), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")),
        floats(1, 4, 5, 6, 2),
        floats(2, 3, 2, 2, 3),
    ),
    "conv of a kernel known": (lambda x: conv()(x, KERNEL), IMAGE),
    "max pool": (pool("max"), IMAGE),
    "min pool": (pool("min", padding="VALID"), IMAGE),
    "sum pool": (pool("sum"), IMAGE),
    "pool, dilated": (pool("max", window_dilation=(1, 2, 1, 1)), IMAGE),
    "pool, wide padding": (pool("sum", padding=((0, 0), (3, 0), (2, 4), (0, 0))), IMAGE),
    "pool of a line": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (3,), (1,), "SAME"), floats(9)),
    "pool of ints": (lambda x: lax.reduce_window(x, 0, lax.add, (3,), (2,), "VALID"), ints(9)),
    # Control flow.
    "scan": (lambda x: lax.scan(lambda c, r: (c + r, (c * r, r.sum())), jnp.zeros(5), x), floats(9, 5)),
    "scan, short": (lambda x: lax.scan(lambda c, r: (c + r, c * r), jnp.zeros(5), x), X),
    "scan, reversed": (lambda x: lax.scan(lambda c, r: (c + r, c), jnp.zeros(5), x, reverse=True), floats(9, 5)),
    "scan, short, reversed": (lambda x: lax.scan(lambda c, r: (c + r, c), jnp.zeros(5), x, reverse=True), X),
    "scan without inputs": (lambda x: lax.scan(lambda c, _: (jnp.sin(c), c), x, None, length=6), X),
    "scan without outputs": (
        lambda x: lax.scan(lambda c, r: (c * 0.5 + r, None), x[0], x, reverse=True)[0],
        floats(9, 5),
    ),
    "scan with constants": (
        lambda x, w: lax.scan(lambda c, r: (jnp.tanh(c @ w + r), c), x[0], x)[0],
        floats(9, 5),
        floats(5, 5),
    ),
    "scan in a scan": (
        lambda x: lax.scan(lambda c, r: (lax.fori_loop(0, 7, lambda i, s: s * 0.9 + i, c) + r, c), x[0], x),
        floats(6, 5),
    ),
    "fori_loop": (lambda x, n: lax.fori_loop(0, n, lambda i, c: c + i * x, jnp.zeros(5)), floats(5), np.int32(4)),
    "while": (fibonacci, np.int32(10)),
    "while, never": (fibonacci, np.int32(0)),
    "while over a matrix": (
        lambda x: lax.while_loop(lambda s: (s * s).sum() > 1e-2, lambda s: s @ (0.1 * s), x),
        floats(4, 4),
    ),
    "while under vmap": (
        jax.vmap(lambda x: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 2), (x, jnp.stack([x, x])))),
        floats(5),
    ),
    "cond under vmap": (jax.vmap(lambda x: lax.cond(x > 0, jnp.sin, jnp.cos, x)), floats(5)),
    "slices under vmap": (jax.vmap(lambda x, i: lax.dynamic_slice(x, (i,), (2,))), X, np.array([0, 2, 9], "int32")),
    "writes under vmap": (
        jax.vmap(lambda x, i: lax.dynamic_update_slice(x, jnp.ones(2), (i,))),
        X,
        np.array([0, 2, 9], "int32"),
    ),
    "unstack": (lambda x: jnp.unstack(x, axis=1), X),
    "image.resize": (lambda x: jax.image.resize(x, (2, 9, 8, 4), "bilinear"), IMAGE),
    "gradient of a convolution": (jax.grad(lambda x: (conv(window_strides=(2, 2))(x, KERNEL) ** 2).sum()), 0.1 * IMAGE),
    "cond, true": (lambda p, x: lax.cond(p, lambda x: x + 1, lambda x: x * 2, x), np.array(True), X),
    "cond, false": (lambda p, x: lax.cond(p, lambda x: (x + 1, x.sum()), lambda x: (x, 0.0), x), np.array(False), X),
    **{
        f"switch {i}": (lambda i, x: lax.switch(i, [jnp.sin, jnp.cos, jnp.tanh, jnp.exp], x), np.int32(i), X)
        for i in (-1, 0, 1, 2, 3, 7)
    },
    "cond in a scan": (
        lambda x: lax.scan(lambda c, r: (lax.cond(r.sum() > 0, lambda: c + r, lambda: c - r), c), x[0], x),
        floats(9, 5),
    ),
    "map": (lambda x: lax.map(lambda r: r @ r, x), floats(6, 5)),
    "associative_scan": (lambda x: lax.associative_scan(jnp.add, x), floats(9, 2)),
    # Calls.
    "jit in jit": (jax.jit(lambda x: jax.jit(jnp.sin)(x) + 1), X),
    "remat": (jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))), X),
    "gradient": (jax.grad(lambda x: (jnp.tanh(x) ** 2).sum()), X),
    "jacobian": (jax.jacfwd(lambda x: jnp.sin(x) * x.sum()), floats(4)),
    "constants are computed": (lambda x: x + (jnp.sin(jnp.arange(5.0)) @ jnp.eye(5))[None], X),
    "an input as it is": (lambda x: (x, x), X),
    "a constant as it is": (lambda x: (jnp.arange(3), jnp.zeros((2, 2))), X),
    "scalars": (lambda x, y: x * y + 1, np.float32(2), np.float32(3)),
    "no rows": (lambda x: (x + 1, x.sum(0), jnp.concatenate([x, x])), floats(0, 5)),
    "no columns": (lambda x: x.sum(1), floats(3, 0)),
    "searches": (lambda x: (jnp.nonzero(x > 0, size=4, fill_value=0)[0], jnp.linalg.norm(x, axis=0)), floats(9)),
    "rng of a known key": (lambda x: x + jax.random.normal(jax.random.key(0), (3, 5)), X),
    "float16": (
        lambda x, y: (x + y, x @ y.T, jax.nn.softmax(x), jnp.where(x > 0, x, 0), x.sum(0), x.max(1)),
        floats(3, 5, dtype="float16"),
        floats(3, 5, dtype="float16"),
    ),
}
TOLERANCES = {"float16": {"rtol": 2e-3, "atol": 2e-3}, "erfc": {"atol": 1e-6}, "tan": {"rtol": 1e-4}, "conv": {}}


@pytest.mark.parametrize("name", CASES)
def test_as_jax_does(name, tmp_path):
    function, *inputs = CASES[name]
    outputs, _ = exported(tmp_path, lambda _, *inputs: function(*inputs), {}, *inputs)
    assert_same(outputs, jax.jit(function)(*inputs), **TOLERANCES.get(name, {}))


def test_with_64_bits(tmp_path):
    def function(x, i):
        return jnp.tanh(x @ x.T), jnp.sort(x), x.sum(0), jnp.take(jnp.arange(9.0), i), i // 3, i << 2, i.astype(x.dtype)

    with jax.enable_x64(True):
        inputs = RNG.normal(size=(3, 5)), RNG.integers(0, 8, (3, 5))
        outputs, _ = exported(tmp_path, lambda _, *inputs: function(*inputs), {}, *inputs)
        assert_same(outputs, jax.jit(function)(*inputs))
