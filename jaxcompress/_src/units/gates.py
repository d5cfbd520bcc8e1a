"""Gates as a transform: learned switches on units, or on single weights."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.schedules import warn_unfinished
from jaxcompress._src.solvers.hard_concrete import (
    STANDARD,
    Estimator,
    HardConcrete,
    deterministic_gates,
    initial_log_alpha,
    nonzero_probability,
    sample_gates,
    soft_gates,
)
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, map_with_path
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Selector, Transform, TransformState, plain
from jaxcompress._src.units.group import UnitGroup, by_name, check_groups, check_known
from jaxcompress._src.units.penalty import Gated, Penalty
from jaxcompress._src.units.slices import multiply_units

CLAMP = (-4.605170185988091, 4.605170185988092)
"""log 1e-2 and log 1e2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setup:
    groups: tuple[UnitGroup, ...]
    penalty: Penalty
    select: Selector | None
    drop_rate: float | Mapping[str, float]
    estimator: Estimator
    clamp: tuple[float, float]
    distribution: HardConcrete


@transform_on_auto_axes
def hard_concrete(
    groups: Sequence[UnitGroup] = (),
    *,
    penalty: Penalty,
    select: Selector | None = None,
    drop_rate: float | Mapping[str, float] = 0.5,
    estimator: Estimator = "louizos",
    clamp: tuple[float, float] = CLAMP,
    distribution: HardConcrete = STANDARD,
) -> Transform:
    """Multiplies every unit by a hard concrete gate, whose location log alpha is trained with the model.

    `apply` draws one sample for each gate and call, or takes the deterministic form without a key; `penalty` prices
    open gates; `project` clamps log alpha. `finalize` folds the deterministic gates into the weights they multiply:
    closed units are exactly zero there, and `structured.shrink` takes them out for good. It warns
    (`UnfinishedScheduleWarning`) where they are not what the penalty was asked for.

    Args:
        groups: units with gates; each needs gated slices.
        penalty: the price of open gates, from `lagrangian`.
        select: leaves whose single weights have gates of their own; they may be in no group.
        drop_rate: 1 - P at the start, in (0, 1); by name or kind of a group or path of a leaf, 0.5 for those left out.
        estimator: what gates are without noise: "louizos" or "topk" of `deterministic_gates`.
        clamp: log alpha stays in between.
        distribution: constants of the hard concrete distribution.

    Returns:
        The transform. `state.trainable` is {"log_alpha": name or path -> float32 array, "multipliers": those of the
        penalty}; `state.fixed` is the number of updates (int32).

    Raises:
        ValueError: neither groups nor `select`, an empty `clamp`, an unknown estimator; from `init`: whatever
            `check_groups` finds, a group without gated slices, a gated leaf that is no float, a selected leaf
            that a group has too, a `drop_rate` out of range or for something unknown, or what the penalty finds.

    Example:
        >>> from jaxcompress._src.units.penalty import lambda_penalty
        >>> from jaxcompress.structured import UnitSlices
        >>> rows = UnitGroup(name="rows", count=3, slices=(UnitSlices(path="w", axis=0, gated=True),))
        >>> params = {"w": jnp.ones((3, 2))}
        >>> transform = hard_concrete([rows], penalty=lambda_penalty(1.0, examples=100))
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> state.trainable["log_alpha"]["rows"] = jnp.array([4.0, -4.0, 0.0])
        >>> transform.finalize(params, state)["w"]
        Array([[1. , 1. ],
               [0. , 0. ],
               [0.5, 0.5]], dtype=float32)

    References:
        Louizos, Welling and Kingma 2018, "Learning sparse neural networks through L0 regularization".
    """
    setup = _Setup(
        groups=tuple(groups),
        penalty=penalty,
        select=select,
        drop_rate=drop_rate,
        estimator=estimator,
        clamp=clamp,
        distribution=distribution,
    )
    _check_options(setup.groups, select, estimator, clamp)
    apply = functools.partial(_apply, setup)
    return identity()._replace(
        init=functools.partial(_init, setup),
        apply=apply,
        penalty=functools.partial(_penalty, setup),
        update=_update,
        project=functools.partial(_project, setup),
        finalize=functools.partial(_finalize, setup),
    )


def multiply_gates(params: Params, groups: Sequence[UnitGroup], values: Mapping[str, Any]) -> Params:
    """Multiplies units, and leaves whose weights have gates of their own, by their numbers.

    Args:
        params: compressed leaves are materialized where a gate multiplies them.
        groups: of units.
        values: name of a group -> (count,), or path of a leaf -> its shape; from `gate_values`.

    Example:
        >>> multiply_gates({"w": jnp.ones(2)}, [], {"w": jnp.array([0.5, 0.0])})["w"]
        Array([0.5, 0. ], dtype=float32)
    """
    names = {group.name for group in groups}
    single = {path: value for path, value in values.items() if path not in names}
    touched = {part.path for group in groups if group.name in values for part in group.gated} | set(single)

    def multiply(path: str, leaf: Any) -> Any:
        if path in touched:
            leaf = plain(leaf)
        return leaf * single[path].astype(leaf.dtype) if path in single else leaf

    return multiply_units(map_with_path(multiply, params), groups, values)


def gate_values(
    log_alpha: Mapping[str, Any],
    *,
    estimator: Estimator = "louizos",
    keep: Mapping[str, Any] | None = None,
    distribution: HardConcrete = STANDARD,
) -> dict[str, jax.Array]:
    """The deterministic gates, by name; to be multiplied into the weights by `multiply_gates`.

    Args:
        log_alpha: `state.trainable["log_alpha"]`.
        estimator: what gates are without noise: "louizos" or "topk" of `deterministic_gates`.
        keep: name -> bool: units that were selected otherwise, by `structured.select_units` say. Those left out are
            zero, the others have their `soft_gates`. Names without an entry have their deterministic gates.
        distribution: constants.

    Example:
        >>> gate_values({"rows": jnp.array([4.0, 4.0])}, keep={"rows": [True, False]})
        {'rows': Array([1., 0.], dtype=float32)}
    """
    values = {}
    for name, location in log_alpha.items():
        if keep is None or name not in keep:
            values[name] = deterministic_gates(location, estimator=estimator, distribution=distribution)
        else:
            soft = soft_gates(location, estimator=estimator, distribution=distribution)
            values[name] = jnp.where(jnp.asarray(keep[name], bool), soft, 0.0)
    return values


def _split(key: jax.Array, named: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A key for each name, whatever the order of the mapping: `jit` sorts it."""
    return dict(zip(sorted(named), jax.random.split(key, len(named)), strict=True))


def _init(setup: _Setup, params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
    del statistics
    shapes = _gate_shapes(params, setup.groups, setup.select)
    rates = _drop_rates(setup.drop_rate, setup.groups, shapes)
    keys = _split(key, shapes)
    log_alpha = {name: initial_log_alpha(keys[name], shape, rates[name]) for name, shape in shapes.items()}
    multipliers = setup.penalty.init(_gated(setup, params, log_alpha, 0, jnp.zeros(())))
    return TransformState({"log_alpha": log_alpha, "multipliers": multipliers}, jnp.zeros((), jnp.int32))


def _apply(setup: _Setup, params: Params, state: TransformState, *, key: jax.Array | None = None) -> Params:
    log_alpha = state.trainable["log_alpha"]
    if key is None:
        values = gate_values(log_alpha, estimator=setup.estimator, distribution=setup.distribution)
    else:
        keys = _split(key, log_alpha)
        values = {name: sample_gates(keys[name], x, distribution=setup.distribution) for name, x in log_alpha.items()}
    return multiply_gates(params, setup.groups, values)


def _penalty(setup: _Setup, state: TransformState, params: Params, *, loss: Any) -> jax.Array:
    inner = state.trainable
    return setup.penalty.value(_gated(setup, params, inner["log_alpha"], state.fixed, loss), inner["multipliers"])


def _update(grads: Any, state: TransformState, params: Params, *, key: Any, loss: Any) -> tuple[TransformState, None]:
    del grads, params, key, loss
    return state._replace(fixed=state.fixed + 1), None


def _project(setup: _Setup, params: Params, state: TransformState) -> tuple[Params, TransformState]:
    inner = {
        "log_alpha": {name: jnp.clip(x, *setup.clamp) for name, x in state.trainable["log_alpha"].items()},
        "multipliers": setup.penalty.project(state.trainable["multipliers"]),
    }
    return params, state._replace(trainable=inner)


def _finalize(setup: _Setup, params: Params, state: TransformState) -> Params:
    log_alpha = state.trainable["log_alpha"]
    values = gate_values(log_alpha, estimator=setup.estimator, distribution=setup.distribution)
    if not any(is_traced(leaf) for leaf in jax.tree.leaves(state)) and int(state.fixed) > 0:
        switches = {name: (value > 0).astype(jnp.float32) for name, value in values.items()}
        gated = Gated(params=params, groups=setup.groups, probabilities=switches, step=state.fixed, loss=jnp.zeros(()))
        if message := setup.penalty.shortfall(gated):
            warn_unfinished(f"{message}Select units by `structured.select_units`, which is exact, or train on.")
    return multiply_gates(params, setup.groups, values)


def _gated(setup: _Setup, params: Params, log_alpha: Mapping[str, Any], step: Any, loss: Any) -> Gated:
    probabilities = {name: nonzero_probability(x, distribution=setup.distribution) for name, x in log_alpha.items()}
    return Gated(params=params, groups=setup.groups, probabilities=probabilities, step=step, loss=loss)


def _check_options(groups: tuple[UnitGroup, ...], select: Any, estimator: str, clamp: tuple[float, float]) -> None:
    if not groups and select is None:
        raise ValueError("Nothing has a gate: give `groups`, `select`, or both.")
    if estimator not in get_args(Estimator):
        raise ValueError(f"`estimator` must be 'louizos' or 'topk', got {estimator!r}.")
    if not clamp[0] < clamp[1]:
        raise ValueError(f"`clamp` must be (low, high) with low < high, got {clamp}.")


def _gate_shapes(params: Params, groups: tuple[UnitGroup, ...], select: Selector | None) -> dict[str, tuple[int, ...]]:
    """The shape of log alpha by name of a group, or path of a leaf, with all checks."""
    check_groups(groups, params)
    leaves = leaves_by_path(params)
    for group in groups:
        if not group.gated:
            raise ValueError(f"Unit group {group.name!r} has no gated slices: its gates would multiply nothing.")
        for part in group.gated:
            _check_float(part.path, leaves[part.path])
    shapes = {group.name: (group.count,) for group in groups}
    owned = {part.path: group.name for group in groups for part in group.slices}
    marks = [] if select is None else leaves_with_paths(select(params))
    for path in [path for path, mark in marks if mark and not is_unselected(mark)]:
        if path in owned or path in shapes:
            raise ValueError(
                f"Leaf {path!r} cannot have gates of single weights: unit group {owned.get(path, path)!r}."
            )
        _check_float(path, leaves[path])
        shapes[path] = tuple(leaves[path].shape)
    return shapes


def _check_float(path: str, leaf: Any) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"Leaf {path!r} has dtype {leaf.dtype}: gates multiply floats.")


def _drop_rates(
    drop_rate: float | Mapping[str, float], groups: tuple[UnitGroup, ...], shapes: Mapping[str, Any]
) -> dict[str, float]:
    if isinstance(drop_rate, Mapping):
        check_known(drop_rate, {*shapes, *(group.kind for group in groups if group.kind)}, "drop_rate")
    return {name: by_name(drop_rate, name, groups, 0.5) for name in shapes}
