"""Low rank without training: plain, by activations, by Fisher information.

Shape letters: S stack entries, D inputs, R outputs.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxcompress.calibration import InputStatistics, LookupCounts, MatrixLeaf, entries, matrices
from jaxcompress.lowrank._factorize import Whitening, root_of_gram
from jaxcompress.lowrank._leaves import LowRankInfo, Target, factored, shape_of
from jaxcompress.lowrank._ranks import RankRule
from jaxcompress.solvers import dense_targets
from jaxcompress.tree import is_unselected, leaves_with_paths, map_with_path
from jaxcompress.types import Params, Selector, is_compressed

Side = Literal["inputs", "outputs", "both"]


def svd(
    params: Params,
    *,
    rank: int | Mapping[str, int | None] | RankRule,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, LowRankInfo]]:
    """The closest factors in the Frobenius norm: W' = U_k Σ_k V_kᵀ.

    Args:
        params: the tree; compressed leaves count as the arrays they stand for.
        rank: one for all leaves, by path, or a rule: `parameter_share`, `energy`, `budget`. A stack has one rank.
        select: which leaves; see `trace.selected_layouts`.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out). Inputs and outputs with several axes
            count as one each; stack entries are factored one by one.

    Returns:
        `(params, info)`: a `LowRankArray` for every selected leaf, but for those that the rule leaves dense, and a
        `LowRankInfo` for each of them by path. Factors have the dtype of the leaf, and are trainable.

    Raises:
        ValueError: nothing is selected; a selected leaf is no float array, or holds NaN or Inf; what the rule finds.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "bias": jnp.zeros(2)}
        >>> small, info = svd(params, rank=1)
        >>> small["kernel"].rank, info["kernel"].loss
        (1, 1.0)
    """
    chosen = matrices(params, select=select, layouts=layouts)
    targets = [Target(leaf=leaf, weights=_weights(leaf)) for leaf in entries(chosen)]
    return factored(params, chosen, targets, rank)


def activation_svd(
    params: Params,
    statistics: Params,
    *,
    rank: int | Mapping[str, int | None] | RankRule,
    fisher: Params | None = None,
    damping: float = 0.0,
    whitening: Whitening = "eigen",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, LowRankInfo]]:
    """The factors whose outputs come closest: min ||X W - X W'||, and the loss of dropping σ_i is σ_i² exactly.

    The σ are the singular values of A W, with Aᵀ A = XᵀX. With `fisher`, the outputs weigh what the diagonal Fisher
    information says: c_j = Σ_i F_ij / tr(XᵀX), so that XᵀX ⊗ c approximates F, and losses compare across leaves.

    Where the statistics have `cross` (inputs in the dense model against those in the compressed one), the target is
    the weights that come closest to the dense outputs on the inputs that the leaf will really get. A table that is
    looked up weighs its rows by how often that happened, plus one.

    Args:
        params: the tree; compressed leaves count as the arrays they stand for.
        statistics: from `calibration.input_statistics`, with "gram".
        rank: see `svd`.
        fisher: from `calibration.fisher`, or any tree of weights of that shape, at least 0.
        damping: λ mean(diag) is added to the diagonal of XᵀX. "cholesky" needs some where XᵀX is singular, and takes
            more if it must; with `cross`, 0 means 1e-6 for the targets.
        whitening: how A is found; see `root_of_gram`. Without damping the factors are the same.
        select: which leaves; by default all that have such statistics.
        layouts: see `svd`.

    Returns:
        As `svd`.

    Raises:
        ValueError: as `svd`; a leaf without statistics, or with statistics of another width; NaN or Inf in them, or a
            negative `fisher`. Names the leaf.

    Example:
        >>> from jaxcompress.calibration import input_statistics
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
        >>> x = jnp.array([[0.0, 5.0], [0.1, 0.0]])
        >>> statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(x,)])
        >>> small, info = activation_svd(params, statistics, rank=1)
        >>> abs(small["kernel"].materialize().round(3)).tolist(), round(info["kernel"].loss, 3)
        ([[0.0, 0.0], [0.0, 1.0]], 0.09)

    References:
        Wang et al. 2024, "SVD-LLM: truncation-aware singular value decomposition for large language model compression",
        section 3.1; Yuan et al. 2023, "ASVD", for the idea.
    """
    if not damping >= 0:
        raise ValueError(f"`damping` must be at least 0, got {damping}.")
    if whitening not in ("eigen", "cholesky"):
        raise ValueError(f"`whitening` must be 'eigen' or 'cholesky', got {whitening!r}.")
    chosen = matrices(params, select=_with_statistics(statistics, select), layouts=layouts)
    evidence = dict(leaves_with_paths(statistics, is_leaf=_is_evidence))
    weights = _by_path(fisher, chosen)
    targets = [
        _activation_target(leaf, evidence.get(leaf.path), weights.get(leaf.path), damping, whitening)
        for leaf in entries(chosen)
    ]
    return factored(params, chosen, targets, rank)


def fisher_svd(
    params: Params,
    fisher: Params,
    *,
    rank: int | Mapping[str, int | None] | RankRule,
    weights: Side = "inputs",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, LowRankInfo]]:
    """The closest factors in a norm weighted by the Fisher information F, summed over rows or columns.

    Args:
        params: the tree; compressed leaves count as the arrays they stand for.
        fisher: from `calibration.fisher`, at least 0.
        rank: see `svd`.
        weights: "inputs": Σ_j F_ij for input i, as in the paper. "outputs": Σ_i F_ij for output j. "both": their
            product over Σ F, the closest product of the two.
        select: see `svd`.
        layouts: see `svd`.

    Returns:
        As `svd`.

    Raises:
        ValueError: as `svd`; a leaf without an entry in `fisher`, or one of another shape, or one that is not finite or
            negative. Names the leaf.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
        >>> small, _ = fisher_svd(params, {"kernel": jnp.array([[0.0, 1e-4], [1.0, 1.0]])}, rank=1)
        >>> abs(small["kernel"].materialize().round(3)).tolist()
        [[0.0, 0.0], [0.0, 1.0]]

    References:
        Hsu et al. 2022, "Language model compression with weighted low-rank factorization", section 3.
    """
    if weights not in ("inputs", "outputs", "both"):
        raise ValueError(f"`weights` must be 'inputs', 'outputs' or 'both', got {weights!r}.")
    chosen = matrices(params, select=select, layouts=layouts)
    given = _by_path(fisher, chosen)
    targets = []
    for leaf in entries(chosen):
        information = leaf.matrix(given[leaf.path])
        inputs = None if weights == "outputs" else information.sum(2)
        outputs = None if weights == "inputs" else information.sum(1)
        targets.append(Target(leaf=leaf, weights=_weights(leaf), inputs=inputs, outputs=outputs))
    return factored(params, chosen, targets, rank)


def _weights(leaf: MatrixLeaf) -> jax.Array:
    return leaf.matrix(leaf.weight).astype(jnp.float32)


def _activation_target(
    leaf: MatrixLeaf, found: Any, fisher: jax.Array | None, damping: float, whitening: Whitening
) -> Target:
    if isinstance(found, LookupCounts):
        return _lookup_target(leaf, found)
    if not isinstance(found, InputStatistics) or found.gram is None:
        raise ValueError(f"Leaf {leaf.path!r} has no statistic 'gram'; gather it with `input_statistics`.")
    stack, depth, _ = shape_of(leaf)
    if found.gram.shape[-1] != depth or found.count.size != stack:
        raise ValueError(
            f"Leaf {leaf.path!r} has {stack} stack entries and {depth} inputs, its statistics have {found.count.size} "
            f"and {found.gram.shape[-1]}; give `layouts` from `trace.layouts`."
        )
    gram = found.gram.reshape(stack, depth, depth)
    _check_values(leaf.path, "statistics", gram)
    weights = _weights(leaf)
    if found.cross is not None:
        weights = _dense_targets(weights, gram, found.cross.reshape(gram.shape), damping or 1e-6)
    root = root_of_gram(gram, damping, whitening=whitening)
    trace = jnp.trace(gram, axis1=1, axis2=2)[:, None]
    outputs = None if fisher is None else leaf.matrix(fisher).sum(1) / jnp.where(trace > 0, trace, 1.0)
    return Target(
        leaf=leaf,
        weights=weights,
        inputs=root.matrix,
        outputs=outputs,
        damping=float(root.damping.max(initial=damping)),
        retries=int(root.retries.max(initial=0)),
    )


def _lookup_target(leaf: MatrixLeaf, found: LookupCounts) -> Target:
    stack, _, rows = shape_of(leaf)
    if stack != 1 or found.rows.shape != (rows,):
        raise ValueError(
            f"Leaf {leaf.path!r} has {rows} rows, its statistics have {found.rows.shape}; give `layouts` from "
            "`trace.layouts`."
        )
    return Target(leaf=leaf, weights=_weights(leaf), outputs=found.rows[None].astype(jnp.float32) + 1.0)


@jax.jit
def _dense_targets(
    weights: Float32[Array, "S D R"], gram: Float32[Array, "S D D"], cross: Float32[Array, "S D D"], damping: float
) -> Float32[Array, "S D R"]:
    return jax.lax.map(lambda parts: dense_targets(parts[0], parts[1], parts[2], damping), (weights, gram, cross))


def _with_statistics(statistics: Params, select: Selector | None) -> Selector:
    """By default, all leaves that have statistics to go by."""
    if select is not None:
        return select
    found = dict(leaves_with_paths(statistics, is_leaf=_is_evidence))

    def usable(path: str, _: Any) -> bool:
        own = found.get(path)
        return isinstance(own, LookupCounts) or (isinstance(own, InputStatistics) and own.gram is not None)

    def chosen(params: Params) -> Params:
        marks = map_with_path(usable, params)
        if not any(jax.tree.leaves(marks)):
            raise ValueError("No leaf has the statistic 'gram': there is nothing to compress.")
        return marks

    return chosen


def _is_evidence(node: Any) -> bool:
    return isinstance(node, InputStatistics | LookupCounts)


def _by_path(fisher: Params | None, chosen: Params) -> dict[str, jax.Array]:
    """The Fisher information of every chosen leaf, checked."""
    if fisher is None:
        return {}
    given = dict(leaves_with_paths(fisher, is_leaf=lambda leaf: is_unselected(leaf) or is_compressed(leaf)))
    found = {}
    for leaf in entries(chosen):
        own = given.get(leaf.path)
        if own is None or is_unselected(own) or is_compressed(own) or own.shape != leaf.weight.shape:
            raise ValueError(f"Leaf {leaf.path!r} needs an entry in `fisher` of its shape, {leaf.weight.shape}.")
        _check_values(leaf.path, "`fisher`", own)
        if bool((own < 0).any()):
            raise ValueError(f"`fisher` of leaf {leaf.path!r} is negative somewhere.")
        found[leaf.path] = own.astype(jnp.float32)
    return found


def _check_values(path: str, what: str, values: jax.Array) -> None:
    if not bool(jnp.isfinite(values).all()):
        raise ValueError(f"The {what} of leaf {path!r} hold NaN or Inf.")
