"""Rounding kernel after kernel, each of which makes up for what the ones before have lost.

Shape letters: D inputs of a kernel, R outputs.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64

from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.calibration.moments import Moments, flat_weights, moments, relative_error
from jaxcompress._src.calibration.pause import side_by_side, stops
from jaxcompress._src.calibration.site import LeafPart, Site
from jaxcompress._src.quantization.blocks import PARTIAL, cut
from jaxcompress._src.quantization.gptq_matrix import GroupScales, Order, Rule, Solved, check_rule, gptq_matrix
from jaxcompress._src.quantization.leaf_matrix import (
    check_blocks,
    plain_kernels,
    stored,
    with_whole_groups,
)
from jaxcompress._src.quantization.range_search import BEST_RANGES, RangeSearch
from jaxcompress._src.quantization.round_to_nearest import quantize_array
from jaxcompress._src.quantization.rounding_info import FALLBACKS, RoundingInfo
from jaxcompress._src.quantization.shared_kernels import pooled_moments
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.trace.layouts import layouts as traced_layouts
from jaxcompress._src.trace.left_out import warn_left_out
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, map_with_path, with_leaves
from jaxcompress._src.types import Params, Selector
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

    Args:
        apply: `(params, *inputs) -> outputs`; kernels may be on either side of their matmul (`x @ w`, `w @ x`). The
            layers of a scan, and the entries `w[i]` of a stack, are rounded one after another. A kernel that several
            matmuls share (ALBERT) is fitted to all of them at once: to the rows of all, as they are when the model has
            been rounded so far; its biases stay.
        params: the dense tree, plain arrays.
        batches: tuples of inputs; no labels are needed. All wait at the same kernel: memory for what one layer holds
            for all of them, twice.
        spec: bits, granularity, variant; or a function of the path.
        order: as for `gptq`.
        group_scales: as for `gptq`.
        range_search: as for `gptq`.
        refine: as for `gptq`.
        targets: "dense": T as above. "weights": T = W, which is GPTQ as published, in sequence; without `refine`,
            `range_search` and `bias`, exactly so.
        ridge: how much T is held to W; the rows must tell more than noise about it. MiniLM (2 bits, asymmetric, groups
            of 32, 128 film reviews, 3 seeds) has sentence-vector errors of .407 on other film reviews and .566 on news
            with .1, .399 and .555 with .3; the KL of its classes is .018 and .022, .018 and .025.
        damping: as for `gptq`.
        unseen: as for `gptq`.
        bias: fit the bias too, where one is added to the output and nothing else reads it; it stays a float.
        row_mask: `(*inputs) -> weights`, one for each row of the kernels' inputs (each token), 0 where it does not
            count; by default all count alike.
        select: which leaves; by default every kernel of a plain matmul. Other weights (tables that are looked up, tied
            ones, experts, convolutions, kernels inside branches and `while` loops) stay, and a `trace.LeftOutWarning`
            names them.

    Returns:
        `(params, info)`: a `QuantizedArray` for every kernel, new biases, and a `RoundingInfo` by path (`path[i]`
        for each entry of a stack), also of kernels that a default selection leaves as they are: its `note` says why.
        Its errors are relative output errors, sqrt(Σ |x W' + b' + r - t|² / Σ |t - r - b|²), before with the weights
        rounded to nearest. With the inputs and the bias of the dense model that is ||X W' - X W|| / ||X W||.

    Raises:
        ValueError: options out of range; no batches, or no row that counts; a kernel that `calibration.pausing` cannot
            stop at, or with axes that the group size does not divide; inputs with NaN or Inf. Names the leaf; of
            selected kernels at which the model cannot stop, all.

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
    kept = list(batches)
    _check(kept, targets)
    check_unseen(unseen)
    kernels, uses, left = _kernels(apply, params, kept[0], select)
    rules = {
        path: Rule(spec(path) if callable(spec) else spec, order, group_scales, range_search, refine)
        for path in kernels
    }
    places = {path: (kernel.weight.shape, kernel.layout) for path, kernel in kernels.items()}
    rest = misfits(places, lambda path, shape, layout: cut(shape, rules[path].spec, layout), select, advice=PARTIAL)
    for path in rest:
        del kernels[path], rules[path]
    uses = {part: count for part, count in uses.items() if part.path in kernels}
    for path, kernel in kernels.items():
        check_rule(rules[path], damping, ridge)
        check_blocks(kernel, rules[path].spec)
    rows, held = flat_weights(row_mask, kept), ridge if targets == "dense" else None
    run = side_by_side(apply, list(kernels), (params, params), kept, repeated="first")
    replies: Any = None
    visited: list[_Rounded] = []
    for _ in uses:
        pairs = run.send(replies)
        site = pairs[0][0]
        kernel, before = _entry(kernels, site.kernel), _bias(params, site)
        weights = np.asarray(kernel.matrix(kernel.weight)[0], np.float64)
        dense = jnp.asarray(weights, jnp.float32)
        if uses[site.kernel] > 1:
            trees = params, _so_far(params, kernels, rules, visited)
            sums = pooled_moments(apply, trees, site.kernel, kept, rows)
            fit = _Fit(weights, np.zeros(before.shape), held, damping, False, unseen)
        else:
            sums = moments(pairs, dense, before.astype(jnp.float32), rows)
            fit = _Fit(weights, np.asarray(before, np.float64), held, damping, bias and site.bias is not None, unseen)
        found, new = _rounded_kernel(kernel, site, sums, fit, rules[site.kernel.path])
        visited.append(found)
        dense_reply = kernel.matrix(kernel.weight)[0], before
        replies = dense_reply, (new, jnp.asarray(found.values, before.dtype) if fit.free_bias else before)
    leaves, info = _assembled(kernels, rules, visited)
    plain = leaves_by_path(params)
    bits = {path: 8.0 * jnp.dtype(plain[path].dtype).itemsize for path in left}
    info |= {path: RoundingInfo(bits_per_weight=bits[path], note=reason) for path, reason in left.items()}
    warn_unseen({found.kernel.name: found.unseen[None] for found in visited}, FALLBACKS[unseen])
    return with_leaves(params, _fitted_biases(params, visited) | leaves), info


def _check(kept: list[Any], targets: Targets) -> None:
    if not kept:
        raise ValueError("`batches` is empty: rounding needs inputs.")
    if targets not in get_args(Targets):
        raise ValueError(f"`targets` must be one of {get_args(Targets)}, got {targets!r}.")


def _kernels(
    apply: Callable[..., Any], params: Params, inputs: tuple[Any, ...], select: Selector | None
) -> tuple[dict[str, MatrixLeaf], Counter[LeafPart], dict[str, str]]:
    """The kernels to round by path, how many matmuls read each entry, and what a default selection leaves, and why.

    Raises, naming all of them, where the model does not stop at what is selected.
    """
    found = traced_layouts(apply, params, *inputs)
    if select is not None:
        kernels = {entry.path: entry for entry in weight_leaves(params, select=select, layouts=found)}
        return kernels, Counter(stops(apply, params, *inputs, paths=list(kernels), repeated="each")), {}
    parts, refused = plain_kernels(apply, params, inputs)
    chosen = {part.path for part in parts}
    rest = {path: layout.kind for path, layout in leaves_with_paths(found) if layout.is_weight and path not in chosen}
    phrases = {path: f"it {reason.removeprefix(f'Leaf {path!r} ')}" for path, reason in refused.items()}
    kinds = {"lookup": "its rows are looked up", "tied": "it is looked up and contracted"}
    left = {path: phrases.get(path) or kinds.get(kind, "it is not in a plain matmul") for path, kind in rest.items()}
    if not chosen:
        reasons = "".join(f"\n  {path!r}: {reason}" for path, reason in left.items())
        raise ValueError(
            f"No leaf is in a plain matmul: for experts, convolutions and runs of `split_stacks` use `gptq`.{reasons}"
        )
    warn_left_out(
        left,
        "`reconstruct` stops at plain matmuls and leaves as they are",
        advice="Round them by `gptq` or `quantize`, or give `select` to say that it is meant.",
        stacklevel=4,
    )

    def plain(params: Params) -> Params:
        return map_with_path(lambda path, _: path in chosen, params)

    kernels = {entry.path: entry for entry in weight_leaves(params, select=plain, layouts=found)}
    return kernels, Counter(parts), phrases


def _entry(kernels: Mapping[str, MatrixLeaf], part: LeafPart) -> MatrixLeaf:
    """The kernel, or one entry of the stack, as a leaf of its own."""
    whole = kernels[part.path]
    return MatrixLeaf(path=part.name, weight=part.entry_of(whole.weight), layout=whole.layout.entry)


def _bias(params: Params, site: Site) -> Float[Array, " R"]:
    """The dense bias, in its dtype; zeros, in that of the kernel, without one."""
    leaves = leaves_by_path(params)
    if site.bias is None:
        kernel = jnp.asarray(leaves[site.kernel.path])
        return jnp.zeros(site.kernel.matrix(kernel).shape[1], kernel.dtype)
    return site.bias.matrix(jnp.asarray(leaves[site.bias.path]))[0]


class _Fit(NamedTuple):
    """A kernel of the dense model, and what it may become; without a ridge the weights are the targets."""

    weights: Float64[np.ndarray, "D R"]
    bias: Float64[np.ndarray, " R"]
    ridge: float | None
    damping: float
    free_bias: bool
    unseen: Unseen


class _Rounded(NamedTuple):
    """What a kernel became: codes and scales, its bias, what it never saw, and the errors. No floats of its weights."""

    kernel: LeafPart
    codes: Any
    scale: Any
    zero_point: Any
    bias: LeafPart | None
    values: Float64[np.ndarray, " R"]
    unseen: Bool[np.ndarray, " D"]
    figures: dict[str, Any]


def _rounded_kernel(
    kernel: MatrixLeaf, site: Site, sums: Moments, fit: _Fit, rule: Rule
) -> tuple[_Rounded, Float[Array, "D R"]]:
    """What is stored, and the weights that it stands for, in the dtype of the leaf."""
    targets, hessian, marks = _problem(sums, fit)
    whole = with_whole_groups(kernel, jnp.asarray(targets, jnp.float32), rule.spec, 0)
    metric = with_whole_groups(kernel, jnp.asarray(hessian, jnp.float32), rule.spec, 0, 1)
    # What fills up a partial group meets no input: its errors cost nothing, and nothing makes up for them.
    metric = metric + jnp.diag(jnp.where(jnp.diag(metric) == 0, 1.0, 0.0))
    solved = _solve(whole, metric, np.float32(fit.damping), rule)
    weights = kernel.matrix(_stored(kernel, [solved], rule.spec).materialize())[0]
    found = np.asarray(weights, np.float64)
    nearest = quantize_array(kernel.weight, rule.spec, kernel.layout).materialize()
    after = (sums.targets - sums.inputs @ found) / sums.count if fit.free_bias else fit.bias
    figures = {
        "error_before": relative_error(sums, np.asarray(kernel.matrix(nearest)[0]), fit.bias, fit.bias),
        "error": relative_error(sums, found, after, fit.bias),
        "damping": float(solved.damping),
        "retries": int(solved.retries),
        **unseen_counts(marks[None]),
    }
    stored_parts = solved.codes, solved.scale, solved.zero_point
    return _Rounded(site.kernel, *stored_parts, site.bias if fit.free_bias else None, after, marks, figures), weights


def _so_far(
    params: Params, kernels: Mapping[str, MatrixLeaf], rules: Mapping[str, Rule], visited: Sequence[_Rounded]
) -> Params:
    """The model with what has been rounded, as plain arrays."""
    leaves, changed = leaves_by_path(params), dict[str, Any](_fitted_biases(params, visited))
    for found in visited:
        path = found.kernel.path
        kernel = _entry(kernels, found.kernel)
        weights = kernel.matrix(_stored(kernel, [found], rules[path].spec).materialize())[0]
        changed[path] = found.kernel.put(changed.get(path, leaves[path]), weights)
    return with_leaves(params, {path: jnp.asarray(leaf) for path, leaf in changed.items()})


def _fitted_biases(params: Params, visited: Sequence[_Rounded]) -> dict[str, jax.Array]:
    """The biases by path, with their stack entries put together."""
    leaves, changed = leaves_by_path(params), {}
    for found in visited:
        if found.bias is not None:
            path = found.bias.path
            changed[path] = found.bias.put(changed.get(path, leaves[path]), found.values)
    return {path: jnp.asarray(leaf) for path, leaf in changed.items()}


def _assembled(
    kernels: Mapping[str, MatrixLeaf], rules: Mapping[str, Rule], visited: Sequence[_Rounded]
) -> tuple[dict[str, QuantizedArray], dict[str, RoundingInfo]]:
    """The compressed leaves, by path, and what happened, by path and entry, in the order of the model."""
    leaves = {}
    for path, kernel in kernels.items():
        own = sorted((found for found in visited if found.kernel.path == path), key=lambda found: found.kernel.entry)
        leaves[path] = _stored(kernel, own, rules[path].spec)
    info = {found.kernel.name: RoundingInfo.of(leaves[found.kernel.path], **found.figures) for found in visited}
    return leaves, info


def _stored(kernel: MatrixLeaf, parts: Sequence[Solved | _Rounded], spec: QuantSpec) -> QuantizedArray:
    """The leaf of the codes of all of its stack entries."""
    codes, scale = jnp.stack([part.codes for part in parts]), jnp.stack([part.scale for part in parts])
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return stored(kernel, codes, scale, jnp.stack(zeros) if zeros else None, spec)


def _problem(sums: Moments, fit: _Fit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, the matrix that weighs their errors (its mean diagonal is 1), and which inputs are 0 in every row."""
    gram, cross = sums.gram, sums.cross - np.outer(sums.inputs, fit.bias)
    unseen = np.diag(gram) <= 0
    if fit.free_bias:
        gram = sums.gram - np.outer(sums.inputs, sums.inputs) / sums.count
        cross = sums.cross - np.outer(sums.inputs, sums.targets) / sums.count
    # Inputs that never change leave rounding errors on a centred diagonal, or nothing.
    level = np.diag(sums.gram)[~unseen].mean() if not unseen.all() else 1.0
    constant = np.diag(gram) <= 1e-6 * np.diag(sums.gram)
    mean = np.diag(gram)[~constant].mean() if not constant.all() else level
    hessian = np.where(constant[:, None] | constant[None], 0.0, gram / mean) + np.diag(np.where(constant, 1.0, 0.0))
    targets = fit.weights
    if fit.ridge is not None:
        hold = max(fit.ridge, 1e-8)
        right = np.where(constant[:, None], fit.weights, cross / mean) + hold * fit.weights
        targets = np.linalg.solve(hessian + hold * np.eye(len(gram)), right)
    return np.where(unseen[:, None], 0.0 if fit.unseen == "zero" else fit.weights, targets), hessian, unseen


@functools.partial(jax.jit, static_argnames="rule")
def _solve(targets: Any, hessian: Any, damping: Any, rule: Rule) -> Solved:
    return gptq_matrix(targets, hessian, damping, rule)
