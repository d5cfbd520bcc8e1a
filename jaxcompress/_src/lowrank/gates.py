"""Ranks that are learned: a gate on every direction.

Shape letters: S stack entries, D inputs, R outputs, K = min(D, R), k the rank.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxcompress._src.lowrank.leaves import low_rank_leaf
from jaxcompress._src.lowrank.targets import activation_targets, plain_targets
from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.schedules import constant, final_value, is_at, warn_unfinished
from jaxcompress._src.solvers.hard_concrete import (
    STANDARD,
    HardConcrete,
    deterministic_gates,
    initial_log_alpha,
    nonzero_probability,
    sample_gates,
)
from jaxcompress._src.solvers.multipliers import augmented_lagrangian
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.maps import map_with_path, with_leaves
from jaxcompress._src.tree.unselected import is_unselected, without_compressed
from jaxcompress._src.types import Params, Schedule, Selector, Transform, TransformState
from jaxcompress._src.weights.matrices import MatrixLeaf, weight_leaves
from jaxcompress._src.weights.selection import selected_layouts

_CLAMP = (-4.605170185988091, 4.605170185988092)
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setup:
    share: float | None
    strength: float
    warm_up: Schedule
    drop_rate: float
    select: Selector | None
    layouts: Params | None
    distribution: HardConcrete


@transform_on_auto_axes
def rank_gates(
    *,
    share: float | None = None,
    strength: float | None = None,
    warm_up: Schedule = constant(1.0),  # noqa: B008 (a pure function)
    drop_rate: float = 0.1,
    distribution: HardConcrete = STANDARD,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Learns how many directions each leaf keeps: W' = W V diag(z) Vᵀ, with a hard concrete gate z on each direction.

    V are the right singular vectors of W, in the norm of its outputs if `init` gets statistics with "gram" (there V Vᵀ
    is the best projection of every rank; see `activation_svd`), and stays as it is. W and the gates are trained: the
    weights go on learning, within the directions that are open. The entries of a stack share their gates.

    `finalize` gives a `LowRankArray` of the open directions, W V z and V, where that is smaller than the leaf. It warns
    (`UnfinishedScheduleWarning`) if training ended before `warm_up` did, or if the open directions miss `share` by more
    than a hundredth (or one direction).

    Args:
        share: aim at this share of the leaves' parameters, with two multipliers that ascend: λ1 (s - t) + λ2
            (s - t)², s = Σ S (D + R) Σ P(z != 0) / Σ S D R. Either this or `strength`.
        strength: λ: a fixed price, λ s.
        warm_up: step -> how far towards t: the target is 1 - warm_up (1 - t).
        drop_rate: 1 - P(z != 0) at the start, in (0, 1).
        distribution: constants of the hard concrete distribution.
        select: which leaves; by default every weight. Those that are compressed when the training begins stay as
            they are.
        layouts: from `trace.layouts`.

    Returns:
        The transform. `state.trainable` is {"log_alpha": path -> (K,), "multipliers": {"linear": λ1, "quadratic": λ2}
        or {}}; `state.fixed` is {"directions": path -> (S, R, K), "step": int32}, all float32.

    Raises:
        ValueError: not exactly one of `share` and `strength`, or an option out of range; from `init`: as `svd`.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])}
        >>> transform = rank_gates(share=0.75)
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> state.trainable["log_alpha"]["kernel"] = jnp.array([4.0, -4.0])
        >>> small = transform.finalize(params, state)["kernel"]
        >>> small.rank, small.materialize().round().tolist()[0]
        (1, [3.0, 0.0])

    References:
        Wang, Wohlwend and Lei 2020, "Structured pruning of large language models", section 3.1: gates between two
        factors; Louizos, Welling and Kingma 2018 for the gates.
    """
    if (share is None) == (strength is None):
        raise ValueError(f"Give one of `share` and `strength`, got {share} and {strength}.")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"`share` must be in (0, 1], got {share}.")
    if strength is not None and not strength >= 0:
        raise ValueError(f"`strength` must be at least 0, got {strength}.")
    if not 0 < drop_rate < 1:
        raise ValueError(f"`drop_rate` must be in (0, 1), got {drop_rate}.")
    setup = _Setup(
        share=share,
        strength=strength or 0.0,
        warm_up=warm_up,
        drop_rate=drop_rate,
        select=select,
        layouts=layouts,
        distribution=distribution,
    )
    final_value(warm_up, name="warm_up")
    return identity()._replace(
        init=functools.partial(_init, setup),
        apply=functools.partial(_apply, setup),
        penalty=functools.partial(_penalty, setup),
        update=_update,
        project=_project,
        finalize=functools.partial(_finalize, setup),
    )


def expected_ranks(state: TransformState, *, distribution: HardConcrete = STANDARD) -> dict[str, float]:
    """Σ P(z != 0) of every leaf, by path."""
    return {
        path: float(nonzero_probability(log_alpha, distribution=distribution).sum())
        for path, log_alpha in state.trainable["log_alpha"].items()
    }


def _init(setup: _Setup, params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
    layouts = selected_layouts(params, select=setup.select, layouts=setup.layouts)
    layouts = without_compressed(layouts, params)
    marks = map_with_path(lambda _, entry: not is_unselected(entry), layouts, is_leaf=is_unselected)
    if statistics is None:
        targets = plain_targets(params, select=lambda _: marks, layouts=setup.layouts)
    else:
        targets = activation_targets(
            params,
            statistics,
            fisher=None,
            damping=0.0,
            ridge=0.1,
            whitening="cholesky",
            select=lambda _: marks,
            layouts=setup.layouts,
        )
    bases = {target.leaf.path: target.directions().outputs for target in targets}
    keys = dict(zip(sorted(bases), jax.random.split(key, len(bases)), strict=True))
    log_alpha = {
        path: initial_log_alpha(keys[path], (basis.shape[-1],), setup.drop_rate) for path, basis in bases.items()
    }
    multipliers = {} if setup.share is None else {name: jnp.zeros(()) for name in ("linear", "quadratic")}
    return TransformState(
        {"log_alpha": log_alpha, "multipliers": multipliers},
        {"directions": bases, "step": jnp.zeros((), jnp.int32)},
    )


def _gates(setup: _Setup, state: TransformState, key: jax.Array | None) -> dict[str, jax.Array]:
    log_alpha = state.trainable["log_alpha"]
    if key is None:
        return {
            path: deterministic_gates(value, estimator="louizos", distribution=setup.distribution)
            for path, value in log_alpha.items()
        }
    keys = dict(zip(sorted(log_alpha), jax.random.split(key, len(log_alpha)), strict=True))
    return {path: sample_gates(keys[path], value, distribution=setup.distribution) for path, value in log_alpha.items()}


def _apply(setup: _Setup, params: Params, state: TransformState, *, key: jax.Array | None = None) -> Params:
    gates = _gates(setup, state, key)
    return _map(setup, params, state, lambda leaf, along: _plain(leaf, _opened(leaf, along, gates[leaf.path]), along))


def _penalty(setup: _Setup, state: TransformState, params: Params, *, loss: Any) -> jax.Array:
    del loss
    shapes = {leaf.path: leaf.sizes for leaf in _leaves(setup, params, state)}
    log_alpha = state.trainable["log_alpha"]
    open_ = {
        path: nonzero_probability(value, distribution=setup.distribution).sum() for path, value in log_alpha.items()
    }
    parameters = sum(stack * (depth + width) * open_[path] for path, (stack, depth, width) in shapes.items())
    size = parameters / max(sum(stack * depth * width for stack, depth, width in shapes.values()), 1)
    if setup.share is None:
        return setup.strength * jnp.asarray(size, jnp.float32)
    target = 1 - setup.warm_up(state.fixed["step"]) * (1 - setup.share)
    return augmented_lagrangian(size - target, **state.trainable["multipliers"])


def _update(grads: Any, state: TransformState, params: Params, *, key: Any, loss: Any) -> tuple[TransformState, None]:
    del grads, params, key, loss
    return state._replace(fixed=state.fixed | {"step": state.fixed["step"] + 1}), None


def _project(params: Params, state: TransformState) -> tuple[Params, TransformState]:
    clamped = {path: jnp.clip(value, *_CLAMP) for path, value in state.trainable["log_alpha"].items()}
    return params, state._replace(trainable=state.trainable | {"log_alpha": clamped})


def _finalize(setup: _Setup, params: Params, state: TransformState) -> Params:
    gates = _gates(setup, state, None)
    if setup.share is not None and int(state.fixed["step"]) > 0:
        _warn_of_a_shortfall(setup, params, state, gates)

    def store(leaf: MatrixLeaf, along: jax.Array) -> Any:
        places = np.flatnonzero(np.asarray(gates[leaf.path]) > 0)
        _, depth, width = leaf.sizes
        if len(places) * (depth + width) >= depth * width:
            return _plain(leaf, _opened(leaf, along, gates[leaf.path]), along)
        along = along[..., places]
        return low_rank_leaf(leaf, _opened(leaf, along, gates[leaf.path][places]), along)

    return _map(setup, params, state, store)


def _warn_of_a_shortfall(setup: _Setup, params: Params, state: TransformState, gates: dict[str, jax.Array]) -> None:
    shapes = {leaf.path: leaf.sizes for leaf in _leaves(setup, params, state)}
    total = max(sum(stack * depth * width for stack, depth, width in shapes.values()), 1)
    prices = {path: stack * (depth + width) / total for path, (stack, depth, width) in shapes.items()}
    stored = sum(price * int((np.asarray(gates[path]) > 0).sum()) for path, price in prices.items())
    step, goal = int(state.fixed["step"]), final_value(setup.warm_up, name="warm_up")
    wanted, now = 1 - goal * (1 - (setup.share or 1.0)), float(setup.warm_up(step))
    message = ""
    if not is_at(now, goal):
        message = f"Training ended after {step} updates, where `warm_up` is {now:.4g} and goes on to {goal:.4g}. "
    if abs(stored - wanted) > max(0.01, *prices.values()):
        message += f"The open directions have a share of {stored:.4g}, and {wanted:.4g} is asked for."
    if message:
        warn_unfinished(message.strip())


def _leaves(setup: _Setup, params: Params, state: TransformState) -> list[MatrixLeaf]:
    known = state.fixed["directions"]
    return weight_leaves(
        params, select=lambda tree: map_with_path(lambda path, _: path in known, tree), layouts=setup.layouts
    )


def _map(setup: _Setup, params: Params, state: TransformState, fn: Callable[[MatrixLeaf, jax.Array], Any]) -> Params:
    directions = state.fixed["directions"]
    return with_leaves(params, {leaf.path: fn(leaf, directions[leaf.path]) for leaf in _leaves(setup, params, state)})


def _opened(leaf: MatrixLeaf, along: Float32[Array, "S R k"], gate: Float32[Array, " k"]) -> Float32[Array, "S D k"]:
    """W V z."""
    weights = leaf.matrices
    return jnp.matmul(weights, gate[None, None] * along, precision=_HIGHEST)


def _plain(leaf: MatrixLeaf, opened: Float32[Array, "S D k"], along: Float32[Array, "S R k"]) -> Float[Array, "..."]:
    """W V z Vᵀ, in the axes and the dtype of the leaf."""
    return leaf.leaf(jnp.matmul(opened, along.mT, precision=_HIGHEST)).astype(leaf.weight.dtype)
