"""Static ranges of the inputs of weights, from calibration data."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxcompress._src.arrays.quantized import dequantize
from jaxcompress._src.calibration.histogram import Histogram
from jaxcompress._src.calibration.input_statistics import batch_statistics, input_statistics
from jaxcompress._src.calibration.statistics import InputStatistics, LookupCounts
from jaxcompress._src.quantization.entropy import entropy_clip
from jaxcompress._src.quantization.inputs import InputRange, check_input_spec
from jaxcompress._src.quantization.lsq import InitialScales
from jaxcompress._src.quantization.ranges import GRID
from jaxcompress._src.quantization.rounding import round_to_codes
from jaxcompress._src.quantization.scales import range_scales
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.unselected import Unselected
from jaxcompress._src.types import Params, Selector


def input_ranges(
    apply: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    spec: QuantSpec,
    *,
    row_mask: Callable[..., Any] | None = None,
    momentum: float | None = None,
    initial_scales: InitialScales = "range",
    select: Selector | None = None,
) -> Params:
    """The range of what each weight is multiplied with, by the range rule of a spec.

    "min-max" takes the extreme values. The others are found from a histogram of 2048 bins to each side of 0:
    "percentile" of |x| (symmetric) or of both tails; "mse" the range of least mean |x - q(x)|^`error_norm` among the
    fractions of the extreme values that weights try, too; "entropy" the clip of |x| that `entropy_clip` finds.

    A stack entry that no row reached (an expert without tokens) gets a range that holds those of all others.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: plain or compressed.
        batches: tuples of inputs.
        spec: of the inputs; `per_tensor`.
        row_mask: as in `calibration.input_statistics`, so that padding does not count.
        momentum: m in [0, 1): a running range instead, r <- m r + (1 - m) r_batch, beginning with the first batch.
            None: one range of all values.
        initial_scales: "mean" gives 2 mean|x| / sqrt(Q_P) instead, where LSQ begins; for symmetric specs.
        select: which leaves; by default every one that is multiplied.

    Returns:
        A partial tree of `InputRange`, for `quantize_inputs` and, as `statistics`, for `lsq_inputs` and `pact_inputs`.

    Raises:
        ValueError: the spec is not `per_tensor`; `momentum` out of range; as `calibration.input_statistics`.

    Example:
        >>> batches = [(jnp.array([[1.0, -2.54]]),), (jnp.array([[0.5, 0.0]]),)]
        >>> spec = QuantSpec(bits=8, per_tensor=True)
        >>> ranges = input_ranges(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((2, 3))}, batches, spec)
        >>> round(float(ranges["kernel"].scale), 4)
        0.02

    References:
        Jacob et al., 2018 (running ranges); Migacz, "8-bit inference with TensorRT", 2017 (entropy).
    """
    check_input_spec(spec, static=True)
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
    if initial_scales == "mean" and not spec.symmetric:
        raise ValueError("`initial_scales` 'mean' is for symmetric specs; take 'range'.")
    gather = {"select": select, "row_mask": row_mask, "statistics": ("histogram",)}
    find = functools.partial(_ends, spec=spec, initial_scales=initial_scales)
    if momentum is None:
        ends = _of_leaves(find, input_statistics(apply, params, batches, **gather))
    else:
        by_batch = (_of_leaves(find, each) for each in batch_statistics(apply, params, batches, **gather))
        ends = functools.reduce(functools.partial(jax.tree.map, functools.partial(_mixed, momentum)), by_batch)
    if not jax.tree.leaves(ends):
        raise ValueError("No selected leaf is multiplied by an input: tables that are only looked up have no range.")
    for path, pair in leaves_with_paths(ends):
        if bool(jnp.isnan(pair).all()):
            raise ValueError(f"Leaf {path!r} got no rows of inputs in any batch: it has no range; exclude it.")
    return jax.tree.map(lambda pair: InputRange(*range_scales(*_filled(pair), spec)), ends)


def _of_leaves(find: Callable[[Histogram], Array], statistics: Params) -> Params:
    def visit(entry: InputStatistics | LookupCounts) -> Any:
        return find(entry.histogram) if isinstance(entry, InputStatistics) else Unselected

    return jax.tree.map(visit, statistics, is_leaf=lambda x: isinstance(x, InputStatistics | LookupCounts))


def _mixed(momentum: float, old: Array, new: Array) -> Array:
    """A batch that does not reach an entry leaves its range as it is."""
    mean = momentum * old + (1 - momentum) * new
    return jnp.where(jnp.isnan(new), old, jnp.where(jnp.isnan(old), new, mean))


def _filled(ends: Array) -> tuple[Array, Array]:
    """The lowest and highest values; stack entries that no row reached get a range that holds those of the others."""
    low, high = ends
    return jnp.where(jnp.isnan(low), jnp.nanmin(low), low), jnp.where(jnp.isnan(high), jnp.nanmax(high), high)


def _ends(histogram: Histogram, *, spec: QuantSpec, initial_scales: InitialScales) -> Array:
    """(2, stack...): the lowest and the highest value of the range, for each stack entry; NaN without any value."""
    stack = histogram.lowest.shape
    parts = [np.asarray(part, np.float64).reshape(math.prod(stack), -1) for part in _parts(histogram)]
    ends = [_entry_ends(*entry, spec=spec, initial_scales=initial_scales) for entry in zip(*parts, strict=True)]
    return jnp.asarray(np.array(ends).T.reshape(2, *stack), jnp.float32)


def _parts(histogram: Histogram) -> list[Any]:
    return [histogram.counts, histogram.limit, histogram.lowest, histogram.highest]


def _entry_ends(
    counts: np.ndarray,
    limit: np.ndarray,
    lowest: np.ndarray,
    highest: np.ndarray,
    *,
    spec: QuantSpec,
    initial_scales: InitialScales,
) -> tuple[float, float]:
    low, high, half = float(lowest[0]), float(highest[0]), len(counts) // 2
    if not counts.any():
        return math.nan, math.nan
    edges = np.linspace(-limit[0], limit[0], len(counts) + 1)
    sizes, upper = counts[half:] + counts[:half][::-1], edges[half + 1 :]
    if initial_scales == "mean":
        mean = float(sizes @ (upper - upper[0] / 2)) / max(sizes.sum(), 1)
        steps = spec.number_format.steps_above_zero
        clip = 2 * mean / math.sqrt(steps) * steps
    elif spec.range_rule == "entropy":
        levels = 2 ** (spec.bits - 1) if low < 0 else 2**spec.bits
        clip = upper[entropy_clip(sizes, levels=levels) - 1]
    elif spec.range_rule == "percentile" and spec.symmetric:
        clip = _quantile(sizes, upper, spec.percentile / 100)
    elif spec.range_rule == "percentile":
        share = spec.percentile / 100
        low = max(low, min(-_quantile(counts[::-1], -edges[:-1][::-1], share), 0.0))
        return low, min(high, max(_quantile(counts, edges[1:], share), 0.0))
    elif spec.range_rule == "mse":
        factor = float(_least_error(jnp.asarray(counts), jnp.asarray(edges), low, high, spec))
        return factor * low, factor * high
    else:
        return low, high
    # "mean" is a rule for the scale, and may lie beyond the largest value.
    return (-clip, clip) if initial_scales == "mean" else (max(low, -clip), min(high, clip))


def _quantile(counts: np.ndarray, upper: np.ndarray, share: float) -> float:
    """The upper end of the first bin up to which at least this share of the values lies."""
    total = np.cumsum(counts)
    return float(upper[np.searchsorted(total, share * total[-1])])


@functools.partial(jax.jit, static_argnames="spec")
def _least_error(counts: Array, edges: Array, low: Any, high: Any, spec: QuantSpec) -> Array:
    """The factor of the range of least error, each bin standing for its middle; the widest of equal ones."""
    factors = jnp.asarray(GRID, jnp.float32)[:, None]
    scale, zero_point = range_scales(factors * low, factors * high, spec)
    values = jnp.broadcast_to((edges[1:] + edges[:-1]) / 2, (len(GRID), len(counts))).astype(jnp.float32)
    codes = round_to_codes(values, scale, zero_point, spec)
    off = jnp.abs(dequantize(codes, scale, zero_point, levels=spec.levels) - values) ** spec.error_norm
    return factors[jnp.argmin(off @ counts.astype(jnp.float32)), 0]
