"""Symbolic sizes: one file runs at any of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from onnx_runs import assert_same, run_session, session

from jaxcompress.export import save_onnx

SCOPE = "batch, length"


def floats(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def rows(batch, length):
    return (floats(batch, length, 4),)


def two(batch, length):
    return floats(batch, length, 4), floats(batch, length)


def tokens(batch, length):
    return (np.random.default_rng(batch).integers(0, 7, (batch, length)).astype(np.int32),)


def attention(x):
    heads = x.reshape(*x.shape[:2], 2, 2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", heads, heads)
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, heads).reshape(x.shape)


CASES = {
    "merge and split": (lambda x: (x.reshape(-1, 4), x.reshape(x.shape[0], -1), x.reshape(*x.shape[:2], 2, 2)), rows),
    "merge and transpose": (lambda x: x.transpose(1, 0, 2).reshape(-1, 2).reshape(x.shape[1], -1), rows),
    "two unknown sizes": (
        lambda x: x.reshape(x.shape[0], 1, x.shape[1], 4).transpose(0, 3, 1, 2).reshape(x.shape[0], 4, x.shape[1]),
        rows,
    ),
    "broadcast": (lambda x: jnp.broadcast_to(x[:, :, None], (*x.shape[:2], x.shape[1], 4)) + 1, rows),
    "zeros of a size": (lambda x: (jnp.zeros(x.shape[:2]), jnp.ones((x.shape[0], 2 * x.shape[1]))), rows),
    "iota": (lambda x: jnp.arange(x.shape[1])[None] + x[..., 0].astype(jnp.int32), rows),
    "iota over a product": (lambda x: jnp.arange(x.shape[0] * x.shape[1] + 1), rows),
    "arithmetic of sizes": (
        lambda x: (
            jnp.zeros((x.shape[1] + 2, x.shape[0] * 3)),
            jnp.arange(x.shape[1] // 2),
            jnp.arange(x.shape[1] % 3),
        ),
        rows,
    ),
    "means": (lambda x: (x.mean(1), x.mean(), x.sum((0, 1)), x.var(0)), rows),
    "sizes as numbers": (lambda x: x * x.shape[1] + x.shape[0] ** 2, rows),
    "cuts": (lambda x: (x[:, -1], x[:, :1], x[:, ::-1], x[1:], x[:, : x.shape[1] // 2]), rows),
    "concatenate": (lambda x: (jnp.concatenate([x, x], 1), jnp.stack([x, x], 1), jnp.concatenate([x[:1], x], 0)), rows),
    "pad": (
        lambda x: (jnp.pad(x, ((0, 0), (1, 2), (0, 0))), lax.pad(x, 0.0, ((0, 0, 0), (-1, 0, 1), (0, 0, 0)))),
        rows,
    ),
    "tile": (lambda x: (jnp.tile(x, (1, 2, 1)), jnp.repeat(x, 2, axis=1)), rows),
    "one_hot": (lambda ids: jax.nn.one_hot(ids, 7), tokens),
    "take": (lambda ids: jnp.take(floats(7, 3), ids, axis=0), tokens),
    "take along": (lambda x, y: jnp.take_along_axis(x, jnp.argsort(y, axis=1)[..., None], axis=1), two),
    "take the last": (
        lambda x, y: jnp.take_along_axis(x, (jnp.sum(y > 0, 1, dtype=jnp.int32) - 1)[:, None, None].clip(0), axis=1),
        two,
    ),
    "set": (lambda x: (x.at[:, 0].set(1.0), x.at[0].add(2.0)), rows),
    "write": (lambda x: lax.dynamic_update_slice_in_dim(jnp.zeros((x.shape[0], x.shape[1] + 3, 4)), x, 2, 1), rows),
    "sort": (lambda x, y: (jnp.sort(x, 1), jnp.argsort(y, 1), lax.top_k(y, 1)), two),
    "cumulative": (lambda x: (x.cumsum(1), lax.cummax(x, 1), lax.cumprod(x, 0)), rows),
    "argmax": (lambda x: x.argmax(1), rows),
    "attention": (attention, rows),
    "matmuls": (
        lambda x: (x @ floats(4, 5), jnp.einsum("blc,bmc->blm", x, x), jnp.einsum("blc,dc->bdl", x, floats(3, 4))),
        rows,
    ),
    "conv": (
        lambda x: lax.conv_general_dilated(x, floats(3, 4, 2), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        rows,
    ),
    "pool": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID"), rows),
    "scan over a size": (
        lambda x: lax.scan(lambda c, r: (c + r, c.sum()), jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1)),
        rows,
    ),
    "loop of a size": (
        lambda x: lax.fori_loop(0, x.shape[1], lambda i, c: c + x[:, i], jnp.zeros((x.shape[0], 4))),
        rows,
    ),
    "branch": (lambda x: lax.cond(x.sum() > 0, lambda: x.mean(1), lambda: x[:, 0]), rows),
    "mask": (lambda x: x * (jnp.arange(x.shape[1]) < x.shape[1] - 1)[None, :, None], rows),
}


@pytest.mark.parametrize("name", CASES)
def test_as_jax_does_at_any_size(name, tmp_path):
    function, make = CASES[name]
    batch, length = jax.export.symbolic_shape(SCOPE, constraints=["length >= 2"])
    sizes = {5: batch, 3: length}
    specs = [
        jax.ShapeDtypeStruct(tuple(sizes.get(n, n) for n in array.shape[:2]) + array.shape[2:], array.dtype)
        for array in make(5, 3)
    ]
    info = save_onnx(tmp_path / "m.onnx", lambda _, *inputs: function(*inputs), {}, *specs)
    runner = session(tmp_path / "m.onnx")
    for size in ((5, 3), (1, 2), (2, 7)):
        inputs = make(*size)
        assert_same(run_session(runner, info.inputs, inputs), jax.jit(function)(*inputs))


def test_the_file_names_the_sizes(tmp_path):
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 4), jnp.float32)
    save_onnx(tmp_path / "m.onnx", lambda _, x: jnp.concatenate([x, x]), {}, x)
    runner = session(tmp_path / "m.onnx")
    assert runner.get_inputs()[0].shape == ["batch", 4]
    assert runner.get_outputs()[0].shape == ["2*batch", 4]


def test_a_size_can_be_read_off_a_multiple_of_it(tmp_path):
    (n,) = jax.export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((2 * n + 3,), jnp.float32)
    info = save_onnx(tmp_path / "m.onnx", lambda _, x: (x[3:].reshape(2, -1), jnp.zeros(x.shape[0] * 2)), {}, x)
    outputs = run_session(session(tmp_path / "m.onnx"), info.inputs, (floats(9),))
    assert_same(outputs, (floats(9)[3:].reshape(2, 3), np.zeros(18, np.float32)))


def test_a_size_that_no_input_has_is_named(tmp_path):
    m, n = jax.export.symbolic_shape("m, n")
    x = jax.ShapeDtypeStruct((m * n,), jnp.float32)
    with pytest.raises(ValueError, match="No input has an axis that says what 'm' is"):
        save_onnx(tmp_path / "m.onnx", lambda _, x: jnp.zeros(m) + x.sum(), {}, x)
