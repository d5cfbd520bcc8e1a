"""Moving factors from the inputs of kernels into their weights, where the model allows it: SmoothQuant and AWQ.

Shape letters: D features that a fold shares, R outputs of one consumer.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxcompress.calibration import Calibrated, InputStatistics, calibrated, checked_weight, entries
from jaxcompress.quantization._leaf_matrix import MATRIX, check_blocks, rounded, stored, with_new_leaves
from jaxcompress.quantization._range_search import RangeSearch, searched_scales
from jaxcompress.quantization._rounding import round_to_codes
from jaxcompress.quantization._rounding_info import RoundingInfo
from jaxcompress.quantization._spec import QuantSpec
from jaxcompress.solvers import output_error
from jaxcompress.trace import Fold
from jaxcompress.tree import leaves_with_paths
from jaxcompress.types import Params, Selector

CLIP = RangeSearch(steps=10, shrink=0.5, norm=2.0, weighted=True)
"""AWQ's search for ranges: ten of them, down to a half."""


def smooth(
    params: Params, statistics: Params, folds: Sequence[Fold], *, strength: float = 0.5
) -> tuple[Params, dict[str, jax.Array]]:
    """SmoothQuant: the inputs of some kernels are divided, and their weights multiplied, by s_j for each feature j.

    s_j = max|x_j|^α / max|w_j|^(1 - α), the maximum of the weights over all consumers, both at least 1e-5. Outliers of
    the inputs, which suffer when activations are rounded, become outliers of weights, which suffer less. The function
    of the model stays the same.

    Args:
        params: the tree; plain leaves.
        statistics: from `calibration.input_statistics`, with "absolute_max", for one consumer of each fold at least.
        folds: from `trace.folds`: where that is possible.
        strength: α, in [0, 1].

    Returns:
        `(params, factors)`: s by the paths of the consumers.

    Raises:
        ValueError: `strength` out of range; no folds; a fold without statistics, or with those of another width or with
            NaN; a leaf with NaN: names it.

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
    if not 0 <= strength <= 1:
        raise ValueError(f"`strength` must be in [0, 1], got {strength}.")
    if not folds:
        raise ValueError("`folds` is empty: no factor can be moved in this model.")
    leaves, factors = dict(leaves_with_paths(params)), {}
    for fold in folds:
        plain = [_features_first(checked_weight(path, leaves[path]), axes) for path, axes in fold.consumers]
        largest = _statistic(fold, statistics, "absolute_max", len(plain[0]))
        weights = [jnp.abs(features).max(axis=1) for features in plain]
        of_weights = functools.reduce(jnp.maximum, [w.astype(jnp.float32) for w in weights])
        factor = jnp.maximum(largest, 1e-5) ** strength / jnp.maximum(of_weights, 1e-5) ** (1 - strength)
        leaves |= _moved(fold, leaves, factor)
        factors |= dict.fromkeys((path for path, _ in fold.consumers), factor)
    return with_new_leaves(params, leaves), factors


def awq(
    params: Params,
    statistics: Params,
    spec: QuantSpec,
    *,
    folds: Sequence[Fold] = (),
    steps: int = 20,
    ranges: RangeSearch | None = CLIP,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, RoundingInfo]]:
    """AWQ: features with large inputs get finer steps, by factors that are moved into the leaves before them.

    For each fold, s_j = mean|x_j|^r / sqrt(max · min), r = 0, 1/steps, ...: the r of the least output error of all
    consumers together, ||X W - X q(s W) / s||², measured by XᵀX. Then the ranges are searched for, weighted by the
    inputs, and the weights rounded to nearest. Leaves without a fold get the search for ranges alone.

    Args:
        params: the tree; plain leaves.
        statistics: from `calibration.input_statistics`, with "gram" and "absolute_sum".
        spec: bits, granularity, variant.
        folds: from `trace.folds`.
        steps: number of exponents r.
        ranges: the search; None: the extreme values.
        select: which leaves are rounded; by default all that have statistics of contracted inputs.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out).

    Returns:
        `(params, info)`: a `QuantizedArray` for every leaf, the leaves before them divided, and a `RoundingInfo` by
        path.

    Raises:
        ValueError: `steps` below 1; as `gptq` for leaves and statistics.

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
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    chosen = calibrated(params, statistics, needs="gram", select=select, layouts=layouts)
    by_path: dict[str, Calibrated] = {entry.path: entry for entry in entries(chosen)}
    for entry in by_path.values():
        check_blocks(entry, spec)
    leaves, factors = dict(leaves_with_paths(params)), {}
    for fold in folds:
        own = [by_path[path] for path, _ in fold.consumers if path in by_path]
        if len(own) != len(fold.consumers) or any(entry.stack != 1 for entry in own):
            continue
        width = math.prod(leaves[own[0].path].shape[axis] for axis in fold.consumers[0][1])
        factor = _best_factor(own, _statistic(fold, statistics, "absolute_mean", width), spec, steps)
        leaves |= _moved(fold, leaves, factor)
        factors |= dict.fromkeys((entry.path for entry in own), factor)
    info = {}
    for path, entry in by_path.items():
        leaves[path], info[path] = _rounded_leaf(entry, leaves[path], factors.get(path), spec, ranges)
    return with_new_leaves(params, leaves), info


def _best_factor(own: list[Calibrated], mean: Float[Array, " D"], spec: QuantSpec, steps: int) -> Float32[Array, " D"]:
    candidates, losses = [], []
    for r in np.arange(steps, dtype=np.float32) / steps:
        factor = jnp.maximum(mean, 1e-4) ** r
        factor = factor / jnp.sqrt(factor.max() * factor.min())
        lost = [
            _lost(entry.matrix(entry.weight)[0].astype(jnp.float32), entry.statistics.gram, factor, spec)
            for entry in own
        ]
        candidates.append(factor)
        losses.append(sum(float(loss) for loss in lost))
    return candidates[int(np.argmin(losses))]


@functools.partial(jax.jit, static_argnames="spec")
def _lost(w: Float32[Array, "D R"], gram: Float[Array, "D D"], factor: Float[Array, " D"], spec: QuantSpec) -> Array:
    scaled = w * factor[:, None]
    scale, zero_point = searched_scales(scaled, spec, MATRIX, None)
    gap = rounded(scaled, scale, zero_point, spec) / factor[:, None] - w
    return jnp.sum(gap * jnp.matmul(gram, gap, precision=jax.lax.Precision.HIGHEST))


def _rounded_leaf(
    entry: Calibrated, leaf: Any, factor: Any, spec: QuantSpec, ranges: RangeSearch | None
) -> tuple[Any, RoundingInfo]:
    gram = entry.flat(entry.statistics.gram, ndim=2)
    # What reaches the leaf now has been divided.
    inverse = jnp.ones(gram.shape[1:2]) if factor is None else 1.0 / factor
    own = gram * inverse[None, :, None] * inverse[None, None]
    weights = entry.matrix(leaf).astype(jnp.float32)
    codes, scale, zero_point, found = _nearest(weights, own, spec, ranges)
    before = _nearest(entry.matrix(entry.weight).astype(jnp.float32), gram, spec, None)[-1]
    small = stored(entry, codes, scale, zero_point, spec)
    return small, RoundingInfo.of(small, error_before=float(before), error=float(found))


@functools.partial(jax.jit, static_argnames=("spec", "ranges"))
def _nearest(weights: Float32[Array, "S D R"], gram: Float[Array, "S D D"], spec: QuantSpec, ranges: Any) -> Any:
    def one(parts: Any) -> Any:
        w, own = parts
        scale, zero_point = searched_scales(w, spec, MATRIX, ranges, jnp.diagonal(own)[:, None])
        return round_to_codes(w, scale, zero_point, spec), scale, zero_point, rounded(w, scale, zero_point, spec)

    codes, scale, zero_point, found = jax.lax.map(one, (weights, gram))
    return codes, scale, zero_point, output_error(gram, weights, found)


def _statistic(fold: Fold, statistics: Params, name: str, width: int) -> Float32[Array, " D"]:
    """A statistic of the features, from any of the consumers (all have the same inputs)."""
    found = dict(leaves_with_paths(statistics, is_leaf=lambda leaf: isinstance(leaf, InputStatistics)))
    for path, _ in fold.consumers:
        entry = found.get(path)
        if isinstance(entry, InputStatistics) and getattr(entry, name) is not None:
            return _checked(path, getattr(entry, name), width)
    raise ValueError(f"Leaf {fold.consumers[0][0]!r} has no statistic {name!r}; gather it with `input_statistics`.")


def _checked(path: str, statistic: Any, width: int) -> Any:
    if statistic.shape != (width,):
        raise ValueError(f"Leaf {path!r} has {width} inputs, its statistics have shape {statistic.shape}.")
    if not bool(jnp.isfinite(statistic).all()):
        raise ValueError(f"The statistics of leaf {path!r} hold NaN or Inf.")
    return statistic


def _moved(fold: Fold, leaves: Mapping[str, Any], factor: Float[Array, " D"]) -> dict[str, jax.Array]:
    changed = {path: _scaled(leaves[path], axes, factor) for path, axes in fold.consumers}
    return changed | {path: _scaled(leaves[path], axes, 1.0 / factor) for path, axes in fold.producers}


def _scaled(leaf: Any, axes: tuple[int, ...], factor: Float[Array, " D"]) -> jax.Array:
    """A leaf times one factor for each feature; several axes, flattened in the order given, are the features."""
    order = np.argsort(axes)
    spread = factor.reshape([leaf.shape[axis] for axis in axes]).transpose(order.tolist())
    shape = [leaf.shape[axis] if axis in axes else 1 for axis in range(leaf.ndim)]
    return (leaf.astype(jnp.float32) * spread.reshape(shape)).astype(leaf.dtype)


def _features_first(leaf: Any, axes: tuple[int, ...]) -> jax.Array:
    size = math.prod(leaf.shape[axis] for axis in axes)
    return jnp.moveaxis(leaf, axes, tuple(range(len(axes)))).reshape(size, -1)
