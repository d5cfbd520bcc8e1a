"""Which range of a block its codes cover."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress._src.arrays.quantized import dequantize, split_blocks
from jaxcompress._src.quantization.blocks import reduced_axes
from jaxcompress._src.quantization.rounding import round_to_codes
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.solvers.outputs import unit_of

GRID = tuple(1 - step / 100 for step in range(80))
"""The factors of the range that "mse" tries, as GPTQ's code does."""

Scales = Callable[[Array, Array], tuple[Array, Array | None]]
"""`(low, high) -> (scale, zero point)`."""


def block_range(
    blocks: Float[Array, "..."], axes: tuple[int, ...], spec: QuantSpec
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The range of every block by "min-max" or "percentile", widened to contain 0.

    Args:
        blocks: from `split_blocks`.
        axes: those within a block; they are kept with size 1.
        spec: gives the rule; "mse" begins with the extreme values.

    Raises:
        ValueError: the rule is "entropy".
    """
    if spec.range_rule == "entropy":
        raise ValueError(
            "`range_rule` 'entropy' needs a histogram of many values: it is for the inputs of matmuls, by "
            "`input_ranges`; for weights take 'mse'."
        )
    if spec.range_rule != "percentile" or 0 in blocks.shape:
        high = blocks.max(axis=axes, keepdims=True, initial=0)
        return blocks.min(axis=axes, keepdims=True, initial=0), high
    if spec.symmetric:
        high = jnp.percentile(jnp.abs(blocks), spec.percentile, axis=axes, keepdims=True)
        return -high, high
    low, high = (jnp.percentile(blocks, q, axis=axes, keepdims=True) for q in (100 - spec.percentile, spec.percentile))
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def least_error_range(
    w: Float[Array, "..."],
    low: Float[Array, "..."],
    high: Float[Array, "..."],
    spec: QuantSpec,
    scales: Scales,
    *,
    bits: Any = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The range, among those of `GRID`, of least Σ|w - q(w)|^p in each block; the widest of equal ones.

    Args:
        w: the weights.
        low: the lower end of the full range.
        high: the upper end of the full range.
        spec: format, and p as `error_norm`.
        scales: how a range becomes scales.
        bits: of the codes, where they are traced.
    """
    if 0 in w.shape:
        return low, high
    unit = unit_of(w)

    def error(factor: Any) -> Array:
        scale, zero_point = scales(factor * low, factor * high)
        codes = round_to_codes(w, scale, zero_point, spec, bits=bits)
        off = jnp.abs(dequantize(codes, scale, zero_point, levels=spec.levels) - w.astype(jnp.float32))
        blocks = split_blocks((off / unit) ** spec.error_norm, scale.shape)
        return blocks.sum(axis=reduced_axes(w.shape, scale.shape), keepdims=True).reshape(low.shape)

    def better(best: Any, factor: Any) -> Any:
        loss = error(factor)
        # Not for errors that differ by rounding alone: the same range wins eagerly and inside `jit`.
        wins = loss < best[0] * (1 - 1e-5)
        return (jnp.where(wins, loss, best[0]), jnp.where(wins, factor, best[1])), None

    start = error(jnp.float32(1)), jnp.ones_like(low)
    (_, factor), _ = jax.lax.scan(better, start, jnp.asarray(GRID[1:], jnp.float32))
    return factor * low, factor * high
