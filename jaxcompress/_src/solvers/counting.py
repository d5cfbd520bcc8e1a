"""Counting the set entries of a mask in one fused read."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


def count_true(mask: Bool[Array, "..."], axes: tuple[int, ...] | None = None) -> Int32[Array, "..."]:
    """Number of set entries over `axes`; reduced axes have size 1.

    XLA's CPU backend does not fuse a mask into a long reduction: it writes the mask as int32 (4 bytes per entry) and
    adds that up slowly. It does fuse a short one. So up to two axes are first folded by a small factor, outer ones
    first, which makes a count take the time of 1.5 to 2 `sum(abs(x))` and needs 1/6 to 1/31 byte per entry.

    Args:
        mask: any shape; usually an expression that is computed here only.
        axes: not negative; None is all of them.

    Returns:
        The counts; exact below 2^31.

    Example:
        >>> import jax.numpy as jnp
        >>> count_true(jnp.array([[True, False], [True, True]]), (1,))
        Array([[1],
               [2]], dtype=int32)
    """
    axes = tuple(range(mask.ndim)) if axes is None else axes
    counts, free = mask, list(axes)
    for dtype in (jnp.int8, jnp.int16):  # 31 and 31 * 31 fit
        # Twice the same axis would be one long reduction for XLA. Folding the last axis is slow, and comes last.
        free.sort(key=lambda axis: (axis == mask.ndim - 1, -_factor(counts.shape, axis)))
        if counts.size < 4096 or not free or _factor(counts.shape, free[0]) == 1:
            break
        counts = fold(counts, free[0], _factor(counts.shape, free[0])).sum(free.pop(0) + 1, dtype=dtype)
    return counts.sum(axes, dtype=jnp.int32, keepdims=True)


def fold(x: Array, axis: int, factor: int | None = None) -> Array:
    """`x` with the axis split in two, (d / k, k), by k = `factor`, or `fold_factor(d)`."""
    factor = fold_factor(x.shape[axis]) if factor is None else factor
    return x.reshape(*x.shape[:axis], x.shape[axis] // factor, factor, *x.shape[axis + 1 :])


def fold_factor(size: int, *, most: int = 31) -> int:
    """The divisor, at most `most`, to split an axis by: (d / k, k).

    A sharded axis keeps its sharding if the number of shards divides d / k; otherwise the partitioner would gather it.
    Mesh axes are mostly powers of two, so up to 32 shards are left in d / k as far as possible: 768 -> (32, 24).
    """
    divisors = [k for k in range(2, most + 1) if size % k == 0 and size > k]
    enough = [k for k in divisors if k >= 6] or divisors
    return max(enough, key=lambda k: (min((size // k) & -(size // k), 32), k), default=1)


def _factor(shape: tuple[int, ...], axis: int) -> int:
    """How an axis is folded: k slices of the axes behind it should fit into a cache together."""
    return fold_factor(shape[axis], most=min(31, max(8, 32768 // max(math.prod(shape[axis + 1 :]), 1))))


def check_sizes(sizes: list[int]) -> None:
    """Raises when a group has too many entries to count in int32.

    Raises:
        ValueError: 2^31 or more.
    """
    if max(sizes) >= 2**31:
        raise ValueError(
            f"Ranking counts in int32: at most 2**31 - 1 weights can be ranked together, got {max(sizes)}."
        )
