"""Wanda: weights by their size times the size of their input."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.pruning.counts import check_counting, sparsity_by_path
from jaxcompress._src.pruning.leaf_info import LeafInfo, leaf_infos
from jaxcompress._src.pruning.masks import Scope, masks_from_scores
from jaxcompress._src.pruning.patterns import NOfM, Pattern, unstructured
from jaxcompress._src.solvers.outputs import output_errors
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.maps import with_leaves
from jaxcompress._src.tree.unselected import partial_tree
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.matrices import CalibratedLeaf, calibrated_leaves
from jaxcompress._src.weights.unseen import Unseen, check_unseen, fill_unseen, warn_unseen

_UNSTRUCTURED = unstructured()


Counting = Literal["exact", "wanda"]
"""How many weights go: exactly those asked for, or as the public implementation counts."""

_FALLBACKS = {"keep": "ranked by magnitude", "zero": "given a score of 0"}


@on_auto_axes
def wanda_scores(
    params: Params,
    statistics: Params,
    *,
    unseen: Unseen = "keep",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Params:
    """|w_ij| sqrt(mean x_j²), in float32.

    Args:
        params: the tree.
        statistics: from `calibration.input_statistics`, with "squared_sum".
        unseen: what inputs that are 0 in every row count. "keep": as much as the others do on average, so that their
            weights are ranked by magnitude. "zero": nothing, as in the paper; they go first.
        select: which leaves; by default all that have statistics of contracted inputs.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out).

    Returns:
        A partial tree of scores, each of its leaf's shape.

    Raises:
        ValueError: nothing to score; a leaf without statistics, or with statistics of another width.

    Example:
        >>> from jaxcompress.calibration import input_statistics
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 1.0]])}
        >>> statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(jnp.array([[4.0, 1.0]]),)])
        >>> wanda_scores(params, statistics)["kernel"].tolist()
        [[4.0, 8.0], [3.0, 1.0]]

    References:
        Sun et al. 2023, "A simple and effective pruning approach for large language models", equation 1.
    """
    check_unseen(unseen)
    entries = calibrated_leaves(params, statistics, needs="squared_sum", select=select, layouts=layouts)
    warn_unseen({entry.path: entry.unseen for entry in entries}, _FALLBACKS[unseen])
    return partial_tree(params, {entry.path: _scores(entry, unseen) for entry in entries})


@on_auto_axes
def wanda(
    params: Params,
    statistics: Params,
    *,
    sparsity: Any = None,
    pattern: Pattern = _UNSTRUCTURED,
    scope: Scope = "row",
    counting: Counting = "exact",
    unseen: Unseen = "keep",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, LeafInfo]]:
    """Prunes by `wanda_scores`, in each output row by default; kept weights stay as they are.

    Args:
        params: the tree.
        statistics: from `calibration.input_statistics`; with "gram" the info has the output error.
        sparsity: share of pruned weights; one number, or a partial tree of them. A pattern n of m implies it.
        pattern: `unstructured()`, `n_of_m(2, 4)` (two of every four consecutive inputs are kept) or `block(32, 32)`.
        scope: what is ranked together; see `masks_from_scores`.
        counting: "exact", as `masks_from_scores` counts; "wanda", as the public implementation: int(s n) of the n
            inputs of a row, and among equal scores the lowest index is pruned (n of m: as "exact").
        unseen: what inputs that are 0 in every row count: "keep", as much as the others do on average, or "zero",
            nothing.
        select: which leaves; by default all that have statistics of contracted inputs.
        layouts: from `trace.layouts`; needed where kernels are not (in..., out).

    Returns:
        `(params, info)`: plain leaves with zeros, and a `LeafInfo` for each of them by path (`path[i]` for each
        entry of a stack).

    Raises:
        ValueError: as for `wanda_scores` and `masks_from_scores`; "wanda" with another scope than "row"; several
            sparsities in global scope.

    Example:
        >>> from jaxcompress.calibration import input_statistics
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 1.0]])}
        >>> statistics = input_statistics(lambda p, x: x @ p["kernel"], params, [(jnp.array([[4.0, 1.0]]),)])
        >>> pruned, info = wanda(params, statistics, sparsity=0.5)
        >>> pruned["kernel"].tolist(), info["kernel"].sparsity
        ([[1.0, -2.0], [0.0, 0.0]], 0.5)
    """
    check_counting(counting, Counting)
    check_unseen(unseen)
    if counting == "wanda" and scope != "row":
        raise ValueError(f"`counting='wanda'` counts in rows, got `scope` {scope!r}.")
    entries = calibrated_leaves(params, statistics, needs="squared_sum", select=select, layouts=layouts)
    shares = sparsity_by_path(sparsity, entries, pattern)
    if scope == "global":
        masks = _global_masks(entries, shares, pattern, unseen)
    else:
        of_leaf = _reference_mask if counting == "wanda" and not isinstance(pattern, NOfM) else _mask
        masks = {e.path: of_leaf(e, shares[e.path], scope=scope, pattern=pattern, unseen=unseen) for e in entries}
    leaves = {e.path: jnp.where(masks[e.path], e.weight, jnp.zeros((), e.weight.dtype)) for e in entries}
    info = {name: figures for e in entries for name, figures in _infos(e, leaves[e.path]).items()}
    warn_unseen({entry.path: entry.unseen for entry in entries}, _FALLBACKS[unseen])
    return with_leaves(params, leaves), info


def _scores(entry: CalibratedLeaf, unseen: Unseen) -> jax.Array:
    statistics = entry.statistics
    mean = entry.flat(
        statistics.squared_sum / jnp.where(statistics.count > 0, statistics.count, 1.0)[..., None], ndim=1
    )
    if unseen == "keep":
        mean = fill_unseen(mean, entry.unseen)
    return jnp.abs(entry.weight.astype(jnp.float32)) * jnp.sqrt(entry.of_inputs(mean))


def _mask(entry: CalibratedLeaf, share: float, *, scope: Scope, pattern: Pattern, unseen: Unseen) -> jax.Array:
    scores, layouts = {entry.path: _scores(entry, unseen)}, {entry.path: entry.layout}
    return masks_from_scores(scores, sparsity=share, scope=scope, pattern=pattern, layouts=layouts)[entry.path]


def _reference_mask(
    entry: CalibratedLeaf, share: float, *, scope: Scope, pattern: Pattern, unseen: Unseen
) -> jax.Array:
    del scope
    # From the last input to the first: the rule that keeps the lowest index then keeps the highest.
    scores = entry.matrix(_scores(entry, unseen))[:, ::-1]
    rows = scores.shape[1]
    layout = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
    masks = masks_from_scores(
        {"": scores}, sparsity=int(rows * share) / max(rows, 1), scope="row", pattern=pattern, layouts={"": layout}
    )
    return entry.leaf(masks[""][:, ::-1])


def _global_masks(
    entries: list[CalibratedLeaf], shares: dict[str, float], pattern: Pattern, unseen: Unseen
) -> dict[str, jax.Array]:
    if len(set(shares.values())) > 1:
        raise ValueError("`scope='global'` ranks all leaves together: give one `sparsity` for all of them.")
    scores = {entry.path: _scores(entry, unseen) for entry in entries}
    layouts = {entry.path: entry.layout for entry in entries}
    share = next(iter(shares.values()))
    return masks_from_scores(scores, sparsity=share, scope="global", pattern=pattern, layouts=layouts)


def _infos(entry: CalibratedLeaf, pruned: jax.Array) -> dict[str, LeafInfo]:
    if entry.statistics.gram is None:
        return leaf_infos(entry, pruned, {})
    error = _errors(entry.gram, entry.matrix(entry.weight), entry.matrix(pruned), groups=entry.layout.groups)
    return leaf_infos(entry, pruned, {"error_before": error, "error": error})


_errors = jax.jit(output_errors, static_argnames="groups")
