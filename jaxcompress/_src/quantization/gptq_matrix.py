"""GPTQ on one matrix: arrays only.

Shape letters: D inputs, R outputs, G groups of inputs.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Integer, Num

from jaxcompress._src.quantization.leaf_matrix import MATRIX
from jaxcompress._src.quantization.range_search import RangeSearch, searched_scales
from jaxcompress._src.quantization.rounding import round_to_codes, rounded, values_of
from jaxcompress._src.quantization.scales import cast_scale
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.solvers.cholesky import inverse_factor
from jaxcompress._src.solvers.columns import solve_columns, solve_groups
from jaxcompress._src.solvers.descent import coordinate_descent, least_squares_scales
from jaxcompress._src.solvers.hessian import check_damping
from jaxcompress._src.solvers.outputs import not_worse, unit_of
from jaxcompress._src.solvers.rows import row

Order = Literal["natural", "activation"]
"""In which order the inputs of a leaf are rounded: as they are stored, or those of most energy first."""

GroupScales = Literal["static", "updated"]
"""Scales from the weights as they were, or as they are when their group begins.

Updated weights carry the errors of those before them, and their ranges grow: with symmetric codes of 2 bits the model
as a whole can end up worse than rounded to nearest.
"""

# Damping below this does not hold weights along directions that no input has.
_LITTLE = 1e-4


class Rule(NamedTuple):
    """The options; hashable, so that leaves of one shape share a compilation."""

    spec: QuantSpec
    order: Order = "activation"
    group_scales: GroupScales = "static"
    range_search: RangeSearch | None = None
    refine: int = 0
    block_size: int = 128


class Solved(NamedTuple):
    """Codes and scales of one matrix, what they stand for, and what it took."""

    codes: Integer[Array, "D R"]
    scale: Array
    zero_point: Array | None
    weights: Float32[Array, "D R"]
    damping: Float32[Array, ""]
    retries: Int[Array, ""]


def check_rule(rule: Rule, damping: float, ridge: float) -> None:
    """Raises for options that are out of range, or exclude each other."""
    if rule.order not in get_args(Order):
        raise ValueError(f"`order` must be one of {get_args(Order)}, got {rule.order!r}.")
    if rule.group_scales not in get_args(GroupScales):
        raise ValueError(f"`group_scales` must be one of {get_args(GroupScales)}, got {rule.group_scales!r}.")
    if (rule.order, rule.group_scales) == ("activation", "updated"):
        raise ValueError("`group_scales='updated'` needs `order='natural'`: otherwise no group is finished as a whole.")
    check_damping(damping, ridge)
    if rule.block_size < 1 or rule.refine < 0:
        raise ValueError(
            f"`block_size` must be at least 1 and `refine` at least 0, got {rule.block_size} and {rule.refine}."
        )


def gptq_matrix(
    targets: Float32[Array, "D R"], hessian: Float32[Array, "D D"], damping: Any, rule: Rule, *, bits: Any = None
) -> Solved:
    """Codes W' that make tr((T - W')ᵀ H (T - W')) small.

    Args:
        targets: T.
        hessian: H, with a positive diagonal.
        damping: share of the mean diagonal that is added to H; grows until H can be factored.
        rule: the options.
        bits: of integers, where they are traced instead of those of `rule.spec`; whole numbers in [2, 8].
    """
    spec, importance = rule.spec, jnp.diagonal(hessian)
    by_energy = rule.order == "activation"
    order = jnp.argsort(-importance, stable=True) if by_energy else jnp.arange(len(importance))
    factor = inverse_factor(hessian[order][:, order], damping)
    if rule.group_scales == "updated" and spec.group_size is not None:
        weights, (scale, zero_point) = _with_updated_groups(targets, factor.factor, importance, rule, bits)
    else:
        scale, zero_point = searched_scales(targets, spec, MATRIX, rule.range_search, importance[:, None], bits=bits)
        round_input = _round_input(scale, zero_point, order, spec, bits)
        solution = solve_columns(
            targets[order],
            factor.factor,
            block_size=rule.block_size,
            quantize_column=lambda w, _, i: round_input(w, i),
        )
        weights = jnp.zeros_like(solution).at[order].set(solution)
    nearest = rounded(targets, scale, zero_point, spec, bits=bits)
    if not rule.refine:
        # Published GPTQ stays what it is, but for inputs that are linearly dependent and hardly damped.
        risky = (factor.retries > 0) | (jnp.asarray(damping) < _LITTLE)
        weights = jax.lax.cond(risky, lambda: not_worse(weights, nearest, targets, hessian), lambda: weights)
    else:
        weights = not_worse(weights, nearest, targets, hessian)
        whole = hessian + factor.damping * importance.mean() * jnp.eye(len(importance), dtype=jnp.float32)
        weights, scale = refined(weights, scale, zero_point, targets, whole, spec, rule.refine, bits=bits)
    codes = round_to_codes(weights, scale, zero_point, spec, bits=bits)
    return Solved(codes, scale, zero_point, weights, factor.damping, factor.retries)


def refined(
    weights: Float32[Array, "D R"],
    scale: Array,
    zero_point: Num[Array, "..."] | None,
    targets: Float32[Array, "D R"],
    hessian: Float32[Array, "D D"],
    spec: QuantSpec,
    rounds: int,
    *,
    bits: Any = None,
) -> tuple[Float32[Array, "D R"], Array]:
    """Least-squares scales for the codes, then coordinate descent of the codes, in turn; no output gets worse.

    Scales that are shared by several outputs, and those that the format fixes, stay as they are.

    Args:
        weights: weights that can be stored with these scales.
        scale: of each block.
        zero_point: of each block; stays as it is.
        targets: T.
        hessian: H, damped.
        spec: gives the codes.
        rounds: how often.
        bits: of integers, where they are traced.
    """
    depth, width = weights.shape
    unit = unit_of(targets)
    fits = scale.shape[1] == width and spec.number_format.has_free_scale

    def loss(weights: Any, slope: Any) -> Any:
        return jnp.sum((weights - targets) / unit * (slope / unit), axis=0)

    def turn(state: Any, _: Any) -> Any:
        weights, scale, before = state
        fitted, start = scale, weights
        if fits:
            values = values_of(weights, scale, zero_point, spec, bits=bits)
            best_scales = least_squares_scales(values, targets, hessian, scale.astype(jnp.float32))
            usable = jnp.isfinite(best_scales) & (best_scales > jnp.finfo(jnp.float32).tiny)
            fitted = jnp.where(usable, cast_scale(jnp.where(usable, best_scales, 1.0), spec), scale)
            start = values * jnp.repeat(fitted.astype(jnp.float32), depth // len(fitted), axis=0)
        round_input = _round_input(fitted, zero_point, jnp.arange(depth), spec, bits)
        start, slope = coordinate_descent(start, targets, hessian, round_input)
        after = loss(start, slope)
        better = after < before
        scale = jnp.where(better[None] if fits else True, fitted, scale)
        return (jnp.where(better[None], start, weights), scale, jnp.where(better, after, before)), None

    slope = jnp.matmul(hessian, weights - targets, precision=jax.lax.Precision.HIGHEST)
    (weights, scale, _), _ = jax.lax.scan(turn, (weights, scale, loss(weights, slope)), length=rounds)
    return weights, scale


def _round_input(scale: Array, zero_point: Array | None, order: Int[Array, " D"], spec: QuantSpec, bits: Any) -> Any:
    """The nearest weights that can be stored, for all outputs of one input, by its place in an order."""
    # Laid out for every input: a loop that computes which group a row is of, for each of its entries, is slow.
    groups = order // (len(order) // scale.shape[0])
    scales = scale[groups]
    zeros = None if zero_point is None else jnp.broadcast_to(zero_point, scale.shape)[groups]

    def column(w: Any, index: Any) -> Any:
        zero_row = None if zeros is None else row(zeros, index)[None]
        return rounded(w[None], row(scales, index)[None], zero_row, spec, bits=bits)[0]

    return column


def _with_updated_groups(
    targets: Float32[Array, "D R"],
    factor: Float32[Array, "D D"],
    importance: Float32[Array, " D"],
    rule: Rule,
    bits: Any,
) -> tuple[Array, tuple[Array, Array | None]]:
    size = rule.spec.group_size
    assert size is not None  # the caller looked
    spec = dataclasses.replace(rule.spec, group_size=None, partial_groups=False)

    def start(w: Any, first: Any) -> Any:
        energies = jax.lax.dynamic_slice_in_dim(importance, first, size)[:, None]
        scale, zero_point = searched_scales(w, spec, MATRIX, rule.range_search, energies, bits=bits)
        return scale[0], None if zero_point is None else jnp.broadcast_to(zero_point, scale.shape)[0]

    def column(w: Any, parameters: Any, _: Any) -> Any:
        scale, zero_point = parameters
        zero_row = None if zero_point is None else zero_point[None]
        return rounded(w[None], scale[None], zero_row, spec, bits=bits)[0]

    # GroupScales beyond a block must be a multiple of it.
    block = rule.block_size
    if size >= block:
        block = max(part for part in range(1, block + 1) if size % part == 0)
    return solve_groups(targets, factor, quantize_column=column, start_group=start, group_size=size, block_size=block)
