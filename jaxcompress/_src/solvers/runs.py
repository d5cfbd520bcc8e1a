"""N of every M consecutive entries."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from jaxcompress._src.solvers.order import order_keys


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def keep_in_runs(scores: Shaped[Array, "*shape"], n: int, m: int, *, axis: int = -1) -> Bool[Array, "*shape"]:
    """The n largest of every m consecutive entries along an axis; among equal scores the lowest index is kept.

    Ranks by comparing all pairs of a run, without sorting. A last run of r < m entries keeps min(n, r).

    Args:
        scores: floats, or keys; NaN counts as the largest.
        n: kept entries.
        m: length of a run, at most 127.
        axis: of the runs.

    Returns:
        The mask, True = kept.

    Example:
        >>> import jax.numpy as jnp
        >>> keep_in_runs(jnp.array([1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0]), 2, 4)
        Array([False,  True,  True, False,  True,  True, False], dtype=bool)
    """
    axis = axis % scores.ndim
    width = scores.shape[axis]
    keys = order_keys(scores)
    if width % m:
        # Key 0 loses against everything, and ties with it go to the lower index: the padding never wins.
        keys = jnp.pad(keys, [(0, -width % m if i == axis else 0) for i in range(keys.ndim)])
    runs = keys.reshape(*keys.shape[:axis], -(-width // m), m, *keys.shape[axis + 1 :])
    shape = tuple(m if i == axis + 1 else 1 for i in range(runs.ndim))
    places = jnp.arange(m, dtype=jnp.uint8).reshape(shape)
    one, other = jnp.expand_dims(runs, axis + 2), jnp.expand_dims(runs, axis + 1)
    earlier = jnp.expand_dims(places, axis + 1) < jnp.expand_dims(places, axis + 2)
    better = (other > one) | ((other == one) & earlier)
    mask = better.sum(axis + 2, dtype=jnp.int8) < n
    return jax.lax.slice_in_dim(mask.reshape(keys.shape), 0, width, axis=axis)
