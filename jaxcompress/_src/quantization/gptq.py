"""GPTQ: rounding one input after another, while the rest makes up for it.

Shape letters: S stack entries (of each group), E stack entries with all of their groups, D inputs, R outputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxcompress._src.meshes import on_auto_axes, sharded_like
from jaxcompress._src.quantization.gptq_matrix import GroupScales, Order, Rule, Solved, check_rule, gptq_matrix
from jaxcompress._src.quantization.leaf_matrix import (
    MATRIX,
    check_blocks,
    fitting,
    stored,
    with_whole_groups,
)
from jaxcompress._src.quantization.range_search import BEST_RANGES, RangeSearch, searched_scales
from jaxcompress._src.quantization.rounding import round_to_codes, rounded
from jaxcompress._src.quantization.rounding_info import FALLBACKS, RoundingInfo
from jaxcompress._src.quantization.scales import block_scales
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.solvers.hessian import problem
from jaxcompress._src.solvers.outputs import output_errors, unit_of
from jaxcompress._src.tree.maps import with_leaves
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.infos import entry_infos
from jaxcompress._src.weights.matrices import CalibratedLeaf, TableLeaf, calibrated_leaves_and_tables
from jaxcompress._src.weights.side_by_side import solve_leaves
from jaxcompress._src.weights.unseen import Unseen, check_unseen, warn_unseen


@on_auto_axes
def gptq(
    params: Params,
    statistics: Params,
    spec: QuantSpec,
    *,
    order: Order = "activation",
    group_scales: GroupScales = "static",
    range_search: RangeSearch | None = BEST_RANGES,
    refine: int = 2,
    ridge: float = 0.1,
    damping: float = 0.01,
    block_size: int = 128,
    unseen: Unseen = "keep",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, RoundingInfo]]:
    """Rounds the inputs of each leaf one after another; those still to come make up for the error.

    With U the upper factor of (XᵀX + λ mean(diag) I)⁻¹ = Uᵀ U, input i is rounded to nearest, and its error
    e = (w_i - q_i) / U_ii, times U_ij, is subtracted from every later input j. Where the statistics have `cross`
    (inputs Y in the dense model against those X in the compressed one), the weights first become those that come
    closest to the dense outputs on the inputs that the leaf will really get,

        T = argmin ||X T - Y W||² + ridge mean(diag XᵀX) ||T - W||².

    Tables that are looked up (`LookupCounts`) are rounded to nearest: their rows do not make up for one another.

    On a mesh (params, or the statistics of sharded batches) every device rounds another stack entry or leaf, whole, and
    leaves come back with the sharding that they had, their codes and scales where it divides those.

    Args:
        params: the tree; compressed leaves count as the arrays they stand for.
        statistics: from `calibration.input_statistics`, with "gram".
        spec: bits, granularity, variant.
        order: "activation" begins with the inputs of most energy (act-order); what is stored does not change.
        group_scales: "static": all scales come from the weights as they were. "updated": those of a group from the
            weights as they are when it begins, in natural order only. Without groups there is no difference.
        range_search: how to search for scales; None: by the extreme values, as published.
        refine: rounds of least-squares scales and coordinate descent of the codes behind it; no output gets worse on
            the calibration rows. 0: none, as published. Without both, 2-bit codes lose about twice as much.
        ridge: how much T is held to W, at least 0; the rows must tell more than noise about it. Without `cross`,
            T = W.
        damping: λ, at least 0; grows tenfold until the matrix can be factored.
        block_size: inputs between two updates of all the rest.
        unseen: what becomes of inputs that are 0 in every row. "keep": their weights are rounded to nearest. "zero":
            they become 0, as in the public implementations.
        select: which leaves; by default all that have statistics.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out).

    Returns:
        `(params, info)`: a `QuantizedArray` for every leaf, and a `RoundingInfo` by path (`path[i]` for each
        entry of a stack).

    Raises:
        ValueError: options out of range; nothing to round; a leaf without statistics, with statistics of another width,
            with NaN or Inf in either, or with axes that the group size does not divide. Names option or leaf.

    Example:
        >>> from jaxcompress.calibration import input_statistics
        >>> params = {"kernel": jnp.array([[0.6], [0.6], [7.0]])}
        >>> x = jnp.array([[1.0, 0.95, 0.0], [0.95, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(x,)])
        >>> small, info = gptq(params, statistics, QuantSpec(bits=4))
        >>> small["kernel"].codes().ravel().tolist()  # two inputs of 0.6 that nearly agree: 1.2 is 1 + 0, not 1 + 1
        [1, 0, 7]
        >>> info["kernel"].error < info["kernel"].error_before
        True

    References:
        Frantar et al. 2022, "GPTQ: accurate post-training quantization for generative pre-trained transformers".
    """
    rule = Rule(spec, order, group_scales, range_search, refine, block_size)
    check_rule(rule, damping, ridge)
    check_unseen(unseen)
    entries = calibrated_leaves_and_tables(params, statistics, needs="gram", select=select, layouts=layouts)
    fitted = fitting(entries, spec, select)
    for entry in fitted:
        check_blocks(entry, spec)
    kernels = [entry for entry in fitted if isinstance(entry, CalibratedLeaf)]
    outcomes = {
        entry.path: _nearest_table(entry, spec, range_search) for entry in fitted if isinstance(entry, TableLeaf)
    }
    rounded_kernels = solve_leaves(
        kernels,
        functools.partial(_parts, ridge=ridge, damping=damping, spec=spec),
        _solve,
        functools.partial(_rounded_leaf, spec=spec),
        options=(unseen == "zero", rule),
    )
    outcomes |= {kernel.path: outcome for kernel, outcome in zip(kernels, rounded_kernels, strict=True)}
    infos = {name: info for entry in fitted for name, info in outcomes[entry.path][1].items()}
    warn_unseen({kernel.path: kernel.unseen for kernel in kernels}, FALLBACKS[unseen])
    return with_leaves(params, {path: leaf for path, (leaf, _) in outcomes.items()}), infos


def _parts(entry: CalibratedLeaf, *, ridge: float, damping: float, spec: QuantSpec) -> dict[str, Any]:
    """What `_solve` is given of a leaf."""
    gram, cross = (
        None if part is None else with_whole_groups(entry, part, spec, 1, 2) for part in (entry.gram, entry.cross)
    )
    numbers = {
        name: np.full(entry.stack, value, np.float32) for name, value in (("ridge", ridge), ("damping", damping))
    }
    weights = with_whole_groups(entry, entry.matrices, spec, 1)
    return {"weights": weights, "gram": gram, "cross": cross, "count": entry.count, **numbers}


def _rounded_leaf(entry: CalibratedLeaf, solution: Any, *, spec: QuantSpec) -> tuple[Any, dict[str, RoundingInfo]]:
    solved, errors = solution
    leaf = sharded_like(stored(entry, solved.codes, solved.scale, solved.zero_point, spec), entry.weight)
    return leaf, entry_infos(
        entry,
        functools.partial(RoundingInfo.of, leaf),
        errors=errors,
        unseen=entry.unseen,
        damping=solved.damping,
        retries=solved.retries,
    )


@functools.partial(jax.jit, static_argnames=("groups", "zero_unseen", "rule"))
def _solve(
    parts: dict[str, Any], groups: int, zero_unseen: bool, rule: Rule
) -> tuple[Solved, dict[str, Float32[Array, " E"]]]:
    def one(part: dict[str, Any]) -> Any:
        weights, ridge = part["weights"], part["ridge"]
        targets, hessian, _ = problem(
            weights, part["gram"], part["cross"], part["count"], ridge, zero_unseen=zero_unseen
        )
        nearest = rounded(weights, *block_scales(weights, rule.spec, MATRIX), rule.spec)
        return gptq_matrix(targets, hessian, part["damping"], rule), targets, nearest

    gram = parts["gram"]
    solved, targets, nearest = jax.lax.map(one, parts)
    before = output_errors(gram, targets, nearest, groups=groups)
    return solved, {"error_before": before, "error": output_errors(gram, targets, solved.weights, groups=groups)}


def _nearest_table(
    table: TableLeaf, spec: QuantSpec, range_search: RangeSearch | None
) -> tuple[Any, dict[str, RoundingInfo]]:
    """Rounds a table to nearest; scales that several rows share suit the rows that are looked up most.

    Rows that were never looked up count a thousandth of a look-up: enough for a search of their own scales, too little
    to spoil those that they share.

    Args:
        table: the leaf.
        spec: of the codes.
        range_search: how to search for scales.
    """
    matrix = with_whole_groups(table, table.matrices, spec, 1)
    scale, zero_point, codes, before, after = _nearest_rows(matrix[0], table.counts.rows, spec, range_search)
    zero_point = None if zero_point is None else zero_point[None]
    leaf = sharded_like(stored(table, codes[None], scale[None], zero_point, spec), table.weight)
    errors = {"error_before": before[None], "error": after[None]}
    return leaf, entry_infos(table, functools.partial(RoundingInfo.of, leaf), errors=errors)


@functools.partial(jax.jit, static_argnames=("spec", "range_search"))
def _nearest_rows(
    w: Float32[Array, "D R"], counts: Float[Array, " R"], spec: QuantSpec, range_search: RangeSearch | None
) -> Any:
    scale, zero_point = searched_scales(w, spec, MATRIX, range_search, jnp.where(counts > 0, counts, 1e-3)[None])
    plain = searched_scales(w, spec, MATRIX, None)
    unit = unit_of(w)
    total = jnp.sum(counts * jnp.square(w / unit).sum(axis=0))

    def error(scale: Any, zero_point: Any) -> Any:
        lost = jnp.sum(counts * jnp.square((rounded(w, scale, zero_point, spec) - w) / unit).sum(axis=0))
        return jnp.where(total > 0, jnp.sqrt(lost / jnp.where(total > 0, total, 1.0)), 0.0)

    return scale, zero_point, round_to_codes(w, scale, zero_point, spec), error(*plain), error(scale, zero_point)
