"""Penalties under a constraint: multipliers ascend where everything else descends."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.schedules import constant, final_value, is_at
from jaxcompress._src.solvers.multipliers import ascending, augmented_lagrangian
from jaxcompress._src.types import Schedule
from jaxcompress._src.units.budget import allowed_cost, check_budget, check_reachable, check_shape
from jaxcompress._src.units.costs import Costs, expected_cost, total_cost, unit_costs
from jaxcompress._src.units.penalty import Gated, Penalty

Multipliers = dict[str, Any]


def lagrangian(
    *,
    sparsity: int | float | None = None,
    budget: int | float | None = None,
    shape: Mapping[str, int] | None = None,
    costs: Costs | None = None,
    warm_up: Schedule = constant(1.0),  # noqa: B008 (a pure function)
    initial: tuple[float, float] = (0.0, 0.0),
) -> Penalty:
    """λ1 (ŝ - t) + λ2 (ŝ - t)², with ŝ the expected sparsity and t the target.

    ŝ = 1 - E[cost of what is left] / cost of everything. The gradient of λ1 and λ2 is reversed, so that the optimizer
    that minimises everything else makes them ascend: λ1 grows while the model is too large and falls while it is too
    small, until ŝ = t. That is an expectation, and met about: `structured.select_units` selects units that meet it
    exactly. `finalize` of `hard_concrete` warns where its gates miss the target by more than a hundredth of the full
    cost (or one unit).

    With `shape`, t says how many units stay in every group of a kind: Σ over kinds of the mean over their groups of
    the same expression, with ŝ = 1 - E[units] / count and a pair of multipliers for each kind.

    Args:
        sparsity: t, in [0, 1]. Either this, `budget` or `shape`.
        budget: the target as the cost of what is left.
        shape: kind of groups -> units that are to stay in each of them; kinds left out stay free.
        costs: path -> cost of one weight, from `structured.parameter_costs` or `flop_costs`. By default every weight
            costs 1. Not with `shape`.
        warm_up: step -> share of t that is aimed at, such as `optax.linear_schedule(0.0, 1.0, 1000)`.
        initial: λ1 and λ2 at the start.

    Returns:
        The penalty; its multipliers are {"linear": λ1, "quadratic": λ2}, with `shape` {kind: those of the kind}.

    Raises:
        ValueError: not exactly one of `sparsity`, `budget` and `shape`, or one out of its range; `costs` with `shape`;
            from `init`: nothing costs anything, the target is above the full cost or below what is left when all gates
            are closed, which it names, there is no such kind, or a group of it has fewer units.

    Example:
        >>> from jaxcompress.structured import UnitGroup, UnitSlices
        >>> rows = UnitGroup(name="rows", count=2, slices=(UnitSlices(path="w", axis=0, gated=True),))
        >>> params, probabilities = {"w": jnp.ones((2, 3))}, {"rows": jnp.array([1.0, 0.5])}
        >>> gated = Gated(params=params, groups=(rows,), probabilities=probabilities, step=0, loss=0.0)
        >>> penalty = lagrangian(sparsity=0.75, initial=(1.0, 2.0))
        >>> float(penalty.value(gated, penalty.init(gated)))
        0.0

    References:
        Wang, Wohlwend and Lei 2020, "Structured pruning of large language models", section 3.2; Xia, Zhong and Chen
        2022, "Structured pruning learns compact and accurate models", section 3.1. `shape`: Xia, Gao, Zeng and Chen
        2024, "Sheared LLaMA: accelerating language model pre-training via structured pruning", section 2.1.
    """
    check_budget(sparsity=sparsity, budget=budget, shape=shape)
    if shape is not None:
        if costs is not None:
            raise ValueError("`costs` does not go with `shape`, which counts units.")
        return _towards_shape(shape, warm_up, initial)
    goal = final_value(warm_up, name="warm_up")

    def targets(gated: Gated) -> tuple[float, float]:
        """The full cost and the cost to reach."""
        total = total_cost(gated.params, costs)
        return total, allowed_cost(total, sparsity=sparsity, budget=budget)

    def left(gated: Gated) -> Any:
        return expected_cost(gated.params, gated.groups, gated.probabilities, costs)

    def init(gated: Gated) -> Multipliers:
        total, target = targets(gated)
        closed = {name: np.zeros(p.shape) for name, p in gated.probabilities.items()}
        least = expected_cost(gated.params, gated.groups, closed, costs)
        # Targets may be computed, and the expected cost is counted in float32.
        check_reachable(target, least, total, slack=1e-6)
        if target > total * (1 + 1e-6):
            raise ValueError(f"The budget {target:g} is above the full cost, {total:g}.")
        return _pair(initial)

    def value(gated: Gated, multipliers: Multipliers) -> jax.Array:
        total, target = targets(gated)
        distance = 1 - left(gated) / total - warm_up(gated.step) * (1 - target / total)
        return augmented_lagrangian(distance, **multipliers)

    def shortfall(gated: Gated) -> str:
        total, target = targets(gated)
        share, wanted = float(left(gated)) / total, 1 - goal * (1 - target / total)
        units = [unit_costs(group, gated.params, costs).max(initial=0.0) for group in gated.groups]
        return _unfinished(gated, warm_up, goal) + _missed(share, wanted, max(0.01, max(units, default=0.0) / total))

    return Penalty(init, value, shortfall=shortfall)


def smallest_with(*, loss_bound: float, costs: Costs | None = None, initial: float = 1.0) -> Penalty:
    """The smallest model whose loss is at most a bound: min E[cost] / full cost subject to L <= ε.

    What is minimised is E[cost] / full cost + λ (L - ε), λ >= 0: the loss that the train step adds with weight one is
    taken off again. λ ascends by a reversed gradient while the loss is above the bound, and falls to zero at least
    while it is below.

    Args:
        loss_bound: ε, for the loss of a training batch, with sampled gates.
        costs: path -> cost of one weight; by default every weight costs 1.
        initial: λ at the start; without any, nothing is learned before the loss has made λ rise.

    Returns:
        The penalty; its multipliers are {"loss": λ}.

    Raises:
        ValueError: a bound that is not a finite number, or a negative start; from `init`: nothing costs anything.

    Example:
        >>> gated = Gated(params={"w": jnp.ones(4)}, groups=(), probabilities={"w": jnp.ones(4) / 4}, step=0, loss=0.5)
        >>> float(smallest_with(loss_bound=0.25).value(gated, {"loss": jnp.float32(2.0)}))
        0.25
    """
    if not -jnp.inf < loss_bound < jnp.inf:
        raise ValueError(f"`loss_bound` must be a finite number, got {loss_bound}.")
    if initial < 0:
        raise ValueError(f"`initial` must not be negative, got {initial}.")

    def init(gated: Gated) -> Multipliers:
        total_cost(gated.params, costs)
        return {"loss": jnp.asarray(initial, jnp.float32)}

    def value(gated: Gated, multipliers: Multipliers) -> jax.Array:
        share = expected_cost(gated.params, gated.groups, gated.probabilities, costs)
        share = share / total_cost(gated.params, costs)
        return share + ascending(multipliers["loss"]) * (gated.loss - loss_bound) - gated.loss

    return Penalty(init, value, lambda multipliers: {"loss": jnp.maximum(multipliers["loss"], 0.0)})


def _towards_shape(shape: Mapping[str, int], warm_up: Schedule, initial: tuple[float, float]) -> Penalty:
    goal = final_value(warm_up, name="warm_up")

    def init(gated: Gated) -> Multipliers:
        check_shape(gated.groups, shape)
        return {kind: _pair(initial) for kind in shape}

    def value(gated: Gated, multipliers: Multipliers) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        for kind, units in shape.items():
            groups = [group for group in gated.groups if group.kind == kind]
            for group in groups:
                target = warm_up(gated.step) * (1 - units / group.count)
                distance = 1 - jnp.mean(gated.probabilities[group.name]) - target
                total = total + augmented_lagrangian(distance, **multipliers[kind]) / len(groups)
        return total

    def shortfall(gated: Gated) -> str:
        message = _unfinished(gated, warm_up, goal)
        for group in gated.groups:
            count = int(np.sum(np.asarray(gated.probabilities[group.name])))
            if group.kind in shape and goal == 1 and count != shape[group.kind]:
                message += f"The unit group {group.name!r} keeps {count} units, and {shape[group.kind]} are asked for. "
        return message

    return Penalty(init, value, shortfall=shortfall)


def _unfinished(gated: Gated, warm_up: Schedule, goal: float) -> str:
    share = float(warm_up(gated.step))
    if is_at(share, goal):
        return ""
    return f"Training ended after {int(gated.step)} updates, where `warm_up` is {share:.4g} and goes on to {goal:.4g}. "


def _missed(share: float, wanted: float, slack: float) -> str:
    if abs(share - wanted) <= slack:
        return ""
    return f"The open gates leave {share:.4g} of the size, and {wanted:.4g} are asked for. "


def _pair(initial: tuple[float, float]) -> Multipliers:
    linear, quadratic = initial
    return {"linear": jnp.asarray(linear, jnp.float32), "quadratic": jnp.asarray(quadratic, jnp.float32)}
