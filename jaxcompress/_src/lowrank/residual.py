"""Low rank and what it leaves over: sparse, quantized, or whatever a sibling makes of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.lowrank.factorize import apply_norm, directions, output_scale, truncate
from jaxcompress._src.lowrank.leaves import LowRankInfo, Target, low_rank_leaf, spectrum_of
from jaxcompress._src.lowrank.ranks import RankRule, as_rule
from jaxcompress._src.lowrank.targets import activation_targets, plain_targets
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.maps import leaves_by_path, with_leaves
from jaxcompress._src.tree.unselected import partial_tree
from jaxcompress._src.types import Params, Selector, plain

CompressFn = Callable[[Params, Params, Params], tuple[Params, Any]]
"""`(params, statistics, layouts) -> (params, info)`, on partial trees, as `calibration.sequential` takes it."""

First = Literal["residual", "low rank"]


@on_auto_axes
def with_residual(
    params: Params,
    compress: CompressFn,
    *,
    rank: int | Mapping[str, int | None] | RankRule,
    statistics: Params | None = None,
    fisher: Params | None = None,
    iterations: int = 5,
    first: First = "residual",
    damping: float = 0.0,
    ridge: float = 0.1,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, LowRankInfo]]:
    """W ≈ L + C, by turns: C = compress(W - L), and L the closest factors to W - C.

    Of all turns, each leaf keeps the one with the least error. That is measured as in `activation_svd` if there are
    statistics (then C can be what GPTQ or SparseGPT make of W - L), and as in `svd` otherwise.

    Args:
        params: the tree; compressed leaves count as the arrays they stand for.
        compress: `(params, statistics, layouts) -> (params, info)`, called with partial trees of W - L, such as
            `lambda p, s, at: quantization.quantize(p, spec, layouts=at)`. What it returns (compressed leaves,
            or plain ones) becomes `LowRankArray.residual`.
        rank: one for all leaves, by path, or a rule: `parameter_share`, `energy`, `budget`. A rule sees the spectra of
            W - C (of W, if the low-rank part comes first) in the first turn. A leaf that it would leave dense gets no
            factors: only C.
        statistics: from `calibration.input_statistics`, with "gram"; without them every input counts the same.
        fisher: weights of the outputs; see `activation_svd`.
        iterations: number of turns, at least 1.
        first: which part is made first, with the other one zero. "residual", as LoftQ: factors of what quantization
            lost. "low rank": a residual of what the factors cannot hold, for sparse ones.
        damping: share of the mean diagonal that is added to XᵀX.
        ridge: how much dense-model targets are held to the weights; see `activation_svd`.
        select: see `svd`, with statistics see `activation_svd`.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out). Several axes count as one.

    Returns:
        `(params, info)`, with a `LowRankInfo` by path (`path[i]` for each entry of a stack); `loss` and `error` are
        those of L + C, `parameters` those of the factors.

    Raises:
        ValueError: as `activation_svd`; `compress` returned another structure, shape or dtype.

    Example:
        >>> def halves(params, statistics, layouts):
        ...     return jax.tree.map(lambda w: jnp.round(2 * w) / 2, params), None
        >>> params = {"kernel": jnp.array([[3.2, 0.1], [0.6, 1.1]])}
        >>> small, info = with_residual(params, halves, rank=1)
        >>> bool(info["kernel"].error < jnp.linalg.norm(jnp.array([0.2, 0.1, 0.1, 0.1])) / 3.4)
        True

    References:
        Li et al. 2023, "LoftQ: LoRA-fine-tuning-aware quantization for large language models", algorithm 1; Zhang et
        al. 2024, "LQER: low-rank quantization error reconstruction for LLMs", for factors in the norm of activations.
    """
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}.")
    if first not in ("residual", "low rank"):
        raise ValueError(f"`first` must be 'residual' or 'low rank', got {first!r}.")
    if statistics is None:
        targets = plain_targets(params, select=select, layouts=layouts)
    else:
        targets = activation_targets(
            params,
            statistics,
            fisher=fisher,
            damping=damping,
            ridge=ridge,
            whitening="cholesky",
            select=select,
            layouts=layouts,
        )
    split = _Split(params, targets, compress, statistics)
    rule = as_rule(rank)
    best: dict[str, tuple[np.ndarray, Any]] = {}
    parts = split.low_rank(dict.fromkeys(split.paths), rule) if first == "low rank" else dict.fromkeys(split.paths)
    for _ in range(iterations):
        residuals = split.residuals(parts)
        parts = split.low_rank(residuals, rule)
        for path, (losses, leaf) in split.joined(parts, residuals).items():
            if path not in best or losses.sum() < best[path][0].sum():
                best[path] = (losses, leaf)
    info = {}
    for target in targets:
        info |= _infos(target, *best[target.leaf.path])
    return with_leaves(params, {path: leaf for path, (_, leaf) in best.items()}), info


class _Split:
    """The leaves, and both halves of a turn. Parts are by path; None stands for zero."""

    def __init__(self, params: Params, targets: list[Target], compress: CompressFn, statistics: Any) -> None:
        self.params, self.targets, self.compress = params, targets, compress
        self.paths = [target.leaf.path for target in targets]
        self.layouts = partial_tree(params, {target.leaf.path: target.leaf.layout for target in targets})
        given = {} if statistics is None else leaves_by_path(statistics)
        self.statistics = partial_tree(params, {path: given[path] for path in self.paths if path in given})
        self.ranks: Mapping[str, int | None] | None = None

    def residuals(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """compress(W - L)."""
        rests = {
            t.leaf.path: t.leaf.leaf(_without(t, parts[t.leaf.path])).astype(t.leaf.weight.dtype) for t in self.targets
        }
        compressed, _ = self.compress(partial_tree(self.params, rests), self.statistics, self.layouts)
        leaves = leaves_by_path(compressed)
        for path, rest in rests.items():
            new = leaves.get(path)
            if new is None or (new.shape, new.dtype) != (rest.shape, rest.dtype):
                shown = "nothing" if new is None else f"{new.dtype}{tuple(new.shape)}"
                raise ValueError(
                    f"`compress` returned {shown} for leaf {path!r}, expected {rest.dtype}{tuple(rest.shape)}."
                )
        return {path: leaves[path] for path in self.paths}

    def low_rank(self, residuals: Mapping[str, Any], rule: RankRule) -> dict[str, Any]:
        """The closest factors to W - C."""
        rests = [_without(target, residuals[target.leaf.path]) for target in self.targets]
        bases = [directions(rest, t.inputs, t.outputs) for rest, t in zip(rests, self.targets, strict=True)]
        if self.ranks is None:
            values = [jax.device_get(basis.values) for basis in bases]
            self.ranks = rule([spectrum_of(t.leaf, spectrum) for t, spectrum in zip(self.targets, values, strict=True)])
        parts = {}
        for target, rest, basis in zip(self.targets, rests, bases, strict=True):
            rank = self.ranks[target.leaf.path]
            factors = truncate(rest, basis, rank=rank) if rank else None
            parts[target.leaf.path] = None if factors is None else low_rank_leaf(target.leaf, *factors)
        return parts

    def joined(self, parts: Mapping[str, Any], residuals: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, Any]]:
        """The leaves, L + C, with the losses of their stack entries."""
        leaves = {}
        for target in self.targets:
            part, residual = parts[target.leaf.path], residuals[target.leaf.path]
            leaf = residual if part is None else dataclasses.replace(part, residual=residual)
            losses = np.asarray(_losses(_without(target, leaf), target.inputs, target.outputs), np.float64)
            leaves[target.leaf.path] = (losses, leaf)
        return leaves


def _without(target: Target, part: Any) -> jax.Array:
    """W less a part, as matrices in float32."""
    if part is None:
        return target.weights
    return target.weights - target.leaf.matrix(plain(part)).astype(jnp.float32)


@jax.jit
def _losses(gap: jax.Array, inputs: jax.Array | None, outputs: jax.Array | None) -> Float[Array, " S"]:
    return jnp.sum(jnp.square(apply_norm(gap, inputs, output_scale(gap, outputs))), axis=(1, 2))


def _infos(target: Target, losses: np.ndarray, leaf: Any) -> dict[str, LowRankInfo]:
    _, depth, width = target.leaf.sizes
    rank = leaf.rank if isinstance(leaf, LowRankArray) else None
    return target.infos(leaf, rank=rank, parameters=(rank or 0) * (depth + width), losses=losses)
