"""Arithmetic that gives the same bits eagerly, inside `jit` and on any number of devices."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def divide(x: Float[Array, "..."], y: Shaped[Array, "..."] | float | int) -> Float[Array, "..."]:
    """The quotient x / y in float32, rounded once; `y` broadcasts against `x`.

    XLA turns the division by a broadcast or constant value into a multiplication with its reciprocal, which is off by
    one unit in the last place for a quarter of the values, and only where it sees the broadcast. Behind a barrier it
    cannot; the barrier is gone before loops are fused, so that no broadcast array is written.
    """
    x = x.astype(jnp.float32)
    y = jnp.broadcast_to(jnp.asarray(y, jnp.float32), x.shape)
    # Either way `y`: a value that depends on `x`, or `vmap` would broadcast it behind the barrier.
    y = jax.lax.select(x == x, y, y)
    return jax.lax.div(x, jax.lax.optimization_barrier(y))


def mean_magnitude(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """The mean of |x| over the nonzero entries along `axes`, which are kept with size 1; 0 where there are none.

    The sums are of integers, exact in any order: sums of fractions differ between devices and between fusions. Every
    term is |x| / max|x|, in two digits of as many bits as cannot overflow.
    """
    size = max(math.prod(x.shape[axis] for axis in axes), 1)
    # XLA on the CPU sums float32 four times as fast as int32 (and bools no faster); up to 2^24 it is exact as well.
    dtype, capacity = (jnp.float32, 24) if size <= 2**16 else (jnp.int32, 30)
    unit = jnp.float32(2.0 ** min(capacity - math.ceil(math.log2(size)), 23))

    def total(whole: Float[Array, "..."]) -> Float[Array, "..."]:
        return whole.astype(dtype).sum(axis=axes, keepdims=True, dtype=dtype).astype(jnp.float32)

    largest = jnp.abs(x).max(axis=axes, keepdims=True, initial=0)
    scaled = divide(jnp.abs(x), jnp.where(largest > 0, largest, jnp.ones_like(largest))) * unit
    high = jnp.floor(scaled)
    low = jnp.round((scaled - high) * unit)
    mean = divide(total(high) / unit + total(low) / unit / unit, jnp.maximum(total(jnp.abs(jnp.sign(x))), 1))
    # The quotient may round to a little more than 1, and the largest float times that is Inf.
    return largest * jnp.minimum(mean, 1)


def floor_log2(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """The exponent of positive float32 numbers, exact; -127 for 0 and subnormal ones."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """2^exponent in float32, exact, for exponents in [-126, 127]."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def limited(x: Float[Array, "..."], bound: float) -> Float[Array, "..."]:
    """Clipped to ±bound, but for infinities: the loss must show them, as it does without quantization."""
    return jnp.where(jnp.isinf(x), x, jnp.clip(x, -bound, bound))


def normal(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scales with 1 in place of 0 and of subnormal numbers; NaN stays.

    Backends flush subnormal numbers to zero, and the division by such a scale would give Inf.
    """
    return jnp.where(scale < float(jnp.finfo(jnp.float32).tiny), jnp.ones_like(scale), scale)
