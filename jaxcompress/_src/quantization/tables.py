"""Tables that are looked up, beside leaves that are contracted.

Shape letters: D features of a row, R rows.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxcompress._src.calibration.statistics import LookupCounts
from jaxcompress._src.quantization.leaf_matrix import MATRIX, check_blocks, rounded, stored, with_whole_groups
from jaxcompress._src.quantization.range_search import RangeSearch, searched_scales
from jaxcompress._src.quantization.rounding import round_to_codes
from jaxcompress._src.quantization.rounding_info import RoundingInfo
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.solvers.outputs import unit_of
from jaxcompress._src.trace.layout import LeafLayout, default_layout
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.infos import entry_infos
from jaxcompress._src.weights.matrices import Calibrated, MatrixLeaf, calibrated, checked_weight, entries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(MatrixLeaf):
    """A table; as a matrix, its rows are the outputs.

    Attributes:
        counts: how often each row was looked up.
    """

    counts: LookupCounts


def counted_leaves(
    params: Params, statistics: Params, *, needs: str, select: Selector | None, layouts: Params | None
) -> tuple[list[Calibrated], list[Table]]:
    """The leaves to compress: contracted ones with their statistics, and tables with their counts.

    Args:
        params: the tree.
        statistics: from `calibration.input_statistics`.
        needs: the statistic that contracted leaves must have.
        select: which leaves; by default all that have either.
        layouts: from `trace.layouts`.

    Raises:
        ValueError: as `calibration.calibrated`; a table whose counts are those of another one.
    """
    tables: list[Table] = []
    known = map_with_path(lambda *_: None, params) if layouts is None else layouts
    marks = map_with_path(lambda *_: None, params) if select is None else select(params)

    def visit(path: str, leaf: Any, found: Any, layout: LeafLayout | None, mark: bool | None) -> bool | None:
        if not isinstance(found, LookupCounts):
            return mark
        if mark is not False:
            axes = layout if layout is not None and layout.is_weight else default_layout(path, leaf)
            tables.append(Table(path=path, weight=checked_weight(path, leaf), layout=axes, counts=found))
            _check_rows(tables[-1])
        return False

    rest = map_with_path(visit, params, statistics, known, marks)
    if tables and not any(mark is not False for mark in jax.tree.leaves(rest, is_leaf=lambda leaf: leaf is None)):
        return [], tables
    chosen = calibrated(params, statistics, needs=needs, select=lambda _: rest, layouts=layouts)
    return list(entries(chosen)), tables


def nearest_table(table: Table, spec: QuantSpec, ranges: RangeSearch | None) -> tuple[Any, dict[str, RoundingInfo]]:
    """Rounds a table to nearest; scales that several rows share suit the rows that are looked up most.

    Rows that were never looked up count a thousandth of a look-up: enough for a search of their own scales, too little
    to spoil those that they share.

    Args:
        table: the leaf.
        spec: of the codes.
        ranges: how to search for scales.
    """
    check_blocks(table, spec)
    matrix = with_whole_groups(table, table.matrix(table.weight).astype(jnp.float32), spec, 1)
    scale, zero_point, codes, before, after = _nearest(matrix[0], table.counts.rows, spec, ranges)
    zero_point = None if zero_point is None else zero_point[None]
    leaf = stored(table, codes[None], scale[None], zero_point, spec)
    errors = {"error_before": before[None], "error": after[None]}
    return leaf, entry_infos(table, functools.partial(RoundingInfo.of, leaf), errors=errors)


@functools.partial(jax.jit, static_argnames=("spec", "ranges"))
def _nearest(w: Float32[Array, "D R"], counts: Float[Array, " R"], spec: QuantSpec, ranges: RangeSearch | None) -> Any:
    scale, zero_point = searched_scales(w, spec, MATRIX, ranges, jnp.where(counts > 0, counts, 1e-3)[None])
    plain = searched_scales(w, spec, MATRIX, None)
    unit = unit_of(w)
    total = jnp.sum(counts * jnp.square(w / unit).sum(axis=0))

    def error(scale: Any, zero_point: Any) -> Any:
        lost = jnp.sum(counts * jnp.square((rounded(w, scale, zero_point, spec) - w) / unit).sum(axis=0))
        return jnp.where(total > 0, jnp.sqrt(lost / jnp.where(total > 0, total, 1.0)), 0.0)

    return scale, zero_point, round_to_codes(w, scale, zero_point, spec), error(*plain), error(scale, zero_point)


def _check_rows(table: Table) -> None:
    rows = math.prod(table.weight.shape[axis] for axis in table.layout.output_axes)
    if rows != table.counts.rows.size or table.stack != 1:
        raise ValueError(
            f"Leaf {table.path!r} of shape {table.weight.shape} has {rows} rows, its statistics count "
            f"{table.counts.rows.size}; give `layouts` from `trace.layouts`."
        )
