"""SparseGPT: pruning one input after another, while the rest makes up for it.

Shape letters: S stack entries (of each group), E stack entries with all of their groups, D inputs, R outputs.
"""

import functools
import itertools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from jaxcompress._src.meshes import on_auto_axes, sharded_like
from jaxcompress._src.pruning.counts import check_counting, sparsity_by_path
from jaxcompress._src.pruning.leaf_info import LeafInfo, leaf_infos
from jaxcompress._src.pruning.patterns import NOfM, Pattern, Unstructured, unstructured
from jaxcompress._src.solvers.cholesky import inverse_factor
from jaxcompress._src.solvers.columns import QuantizeColumn, StartGroup, block_sizes, solve_columns
from jaxcompress._src.solvers.hessian import check_damping, problem
from jaxcompress._src.solvers.outputs import not_worse, output_errors
from jaxcompress._src.solvers.rank import keep_largest
from jaxcompress._src.solvers.runs import keep_in_runs
from jaxcompress._src.tree.maps import with_leaves
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.matrices import CalibratedLeaf, calibrated_leaves
from jaxcompress._src.weights.side_by_side import solve_leaves
from jaxcompress._src.weights.unseen import Unseen, check_unseen, warn_unseen

_UNSTRUCTURED = unstructured()

RankingScope = Literal["leaf", "block"]
"""Where the pruned weights of a leaf lie: as many in each block of inputs, or where they cost least."""

Counting = Literal["exact", "sparsegpt"]
"""How many weights go: exactly those asked for, or as the public implementation counts."""

_FALLBACKS = {"keep": "ranked by magnitude", "zero": "set to 0"}


@on_auto_axes
def sparsegpt(
    params: Params,
    statistics: Params,
    *,
    sparsity: Any = None,
    pattern: Pattern = _UNSTRUCTURED,
    damping: float = 0.01,
    ridge: float = 0.1,
    block_size: int = 128,
    scope: RankingScope = "leaf",
    counting: Counting = "exact",
    unseen: Unseen = "keep",
    quantize_column: QuantizeColumn | None = None,
    start_group: StartGroup | None = None,
    group_size: int | None = None,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, LeafInfo]]:
    """Prunes the weights whose loss costs least after the others have made up for it, and lets them do so.

    With U the upper factor of (XᵀX + λ mean(diag) I)⁻¹ = Uᵀ U, the score of w_ij, i an input, is (w_ij / U_ii)². Inputs
    are fixed in their order: an input's error e = (w - q) / U_ii is subtracted from those still to come, times U_ij.
    Which weights go is decided anew for every block of inputs (for every run of n of m), from the weights as updated.

    Where the statistics have `cross` (inputs Y in the dense model against those X in the compressed one), the weights
    first become those that come closest to the dense outputs on the inputs that the leaf will really get,

        T = argmin ||X T - Y W||² + ridge mean(diag XᵀX) ||T - W||².

    On a mesh (params, or the statistics of sharded batches) every device prunes another stack entry or leaf, whole, and
    leaves come back with the sharding that they had.

    Args:
        params: the tree; compressed leaves count as the arrays they stand for.
        statistics: from `calibration.input_statistics`, with "gram".
        sparsity: share of pruned weights; one number, or a partial tree of them. A pattern n of m implies it.
        pattern: `unstructured()` or `n_of_m(n, m)`.
        damping: λ, at least 0; grows tenfold until the matrix can be factored.
        ridge: how much T is held to W, at least 0; the rows must tell more than noise about it. Without `cross`,
            T = W.
        block_size: inputs that are decided together; rounded up to a multiple of m, and of smaller groups.
        scope: what is ranked together. "leaf": blocks lose what a ranking of the whole leaf by the scores of the dense
            weights says. "block": every block loses the same share, as in the paper.
        counting: "exact": n - round(s n) weights are kept, lowest (input, output) first among equal scores.
            "sparsegpt": as the public implementation counts, per block: scores up to the one of rank int(s n) go, that
            is int(s n) + 1 weights, and more where scores tie.
        unseen: what becomes of inputs that are 0 in every row. "keep": their weights are ranked with the others, as if
            such inputs had the mean energy of those that were seen: by magnitude. "zero": they become 0, beyond the
            sparsity asked for if need be, as in the public implementation.
        quantize_column: applied to the kept weights of each input on the way; see `solvers.solve_columns`. Keep one
            function for many calls: each new one is compiled.
        start_group: what a group of inputs begins with, such as its scales; see `solvers.solve_columns`.
        group_size: how many inputs a group has.
        select: which leaves; by default all that have statistics of contracted inputs.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out).

    Returns:
        `(params, info)`: plain leaves with exact zeros, and a `LeafInfo` for each of them by path (`path[i]`
        for each entry of a stack).

    Raises:
        ValueError: options out of range; nothing to prune; a leaf without statistics, with statistics of another
            width, or with NaN or Inf in either. Names option or leaf.

    Example:
        >>> from jaxcompress.calibration import input_statistics
        >>> params = {"kernel": jnp.array([[1.0], [1.0]])}
        >>> x = jnp.array([[1.0, 0.9], [0.9, 1.0]])
        >>> statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(x,)])
        >>> pruned, info = sparsegpt(params, statistics, sparsity=0.5, damping=0.0)
        >>> (pruned["kernel"] > 0).tolist(), info["kernel"].error < 0.1 < info["kernel"].error_before
        ([[False], [True]], True)

    References:
        Frantar and Alistarh 2023, "SparseGPT: massive language models can be accurately pruned in one-shot".
    """
    _check_options(pattern, damping, ridge, block_size, scope, counting)
    check_unseen(unseen)
    entries = calibrated_leaves(params, statistics, needs="gram", select=select, layouts=layouts)
    shares = sparsity_by_path(sparsity, entries, pattern)
    if group_size is not None and group_size < block_size:
        block_size = -(-block_size // group_size) * group_size
    rule = _Rule(pattern, block_size, scope, counting, unseen, quantize_column, start_group, group_size)
    pruned = solve_leaves(
        entries,
        lambda entry: _parts(entry, shares[entry.path], damping, ridge, rule),
        _solve,
        _pruned_leaf,
        options=(rule,),
    )
    leaves = {entry.path: leaf for entry, (leaf, _) in zip(entries, pruned, strict=True)}
    info = {name: leaf_info for _, infos in pruned for name, leaf_info in infos.items()}
    warn_unseen({entry.path: entry.unseen for entry in entries}, _FALLBACKS[unseen])
    return with_leaves(params, leaves), info


class _Rule(NamedTuple):
    """The options; hashable, so that leaves of one shape share a compilation."""

    pattern: Any
    block_size: int
    scope: RankingScope
    counting: Counting
    unseen: Unseen
    quantize_column: QuantizeColumn | None
    start_group: StartGroup | None
    group_size: int | None


class _Numbers(NamedTuple):
    """Options that may differ from leaf to leaf without another compilation."""

    dropped: Any
    by_block: Any
    damping: Any
    ridge: Any


class _Solved(NamedTuple):
    weights: Array
    damping: Array
    retries: Array


def _check_options(pattern: Pattern, damping: float, ridge: float, block_size: int, scope: str, counting: str) -> None:
    check_counting(counting, Counting)
    if not isinstance(pattern, Unstructured | NOfM):
        raise ValueError(f"`sparsegpt` prunes single weights or n of m, got the pattern {pattern}.")
    check_damping(damping, ridge)
    if block_size < 1:
        raise ValueError(f"`block_size` must be at least 1, got {block_size}.")
    if scope not in get_args(RankingScope):
        raise ValueError(f"`scope` must be one of {get_args(RankingScope)}, got {scope!r}.")


def _parts(entry: CalibratedLeaf, sparsity: float, damping: float, ridge: float, rule: _Rule) -> dict[str, Any]:
    """What `_solve` is given of a leaf."""
    if isinstance(rule.pattern, NOfM) and not np.isclose(sparsity, rule.pattern.allowed):
        raise ValueError(f"The pattern implies a `sparsity` of {rule.pattern.allowed:g}, got {sparsity:g}.")
    weights = entry.matrices
    depth, width = weights.shape[1:]
    numbers = _Numbers(
        dropped=np.int32(round(sparsity * depth * width)),
        by_block=_counts_by_block(depth, width, sparsity, rule),
        damping=np.float32(damping),
        ridge=np.float32(ridge),
    )
    repeated = jax.tree.map(lambda number: np.broadcast_to(number, (entry.stack, *number.shape)), numbers)
    return {"weights": weights, "gram": entry.gram, "cross": entry.cross, "count": entry.count, "numbers": repeated}


def _pruned_leaf(entry: CalibratedLeaf, solution: Any) -> tuple[jax.Array, dict[str, LeafInfo]]:
    solved, errors = solution
    pruned = sharded_like(entry.leaf(solved.weights).astype(entry.weight.dtype), entry.weight)
    return pruned, leaf_infos(entry, pruned, errors, damping=solved.damping, retries=solved.retries)


def _counts_by_block(depth: int, width: int, sparsity: float, rule: _Rule) -> np.ndarray:
    """How many weights each block loses; for the reference, the rank of the last one."""
    sizes = [rows * width for rows in block_sizes(depth, rule.block_size)]
    if rule.counting == "sparsegpt":
        return np.array([int(size * sparsity) for size in sizes], np.int32)
    ends = itertools.accumulate(sizes, initial=0)
    return np.diff([round(sparsity * end) for end in ends]).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("groups", "rule"))
def _solve(parts: dict[str, Any], groups: int, rule: _Rule) -> tuple[_Solved, dict[str, Float32[Array, " E"]]]:
    solved, targets = jax.lax.map(lambda part: _solve_matrix(**part, rule=rule), parts)
    gram, masked = parts["gram"], jnp.where(solved.weights == 0, 0.0, targets)
    before = output_errors(gram, targets, masked, groups=groups)
    return solved, {"error_before": before, "error": output_errors(gram, targets, solved.weights, groups=groups)}


def _solve_matrix(
    weights: Float32[Array, "D R"],
    gram: Float32[Array, "D D"],
    cross: Float32[Array, "D D"] | None,
    count: Float32[Array, ""],
    numbers: _Numbers,
    rule: _Rule,
) -> tuple[_Solved, Float32[Array, "D R"]]:
    zero = rule.unseen == "zero"
    targets, hessian, _ = problem(weights, gram, cross, count, numbers.ridge, zero_unseen=zero)
    factor = inverse_factor(hessian, numbers.damping)
    hooks = _hooks(targets, jnp.diagonal(factor.factor), numbers, rule)
    solved = solve_columns(
        targets,
        factor.factor,
        block_size=rule.block_size,
        quantize_column=rule.quantize_column,
        start_group=rule.start_group,
        group_size=rule.group_size,
        **hooks,
    )
    if rule.quantize_column is None:
        # Where hardly anything holds the weights, they may run away along directions that no input has.
        risky, masked = (factor.retries > 0) | (numbers.damping < 1e-4), jnp.where(solved == 0, 0.0, targets)
        solved = jax.lax.cond(risky, lambda: not_worse(solved, masked, targets, hessian), lambda: solved)
    return _Solved(solved, factor.damping, factor.retries), targets


def _hooks(
    weights: Float32[Array, "D R"], diagonal: Float32[Array, " D"], numbers: _Numbers, rule: _Rule
) -> dict[str, Any]:
    """What to keep, for `solve_columns`."""
    if isinstance(rule.pattern, NOfM):
        n, m = rule.pattern.n, rule.pattern.m

        def keep_run(weights: Any, diagonal: Any) -> Any:
            return keep_in_runs(_scores(weights, diagonal, beyond=-1.0), n, m, axis=0)

        return {"keep_run": keep_run, "run_size": m}
    if rule.counting == "sparsegpt":
        ranks = numbers.by_block
        return {"keep_block": lambda weights, diagonal, block: _above(_scores(weights, diagonal), ranks[block])}
    counts = numbers.by_block if rule.scope == "block" else _cheapest(weights, diagonal, numbers.dropped, rule)

    def keep_block(weights: Any, diagonal: Any, block: Any) -> Any:
        return keep_largest([_scores(weights, diagonal)], counts[block])[0]

    return {"keep_block": keep_block}


def _cheapest(
    weights: Float32[Array, "D R"], diagonal: Float32[Array, " D"], dropped: Any, rule: _Rule
) -> Int32[Array, " blocks"]:
    """How many weights each block loses when the whole leaf is ranked."""
    mask = keep_largest([_scores(weights, diagonal)], dropped)[0]
    padded = jnp.pad((~mask).sum(axis=1, dtype=jnp.int32), (0, -len(mask) % rule.block_size))
    return padded.reshape(-1, rule.block_size).sum(axis=1, dtype=jnp.int32)


def _scores(
    weights: Float32[Array, "B R"], diagonal: Float32[Array, " B"], *, beyond: float = jnp.inf
) -> Float32[Array, "B R"]:
    """|w / U_ii|; `beyond` for inputs that fill up the last block."""
    real = diagonal > 0
    # In order of the squares, which would vanish or overflow for very small or large weights.
    scores = jnp.abs(weights / jnp.where(real, diagonal, 1.0)[:, None])
    return jnp.where(real[:, None], scores, beyond)


def _above(scores: Float32[Array, "B R"], rank: Int32[Array, ""]) -> Bool[Array, "B R"]:
    ordered = jnp.sort(scores.reshape(-1))
    return scores > ordered[jnp.minimum(rank, scores.size - 1)]
