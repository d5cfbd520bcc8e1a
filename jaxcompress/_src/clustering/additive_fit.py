"""Tables and codes of one matrix of runs: seeds by splitting, then least squares and search in turn.

Shape letters: N runs, D weights of a run, M tables, K entries of a table.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float32, Int32, UInt8

from jaxcompress._src.clustering.additive_search import nearest_entries, run_errors, search_codes
from jaxcompress._src.clustering.additive_spec import AdditiveSpec
from jaxcompress._src.solvers.cholesky import damped_cholesky

_DAMPING = 1e-4
_SOLVES = 3
_LLOYD = 3
_LAST_LLOYD = 8
_SEEDING = 64


class AdditiveFit(NamedTuple):
    """What was found for the runs of one matrix.

    Attributes:
        tables: float32, with values that the dtype of the spec holds.
        codes: which entry of each table.
        errors: Σ h (x - sum)² after seeding and after each round; they never rise.
    """

    tables: Float32[Array, "M K D"]
    codes: UInt8[Array, "N M"]
    errors: Float32[Array, " rounds1"]


@functools.partial(jax.jit, static_argnames=("spec",))
def fit_additive(x: Float32[Array, "N D"], h: Float32[Array, "N D"], spec: AdditiveSpec) -> AdditiveFit:
    """Tables and codes with a small Σ h (x - Σ_m tables[m, codes[m]])².

    Args:
        x: the runs, finite, at least one.
        h: importance, not negative.
        spec: number of tables and values, rounds, width of the search.
    """
    tables, codes = _seed(x, h, spec)
    tables = _rounded(tables, spec)

    def total(tables: Float32[Array, "M K D"], codes: UInt8[Array, "N M"]) -> Float32[Array, ""]:
        return run_errors(x, h, codes, tables).sum()

    def one_round(state: AdditiveFit, _: None) -> tuple[AdditiveFit, Float32[Array, ""]]:
        tables, codes, error = state
        # Rounding, of tables to bfloat16 or of sums, can undo a tiny gain: then what was there stays.
        moved = _rounded(least_squares_tables(x, h, codes, tables), spec)
        now = total(moved, codes)
        tables, error = jnp.where(now < error, moved, tables), jnp.minimum(now, error)
        candidates = search_codes(x, h, codes, tables, spec.beam)
        now = total(tables, candidates)
        codes, error = jnp.where(now < error, candidates, codes), jnp.minimum(now, error)
        return AdditiveFit(tables, codes, error), error

    start = total(tables, codes)
    (tables, codes, _), errors = jax.lax.scan(one_round, AdditiveFit(tables, codes, start), None, length=spec.rounds)
    return AdditiveFit(tables, codes, jnp.concatenate([start[None], errors]))


def _rounded(tables: Float32[Array, "M K D"], spec: AdditiveSpec) -> Float32[Array, "M K D"]:
    return tables.astype(spec.dtype).astype(jnp.float32)


def _seed(
    x: Float32[Array, "N D"], h: Float32[Array, "N D"], spec: AdditiveSpec
) -> tuple[Float32[Array, "M K D"], UInt8[Array, "N M"]]:
    """Each table by k-means of what the ones before it leave over."""

    def one_table(rest: Float32[Array, "N D"], _: None) -> tuple[Array, tuple[Array, Array]]:
        table = _kmeans(rest, h, spec.values)
        code = nearest_entries(rest, h, table)
        return rest - table[code], (table, code.astype(jnp.uint8))

    _, (tables, codes) = jax.lax.scan(one_table, x, None, length=spec.tables)
    return tables, codes.T


def _kmeans(x: Float32[Array, "N D"], h: Float32[Array, "N D"], count: int) -> Float32[Array, "K D"]:
    """Lloyd's iteration from centers that split, the worst first, where their runs spread most (no random numbers)."""
    if len(x) <= count:
        return jnp.zeros((count, x.shape[1])).at[: len(x)].set(x)
    few, weights = (part[_spread(len(x), min(len(x), _SEEDING * count))] for part in (x, h))
    mean = _ratio((h * x).sum(0), h.sum(0), x.mean(0))
    centers = jnp.broadcast_to(mean[None], (count, x.shape[1]))

    def level(_: ArrayLike, centers: Float32[Array, "K D"]) -> Float32[Array, "K D"]:
        centers = _split(few, weights, centers)
        return jax.lax.fori_loop(0, _LLOYD, lambda _, centers: _lloyd(few, weights, centers), centers)

    centers = jax.lax.fori_loop(0, count.bit_length() + 1, level, centers)
    return jax.lax.fori_loop(0, _LAST_LLOYD, lambda _, centers: _lloyd(x, h, centers), centers)


def _spread(size: int, count: int) -> Int32[np.ndarray, " count"]:
    """Different numbers below `size`, evenly spread, by steps of a golden section of it.

    A common stride could be a multiple of the runs of one line, and meet the same inputs again and again.
    """
    step = max(round(0.618 * size), 1)
    while math.gcd(step, size) > 1:
        step += 1
    return (np.arange(count) * step % size).astype(np.int32)


def _lloyd(x: Float32[Array, "N D"], h: Float32[Array, "N D"], centers: Float32[Array, "K D"]) -> Float32[Array, "K D"]:
    """Every center moves to the mean of its runs; where they do not count it stays."""
    code = nearest_entries(x, h, centers)
    return _ratio(_sums(h * x, code, len(centers)), _sums(h, code, len(centers)), centers)


def _split(x: Float32[Array, "N D"], h: Float32[Array, "N D"], centers: Float32[Array, "K D"]) -> Float32[Array, "K D"]:
    """Centers without runs move beside those with the largest error: one to each side, along the axis of most error."""
    count = len(centers)
    code = nearest_entries(x, h, centers)
    total, runs = _sums(h, code, count), _sums(jnp.ones_like(h[:, :1]), code, count)[:, 0]
    spread = _sums(h * (x - centers[code]) ** 2, code, count)
    axis = spread.argmax(axis=1)
    most = jnp.take_along_axis(spread, axis[:, None], axis=1)
    step = jnp.sqrt(_ratio(most, jnp.take_along_axis(total, axis[:, None], axis=1), jnp.zeros_like(most)))
    step = step * jax.nn.one_hot(axis, x.shape[1])
    givers = jnp.argsort(-spread.sum(axis=1), stable=True)
    takers = jnp.argsort(runs > 0, stable=True)
    moves = (runs[takers] == 0) & (spread.sum(axis=1)[givers] > 0)
    beside = jnp.where(moves[:, None], centers[givers] + step[givers], centers[takers])
    centers = centers.at[givers].add(jnp.where(moves[:, None], -step[givers], 0.0))
    return centers.at[jnp.where(moves, takers, count)].set(beside, mode="drop")


def least_squares_tables(
    x: Float32[Array, "N D"], h: Float32[Array, "N D"], codes: UInt8[Array, "N M"], tables: Float32[Array, "M K D"]
) -> Float32[Array, "M K D"]:
    """The tables that fit best with these codes: all of them together, from the normal equations of each coordinate.

    The equations are singular (what one table gains another can lose), so steps are damped: a minimum of the error
    plus a small multiple of the squared step, which cannot raise the error; a few of them reach the least squares.
    """
    count, values, _ = tables.shape
    places = codes.astype(jnp.int32) + values * jnp.arange(count)[None]

    def of_coordinate(part: tuple[Array, Array, Array]) -> Float32[Array, " MK"]:
        x, h, entries = part
        factor = damped_cholesky(_normal_matrix(h, places, len(entries), values), _DAMPING).factor

        def step(_: ArrayLike, entries: Float32[Array, " MK"]) -> Float32[Array, " MK"]:
            rest = h * (x - entries[places].sum(axis=1))
            right = sum(_sums(rest, places[:, m], len(entries)) for m in range(count))
            return entries + jax.scipy.linalg.cho_solve((factor, True), right)

        return jax.lax.fori_loop(0, _SOLVES, step, entries)

    flat = tables.reshape(count * values, -1)
    return jax.lax.map(of_coordinate, (x.T, h.T, flat.T)).T.reshape(tables.shape)


def _normal_matrix(
    h: Float32[Array, " N"], places: Int32[Array, "N M"], size: int, values: int
) -> Float32[Array, "MK MK"]:
    """Σ h over the runs that have both entries, for each pair of entries."""
    count = places.shape[1]
    matrix = jnp.diag(sum(_sums(h, places[:, m], size) for m in range(count)))
    for m in range(count):
        for n in range(m):
            pairs = (places[:, m] - m * values) * values + places[:, n] - n * values
            block = _sums(h, pairs, values * values).reshape(values, values)
            rows, columns = slice(m * values, (m + 1) * values), slice(n * values, (n + 1) * values)
            matrix = matrix.at[rows, columns].set(block).at[columns, rows].set(block.T)
    return matrix


def _sums(values: Array, places: Array, count: int) -> Array:
    return jax.ops.segment_sum(values, places, count)


def _ratio(above: Array, below: Array, otherwise: Array) -> Array:
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), otherwise)
