"""Moving factors from the inputs of kernels into their weights, where the model allows it: SmoothQuant and AWQ.

Shape letters: S stack entries (1 of a leaf without a stack), D features that a fold shares, R outputs of one consumer.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.folded import as_matrix_inputs, by_stack, features, fold_statistic, moved, sizes
from jaxcompress._src.quantization.leaf_matrix import (
    MATRIX,
    check_blocks,
    fitting,
    stored,
    with_whole_groups,
)
from jaxcompress._src.quantization.range_search import RangeSearch, searched_scales
from jaxcompress._src.quantization.rounding import round_to_codes, rounded
from jaxcompress._src.quantization.rounding_info import FALLBACKS, RoundingInfo
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.solvers.outputs import output_errors, unit_of
from jaxcompress._src.trace.folds import Fold, FoldedLeaf
from jaxcompress._src.tree.maps import leaves_by_path, with_leaves
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.infos import entry_infos
from jaxcompress._src.weights.matrices import CalibratedLeaf, calibrated_leaves, checked_weight
from jaxcompress._src.weights.unseen import fill_unseen, warn_unseen

CLIP = RangeSearch(grid_size=10, shrink=0.5, norm=2.0, weighted=True)
"""AWQ's search for ranges: ten of them, down to a half."""


@on_auto_axes
def smooth(
    params: Params, statistics: Params, folds: Sequence[Fold], *, alpha: float = 0.5
) -> tuple[Params, dict[str, jax.Array]]:
    """SmoothQuant: the inputs of some kernels are divided, and their weights multiplied, by s_j for each feature j.

    s_j = max|x_j|^α / max|w_j|^(1 - α), the maximum of the weights over all consumers, both at least
    1e-5 of the largest feature. Outliers of
    the inputs, which suffer when activations are rounded, become outliers of weights, which suffer less. The function
    of the model stays the same. Stacked layers (`nn.scan`) get factors of their own, entry by entry.

    Args:
        params: the tree; plain leaves.
        statistics: from `calibration.input_statistics`, with "absolute_max", for one consumer of each fold at least.
        folds: from `trace.folds`: where that is possible.
        alpha: α, the share of the difficulty that moves into the weights, in [0, 1].

    Returns:
        `(params, factors)`: s by the paths of the consumers, (D,), or (*stack, D) with the outermost scan first.

    Raises:
        ValueError: `alpha` out of range; no folds; a fold without statistics, or with those of another width or
            stack or with NaN; a leaf with NaN: names it.

    Example:
        >>> from jaxcompress.calibration import input_statistics
        >>> from jaxcompress.trace import folds
        >>> def apply(p, x):
        ...     return (x * p["scale"][None]) @ p["kernel"]
        >>> params, x = {"scale": jnp.array([8.0, 1.0]), "kernel": jnp.ones((2, 2))}, jnp.ones((1, 2))
        >>> smoothed, factors = smooth(params, input_statistics(apply, params, [(x,)]), folds(apply, params, x))
        >>> (factors["kernel"] ** 2).round().tolist(), (smoothed["scale"] ** 2).round().tolist()
        ([8.0, 1.0], [8.0, 1.0])

    References:
        Xiao et al. 2023, "SmoothQuant: accurate and efficient post-training quantization for large language models",
        equation 4.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha}.")
    if not folds:
        raise ValueError("`folds` is empty: no factor can be moved in this model.")
    leaves, factors = leaves_by_path(params), {}
    for fold in folds:
        plain = [features(checked_weight(place.path, leaves[place.path]), place) for place in fold.consumers]
        largest = fold_statistic(fold, statistics, "absolute_max", leaves)
        weights = [jnp.abs(matrix).max(axis=2).astype(jnp.float32) for matrix in plain]
        of_weights = functools.reduce(jnp.maximum, weights)
        factor = _floored(largest) ** alpha / _floored(of_weights) ** (1 - alpha)
        factors |= {place.path: by_stack(factor, leaves[place.path], place) for place in fold.consumers}
        leaves |= moved(fold, leaves, factor)
    return with_leaves(params, leaves), factors


@on_auto_axes
def awq(
    params: Params,
    statistics: Params,
    spec: QuantSpec,
    *,
    folds: Sequence[Fold] = (),
    grid_size: int = 20,
    range_search: RangeSearch | None = CLIP,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, RoundingInfo]]:
    """AWQ: features with large inputs get finer steps, by factors that are moved into the leaves before them.

    For each fold, s_j = mean|x_j|^r / sqrt(max · min), r = 0, 1/grid_size, ...: the r of the least output error of all
    consumers together, ||X W - X q(s W) / s||², measured by XᵀX. Then the ranges are searched for, weighted by the
    inputs, and the weights rounded to nearest. Leaves without a fold get the search for ranges alone. Each entry of
    stacked layers (`nn.scan`) has an r of its own.

    Args:
        params: the tree; compressed leaves are rounded as the arrays they stand for.
        statistics: from `calibration.input_statistics`, with "gram" and "absolute_sum".
        spec: bits, granularity, variant.
        folds: from `trace.folds`.
        grid_size: number of exponents r.
        range_search: the search; None: the extreme values.
        select: which leaves are rounded; by default all that have statistics of contracted inputs.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out).

    Returns:
        `(params, info)`: a `QuantizedArray` for every leaf, the leaves before them divided, and a `RoundingInfo` by
        path (`path[i]` for each entry of a stack).

    Raises:
        ValueError: `grid_size` below 1; as `gptq` for leaves and statistics.

    Example:
        >>> from jaxcompress.calibration import input_statistics
        >>> params = {"kernel": jnp.array([[1.0], [0.3], [0.3]])}
        >>> x = jnp.array([[0.1, 4.0, 0.0], [0.0, 0.0, 4.0]])
        >>> statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(x,)])
        >>> _, info = awq(params, statistics, QuantSpec(bits=2))
        >>> info["kernel"].error < 0.9 * info["kernel"].error_before
        True

    References:
        Lin et al. 2024, "AWQ: activation-aware weight quantization for on-device LLM compression and acceleration".
    """
    if grid_size < 1:
        raise ValueError(f"`grid_size` must be at least 1, got {grid_size}.")
    calibrated = calibrated_leaves(params, statistics, needs="gram", select=select, layouts=layouts)
    by_path = {entry.path: entry for entry in fitting(calibrated, spec, select)}
    for entry in by_path.values():
        check_blocks(entry, spec)
    leaves, factors = leaves_by_path(params), {}
    leaves |= {path: entry.weight for path, entry in by_path.items()}
    for fold in folds:
        consumers = [(by_path[place.path], place) for place in fold.consumers if place.path in by_path]
        stacks = [entry.stack == sizes(entry.weight, place)[0] for entry, place in consumers]
        if len(consumers) != len(fold.consumers) or not all(stacks):
            continue
        factor = _best_factor(consumers, fold_statistic(fold, statistics, "absolute_mean", leaves), spec, grid_size)
        leaves |= moved(fold, leaves, factor)
        factors |= {entry.path: as_matrix_inputs(factor, entry.weight, place) for entry, place in consumers}
    info = {}
    for path, entry in by_path.items():
        leaves[path], leaf_info = _rounded_leaf(entry, leaves[path], factors.get(path), spec, range_search)
        info |= leaf_info
    warn_unseen({path: entry.unseen for path, entry in by_path.items()}, FALLBACKS["keep"])
    return with_leaves(params, leaves), info


def _floored(largest: Float[Array, "S D"]) -> Float[Array, "S D"]:
    """At least 1e-5 of the largest: not of 1, or it would depend on the scale of weights and inputs."""
    top = largest.max(axis=1, keepdims=True)
    return jnp.maximum(largest, jnp.where(top > 0, 1e-5 * top, 1.0))


def _best_factor(
    consumers: Sequence[tuple[CalibratedLeaf, FoldedLeaf]], mean: Float[Array, "S D"], spec: QuantSpec, grid_size: int
) -> Float32[Array, "S D"]:
    candidates, losses = [], []
    # One for all consumers, whose losses are added.
    unit = functools.reduce(jnp.maximum, [unit_of(entry.weight) for entry, _ in consumers])
    for r in np.arange(grid_size, dtype=np.float32) / grid_size:
        factor = jnp.maximum(mean, 1e-4) ** r
        factor = factor / jnp.sqrt(factor.max(axis=1, keepdims=True) * factor.min(axis=1, keepdims=True))
        lost = [
            _lost(
                with_whole_groups(entry, entry.matrices, spec, 1),
                with_whole_groups(entry, entry.gram, spec, 1, 2),
                with_whole_groups(entry, as_matrix_inputs(factor, entry.weight, place), spec, 1, fill=1.0),
                unit,
                spec,
            )
            for entry, place in consumers
        ]
        candidates.append(factor)
        losses.append(sum(np.asarray(loss, np.float64) for loss in lost))
    best = np.argmin(losses, axis=0)
    return jnp.stack(candidates)[best, np.arange(len(best))]


@functools.partial(jax.jit, static_argnames="spec")
def _lost(
    weights: Float32[Array, "S D R"],
    gram: Float[Array, "S D D"],
    factor: Float[Array, "S D"],
    unit: Float32[Array, ""],
    spec: QuantSpec,
) -> Float32[Array, " S"]:
    def one(parts: Any) -> Any:
        w, products, s = parts
        scaled = w * s[:, None]
        scale, zero_point = searched_scales(scaled, spec, MATRIX, None)
        gap = (rounded(scaled, scale, zero_point, spec) / s[:, None] - w) / unit
        return jnp.sum(gap * jnp.matmul(products, gap, precision=jax.lax.Precision.HIGHEST))

    return jax.lax.map(one, (weights, gram, factor))


def _rounded_leaf(
    entry: CalibratedLeaf, leaf: Any, factor: Any, spec: QuantSpec, range_search: RangeSearch | None
) -> tuple[Any, dict[str, RoundingInfo]]:
    gram = entry.gram
    # What reaches the leaf now has been divided.
    inverse = jnp.ones(gram.shape[:2]) if factor is None else 1.0 / factor
    divided = gram * inverse[:, :, None] * inverse[:, None]
    weights = entry.matrix(leaf).astype(jnp.float32)
    importance = fill_unseen(jnp.diagonal(divided, axis1=1, axis2=2), entry.unseen)
    dense = entry.matrices
    weights, dense, importance = (with_whole_groups(entry, x, spec, 1) for x in (weights, dense, importance))
    gram, divided = (with_whole_groups(entry, x, spec, 1, 2) for x in (gram, divided))
    groups = entry.layout.groups
    codes, scale, zero_point, error = _nearest(weights, divided, importance, spec, range_search, groups)
    before = _nearest(dense, gram, importance, spec, None, groups)[-1]
    small = stored(entry, codes, scale, zero_point, spec)
    errors = {"error_before": before, "error": error}
    return small, entry_infos(entry, functools.partial(RoundingInfo.of, small), errors=errors, unseen=entry.unseen)


@functools.partial(jax.jit, static_argnames=("spec", "range_search", "groups"))
def _nearest(
    weights: Float32[Array, "S D R"],
    gram: Float[Array, "S D D"],
    importance: Float[Array, "S D"],
    spec: QuantSpec,
    range_search: Any,
    groups: int,
) -> Any:
    def one(parts: Any) -> Any:
        w, counts = parts
        scale, zero_point = searched_scales(w, spec, MATRIX, range_search, counts[:, None])
        return round_to_codes(w, scale, zero_point, spec), scale, zero_point, rounded(w, scale, zero_point, spec)

    codes, scale, zero_point, nearest = jax.lax.map(one, (weights, importance))
    return codes, scale, zero_point, output_errors(gram, weights, nearest, groups=groups)
