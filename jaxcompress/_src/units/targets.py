"""Penalties that steer towards a target: multipliers ascend where everything else descends."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.schedules import constant, final_value, is_at
from jaxcompress._src.solvers.multipliers import ascending, steer
from jaxcompress._src.types import Schedule
from jaxcompress._src.units.count import unit_sizes
from jaxcompress._src.units.measure import Measure, expected_size, full_size, parameters
from jaxcompress._src.units.penalty import Gated, Penalty, check_known

Multipliers = dict[str, Any]


def lagrangian(
    *,
    sparsity: int | float | None = None,
    size: int | float | None = None,
    measure: Measure = parameters(),  # noqa: B008 (a pure function)
    warm_up: Schedule = constant(1.0),  # noqa: B008
    initial: tuple[float, float] = (0.0, 0.0),
) -> Penalty:
    """λ1 (ŝ - t) + λ2 (ŝ - t)², with ŝ the expected sparsity and t the target.

    ŝ = 1 - E[size] / full size. The gradient of λ1 and λ2 is reversed, so that the optimizer that minimises everything
    else makes them ascend: λ1 grows while the model is too small and falls while it is too large, until ŝ = t. That is
    an expectation, and met about: `units_within` chooses units that meet it exactly. `finalize` of `hard_concrete`
    warns where its gates miss the target by more than a hundredth of the full size (or one unit).

    Args:
        sparsity: t, in [0, 1]; either this or `size`.
        size: the target in units of `measure`: parameters, or FLOPs.
        measure: what is counted, and of which leaves: `parameters(...)` or `flops(...)`.
        warm_up: step -> share of t that is aimed at, such as `optax.linear_schedule(0.0, 1.0, 1000)`.
        initial: λ1 and λ2 at the start.

    Returns:
        The penalty; its multipliers are {"linear": λ1, "quadratic": λ2}.

    Raises:
        ValueError: not exactly one of `sparsity` and `size`, or one out of its range; from `init`: nothing is counted,
            or the target is above the full size or below what is left when all gates are closed, which it names.

    Example:
        >>> from jaxcompress._src.units.group import UnitSlices
        >>> from jaxcompress.structured import UnitGroup
        >>> rows = UnitGroup(name="rows", count=2, slices=(UnitSlices(path="w", axis=0, gated=True),))
        >>> params, probabilities = {"w": jnp.ones((2, 3))}, {"rows": jnp.array([1.0, 0.5])}
        >>> gated = Gated(params=params, groups=(rows,), probabilities=probabilities, step=0, loss=0.0)
        >>> penalty = lagrangian(sparsity=0.75, initial=(1.0, 2.0))
        >>> float(penalty.value(gated, penalty.init(gated)))
        0.0

    References:
        Wang, Wohlwend and Lei 2020, "Structured pruning of large language models", section 3.2; Xia, Zhong and Chen
        2022, "Structured pruning learns compact and accurate models", section 3.1.
    """
    if (sparsity is None) == (size is None):
        raise ValueError(f"Give one of `sparsity` and `size`, got {sparsity} and {size}.")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"`sparsity` must be in [0, 1], got {sparsity}.")
    if size is not None and not size >= 0:
        raise ValueError(f"`size` must be at least 0, got {size}.")
    goal = final_value(warm_up, name="warm_up")

    def sizes(gated: Gated) -> tuple[Mapping[str, float], float, float]:
        """What a weight counts, the full size, the target."""
        weights = measure(gated.params)
        full = full_size(gated.params, weights)
        return weights, full, float(size) if size is not None else (1 - (sparsity or 0.0)) * full

    def init(gated: Gated) -> Multipliers:
        weights, _, target = sizes(gated)
        check_size(gated, weights, target)
        return _pair(initial)

    def value(gated: Gated, multipliers: Multipliers) -> jax.Array:
        weights, full, target = sizes(gated)
        found = 1 - expected_size(gated.params, gated.groups, gated.probabilities, weights) / full
        return _steer(found - warm_up(gated.step) * (1 - target / full), multipliers)

    def shortfall(gated: Gated) -> str:
        weights, full, target = sizes(gated)
        share = float(expected_size(gated.params, gated.groups, gated.probabilities, weights)) / full
        wanted = 1 - goal * (1 - target / full)
        units = [unit_sizes(group, gated.params, weights=weights).max(initial=0.0) for group in gated.groups]
        return _unfinished(gated, warm_up, goal) + _missed(share, wanted, max(0.01, max(units, default=0.0) / full))

    return Penalty(init, value, shortfall=shortfall)


def shape_lagrangian(
    shape: Mapping[str, int],
    *,
    warm_up: Schedule = constant(1.0),  # noqa: B008
    initial: tuple[float, float] = (0.0, 0.0),
) -> Penalty:
    """The same towards an exact shape: so many units in every group of a kind.

    Σ over kinds of the mean over their groups of λ1 (ŝ - t) + λ2 (ŝ - t)², ŝ = 1 - E[units] / count, with one pair of
    multipliers for each kind. `units_within(shape=...)` then takes exactly that many.

    Args:
        shape: kind of groups -> units that are to stay in each of them; kinds left out stay free.
        warm_up: see `lagrangian`.
        initial: λ1 and λ2 at the start.

    Returns:
        The penalty; its multipliers are {kind: {"linear": λ1, "quadratic": λ2}}.

    Raises:
        ValueError: `shape` is empty; from `init`: there is no such kind, or a group has fewer units.

    References:
        Xia, Gao, Zeng and Chen 2024, "Sheared LLaMA: accelerating language model pre-training via structured pruning",
        section 2.1.
    """
    if not shape:
        raise ValueError("`shape` is empty: name at least one kind of units.")
    goal = final_value(warm_up, name="warm_up")

    def init(gated: Gated) -> Multipliers:
        check_shape(gated.groups, shape)
        return {kind: _pair(initial) for kind in shape}

    def value(gated: Gated, multipliers: Multipliers) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        for kind, units in shape.items():
            found = [
                _steer(
                    1 - jnp.mean(gated.probabilities[group.name]) - warm_up(gated.step) * (1 - units / group.count),
                    multipliers[kind],
                )
                for group in gated.groups
                if group.kind == kind
            ]
            total = total + sum(found) / len(found)
        return total

    def shortfall(gated: Gated) -> str:
        message = _unfinished(gated, warm_up, goal)
        for group in gated.groups:
            found = int(np.sum(np.asarray(gated.probabilities[group.name])))
            if group.kind in shape and goal == 1 and found != shape[group.kind]:
                message += f"The unit group {group.name!r} keeps {found} units, and {shape[group.kind]} are asked for. "
        return message

    return Penalty(init, value, shortfall=shortfall)


def smallest_with(
    *,
    loss_bound: float,
    measure: Measure = parameters(),  # noqa: B008
    initial: float = 1.0,
) -> Penalty:
    """The smallest model whose loss is at most a bound: min E[size] / full size subject to L <= ε.

    What is minimised is E[size] / full size + λ (L - ε), λ >= 0: the loss that the train step adds with weight one is
    taken off again. λ ascends by a reversed gradient while the loss is above the bound, and falls to zero at least
    while it is below.

    Args:
        loss_bound: ε, for the loss of a training batch, with sampled gates.
        measure: see `lagrangian`.
        initial: λ at the start; without any, nothing is learned before the loss has made λ rise.

    Returns:
        The penalty; its multipliers are {"loss": λ}.

    Raises:
        ValueError: a bound that is not a finite number, or a negative start; from `init`: nothing is counted.

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
        check_counted(gated, measure(gated.params))
        return {"loss": jnp.asarray(initial, jnp.float32)}

    def value(gated: Gated, multipliers: Multipliers) -> jax.Array:
        weights = measure(gated.params)
        share = expected_size(gated.params, gated.groups, gated.probabilities, weights)
        share = share / full_size(gated.params, weights)
        return share + ascending(multipliers["loss"]) * (gated.loss - loss_bound) - gated.loss

    return Penalty(init, value, lambda multipliers: {"loss": jnp.maximum(multipliers["loss"], 0.0)})


def check_counted(gated: Gated, weights: Mapping[str, float]) -> None:
    """Checks that some weight counts.

    Raises:
        ValueError: none does.
    """
    if not full_size(gated.params, weights):
        raise ValueError("The measure counts nothing in these parameters.")


def check_size(gated: Gated, weights: Mapping[str, float], target: float) -> None:
    """Checks that a target lies between what is left when every gate is closed and the full size.

    Raises:
        ValueError: it does not; names the least possible.
    """
    check_counted(gated, weights)
    full = full_size(gated.params, weights)
    # Sizes are known where values are traced, too.
    with jax.ensure_compile_time_eval():
        closed = {name: np.zeros(p.shape, np.float32) for name, p in gated.probabilities.items()}
        least = float(expected_size(gated.params, gated.groups, closed, weights))
    # Targets may be computed, and the size is counted in float32.
    slack = 1e-6 * full
    if target < least - slack:
        raise ValueError(
            f"The target size {target:g} is below what the units allow: the least possible is {least:g} of {full:g} "
            f"(sparsity {1 - least / full:.6g})."
        )
    if target > full + slack:
        raise ValueError(f"The target size {target:g} is above the full size, {full:g}.")


def check_shape(groups: tuple[Any, ...], shape: Mapping[str, int]) -> None:
    """Checks that every kind exists, and that its groups have that many units.

    Raises:
        ValueError: they do not; names kind or group.
    """
    check_known(shape, {group.kind for group in groups if group.kind}, "shape")
    for group in groups:
        if group.kind in shape and not 0 <= shape[group.kind] <= group.count:
            raise ValueError(
                f"`shape` asks for {shape[group.kind]} {group.kind}; the unit group {group.name!r} has {group.count}."
            )


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


def _steer(distance: Any, multipliers: Multipliers) -> jax.Array:
    return steer(distance, multipliers["linear"], multipliers["quadratic"])
