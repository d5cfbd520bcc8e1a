"""What is kept of the inputs of a leaf: sums that can be streamed.

Shape letters: S the leaf's stack axes (none, usually) and, of a grouped convolution, its groups; D input features (the
leaf's input axes, flattened in the order of the leaf), N rows.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, Shaped

from jaxcompress._src.calibration.histogram import Histogram, add_histograms, empty_histogram, histogram_of
from jaxcompress._src.meshes import spread
from jaxcompress._src.types import exportable

Statistic = Literal["gram", "squared_sum", "absolute_sum", "absolute_max", "histogram"]
"""The names of what can be gathered of a contracted leaf."""

STATISTICS: tuple[Statistic, ...] = ("gram", "squared_sum", "absolute_sum", "absolute_max")
"""What is gathered by default."""

ALL, NONE = -1, -2
"""Of a group that is gathered in sequence: every stack entry, or nothing."""


@exportable
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "gram", "squared_sum", "absolute_sum", "absolute_max", "cross", "histogram"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class InputStatistics:
    """Sums over the rows x (N, D) that a leaf multiplies; all float32.

    Invariants: `squared_sum` is the diagonal of `gram`, where both are there; an absent statistic is None.

    Attributes:
        count: (S), number of rows, or the sum of their weights; 0 for a stack entry that no row reached.
        gram: (S, D, D), Σ x xᵀ.
        squared_sum: (S, D), Σ x².
        absolute_sum: (S, D), Σ |x|.
        absolute_max: (S, D), max |x| over the rows of positive weight.
        cross: (S, D, D), Σ y xᵀ with y the inputs of the same leaf in the dense model; see `sequential`.
        histogram: of all values of x, whatever their feature.
    """

    is_entry: ClassVar[bool] = True

    count: Any
    gram: Any = None
    squared_sum: Any = None
    absolute_sum: Any = None
    absolute_max: Any = None
    cross: Any = None
    histogram: Histogram | Any = None

    @property
    def absolute_mean(self) -> Float32[Array, "*stack D"] | None:
        """Mean |x|; 0 where there are no rows."""
        if self.absolute_sum is None:
            return None
        return self.absolute_sum / jnp.where(self.count > 0, self.count, 1.0)[..., None]


@exportable
@functools.partial(jax.tree_util.register_dataclass, data_fields=["count", "rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LookupCounts:
    """How often each row of a table was looked up.

    Attributes:
        count: scalar, number of look-ups.
        rows: (rows of the table,).
    """

    is_entry: ClassVar[bool] = True

    count: Any
    rows: Any


Statistics = InputStatistics | LookupCounts

_Statistics = TypeVar("_Statistics", InputStatistics, LookupCounts)


def empty_statistics(
    stack: Sequence[int], width: int, names: Sequence[Statistic], *, cross: bool = False
) -> InputStatistics:
    """The statistics of no rows at all."""
    histogram = empty_histogram(stack) if "histogram" in names else None
    shapes = {name: (*stack, width) for name in names if name != "histogram"}
    if "gram" in names:
        shapes["gram"] = (*stack, width, width)
    if cross:
        shapes["cross"] = (*stack, width, width)
    parts = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    return InputStatistics(count=jnp.zeros(tuple(stack), jnp.float32), histogram=histogram, **parts)


def statistics_shardings(statistics: Statistics, mesh: Mesh) -> Statistics:
    """How statistics lie on a mesh: products of two inputs are cut along their rows, everything else is replicated.

    Args:
        statistics: arrays, or their abstract forms.
        mesh: of the devices.

    Returns:
        The same structure with a `NamedSharding` for each array.

    Example:
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> statistics_shardings(empty_statistics((), 4, ("gram",)), mesh).gram.spec
        P('data', None)
    """
    whole = jax.tree.map(lambda part: spread(mesh, part.shape, stack=len(part.shape)), statistics)
    if isinstance(statistics, LookupCounts):
        return whole
    products = {
        name: spread(mesh, part.shape, stack=len(part.shape) - 2)
        for name in ("gram", "cross")
        if (part := getattr(statistics, name)) is not None
    }
    return dataclasses.replace(whole, **products)


def uninformed(like: InputStatistics) -> InputStatistics:
    """The statistics of the unit vectors as rows: every input counts the same, and none goes with another.

    What to go by where no row was seen.

    Args:
        like: says which statistics to make, and of what width; without stack axes.

    Example:
        >>> uninformed(empty_statistics((), 2, ("gram", "absolute_max"))).gram.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    parts = {name: getattr(like, name) for name in ("gram", "squared_sum", "absolute_sum", "absolute_max", "cross")}
    width = next((part.shape[-1] for part in parts.values() if part is not None), 0)
    rows = jnp.eye(width, dtype=jnp.float32)
    return statistics_of(rows, None, like, dense=rows)


def statistics_of(
    x: Float[Array, "*stack N D"],
    weights: Float32[Array, " N"] | None,
    like: InputStatistics,
    *,
    dense: Float[Array, "*stack N D"] | None = None,
) -> InputStatistics:
    """The statistics of some rows.

    Args:
        x: rows of inputs; sums are made in float32.
        weights: of the rows, at least 0; None counts each once.
        like: says which statistics to make.
        dense: the same rows in the dense model, for `cross`.
    """
    x = x.astype(jnp.float32)
    weighted, largest, count = x, jnp.abs(x), jnp.float32(x.shape[-2])
    if weights is not None:
        column = jnp.broadcast_to(weights[:, None], x.shape)
        # By `where`: what lies in the padding may be NaN.
        weighted, count = jnp.where(column > 0, x * column, 0.0), weights.sum()
        x = jnp.where(column > 0, x, 0.0)
        largest = jnp.abs(x)
    gram = None if like.gram is None else _product(x, weighted)
    squared_sum = jnp.sum(x * weighted, axis=-2) if gram is None else jnp.diagonal(gram, axis1=-2, axis2=-1)
    return InputStatistics(
        count=jnp.broadcast_to(count, x.shape[:-2]),
        gram=gram,
        squared_sum=None if like.squared_sum is None else squared_sum,
        absolute_sum=None if like.absolute_sum is None else jnp.abs(weighted).sum(axis=-2),
        absolute_max=None if like.absolute_max is None else largest.max(axis=-2, initial=0.0),
        cross=None if like.cross is None or dense is None else _product(dense.astype(jnp.float32), weighted),
        histogram=None if like.histogram is None else _histogram(x, weights),
    )


def add_statistics(total: _Statistics, more: _Statistics) -> _Statistics:
    """The statistics of both sets of rows: sums are added, maxima compared.

    Example:
        >>> one = InputStatistics(count=jnp.float32(1), absolute_sum=jnp.ones(1), absolute_max=jnp.ones(1))
        >>> two = add_statistics(one, one)
        >>> two.count.item(), two.absolute_sum.item(), two.absolute_max.item()
        (2.0, 2.0, 1.0)
    """
    added = jax.tree.map(jnp.add, total, more)
    if not isinstance(total, InputStatistics) or not isinstance(more, InputStatistics):
        return added
    if total.absolute_max is not None:
        added = dataclasses.replace(added, absolute_max=jnp.maximum(total.absolute_max, more.absolute_max))
    if total.histogram is not None:
        added = dataclasses.replace(added, histogram=add_histograms(total.histogram, more.histogram))
    return added


def add_at(
    total: InputStatistics,
    more: InputStatistics,
    entries: Int[np.ndarray, " M"],
    offset: Int[Array, ""] | int = 0,
    only: Int[Array, ""] | None = None,
) -> InputStatistics:
    """Adds statistics of some stack entries to those of all.

    Args:
        total: over the whole stack.
        more: of M entries; one leading axis if there is a stack at all.
        entries: their numbers in the flattened stack; those below 0 are left out.
        offset: is added to them.
        only: the entry to add, or `ALL`; None: all.
    """
    stack = total.count.shape
    # Each entry once at a time: a repeated one (keys that several heads share, say) meets as many sets of rows.
    rounds = _rounds(entries)
    for places in rounds[1:]:
        total = add_at(
            total, jax.tree.map(lambda part, places=places: part[places], more), entries[places], offset, only
        )
    if len(rounds) > 1:
        entries, more = entries[rounds[0]], jax.tree.map(lambda part: part[rounds[0]], more)
    if not stack:
        # Beside a leaf that is no stack there may be what fills an axis up: `jnp.pad(w[None], ...)`.
        places = np.flatnonzero(entries >= 0)
        if not len(places):
            return total
        return add_statistics(total, jax.tree.map(lambda part, whole: part[places].reshape(whole.shape), more, total))
    size = math.prod(stack)
    places = jnp.asarray(np.where(entries < 0, size, entries), jnp.int32)
    if not isinstance(offset, int) or offset:
        places = jnp.where(places < size, places + offset, size)
    if only is not None:
        due = (only == ALL) | (places == only)
        more = jax.tree.map(lambda part: jnp.where(_wide(due, part), part, jnp.zeros_like(part)), more)
    if isinstance(offset, int) and np.array_equal(entries + offset, np.arange(size)):
        return add_statistics(total, jax.tree.map(lambda part, whole: part.reshape(whole.shape), more, total))
    flat = jax.tree.map(lambda whole: whole.reshape(size, *whole.shape[len(stack) :]), total)
    if np.array_equal(entries, entries[0] + np.arange(len(entries))) and entries[0] >= 0:
        start, count = places[0], len(entries)
        sums = add_statistics(jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, start, count), flat), more)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        flat = jax.tree.map(put, flat, sums)
    else:
        sums = add_statistics(jax.tree.map(lambda w: w.at[places].get(mode="fill", fill_value=0), flat), more)
        flat = jax.tree.map(lambda w, part: w.at[places].set(part, mode="drop"), flat, sums)
    return jax.tree.map(lambda part, whole: part.reshape(whole.shape), flat, total)


def weigh(more: InputStatistics, weights: Sequence[ArrayLike]) -> InputStatistics:
    """Statistics whose products of two inputs count several times; how many rows there are, and of what size, stays.

    Args:
        more: of M entries.
        weights: for each stream of values, one for each entry, or one for all of them.
    """
    current = jnp.asarray(weights[-1])
    both = jnp.sqrt(jnp.asarray(weights[0]) * current)

    def times(part: Array | None, by: Array) -> Array | None:
        return None if part is None else part * _wide(jnp.broadcast_to(by, part.shape[:1]), part)

    return dataclasses.replace(
        more,
        gram=times(more.gram, current),
        squared_sum=times(more.squared_sum, current),
        cross=times(more.cross, both),
    )


def only_products(more: InputStatistics) -> InputStatistics:
    """What another part of a leaf adds, of rows that have been counted."""
    blank = jax.tree.map(jnp.zeros_like, more)
    return dataclasses.replace(blank, gram=more.gram, squared_sum=more.squared_sum, cross=more.cross)


def _rounds(entries: Int[np.ndarray, " M"]) -> list[Int[np.ndarray, " K"]]:
    """Places among which no entry comes twice; those below 0 are in no more than the first of them."""
    seen: dict[int, int] = {}
    rounds: list[list[int]] = [[]]
    for place, entry in enumerate(entries.tolist()):
        number = seen.get(entry, 0) if entry >= 0 else 0
        seen[entry] = number + 1
        rounds.extend([] for _ in range(number + 1 - len(rounds)))
        rounds[number].append(place)
    return [np.asarray(places, np.int64) for places in rounds]


def _wide(numbers: Shaped[Array, " M"], part: Shaped[Array, "M ..."]) -> Shaped[Array, "M ..."]:
    return numbers.reshape(-1, *(1,) * (part.ndim - 1))


def _histogram(x: Float[Array, "*stack N D"], weights: Float32[Array, " N"] | None) -> Histogram:
    values = x.reshape(*x.shape[:-2], -1)
    return histogram_of(values, None if weights is None else jnp.repeat(weights, x.shape[-1]))


def _product(y: Float32[Array, "*stack N D"], x: Float32[Array, "*stack N D"]) -> Float32[Array, "*stack D D"]:
    return jnp.einsum("...ni,...nj->...ij", y, x, precision=jax.lax.Precision.HIGHEST)
