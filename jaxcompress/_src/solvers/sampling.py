"""Where a threshold probably lies, from a small sample."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jaxcompress._src.solvers.counting import fold, fold_factor

SAMPLE_SIZE = 32768
"""Of all leaves together."""


def thin(x: Array, *, ratio: float) -> Array:
    """Every so-many-th entry of `x`, about `ratio` times fewer, flat.

    Takes entry 0 of folded axes rather than strided slices: those would gather a sharded axis.
    """
    wanted = x.size / ratio
    while x.size > wanted:
        axis = max(range(x.ndim), key=lambda axis: (fold_factor(x.shape[axis]) > 1, x.shape[axis]))
        if fold_factor(x.shape[axis]) == 1:
            break
        x = jax.lax.index_in_dim(fold(x, axis), 0, axis + 1, keepdims=False)
    return x.reshape(-1)


def sample_bracket(
    keys: list[UInt32[Array, " _"]],
    weights: list[float],
    fraction: Float[Array, " rows"],
    slack: Float[Array, " rows"],
    *,
    together: bool,
) -> tuple[UInt32[Array, " rows"], UInt32[Array, " rows"]]:
    """Keys that probably enclose the quantile `fraction`.

    Args:
        keys: one sample per leaf.
        weights: how many entries each key of a sample stands for.
        fraction: of the entries that lie below the quantile.
        slack: to go beyond the quantile on either side, as a fraction, besides the error of the sample itself.
        together: one row of all samples, rather than one row per sample.

    Returns:
        Lower and upper keys.
    """
    parts = [jnp.full(part.shape, weight, jnp.float32) for part, weight in zip(keys, weights, strict=True)]
    rows, mass = (_stack(keys, together), _stack(parts, together))
    size = jnp.array([sum(map(len, keys))] if together else [len(part) for part in keys], jnp.float32)
    rows, mass = jax.lax.sort((rows, mass), dimension=1, num_keys=1)
    below = jnp.cumsum(mass, axis=1)
    below = below / below[:, -1:]
    reach = 2.5 * jnp.sqrt(fraction * (1 - fraction) / size) + 1 / size + slack
    return _at(rows, below, fraction - reach), _at(rows, below, fraction + reach)


def _stack(parts: list[Array], together: bool) -> Array:
    """Rows, filled up with zeros: of no weight, and before every other key."""
    if together:
        return jnp.concatenate(parts)[None]
    longest = max(map(len, parts))
    return jnp.stack([jnp.pad(part, (longest - len(part), 0)) for part in parts])


def _at(rows: Array, below: Array, fraction: Array) -> Array:
    place = (below < fraction[:, None]).sum(axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.take_along_axis(rows, jnp.minimum(place, rows.shape[1] - 1), axis=1)[:, 0]
