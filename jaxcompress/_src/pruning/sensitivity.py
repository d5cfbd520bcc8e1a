"""A budget spread by what pruning each leaf alone does to the loss."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress._src.pruning.masks import apply_masks, masks_from_scores
from jaxcompress._src.pruning.patterns import Pattern, unstructured
from jaxcompress._src.pruning.ranking import Scope, check_sparsity
from jaxcompress._src.solvers.budget import cheapest_choice
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.unselected import Unselected, map_selected
from jaxcompress._src.types import Params

_GRID = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
_UNSTRUCTURED = unstructured()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What `loss_sensitivity` measured: two partial trees of vectors, one entry for each point of the grid.

    Attributes:
        pruned: how many weights of the leaf went, int64; ascending from 0.
        losses: the mean loss with this leaf pruned that far and all others whole, float64.
        sizes: how many weights the leaf has.
    """

    pruned: Params
    losses: Params
    sizes: Params


def loss_sensitivity(
    loss: Callable[[Params, Any], jax.Array],
    params: Params,
    batches: Sequence[Any],
    scores: Params,
    *,
    grid: Sequence[float] = _GRID,
    scope: Scope = "leaf",
    pattern: Pattern = _UNSTRUCTURED,
    layouts: Params | None = None,
) -> Sensitivity:
    """The loss when one leaf at a time is pruned to each sparsity of a grid.

    That is (leaves x grid) evaluations on every batch, all by one compiled function.

    Args:
        loss: `(params, batch) -> scalar`, a mean over the batch.
        params: plain arrays.
        batches: each counts the same; used repeatedly. Not the test set.
        scores: a partial tree; its leaves are measured.
        grid: ascending sparsities; 0 is added if it is missing.
        scope: "leaf" or "row".
        pattern: as in `masks_from_scores`, with a grid that it allows.
        layouts: from `trace.layouts`.

    Returns:
        The table; see `by_sensitivity`.

    Raises:
        ValueError: no batches, a grid that does not ascend, global scope, or a loss that is not finite: names the leaf
            and the sparsity.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss(params, x):
        ...     return jnp.mean((x * (params["a"] - 1)) ** 2) + jnp.mean((x * (params["b"] - 1)) ** 2)
        >>> params = {"a": jnp.array([1.0, 0.5]), "b": jnp.array([1.0, 1.0])}
        >>> table = loss_sensitivity(loss, params, [jnp.ones(2)], params, grid=(0.5,))
        >>> table.pruned["a"], table.losses["b"]
        (array([0, 1]), array([0.125, 0.625]))

    References:
        Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.2 (sensitivity of layers).
    """
    if not batches:
        raise ValueError("`batches` is empty: sensitivities need at least one batch.")
    steps = [0.0, *(share for share in grid if share != 0.0)]
    if any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"`grid` must ascend within [0, 1], got {tuple(grid)}.")
    evaluate = jax.jit(loss)

    def mean_loss(pruned: Params) -> float:
        return float(np.mean([float(evaluate(pruned, batch)) for batch in batches]))

    base = mean_loss(params)
    counts: dict[str, list[int]] = {}

    def measure(path: str, score: jax.Array) -> np.ndarray:
        leaf_scores = map_selected(lambda other, leaf: leaf if other == path else Unselected, scores)
        losses, counts[path] = [base], [0]
        for share in steps[1:]:
            masks = masks_from_scores(leaf_scores, sparsity=share, scope=scope, pattern=pattern, layouts=layouts)
            losses.append(mean_loss(apply_masks(params, masks)))
            counts[path].append(score.size - int(leaves_with_paths(masks)[0][1].sum()))
            if not np.isfinite(losses[-1]):
                raise ValueError(f"The loss is {losses[-1]} at sparsity {share:g}.")
        return np.array(losses)

    losses = map_selected(measure, scores)
    return Sensitivity(
        pruned=map_selected(lambda path, _: np.array(counts[path], np.int64), scores),
        losses=losses,
        sizes=map_selected(lambda _, score: score.size, scores),
    )


def by_sensitivity(sensitivity: Sensitivity, *, sparsity: float) -> Params:
    """The sparsities on the measured grid with the least sum of losses under the budget.

    Losses of different leaves are taken to add up. The choice is the exact optimum (`solvers.cheapest_choice`); the few
    weights by which it stays below the budget go back to the leaves where they gain most between two points of the
    grid, so that the total is exact.

    Args:
        sensitivity: the table.
        sparsity: of all measured leaves together, in [0, 1].

    Returns:
        A partial tree of floats; see `masks_from_scores`.

    Raises:
        ValueError: a sparsity outside [0, 1], or above what the grid reaches.

    Example:
        >>> table = Sensitivity(
        ...     pruned={"a": np.array([0, 5, 9]), "b": np.array([0, 5, 9])},
        ...     losses={"a": np.array([0.0, 0.1, 0.2]), "b": np.array([0.0, 1.0, 3.0])},
        ...     sizes={"a": 10, "b": 10},
        ... )
        >>> by_sensitivity(table, sparsity=0.4)
        {'a': 0.8, 'b': 0.0}
    """
    check_sparsity(sparsity)
    pruned = [entry for _, entry in leaves_with_paths(sensitivity.pruned)]
    losses = [entry for _, entry in leaves_with_paths(sensitivity.losses)]
    sizes = [entry for _, entry in leaves_with_paths(sensitivity.sizes)]
    budget = sum(sizes) - round(float(sparsity) * sum(sizes))
    remaining = [size - counts for size, counts in zip(sizes, pruned, strict=True)]
    least = sum(int(counts[-1]) for counts in remaining)
    if least > budget:
        reached = 1 - least / sum(sizes)
        raise ValueError(f"The grid reaches a sparsity of {reached:.4g}, below the {sparsity:g} asked for: extend it.")
    choice = cheapest_choice(remaining, losses, budget)
    counts = _spend(remaining, losses, list(choice.options), budget - choice.cost)
    shares = iter([1 - count / size if size else 0.0 for count, size in zip(counts, sizes, strict=True)])
    return map_selected(lambda *_: next(shares), sensitivity.sizes)


def _spend(remaining: list[np.ndarray], losses: list[np.ndarray], options: list[int], spare: int) -> list[int]:
    """Counts of kept weights with `spare` more than the options have, on the steepest steps of the grid."""
    counts = [int(counts_of_leaf[option]) for counts_of_leaf, option in zip(remaining, options, strict=True)]

    def slope(i: int) -> float:
        """What one more weight changes, between the two points of the grid around the count of leaf i."""
        denser, here = options[i] - 1, options[i]
        return float(losses[i][denser] - losses[i][here]) / int(remaining[i][denser] - remaining[i][here])

    while spare:
        for i, counts_of_leaf in enumerate(remaining):
            while options[i] and counts_of_leaf[options[i] - 1] == counts[i]:
                options[i] -= 1
        best = min((i for i, option in enumerate(options) if option), key=slope)
        step = min(spare, int(remaining[best][options[best] - 1]) - counts[best])
        counts[best] += step
        spare -= step
    return counts
