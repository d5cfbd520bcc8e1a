"""Importance from evidence that was gathered before: gradients, Fisher sums, movement.

Evidence is a tree like the parameters, or a partial one: it needs an entry for every leaf that is scored.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.checks import check_finite, is_traced
from jaxcompress._src.tree.keys import split_key
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.tree.unselected import is_unselected, map_selected
from jaxcompress._src.types import Params, Selector, is_compressed
from jaxcompress._src.weights.matrices import checked_weight
from jaxcompress._src.weights.selection import selected_layouts


@on_auto_axes
def taylor_scores(
    params: Params, gradients: Params, *, select: Selector | None = None, layouts: Params | None = None
) -> Params:
    """|w g|: by how much the loss changes, to first order, when w is removed.

    Args:
        params: the tree; a compressed leaf counts as the array it stands for.
        gradients: of the loss, such as `calibration.gradients` gives them.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        A partial tree of scores, float32.

    Raises:
        ValueError: nothing is selected; a gradient is missing, has another shape than its leaf, or holds NaN or Inf.
            Names the leaf.

    Example:
        >>> taylor_scores({"kernel": jnp.array([[2.0, -1.0]])}, {"kernel": jnp.array([[0.5, 3.0]])})
        {'kernel': Array([[1., 3.]], dtype=float32)}

    References:
        Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient inference", equation 8,
        for single weights.
    """
    return _scores(lambda w, g: jnp.abs(w * g), params, gradients, "gradients", select, layouts)


@on_auto_axes
def fisher_scores(
    params: Params, fisher: Params, *, select: Selector | None = None, layouts: Params | None = None
) -> Params:
    """w² F / 2: by how much the loss rises, to second order, when w is removed; F is the diagonal empirical Fisher.

    Args:
        params: the tree.
        fisher: the mean over samples of the squared gradient of each sample's loss, such as `calibration.fisher`
            gives it.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        A partial tree of scores, float32.

    Raises:
        ValueError: as `taylor_scores`; or a negative entry in `fisher`.

    Example:
        >>> fisher_scores({"kernel": jnp.array([[2.0, -1.0]])}, {"kernel": jnp.array([[0.5, 3.0]])})
        {'kernel': Array([[1. , 1.5]], dtype=float32)}

    References:
        Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning", equation 4, for single
        weights.
    """
    map_selected(_check_not_negative, fisher)
    return _scores(lambda w, f: jnp.square(w) * f / 2, params, fisher, "fisher", select, layouts)


@on_auto_axes
def movement_scores(
    params: Params, movement: Params, *, select: Selector | None = None, layouts: Params | None = None
) -> Params:
    """-Σ w g over the steps of a training: high where weights moved away from zero, whatever their size.

    Args:
        params: the tree; gives the leaves and their shapes.
        movement: the sum, as `add_movement` accumulates it.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        A partial tree of scores, float32; negative where weights shrank.

    Raises:
        ValueError: as `taylor_scores`.

    Example:
        >>> weights, gradients = {"kernel": jnp.array([[2.0, -1.0]])}, {"kernel": jnp.array([[0.5, 3.0]])}
        >>> movement_scores(weights, add_movement(None, weights, gradients))
        {'kernel': Array([[-1.,  3.]], dtype=float32)}

    References:
        Sanh et al. 2020, "Movement pruning: adaptive sparsity by fine-tuning", equation 4.
    """
    return _scores(lambda _, m: m, params, movement, "movement", select, layouts)


def add_movement(total: Params | None, params: Params, gradients: Params) -> Params:
    """`total` - w g: one more step of the evidence for `movement_scores`. Pure, for use inside a train step.

    Args:
        total: what was accumulated so far; None starts at zero.
        params: the weights at this step.
        gradients: of the loss at these weights; leaves without one (`Unselected`) get no movement.

    Returns:
        A partial tree, float32.
    """

    def add(_: str, gradient: Any, leaf: Any, *before: Any) -> jax.Array:
        step = leaf.astype(jnp.float32) * gradient.astype(jnp.float32)
        return before[0] - step if before else -step

    return map_selected(add, gradients, params, *(() if total is None else (total,)))


@on_auto_axes
def snip_scores(
    params: Params, gradients: Params, *, select: Selector | None = None, layouts: Params | None = None
) -> Params:
    """|w g| / Σ |w g|, the sum over all scored leaves: connection sensitivity of a network before training.

    The gradient of the loss by a mask on w is w g. Use it in global scope, on weights as they were initialised.

    Args:
        params: the initialised weights.
        gradients: of the loss on a batch (or the mean over several).
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        A partial tree of scores, float32, that add up to one (all zero if every product is).

    Raises:
        ValueError: as `taylor_scores`.

    Example:
        >>> snip_scores({"kernel": jnp.array([[2.0, -1.0]])}, {"kernel": jnp.array([[0.5, 3.0]])})
        {'kernel': Array([[0.25, 0.75]], dtype=float32)}

    References:
        Lee et al. 2019, "SNIP: single-shot network pruning based on connection sensitivity", equations 4 and 5.
    """
    scores = taylor_scores(params, gradients, select=select, layouts=layouts)
    total = jnp.sum(jnp.stack([score.sum() for _, score in leaves_with_paths(scores)]))
    total = jnp.where(total > 0, total, 1.0)
    return map_selected(lambda _, score: score / total, scores)


@on_auto_axes
def random_scores(
    params: Params, *, key: jax.Array, select: Selector | None = None, layouts: Params | None = None
) -> Params:
    """Uniform in [0, 1): the baseline of every other score, and what sparse training starts from.

    Args:
        params: the tree.
        key: typed; split per leaf.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        A partial tree of scores, float32.

    Example:
        >>> random_scores({"kernel": jnp.ones((2, 3))}, key=jax.random.key(0))["kernel"].shape
        (2, 3)
    """
    selected = selected_layouts(params, select=select, layouts=layouts)
    keys = split_key(key, params)
    return map_selected(
        lambda _, layout, leaf, leaf_key: jax.random.uniform(leaf_key, leaf.shape), selected, params, keys
    )


def _scores(
    score: Callable[[jax.Array, jax.Array], jax.Array],
    params: Params,
    evidence: Params,
    name: str,
    select: Selector | None,
    layouts: Params | None,
) -> Params:
    selected = selected_layouts(params, select=select, layouts=layouts)

    def visit(path: str, layout: Any, leaf: Any, statistic: Any) -> Any:
        if is_unselected(layout):
            return layout
        if is_unselected(statistic) or not hasattr(statistic, "shape"):
            raise ValueError(f"`{name}` has no entry for the leaf, found {statistic!r}.")
        weight = checked_weight(path, leaf)
        if statistic.shape != weight.shape:
            raise ValueError(f"`{name}` has shape {statistic.shape} where the leaf has {weight.shape}.")
        check_finite(path, statistic)
        return score(weight.astype(jnp.float32), statistic.astype(jnp.float32))

    return map_with_path(visit, selected, params, evidence, is_leaf=lambda x: is_unselected(x) or is_compressed(x))


def _check_not_negative(path: str, leaf: Any) -> None:
    if not is_traced(leaf) and bool((leaf < 0).any()):
        raise ValueError(f"`fisher` holds negative entries at {path!r}: it is a mean of squares.")
