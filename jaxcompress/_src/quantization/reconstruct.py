"""Rounding kernel after kernel, each of which makes up for what the ones before have lost.

Shape letters: D inputs of a kernel, R outputs.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32

from jaxcompress._src.arrays.quantized import QuantizedArray, dequantize
from jaxcompress._src.calibration.layer_by_layer import layer_by_layer
from jaxcompress._src.calibration.leaf_part import LeafPart, entry_of
from jaxcompress._src.calibration.moments import Moments, flat_weights, moments, pooled, relative_error
from jaxcompress._src.calibration.sites import kernels_at_work
from jaxcompress._src.meshes import on_auto_axes, sharded_like, shared_mesh, spread
from jaxcompress._src.quantization.blocks import PARTIAL, cut
from jaxcompress._src.quantization.fake_quant import fake_quantize_array
from jaxcompress._src.quantization.gptq_matrix import GroupScales, Order, Rule, Solved, check_rule, gptq_matrix
from jaxcompress._src.quantization.leaf_matrix import (
    check_blocks,
    plain_kernels,
    stored,
    with_whole_groups,
    without_filling,
)
from jaxcompress._src.quantization.range_search import BEST_RANGES, RangeSearch
from jaxcompress._src.quantization.rounding_info import FALLBACKS, RoundingInfo
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.solvers.cholesky import damped_cholesky
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.trace.layouts import layouts as traced_layouts
from jaxcompress._src.trace.left_out import warn_left_out
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, map_with_path, with_leaves
from jaxcompress._src.types import Params, Selector, is_compressed
from jaxcompress._src.weights.matrices import MatrixLeaf, weight_leaves
from jaxcompress._src.weights.selection import misfits
from jaxcompress._src.weights.unseen import Unseen, check_unseen, unseen_counts, warn_unseen

Targets = Literal["dense", "weights"]
"""What a kernel comes close to: what the dense model writes, or its own weights on the inputs that it gets."""


def reconstruct(
    apply: Callable[..., Any],
    params: Params,
    batches: Iterable[tuple[Any, ...]],
    spec: QuantSpec | Callable[[str], QuantSpec],
    *,
    order: Order = "activation",
    group_scales: GroupScales = "static",
    range_search: RangeSearch | None = BEST_RANGES,
    refine: int = 2,
    targets: Targets = "dense",
    ridge: float = 0.1,
    damping: float = 0.01,
    unseen: Unseen = "keep",
    bias: bool = True,
    row_mask: Callable[..., Any] | None = None,
    select: Selector | None = None,
) -> tuple[Params, dict[str, RoundingInfo]]:
    """GPTQ in one pass through the model, with targets that undo the errors so far.

    Kernel after kernel, in the order of the model, with everything before it already rounded: with x what the rounded
    model feeds into the kernel W, r what its output is added to, and t = y W + b + s the same of the dense model,

        T = argmin Σ |x T + b' + r - t|² + ridge mean(diag Σ x xᵀ) |T - W|²,

    which least squares give; then T is rounded by GPTQ in the metric Σ x xᵀ (about the mean, if the bias b' is free),
    and `refine` rounds of least-squares scales and coordinate descent follow. So a sublayer also makes up for the
    errors in the residual stream that it adds to. Both models run side by side, once.

    On a mesh, batches that are sharded stay so wherever the model stops: each device sums up its rows, a batch at a
    time, and rounds its share of a kernel's outputs (all, where devices do not divide them). Leaves come back with
    the sharding that they had, their codes and scales where it divides those.

    Args:
        apply: `(params, *inputs) -> outputs`; kernels may be on either side of their matmul (`x @ w`, `w @ x`). The
            layers of a scan, and the entries `w[i]` of a stack, are rounded one after another. A kernel that several
            matmuls share (ALBERT) is fitted to all of them at once: to the rows of all, as they are when the model has
            been rounded so far; its biases stay.
        params: the dense tree. Leaves that are compressed already stay as they are.
        batches: tuples of inputs; no labels are needed. All wait at the same kernel: memory for what one layer holds
            for all of them, twice.
        spec: bits, granularity, variant; or a function of the path.
        order: "activation" begins with the inputs of most energy (act-order); "natural": in the order of the leaf.
        group_scales: "static": all scales come from the weights as they were. "updated": those of a group from the
            weights as they are when it begins, in natural order only.
        range_search: how to search for scales; None: by the extreme values, as published.
        refine: rounds of least-squares scales and coordinate descent of the codes; 0: none, as published.
        targets: "dense": T as above. "weights": T = W, which is GPTQ as published, in sequence; without `refine`,
            `range_search` and `bias`, exactly so.
        ridge: how much T is held to W; the rows must tell more than noise about it. MiniLM (2 bits, asymmetric, groups
            of 32, 128 film reviews, 3 seeds) has sentence-vector errors of .407 on other film reviews and .566 on news
            with .1, .399 and .555 with .3; the KL of its classes is .018 and .022, .018 and .025.
        damping: λ, share of the mean diagonal that is added to XᵀX; grows tenfold until the matrix can be factored.
        unseen: what becomes of inputs that are 0 in every row. "keep": their weights are rounded to nearest. "zero":
            they become 0.
        bias: fit the bias too, where one is added to the output and nothing else reads it; it stays a float.
        row_mask: `(*inputs) -> weights`, one for each row of the kernels' inputs (each token), 0 where it does not
            count; by default all count alike.
        select: which leaves; by default every kernel of a plain matmul. Other weights (tables that are looked up, tied
            ones, experts, convolutions, kernels inside branches and `while` loops, and what is compressed already)
            stay, and a `trace.LeftOutWarning` names them.

    Returns:
        `(params, info)`: a `QuantizedArray` for every kernel, new biases, and a `RoundingInfo` by path (`path[i]`
        for each entry of a stack), also of kernels that a default selection leaves as they are: its `note` says why.
        Its errors are relative output errors, sqrt(Σ |x W' + b' + r - t|² / Σ |t - r - b|²), before with the weights
        rounded to nearest. With the inputs and the bias of the dense model that is ||X W' - X W|| / ||X W||.

    Raises:
        ValueError: options out of range; no batches, or no row that counts; a kernel that is compressed already, in
            no plain matmul, or with axes that the group size does not divide; inputs with NaN or Inf. Names the leaf;
            of selected kernels at which the model cannot stop, all.

    Example:
        >>> params = {"w": jnp.array([[0.6], [0.6], [7.0]]), "b": jnp.zeros(1)}
        >>> x = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.1], [4.0, 4.1, 0.0]])
        >>> small, info = reconstruct(lambda p, x: x @ p["w"] + p["b"][None], params, [(x,)], QuantSpec(bits=4))
        >>> info["w"].error < 0.2 < info["w"].error_before
        True

    References:
        Frantar et al. 2022, "GPTQ"; Li et al. 2025, "GPTAQ: efficient finetuning-free quantization for asymmetric
        calibration" (targets of the dense model); here with the residual stream, the bias and least-squares scales.
    """
    all_batches = list(batches)
    _check(all_batches, targets)
    check_unseen(unseen)
    kernels, uses, left = _kernels(apply, params, all_batches[0], select)
    rules = {
        path: Rule(spec(path) if callable(spec) else spec, order, group_scales, range_search, refine)
        for path in kernels
    }
    places = {path: (kernel.weight.shape, kernel.layout) for path, kernel in kernels.items()}
    rest = misfits(places, lambda path, shape, layout: cut(shape, rules[path].spec, layout), select, advice=PARTIAL)
    for path in rest:
        del kernels[path], rules[path]
    for path, kernel in kernels.items():
        check_rule(rules[path], damping, ridge)
        check_blocks(kernel, rules[path].spec)
    rows, held = flat_weights(row_mask, all_batches), max(ridge, 1e-8) if targets == "dense" else None
    visited: list[_Visited] = []
    for stop in layer_by_layer(apply, list(kernels), (params, params), all_batches, repeated="first"):
        path, shared = stop.kernel.path, uses[stop.kernel] > 1
        if shared:
            trees = params, _so_far(params, kernels, rules, visited)
            sums = _pooled_moments(apply, trees, stop.kernel, all_batches, rows)
        else:
            sums = moments(stop.kernel.name, stop.pairs(), *stop.weights(0), rows)
        free = bias and stop.bias is not None and not shared
        weight, layout = entry_of(kernels[path].weight, stop.kernel.entry), _matrix_layout(kernels[path].layout)
        rule, bits = _without_bits(rules[path])
        fit = _Fit(rule, layout, held, damping, free, unseen)
        solved, weights = _rounded(weight, stop.weights(0)[1], sums, bits, fit)
        visited.append(_Visited(stop.kernel, stop.bias if free else None, solved))
        stop.replace(weights, solved.values if free else None)
    leaves, info = _assembled(kernels, rules, visited)
    info |= {path: RoundingInfo.of(leaf, note=left[path]) for path, leaf in leaves_with_paths(params) if path in left}
    warn_unseen({each.kernel.name: np.asarray(each.rounded.unseen)[None] for each in visited}, FALLBACKS[unseen])
    return with_leaves(params, _fitted_biases(params, visited) | leaves), info


def _check(all_batches: list[Any], targets: Targets) -> None:
    if not all_batches:
        raise ValueError("`batches` is empty: rounding needs inputs.")
    if targets not in get_args(Targets):
        raise ValueError(f"`targets` must be one of {get_args(Targets)}, got {targets!r}.")


def _kernels(
    apply: Callable[..., Any], params: Params, inputs: tuple[Any, ...], select: Selector | None
) -> tuple[dict[str, MatrixLeaf], Counter[LeafPart], dict[str, str]]:
    """The kernels to round by path, how many matmuls read each entry, and what a default selection leaves, and why.

    Raises, naming all of them, where the model does not stop at what is selected.
    """
    all_layouts = traced_layouts(apply, params, *inputs)
    compressed = {path for path, leaf in leaves_with_paths(params) if is_compressed(leaf)}
    if select is not None:
        kernels = {entry.path: entry for entry in weight_leaves(params, select=select, layouts=all_layouts)}
        if compressed & set(kernels):
            raise ValueError(f"Leaf {min(compressed & set(kernels))!r} is compressed already; exclude it.")
        return kernels, Counter(kernels_at_work(apply, params, *inputs, paths=list(kernels), repeated="each")), {}
    parts, refused = plain_kernels(apply, params, inputs)
    refused |= {part.path: f"Leaf {part.path!r} is compressed already." for part in parts if part.path in compressed}
    paths = {part.path for part in parts} - compressed
    rest = {
        path: layout.kind for path, layout in leaves_with_paths(all_layouts) if layout.is_weight and path not in paths
    }
    phrases = {path: f"it {reason.removeprefix(f'Leaf {path!r} ')}" for path, reason in refused.items()}
    kinds = {"lookup": "its rows are looked up", "tied": "it is looked up and contracted"}
    left = {path: phrases.get(path) or kinds.get(kind, "it is not in a plain matmul") for path, kind in rest.items()}
    if not paths:
        reasons = "".join(f"\n  {path!r}: {reason}" for path, reason in left.items())
        raise ValueError(f"No leaf is in a plain matmul: for experts and convolutions use `gptq`.{reasons}")
    warn_left_out(
        left,
        "`reconstruct` stops at plain matmuls and leaves as they are",
        advice="Round them by `gptq` or `quantize`, or give `select` to say that it is meant.",
        stacklevel=4,
    )

    def plain(params: Params) -> Params:
        return map_with_path(lambda path, _: path in paths, params)

    kernels = {entry.path: entry for entry in weight_leaves(params, select=plain, layouts=all_layouts)}
    return kernels, Counter(parts), phrases


def _entry(kernels: Mapping[str, MatrixLeaf], part: LeafPart) -> MatrixLeaf:
    """The kernel, or one entry of the stack, as a leaf of its own."""
    whole = kernels[part.path]
    return MatrixLeaf(path=part.name, weight=entry_of(whole.weight, part.entry), layout=whole.layout.entry)


class _Fit(NamedTuple):
    """What a kernel may become; without a ridge its weights are the targets. Hashable: equal layers share a program."""

    rule: Rule
    layout: LeafLayout
    ridge: float | None
    damping: float
    free_bias: bool
    unseen: Unseen


class _Rounded(NamedTuple):
    """What a kernel became: codes and scales, its bias, what it never saw, and the errors."""

    codes: Any
    scale: Any
    zero_point: Any
    values: Any
    unseen: Any
    figures: dict[str, Any]


class _Visited(NamedTuple):
    """The same, with the places of the kernel, and of a bias that was fitted."""

    kernel: LeafPart
    bias: LeafPart | None
    rounded: _Rounded


def _matrix_layout(layout: LeafLayout) -> LeafLayout:
    """Of one entry: its axes alone."""
    entry = layout.entry
    return LeafLayout(kind="matmul", input_axes=entry.input_axes, output_axes=entry.output_axes)


def _without_bits(rule: Rule) -> tuple[Rule, np.float32 | None]:
    """The rule and, apart, the bits of integers: traced, so that one program is compiled for all of them."""
    spec = rule.spec
    if spec.format != "int" or spec.bits == 1:
        return rule, None
    return rule._replace(spec=dataclasses.replace(spec, bits=2)), np.float32(spec.bits)


@on_auto_axes
def _rounded(
    weight: Float[Array, "..."], bias: Float[Array, " R"], sums: Moments, bits: Any, fit: _Fit
) -> tuple[_Rounded, Any]:
    """One kernel, in the shape of its entry, rounded, and the weights (D, R) that it stands for."""
    return _round(weight, bias, sums, bits, fit, shared_mesh((weight, sums)))


@functools.partial(jax.jit, static_argnames=("fit", "mesh"))
def _round(
    weight: Float[Array, "..."], bias: Float[Array, " R"], sums: Moments, bits: Any, fit: _Fit, mesh: Mesh | None
) -> tuple[_Rounded, Any]:
    kernel, spec = MatrixLeaf(path="", weight=weight, layout=fit.layout), fit.rule.spec
    dense = kernel.matrix(weight)[0].astype(jnp.float32)
    if mesh is not None:
        # Outputs do not depend on one another: each device rounds some, by the whole matrix that weighs their errors.
        dense = jax.lax.with_sharding_constraint(dense, spread(mesh, dense.shape, stack=1))
        sums = jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, PartitionSpec()))
    targets, hessian, marks = _problem(sums, dense, fit)
    whole = with_whole_groups(kernel, targets, spec, 0)
    metric = with_whole_groups(kernel, hessian, spec, 0, 1)
    # What fills up a partial group meets no input: its errors cost nothing, and nothing makes up for them.
    filling = (jnp.diagonal(metric) == 0)[None] & jnp.eye(len(metric), dtype=bool)
    solved = gptq_matrix(whole, jnp.where(filling, 1.0, metric), jnp.float32(fit.damping), fit.rule, bits=bits)
    values = dequantize(solved.codes, solved.scale, solved.zero_point, levels=spec.levels, dtype=weight.dtype)
    weights = without_filling(kernel, values, spec)
    nearest = kernel.matrix(fake_quantize_array(weight, spec, fit.layout, bits=bits))[0].astype(jnp.float32)
    change, still = weights.astype(jnp.float32) - dense, jnp.zeros(dense.shape[1], jnp.float32)
    shift = (sums.gaps - _product(sums.inputs, change)) / sums.count if fit.free_bias else still
    figures = {
        "error_before": relative_error(sums, nearest - dense, still),
        "error": relative_error(sums, change, shift),
        "damping": solved.damping,
        "retries": solved.retries,
    }
    biases = bias.astype(jnp.float32) + shift
    if mesh is not None:
        replicated = NamedSharding(mesh, PartitionSpec())
        biases, marks, figures, weights = jax.lax.with_sharding_constraint(
            (biases, marks, figures, weights), replicated
        )
    return _Rounded(solved.codes, solved.scale, solved.zero_point, biases, marks, figures), weights


def _problem(
    sums: Moments, dense: Float32[Array, "D R"], fit: _Fit
) -> tuple[Float32[Array, "D R"], Float32[Array, "D D"], Bool[Array, " D"]]:
    """Targets, the matrix that weighs their errors (its mean diagonal is 1), and which inputs are 0 in every row."""
    raw, gram, cross = jnp.diagonal(sums.gram), sums.gram, sums.cross
    unseen = raw <= 0
    if fit.free_bias:
        gram = gram - jnp.outer(sums.inputs, sums.inputs) / sums.count
        cross = cross - jnp.outer(sums.inputs, sums.gaps) / sums.count
    # Inputs that never change leave rounding errors on a centred diagonal, or nothing.
    centred = jnp.diagonal(gram)
    constant = centred <= 1e-6 * raw
    totals = jnp.stack([raw, ~unseen, jnp.where(constant, 0.0, centred), ~constant]).sum(axis=1)
    level, mean = totals[::2] / jnp.maximum(totals[1::2], 1)
    mean = jnp.where(totals[3] > 0, mean, jnp.where(totals[1] > 0, level, 1.0))
    hessian = jnp.where(constant[:, None] | constant[None], jnp.eye(len(raw)), gram / mean)
    targets = dense
    if fit.ridge is not None:
        factor = damped_cholesky(hessian, fit.ridge).factor
        right = jnp.where(constant[:, None], 0.0, cross / mean)
        targets = dense + jax.scipy.linalg.cho_solve((factor, True), right)
    return jnp.where(unseen[:, None], 0.0 if fit.unseen == "zero" else dense, targets), hessian, unseen


def _pooled_moments(
    apply: Callable[..., Any], trees: Sequence[Params], kernel: LeafPart, batches: Sequence[Any], rows: Sequence[Any]
) -> Moments:
    """Of all matmuls that share a kernel; their biases are the same in both models."""
    return pooled(
        moments(kernel.name, stop.pairs(), *stop.weights(0), rows)
        for stop in layer_by_layer(apply, [kernel.path], trees, batches, repeated="each")
        if stop.kernel == kernel
    )


def _so_far(
    params: Params, kernels: Mapping[str, MatrixLeaf], rules: Mapping[str, Rule], visited: Sequence[_Visited]
) -> Params:
    """The model with what has been rounded, as plain arrays."""
    leaves, changed = leaves_by_path(params), dict[str, Any](_fitted_biases(params, visited))
    for each in visited:
        path = each.kernel.path
        kernel = _entry(kernels, each.kernel)
        weights = kernel.matrix(_stored(kernel, [each.rounded], rules[path].spec).materialize())[0]
        changed[path] = each.kernel.put(changed.get(path, leaves[path]), weights)
    return with_leaves(params, {path: jnp.asarray(leaf) for path, leaf in changed.items()})


def _fitted_biases(params: Params, visited: Sequence[_Visited]) -> dict[str, jax.Array]:
    """The biases by path, with their stack entries put together."""
    leaves, changed = leaves_by_path(params), {}
    for each in visited:
        if each.bias is not None:
            path = each.bias.path
            changed[path] = each.bias.put(changed.get(path, leaves[path]), each.rounded.values)
    return {path: sharded_like(jnp.asarray(leaf), leaves[path]) for path, leaf in changed.items()}


def _assembled(
    kernels: Mapping[str, MatrixLeaf], rules: Mapping[str, Rule], visited: Sequence[_Visited]
) -> tuple[dict[str, QuantizedArray], dict[str, RoundingInfo]]:
    """The compressed leaves, by path, and what happened, by path and entry, in the order of the model."""
    leaves = {}
    for path, kernel in kernels.items():
        entries = sorted((each for each in visited if each.kernel.path == path), key=lambda each: each.kernel.entry)
        leaf = _stored(kernel, [each.rounded for each in entries], rules[path].spec)
        leaves[path] = sharded_like(leaf, kernel.weight)
    info = {}
    for each in visited:
        figures = {name: value.item() for name, value in each.rounded.figures.items()}
        figures |= unseen_counts(np.asarray(each.rounded.unseen)[None])
        info[each.kernel.name] = RoundingInfo.of(leaves[each.kernel.path], **figures)
    return leaves, info


@on_auto_axes
def _stored(kernel: MatrixLeaf, parts: Sequence[Solved | _Rounded], spec: QuantSpec) -> QuantizedArray:
    """The leaf of the codes of all of its stack entries."""
    codes, scale = jnp.stack([part.codes for part in parts]), jnp.stack([part.scale for part in parts])
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return stored(kernel, codes, scale, jnp.stack(zeros) if zeros else None, spec)


def _product(left: Any, right: Any) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
