"""HQQ: zero points from the weights alone, robust to outliers.

Shape letters: S stack entries, D inputs, R outputs, G groups of g inputs.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxcompress._src.arrays.quantized import dequantize, split_blocks
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.blocks import reduced_axes, scale_shape
from jaxcompress._src.quantization.leaf_matrix import (
    STACK,
    check_blocks,
    fitting,
    stored,
    with_whole_groups,
)
from jaxcompress._src.quantization.rounding import round_to_codes
from jaxcompress._src.quantization.rounding_info import RoundingInfo
from jaxcompress._src.quantization.scales import block_scales, cast_scale
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.tree.maps import with_leaves
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.infos import entry_infos
from jaxcompress._src.weights.matrices import MatrixLeaf, weight_leaves

Iterate = Literal["best", "legacy"]
"""Which zero points are taken: for every block the best ones met, or where the public solver stops."""


@on_auto_axes
def hqq(
    params: Params,
    spec: QuantSpec,
    *,
    iterations: int = 20,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterate: Iterate = "best",
    exact_zero: bool = False,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, RoundingInfo]]:
    """Half-quadratic quantization: zero points, not whole numbers, that leave few large errors.

    With scale s from the ranges (which need not contain 0), codes q = round(w / s + z) and errors w - (q - z) s, it
    alternates e = shrink(w - (q - z) s) and z = mean(q - (w - e) / s), where shrink(x) = sign(x) relu(|x| -
    |x|^(p-1) / β), p = `norm`, and β grows by κ each time. No data are used.

    With z a fraction, no code stands for exactly 0: every small weight is off by up to half a step. Where one input
    carries most of the energy and its weights are small (decoders of the Llama family have such inputs), that error
    alone makes the outputs worse than rounding to nearest. `exact_zero` is for those: z is the whole number of the
    range, which then contains 0, and the scale is solved for instead, s = Σ (w - e)(q - z) / Σ (q - z)².

    Args:
        params: the tree; compressed leaves count as the arrays they stand for.
        spec: asymmetric, 2 to 8 bits, with scales per output or group; zero points are stored as `spec.scale_dtype`.
        iterations: largest number of half-quadratic steps.
        norm: p of the l_p norm of the errors, in (0, 1).
        beta: β, the weight of the quadratic term, at the start.
        kappa: κ, by which β grows in each step.
        iterate: "best": for each block, of least mean |w - (q - z) s|. "legacy": as the public solver's default: it
            stops at the first step that does not lower the mean over the whole matrix, and takes the zero points after
            that step; as in that solver, ranges below 1e-4 are taken for none, so weights must not be very small.
        exact_zero: keep weights of 0 exact; no published variant. Zero points then take the bits of a code.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        `(params, info)`: a `QuantizedArray` for every selected leaf, and a `RoundingInfo` by path (`path[i]` for each
        entry of a stack). Its errors are those of the weights, ||W - W'|| / ||W||, before with the zero points of the
        ranges.

    Raises:
        ValueError: options out of range; a spec that is symmetric, or has scales e8m0 or another range rule; nothing is
            selected; a leaf that holds NaN or Inf, or whose axes the group size does not divide. Names the leaf.

    Example:
        >>> kernel = jnp.linspace(-1.0, 1.0, 64).reshape(32, 2).at[0, 0].set(9.0)
        >>> small, info = hqq({"kernel": kernel}, QuantSpec(bits=3, symmetric=False))
        >>> small["kernel"].zero_point.shape, small["kernel"].bits
        ((1, 2), 3)

    References:
        Badri and Shaji 2023, "Half-quadratic quantization of large machine learning models".
    """
    _check_options(spec, iterations, norm, beta, kappa, iterate)
    if exact_zero and iterate == "legacy":
        raise ValueError("`iterate='legacy'` is the public solver, whose zero points are fractions: no `exact_zero`.")
    leaves: dict[str, Any] = {}
    info: dict[str, RoundingInfo] = {}
    for entry in fitting(weight_leaves(params, select=select, layouts=layouts), spec, select):
        check_blocks(entry, spec)
        leaves[entry.path], leaf_info = _quantize(entry, spec, (iterations, norm, beta, kappa, iterate), exact_zero)
        info |= leaf_info
    return with_leaves(params, leaves), info


def _check_options(spec: QuantSpec, iterations: int, norm: float, beta: float, kappa: float, iterate: str) -> None:
    if iterate not in get_args(Iterate):
        raise ValueError(f"`iterate` must be one of {get_args(Iterate)}, got {iterate!r}.")
    if not spec.number_format.is_integer or spec.symmetric or spec.per_tensor or spec.group_outputs > 1:
        raise ValueError(
            "HQQ chooses zero points of integers for each output or group: give a spec with `symmetric=False`, 2 to 8 "
            f"bits, neither `per_tensor` nor tiles, got {spec}."
        )
    if spec.scale_dtype == "e8m0" or spec.range_rule != "min-max":
        raise ValueError(
            "HQQ starts from the extreme values and stores zero points as `scale_dtype`: give float32 or bfloat16 and "
            f"the range rule 'min-max', got {spec.scale_dtype!r} and {spec.range_rule!r}."
        )
    if iterations < 0 or not 0 < norm < 1 or not beta > 0 or not kappa >= 1:
        raise ValueError(
            "`iterations` must be at least 0, `norm` in (0, 1), `beta` positive and `kappa` at least 1, got "
            f"{iterations}, {norm}, {beta} and {kappa}."
        )


def _quantize(
    entry: MatrixLeaf, spec: QuantSpec, options: tuple[Any, ...], exact_zero: bool
) -> tuple[Any, dict[str, RoundingInfo]]:
    weights = entry.matrices
    # By the last weight, not by 0, which a range of HQQ need not contain.
    weights = with_whole_groups(entry, weights, spec, 1, mode="edge")
    solve = _solve_scales if exact_zero else _solve
    codes, scale, zero_point, before, after = solve(weights, spec, options)
    leaf = stored(entry, codes, scale, zero_point, spec)
    errors = {"error_before": before, "error": after}
    return leaf, entry_infos(entry, functools.partial(RoundingInfo.of, leaf), errors=errors)


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def _solve(weights: Float32[Array, "S D R"], spec: QuantSpec, options: tuple[Any, ...]) -> Any:
    stack, depth, width = weights.shape
    groups = scale_shape(weights.shape, spec, STACK)[1]
    blocks = weights.reshape(stack, groups, depth // max(groups, 1), width)
    top = 2.0**spec.bits - 1
    low = blocks.min(axis=2, keepdims=True, initial=jnp.inf)
    high = blocks.max(axis=2, keepdims=True, initial=-jnp.inf)
    # A block that hardly varies keeps scale 1; the public code says so by the range itself, however small weights are.
    legacy = options[-1] == "legacy"
    least = 1e-4 if legacy else 1e-4 * jnp.maximum(jnp.abs(low), jnp.abs(high))
    inverse = jnp.where(high - low <= least, 1.0, jnp.minimum(top / (high - low), 2e4 if legacy else jnp.inf))
    scale = (1.0 / inverse).astype(spec.scale_dtype)
    if spec.scale_dtype != "float32":
        inverse = 1.0 / scale.astype(jnp.float32)

    def codes_at(zero: Any) -> Any:
        return jnp.clip(jnp.round(blocks * inverse + zero), 0, top)

    start = -low * inverse
    zero = _zero_points(blocks, inverse, start, codes_at, options).astype(spec.scale_dtype)

    def error(zero: Any) -> Any:
        return _relative(blocks, (codes_at(zero) - zero) * scale.astype(jnp.float32))

    codes = codes_at(zero.astype(jnp.float32)).astype(jnp.uint8).reshape(weights.shape)
    return codes, scale[:, :, 0], zero[:, :, 0], error(start), error(zero.astype(jnp.float32))


def _zero_points(
    blocks: Float32[Array, "S G g R"],
    inverse: Float32[Array, "S G 1 R"],
    start: Float32[Array, "S G 1 R"],
    codes_at: Any,
    options: tuple[Any, ...],
) -> Float[Array, "S G 1 R"]:
    iterations, norm, beta, kappa, iterate = options
    # The public solver raises β in its other variant only; there κ has no effect on the default one.
    growth = kappa if iterate == "best" else 1.0

    def step(state: Any, k: Any) -> Any:
        zero, best, best_zero, going = state
        codes = codes_at(zero)
        gap = blocks - (codes - zero) / inverse
        size = jnp.abs(gap)
        if iterate == "best":
            error = size.mean(axis=2, keepdims=True)
            best_zero = jnp.where(error < best, zero, best_zero)
        else:
            error = size.mean(axis=(1, 2, 3), keepdims=True)
        shrunk = _shrink(gap, norm, beta * growth**k)
        moved = jnp.mean(codes - (blocks - shrunk) * inverse, axis=2, keepdims=True)
        # The step that no longer helps is still taken, and is the last.
        zero = jnp.where(going, moved, zero)
        return (zero, jnp.minimum(error, best), best_zero, going & (error < best) | (iterate == "best")), None

    shape = start.shape if iterate == "best" else (start.shape[0], 1, 1, 1)
    state = (start, jnp.full(shape, jnp.inf), start, jnp.ones(shape, bool))
    (zero, best, best_zero, _), _ = jax.lax.scan(step, state, jnp.arange(iterations))
    if iterate == "legacy":
        return zero
    last = jnp.abs(blocks - (codes_at(zero) - zero) / inverse).mean(axis=2, keepdims=True)
    return jnp.where(last < best, zero, best_zero)


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def _solve_scales(weights: Float32[Array, "S D R"], spec: QuantSpec, options: tuple[Any, ...]) -> Any:
    """Scales for the zero points of rounding to nearest, from whose scales it starts."""
    iterations, norm, beta, kappa, _ = options
    start, zero_point = block_scales(weights, spec, STACK)
    shape = split_blocks(weights, start.shape).shape
    axes = reduced_axes(weights.shape, start.shape)

    def rounded(scale: Any) -> Any:
        codes = round_to_codes(weights, scale, zero_point, spec)
        return codes, dequantize(codes, scale, zero_point).reshape(shape)

    def step(state: Any, k: Any) -> Any:
        scale, best, best_scale = state
        codes, values = rounded(scale)
        levels = dequantize(codes, jnp.ones(scale.shape), zero_point).reshape(shape)
        gap = weights.reshape(shape) - values
        error = jnp.abs(gap).mean(axis=axes, keepdims=True).reshape(scale.shape)
        best, best_scale = jnp.minimum(error, best), jnp.where(error < best, scale, best_scale)
        wanted = weights.reshape(shape) - _shrink(gap, norm, beta * kappa**k)
        energy = jnp.square(levels).sum(axis=axes, keepdims=True)
        moved = (wanted * levels).sum(axis=axes, keepdims=True) / jnp.where(energy > 0, energy, 1.0)
        usable = jnp.isfinite(moved) & (moved > jnp.finfo(jnp.float32).tiny)
        moved = cast_scale(jnp.where(usable, moved, 1.0).reshape(scale.shape), spec)
        return (jnp.where(usable.reshape(scale.shape), moved, scale), best, best_scale), None

    state = start, jnp.full(start.shape, jnp.inf), start
    (_, _, scale), _ = jax.lax.scan(step, state, jnp.arange(iterations + 1))
    (codes, values), (_, nearest) = rounded(scale), rounded(start)
    dense = weights.reshape(shape)
    return codes, scale, zero_point, _relative(dense, nearest), _relative(dense, values)


def _shrink(gap: Float32[Array, "..."], norm: float, beta: Any) -> Float32[Array, "..."]:
    size = jnp.abs(gap)
    return jnp.sign(gap) * jnp.maximum(size - size ** (norm - 1) / beta, 0.0)


def _relative(dense: Float32[Array, "S ..."], approximation: Float32[Array, "S ..."]) -> Float32[Array, " S"]:
    axes = tuple(range(1, dense.ndim))
    lost, total = jnp.square(dense - approximation).sum(axes), jnp.square(dense).sum(axes)
    return jnp.where(total > 0, jnp.sqrt(lost / jnp.where(total > 0, total, 1.0)), 0.0)
