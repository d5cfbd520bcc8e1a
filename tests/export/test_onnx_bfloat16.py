"""bfloat16: carried in float32, rounded where JAX rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from onnx_runs import assert_same, exported

RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.normal(size=(3, 8)), jnp.bfloat16) for _ in range(2))
EXACT = {
    "arithmetic": lambda x, y: (x + y, x - y, x * y, x / y, jnp.maximum(x, y)),
    "moves": lambda x, y: (x.T, x.reshape(-1), jnp.concatenate([x, y]), x[::-1, 1:], jnp.pad(x, 1), jnp.sort(x)),
    "casts": lambda x, y: (
        x.astype(jnp.float32),
        x.astype(jnp.int32),
        (x.astype(jnp.float32) * 1.001).astype(jnp.bfloat16),
    ),
    "choices": lambda x, y: (jnp.where(x > y, x, y), jnp.clip(x, -1, 1), x.max(0), lax.top_k(x, 2), x.argmax(1)),
    "look-ups": lambda x, y: (x[jnp.array([2, 0])], jnp.take(x, jnp.array([9, 0]), axis=0), x.at[1].set(2)),
    "an input as it is": lambda x, y: (y, x),
    "rounding": lambda x, y: (jnp.round(x), jnp.floor(x), lax.reduce_precision(x.astype(jnp.float32) * 1.001, 8, 7)),
    "iota": lambda x, y: (jnp.arange(300, dtype=jnp.bfloat16), jnp.zeros((2, 2), jnp.bfloat16)),
    "scan": lambda x, y: lax.scan(lambda c, r: (c + r, c), x[0], jnp.concatenate([x, y])),
}
CLOSE = {
    "matmul": lambda x, y: (x @ y.T, jnp.matmul(x, y.T, preferred_element_type=jnp.float32)),
    "softmax": lambda x, y: jax.nn.softmax(x),
    "functions": lambda x, y: (jnp.exp(x), jnp.tanh(x), jax.nn.gelu(x), lax.rsqrt(jnp.abs(x) + 1)),
    "sums": lambda x, y: (x.sum(), x.mean(0), x.cumsum(1)),
    "conv": lambda x, y: lax.conv_general_dilated(
        x[None], y.reshape(3, 8, 1), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "norm": lambda x, y: (
        (x.astype(jnp.float32) / jnp.linalg.norm(x.astype(jnp.float32), axis=1, keepdims=True)).astype(jnp.bfloat16) * y
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_equal_to_jax(name, tmp_path):
    outputs, _ = exported(tmp_path, lambda _, x, y: EXACT[name](x, y), {}, X, Y)
    assert_same(outputs, EXACT[name](X, Y), rtol=0, atol=0)


@pytest.mark.parametrize("name", CLOSE)
def test_close_to_jax(name, tmp_path):
    outputs, _ = exported(tmp_path, lambda _, x, y: CLOSE[name](x, y), {}, X, Y)
    assert_same(outputs, CLOSE[name](X, Y), rtol=2**-6, atol=2**-6)


def test_weights_stay_bfloat16_in_the_file(tmp_path):
    params = {"w": jnp.asarray(RNG.normal(size=(64, 64)), jnp.bfloat16)}
    x = jnp.asarray(RNG.normal(size=(2, 64)), jnp.bfloat16)
    outputs, info = exported(tmp_path, lambda p, x: x @ p["w"], params, x)
    assert_same(outputs, x @ params["w"], rtol=2**-6, atol=2**-6)
    assert info.nbytes < params["w"].nbytes + 1000
