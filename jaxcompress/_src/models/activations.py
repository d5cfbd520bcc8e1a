"""Activation functions, under the names that `config.json` uses."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """GELU, x · Φ(x), in float32 at least, by erf, as PyTorch computes it.

    `jax.nn.gelu` takes erfc, whose derivative XLA on a CPU evaluates in both of its branches: forward and backward take
    3.4 times as long. Below -3, where 1 + erf cancels, the result has an error of up to 1e-7 |x|.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "gelu": gelu,
        "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
        "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
    }
)
