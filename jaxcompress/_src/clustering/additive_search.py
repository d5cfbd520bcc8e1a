"""Codes for given tables: beam search, then one table after the other.

Shape letters: N runs, D weights of a run, M tables, K entries of a table, B beams.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt8

# Runs that are searched together: few enough that (chunk, beam * K) costs stay in the cache of a CPU.
_CHUNK = 256
_SWEEPS = 2


def nearest_entries(
    x: Float32[Array, "N D"], h: Float32[Array, "N D"], table: Float32[Array, "K D"]
) -> Int32[Array, " N"]:
    """The entry with the smallest Σ h (x - entry)²; of equal ones the first."""

    def of_run(run: tuple[Array, Array]) -> Int32[Array, ""]:
        return _first_least(_costs(*run, table))

    return jax.lax.map(of_run, (x, h), batch_size=_CHUNK)


def search_codes(
    x: Float32[Array, "N D"],
    h: Float32[Array, "N D"],
    codes: UInt8[Array, "N M"],
    tables: Float32[Array, "M K D"],
    beam: int,
) -> UInt8[Array, "N M"]:
    """Codes with a smaller Σ h (x - Σ_m tables[m, codes[m]])² than the given ones, or those.

    Beam search picks entries from one table after the other and keeps the `beam` best sums, so K^(M - 1) beams find
    the optimum; then codes are exchanged one by one as long as that helps (iterated conditional modes).

    Args:
        x: the runs.
        h: importance, not negative.
        codes: where to start.
        tables: the entries.
        beam: number of sums that are kept.
    """

    def of_run(run: tuple[Array, Array, Array]) -> UInt8[Array, " M"]:
        x, h, old = run
        start = old.astype(jnp.int32)
        best = _beam_search(x, h, tables, beam)
        best = jnp.where(_error(x, h, best, tables) < _error(x, h, start, tables), best, start)
        for _ in range(_SWEEPS if len(tables) > 1 else 0):
            best = _exchange(x, h, best, tables)
        return jnp.where(_error(x, h, best, tables) < _error(x, h, start, tables), best, start).astype(jnp.uint8)

    return jax.lax.map(of_run, (x, h, codes), batch_size=_CHUNK)


def sums_of_entries(codes: UInt8[Array, "N M"], tables: Float32[Array, "M K D"]) -> Float32[Array, "N D"]:
    """Σ_m tables[m, codes[:, m]]."""
    total = tables[0][codes[:, 0]]
    for m in range(1, len(tables)):
        total = total + tables[m][codes[:, m]]
    return total


def run_errors(
    x: Float32[Array, "N D"], h: Float32[Array, "N D"], codes: UInt8[Array, "N M"], tables: Float32[Array, "M K D"]
) -> Float32[Array, " N"]:
    """Σ h (x - Σ_m tables[m, codes[m]])² of every run."""
    return (h * (x - sums_of_entries(codes, tables)) ** 2).sum(axis=1)


def _costs(x: Float32[Array, " D"], h: Float32[Array, " D"], table: Float32[Array, "K D"]) -> Float32[Array, " K"]:
    """Σ h (x - entry)², less what is the same for all entries."""
    return (table**2) @ h - 2 * (table @ (h * x))


def _error(
    x: Float32[Array, " D"], h: Float32[Array, " D"], codes: Int32[Array, " M"], tables: Float32[Array, "M K D"]
) -> Float32[Array, ""]:
    return (h * (x - _entries(codes, tables).sum(axis=0)) ** 2).sum()


def _entries(codes: Int32[Array, " M"], tables: Float32[Array, "M K D"]) -> Float32[Array, "M D"]:
    return tables[jnp.arange(len(tables)), codes]


def _beam_search(
    x: Float32[Array, " D"], h: Float32[Array, " D"], tables: Float32[Array, "M K D"], beam: int
) -> Int32[Array, " M"]:
    values = tables.shape[1]
    rest, codes = x[None], jnp.zeros((1, 0), jnp.int32)
    for m, table in enumerate(tables):
        costs = ((table**2) @ h)[None] - 2 * (h[None] * rest) @ table.T + (rest**2 @ h)[:, None]
        if m == len(tables) - 1:
            best = _first_least(costs.reshape(-1))[None]
        else:
            _, best = jax.lax.top_k(-costs.reshape(-1), min(beam, costs.size))
        parent, entry = best // values, (best % values).astype(jnp.int32)
        rest = rest[parent] - table[entry]
        codes = jnp.concatenate([codes[parent], entry[:, None]], axis=1)
    return codes[0]


def _exchange(
    x: Float32[Array, " D"], h: Float32[Array, " D"], codes: Int32[Array, " M"], tables: Float32[Array, "M K D"]
) -> Int32[Array, " M"]:
    """The best code of each table in turn, the others as they are."""
    for m in range(len(tables)):
        entries = _entries(codes, tables)
        rest = x - (entries.sum(axis=0) - entries[m])
        codes = codes.at[m].set(_first_least(_costs(rest, h, tables[m])))
    return codes


def _first_least(costs: Float32[Array, " K"]) -> Int32[Array, ""]:
    """`argmin`, as two plain minima: those XLA vectorises on the CPU (4x)."""
    numbers = jnp.arange(len(costs), dtype=jnp.int32)
    return jnp.where(costs <= costs.min(), numbers, len(costs) - 1).min()
