"""Integers that sort as the floats they stand for."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

NAN_KEY = 0xFFFE0000
"""Above the key of +Inf, and a multiple of 2^16, as the keys of bfloat16 are."""

LAST_KEY = 0xFFFF0000
"""The largest key: of entries that are never candidates."""


def order_keys(scores: Shaped[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Keys with x < y exactly when key(x) < key(y), and key(-0.0) == key(0.0); every NaN has the largest key of all.

    Comparing keys also orders denormal numbers, which float comparisons may flush to zero.

    Args:
        scores: floats; bfloat16 and float16 are exact, float64 is rounded to float32. uint32 arrays are keys already.

    Returns:
        The keys, at most `LAST_KEY`.

    Raises:
        TypeError: other dtypes.

    Example:
        >>> import jax.numpy as jnp
        >>> keys = order_keys(jnp.array([-jnp.inf, -1.0, -0.0, 0.0, 2.0, jnp.inf, jnp.nan]))
        >>> [bool(pair) for pair in keys[:-1] < keys[1:]]
        [True, True, False, True, True, True]
    """
    if scores.dtype == jnp.uint32:
        return scores
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"Scores must be floats, got {scores.dtype}.")
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    magnitude = bits & ~sign
    keys = jnp.where(bits >= sign, sign - magnitude, sign + magnitude)
    return jnp.where(magnitude > jnp.uint32(0x7F800000), jnp.uint32(NAN_KEY), keys)


def key_shift(dtype: Any) -> int:
    """The number of low bits that are zero in every key of this dtype: narrow floats need fewer search steps."""
    return {"bfloat16": 16, "float16": 13}.get(jnp.dtype(dtype).name, 0)
