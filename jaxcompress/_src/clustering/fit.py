"""Codes and tables of one array: k-means, and its entropy-constrained form.

Shape letters: B blocks that have a table each, N weights of a block, E entries of a table.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from jaxcompress._src.clustering.spec import CodebookSpec
from jaxcompress._src.solvers.kmeans import kmeans_line
from jaxcompress._src.solvers.outputs import unit_of

_ITERATIONS = 30
_ROUNDS = 4
_ENOUGH = 2**16


def fit_tables(
    weights: Shaped[Array, "..."],
    spec: CodebookSpec,
    blocks: Sequence[int],
    importance: Shaped[Array, "..."] | None = None,
) -> Float[Array, "... E"]:
    """The tables that fit an array best: k-means of each block, then, with a rate, Σ error + λ bits.

    Runs on the host, in float64; the answer of k-means does not depend on a seed.

    Args:
        weights: finite; with `spec.zero`, zeros take no part.
        spec: number of values, rate.
        blocks: of `spec.blocks`.
        importance: h, not negative, that broadcasts against the weights: the error of a weight counts so much.

    Returns:
        float32, or what `spec.dtype` says; ascending, (*blocks, entries).

    Raises:
        ValueError: NaN or Inf, or negative importance.

    Example:
        >>> import jax.numpy as jnp
        >>> fit_tables(jnp.array([[0.0, 1.0], [1.2, -2.0]]), CodebookSpec(values=3), (1, 1))
        Array([[[-2. ,  1.1]]], dtype=float32)
    """
    rows, spread, unit = _rows_near_one(weights, importance, tuple(blocks))
    x, h = np.asarray(rows, np.float64), np.asarray(spread, np.float64)
    tables = np.zeros((len(x), spec.entries))
    for table, values, counts in zip(tables, x, h, strict=True):
        nonzero = values != 0 if spec.zero else np.ones_like(values, bool)
        table[:] = kmeans_line(values[nonzero], spec.entries, weights=counts[nonzero])
    fitted = jnp.asarray(tables, jnp.float32)
    if spec.rate and rows.size:
        # A value that is dear may lose all its weights to others, stay where it was, and be overtaken.
        fitted = jnp.sort(_refit(*_condensed(x, h), fitted, spec.rate, spec.zero), axis=1)
    return (fitted * unit).astype(spec.dtype).reshape(*blocks, spec.entries)


def nearest_codes(
    weights: Float[Array, "..."],
    tables: Float[Array, "... E"],
    spec: CodebookSpec,
    importance: Shaped[Array, "..."] | None = None,
) -> UInt8[Array, "..."]:
    """The codes of the best values: nearest, or cheapest by error + λ bits; ties go to the lower code.

    With `spec.zero`, weights that are exactly 0 get code 0, and at rate 0 no others do.

    Args:
        weights: any shape.
        tables: of `fit_tables`.
        spec: gives `zero` and the rate.
        importance: as for `fit_tables`; without a rate it changes nothing.

    Returns:
        uint8, of the shape of the weights.

    Example:
        >>> import jax.numpy as jnp
        >>> w, table = jnp.array([[0.0, 1.0], [1.2, -2.0]]), jnp.array([[[-2.0, 1.1]]])
        >>> nearest_codes(w, table, CodebookSpec(values=3))
        Array([[0, 2],
               [2, 1]], dtype=uint8)
    """
    return _nearest_codes(weights, tables, importance, spec.rate, spec.zero)


def to_blocks(array: Shaped[Array, "..."], blocks: Sequence[int]) -> Shaped[Array, "B N"]:
    """One row for each table; the sizes of `blocks` divide those of the array."""
    sizes = [size // max(count, 1) for size, count in zip(array.shape, blocks, strict=True)]
    split = array.reshape([part for pair in zip(blocks, sizes, strict=True) for part in pair])
    order = [*range(0, split.ndim, 2), *range(1, split.ndim, 2)]
    return split.transpose(order).reshape(math.prod(blocks), math.prod(sizes))


def from_blocks(rows: Shaped[Array, "B N"], shape: Sequence[int], blocks: Sequence[int]) -> Shaped[Array, "..."]:
    """The inverse of `to_blocks`."""
    sizes = [size // max(count, 1) for size, count in zip(shape, blocks, strict=True)]
    order = [place for axis in range(len(shape)) for place in (axis, len(shape) + axis)]
    return rows.reshape([*blocks, *sizes]).transpose(order).reshape(shape)


@functools.partial(jax.jit, static_argnames=("blocks",), inline=True)
def _rows_near_one(
    weights: Shaped[Array, "..."], importance: Shaped[Array, "..."] | None, blocks: tuple[int, ...]
) -> tuple[Float32[Array, "B N"], Float32[Array, "B N"], Float32[Array, ""]]:
    """The weights in their unit, how much each counts, and the unit.

    Near 1, squares in float32 neither vanish nor overflow; a power of two rounds nothing.
    """
    rows = to_blocks(weights.astype(jnp.float32), blocks)
    unit = unit_of(rows)
    if importance is None:
        spread = jnp.ones(weights.shape, jnp.float32)
    else:
        spread = jnp.broadcast_to(jnp.asarray(importance, jnp.float32), weights.shape)
        spread = spread / unit_of(spread)
    return rows / unit, to_blocks(spread, blocks), unit


@functools.partial(jax.jit, static_argnames=("zero",), inline=True)
def _nearest_codes(
    weights: Float[Array, "..."],
    tables: Float[Array, "... E"],
    importance: Shaped[Array, "..."] | None,
    rate: Float[Array, ""] | float,
    zero: bool,
) -> UInt8[Array, "..."]:
    blocks = tables.shape[:-1]
    rows, spread, unit = _rows_near_one(weights, importance, blocks)
    values = tables.astype(jnp.float32).reshape(-1, tables.shape[-1]) / unit
    codes = _assign(rows, spread, values, _price(rows, spread, values, rate, zero), zero)
    return from_blocks(codes, weights.shape, blocks)


def _condensed(x: np.ndarray, h: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Neighbours of a long sorted block as their mean: the cost of fitting does not grow with the leaf."""
    run = -(-x.shape[1] // _ENOUGH)
    if run > 1:
        order = np.argsort(x, axis=1)
        x, h = np.take_along_axis(x, order, axis=1), np.take_along_axis(h, order, axis=1)
        starts = np.arange(0, x.shape[1], run)
        total = np.add.reduceat(h, starts, axis=1)
        weighed = np.add.reduceat(h * x, starts, axis=1) / np.where(total > 0, total, 1.0)
        # What counts for nothing still has a place in the order, and a code.
        x = np.where(total > 0, weighed, x[:, starts])
        h = total / np.diff(starts, append=order.shape[1])
    return jnp.asarray(x, jnp.float32), jnp.asarray(h, jnp.float32)


@functools.partial(jax.jit, static_argnames=("zero",))
def _refit(
    x: Float32[Array, "B N"], h: Float32[Array, "B N"], tables: Float32[Array, "B E"], rate: ArrayLike, zero: bool
) -> Float32[Array, "B E"]:
    """Assign, then move every value to the mean of its weights; as often as it takes k-means to settle."""

    def step(_: ArrayLike, tables: Float32[Array, "B E"]) -> Float32[Array, "B E"]:
        codes = _assign(x, h, tables, _price(x, h, tables, rate, zero), zero)

        def mean(pair: tuple[Array, Array]) -> Array:
            code, old = pair
            weights = jnp.where(codes == code, h, 0.0)
            total = weights.sum(axis=1)
            return jnp.where(total > 0, (weights * x).sum(axis=1) / jnp.where(total > 0, total, 1.0), old)

        numbers = jnp.arange(tables.shape[1], dtype=jnp.uint8) + jnp.uint8(zero)
        return jax.lax.map(mean, (numbers, tables.T)).T

    return jax.lax.fori_loop(0, _ITERATIONS, step, tables)


@functools.partial(jax.jit, static_argnames=("zero",), inline=True)
def _price(
    x: Float32[Array, "B N"],
    h: Float32[Array, "B N"],
    tables: Float32[Array, "B E"],
    rate: Float[Array, ""] | float,
    zero: bool,
) -> Float32[Array, "B V"]:
    """λ · bits of every code, in units of h (w - value)²; the bits are those of the codes that they lead to."""
    entries = tables.shape[1] + zero
    counts = jnp.maximum((x != 0).sum(axis=1), 1)
    unit = rate * jnp.where(x != 0, h * x * x, 0.0).sum(axis=1) / counts

    def step(_: ArrayLike, price: Float32[Array, "B V"]) -> Float32[Array, "B V"]:
        codes = _assign(x, h, tables, price, zero)
        of_code = jax.lax.map(lambda code: (codes == code).sum(axis=1), jnp.arange(entries, dtype=jnp.uint8)).T
        return unit[:, None] * -jnp.log2((of_code + 0.5) / (x.shape[1] + 0.5 * entries))

    start = jnp.zeros((len(x), entries), jnp.float32)
    return jax.lax.cond(rate > 0, lambda: jax.lax.fori_loop(0, _ROUNDS, step, start), lambda: start)


@functools.partial(jax.jit, static_argnames=("zero",), inline=True)
def _assign(
    x: Float32[Array, "B N"],
    h: Float32[Array, "B N"],
    tables: Float32[Array, "B E"],
    price: Float32[Array, "B V"],
    zero: bool,
) -> UInt8[Array, "B N"]:
    """The cheapest code. A scan over the values, so that no (N, V) array is made."""

    def visit(best: tuple[Array, Array], entry: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        cost, codes = best
        code, value, added = entry
        distance = h * (x - value[:, None]) ** 2 + added[:, None]
        return (jnp.minimum(cost, distance), jnp.where(distance < cost, code, codes)), None

    numbers = jnp.arange(tables.shape[1], dtype=jnp.uint8) + jnp.uint8(zero)
    # Without a price nothing but a pruned weight is 0: k-means of the others has left that value out.
    free = jnp.full(x.shape, jnp.inf)
    start = jnp.where(jnp.any(price > 0), h * x * x + price[:, :1], free) if zero else free
    codes = jnp.where(jnp.isfinite(start), 0, jnp.uint8(zero)).astype(jnp.uint8)
    (_, codes), _ = jax.lax.scan(visit, (start, codes), (numbers, tables.T, price[:, zero:].T))
    return jnp.where(x == 0, jnp.uint8(0), codes) if zero else codes
