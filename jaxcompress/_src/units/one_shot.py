"""Units taken out in one shot, down to a share of the parameters."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress._src.types import Params, Selector
from jaxcompress._src.units.costs import parameter_costs
from jaxcompress._src.units.group import UnitGroup
from jaxcompress._src.units.refit import refit
from jaxcompress._src.units.scores import fisher_unit_scores, gate_gradients, magnitude_unit_scores
from jaxcompress._src.units.select import Rule, select_units
from jaxcompress._src.units.shrink import shrink
from jaxcompress._src.units.swap import swap_units


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShrinkInfo:
    """What happened to a group of units.

    Attributes:
        units: number of units that are left.
        of: number of units that there were.
        keep: bool, (of,): which are left.
    """

    units: int
    of: int
    keep: np.ndarray


def magnitude_shrink(
    params: Params,
    groups: Sequence[UnitGroup],
    *,
    sparsity: float,
    rule: Rule = "kind",
    uniform: bool = False,
    select: Selector | None = None,
) -> tuple[Params, dict[str, ShrinkInfo]]:
    """Takes out the units of least mean magnitude until a share of the parameters is gone; the arrays become smaller.

    Args:
        params: the tree.
        groups: units that live and die together, such as `models.unit_groups(config)`.
        sparsity: share of the parameters of selected leaves that goes, at least.
        rule: how units compete; see `select_units`.
        uniform: equal widths in all groups of a kind; see `select_units`.
        select: leaves whose parameters count; by default all.

    Returns:
        `(params, info)`: the smaller tree, and a `ShrinkInfo` for each group by name.

    Raises:
        ValueError: as for `select_units` and `shrink`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.gates import layer_units
        >>> params = {"a": {"kernel": jnp.arange(8.0).reshape(2, 4)}, "b": {"kernel": jnp.ones((4, 3))}}
        >>> groups = layer_units(params, ["a/kernel", "b/kernel"], inputs=False)
        >>> small, info = magnitude_shrink(params, groups, sparsity=0.5)
        >>> small["a"]["kernel"].tolist(), [(group.units, group.of) for group in info.values()]
        ([[2.0, 3.0], [6.0, 7.0]], [(2, 4)])
    """
    scores = magnitude_unit_scores(params, groups)
    costs = parameter_costs(params, select=select)
    keep = select_units(scores, groups, params, sparsity=sparsity, costs=costs, rule=rule, uniform=uniform).keep
    return shrink(params, groups, keep), _infos(keep)


def fisher_shrink(
    apply: Callable[..., Any],
    params: Params,
    groups: Sequence[UnitGroup],
    batches: Iterable[tuple[Any, ...]],
    *,
    loss: Callable[[Params, Any], Any],
    examples: Iterable[Any],
    sparsity: float,
    rounds: int = 3,
    fit: bool = True,
    row_mask: Callable[..., Any] | None = None,
    select: Selector | None = None,
) -> tuple[Params, dict[str, ShrinkInfo]]:
    """Takes out the units of least Fisher information; least squares makes up for what they did. Nothing is trained.

    A unit's score is the mean squared derivative of the loss by a gate on it. Units are swapped while that lowers the
    summed Fisher information of those that go, their correlations included (`swap_units`). The size comes down
    geometrically in rounds; what was fitted is scored again before more is taken out.

    Args:
        apply: `(params, *inputs) -> outputs`.
        params: the tree.
        groups: units that live and die together, such as `models.unit_groups(config)`.
        batches: tuples of inputs of `apply`, on which rows are fitted.
        loss: `(params, batch) -> scalar`, the mean over a batch: a negative log likelihood.
        examples: batches for the loss; each is used once a round.
        sparsity: share of the parameters of selected leaves that goes, at least.
        rounds: in which the size comes down.
        fit: whether the rows that are left are fitted by least squares; see `refit`.
        row_mask: `(*inputs) -> weights` of rows; see `refit`.
        select: leaves whose parameters count; by default all.

    Returns:
        `(params, info)`: the smaller tree, and a `ShrinkInfo` for each group by name.

    Raises:
        ValueError: `rounds` below 1; as for `gate_gradients`, `select_units`, `refit` and `shrink`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.gates import layer_units
        >>> params = {"a": {"kernel": jnp.eye(4)}, "b": {"kernel": jnp.ones((4, 1))}}
        >>> groups = layer_units(params, ["a/kernel", "b/kernel"], inputs=False)
        >>> apply = lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"]
        >>> x = jnp.array([[3.0, 1.0, 0.0, 2.0]])
        >>> loss = lambda p, x: apply(p, x).mean()
        >>> small, info = fisher_shrink(
        ...     apply, params, groups, [(x,)], loss=loss, examples=[x], sparsity=0.5, fit=False
        ... )
        >>> [group.keep.tolist() for group in info.values()]
        [[True, False, False, True]]

    References:
        Kwon et al. 2022, "A fast post-training pruning framework for transformers": scores and rearrangement; fitted
        rows instead of tuned masks.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
    inputs, scored = list(batches), list(examples)
    costs = parameter_costs(params, select=select)
    current, keep = params, {}
    for i in range(rounds):
        # Units that are gone have rows of zeros, so no gradient and no score: they stay gone.
        gradients = gate_gradients(loss, current, groups, scored)
        scores = fisher_unit_scores(gradients)
        gone = 1 - (1 - sparsity) ** ((i + 1) / rounds)
        keep = select_units(scores, groups, params, sparsity=gone, costs=costs).keep
        keep = swap_units(keep, gradients)
        current, _ = refit(apply, params, groups, keep, inputs, row_mask=row_mask) if fit else (params, None)
    return shrink(current, groups, keep), _infos(keep)


def _infos(keep: Mapping[str, Any]) -> dict[str, ShrinkInfo]:
    masks = {name: np.asarray(mask, bool) for name, mask in keep.items()}
    return {name: ShrinkInfo(units=int(mask.sum()), of=mask.size, keep=mask) for name, mask in masks.items()}
