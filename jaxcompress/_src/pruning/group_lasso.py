"""Group lasso: whole rows, columns or blocks are driven to exactly zero."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.pruning.masks import apply_masks
from jaxcompress._src.pruning.patterns import Block
from jaxcompress._src.pruning.ranked_leaves import RankedLeaves, Store
from jaxcompress._src.schedules import constant, warn_unfinished
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.maps import leaves_by_path, with_leaves
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params, Schedule, Selector, Transform, TransformState, exportable

Grouping = Literal["outputs", "inputs"] | Block
"""The weights of one output unit, those of one input feature, or tiles."""


@exportable
class GroupLassoState(NamedTuple):
    """Fixed state.

    Attributes:
        alive: partial tree of bool, one entry per group (reduced axes have size 1): not frozen at zero.
        step: int32, number of updates so far.
    """

    alive: Params
    step: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Setup:
    leaves: RankedLeaves
    grouping: Grouping
    strength: Schedule
    freeze_at: int | None


@transform_on_auto_axes
def group_lasso(
    *,
    strength: Schedule | float,
    grouping: Grouping = "outputs",
    freeze_at: int | None = None,
    store: Store = "sparse",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Shrinks groups of weights after every step: w_g <- w_g max(0, 1 - t √|g| / ||w_g||), |g| being the group's size.

    That is the proximal step of the penalty λ Σ √|g| ||w_g||, with t = λ times the learning rate; it gives exact zeros,
    which a gradient of the penalty would not. It acts on the raw weights after the optimizer (`project`), so a group
    that is zero comes back only if one step of the optimizer carries it beyond t √|g|.

    Args:
        strength: t, or step -> t (multiply λ by the schedule of the learning rate).
        grouping: "outputs" (all inputs of one output unit), "inputs" (all outputs of one input feature), or a `block`.
        freeze_at: the update from which groups that are zero stay zero, and the others are no longer shrunk: the
            fine-tuning that takes the bias of the penalty away. After a training that ended before, `finalize` warns
            (`UnfinishedScheduleWarning`).
        store: what `finalize` makes of leaves: "sparse" under a bit mask, or "dense" with zeros.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`; stacked layers have groups of their own.

    Returns:
        The transform; its fixed state is a `GroupLassoState`.

    Raises:
        ValueError: a negative constant strength, unknown `grouping`; from `init` as `gradual`.

    Example:
        >>> params = {"kernel": jnp.array([[2.0, 0.1]] * 4)}
        >>> transform = group_lasso(strength=1.0)
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> transform.project(params, state)[0]["kernel"][0]  # √|g| is 2, the norms are 4 and 0.2
        Array([1., 0.], dtype=float32)

    References:
        Yuan and Lin 2006, "Model selection and estimation in regression with grouped variables"; Wen et al. 2016,
        "Learning structured sparsity in deep neural networks", equation 2.
    """
    if not callable(strength) and not strength >= 0:
        raise ValueError(f"`strength` must not be negative, got {strength}.")
    if grouping not in ("outputs", "inputs") and not isinstance(grouping, Block):
        raise ValueError(f"`grouping` must be 'outputs', 'inputs' or a `block`, got {grouping!r}.")
    setup = _Setup(
        leaves=RankedLeaves(select=select, layouts=layouts, store=store),
        grouping=grouping,
        strength=strength if callable(strength) else constant(strength),
        freeze_at=freeze_at,
    )
    return identity()._replace(
        init=functools.partial(_init, setup),
        apply=functools.partial(_apply, setup),
        update=_update,
        project=functools.partial(_project, setup),
        finalize=functools.partial(_finalize, setup),
    )


def shrink_groups(w: Float[Array, "*shape"], norms: Float[Array, "..."], least: Float[Array, "..."]) -> Array:
    """W max(0, 1 - least / norm), exactly zero where norm <= least; `norms` broadcasts against `w`."""
    alive = norms > least
    factor = jnp.where(alive, 1 - least / jnp.where(alive, norms, 1.0), 0.0)
    return jnp.where(alive, w.astype(jnp.float32) * factor, 0.0).astype(w.dtype)


def _init(setup: _Setup, params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
    del key, statistics
    weights, layouts = setup.leaves.weights(params), setup.leaves.layouts_of(params)
    alive = map_selected(lambda _, w, layout: jnp.ones_like(_norms(setup, w, layout), bool), weights, layouts)
    return TransformState((), GroupLassoState(alive, jnp.zeros((), jnp.int32)))


def _apply(setup: _Setup, params: Params, state: TransformState, *, key: jax.Array | None = None) -> Params:
    del key
    if setup.freeze_at is None:
        return params
    layouts = setup.leaves.layouts_of(params)
    masks = map_selected(
        lambda _, alive, leaf, layout: _spread(setup, alive, leaf.shape, layout), state.fixed.alive, params, layouts
    )
    return apply_masks(params, masks)


def _update(
    grads: Params, state: TransformState, params: Params, *, key: jax.Array, loss: Any
) -> tuple[TransformState, None]:
    del grads, params, key, loss
    return TransformState((), GroupLassoState(state.fixed.alive, state.fixed.step + 1)), None


def _project(setup: _Setup, params: Params, state: TransformState) -> tuple[Params, TransformState]:
    alive, step = state.fixed
    strength = jnp.asarray(setup.strength(step), jnp.float32)
    if setup.freeze_at is not None:
        strength = jnp.where(step <= setup.freeze_at, strength, 0.0)
    layouts = setup.leaves.layouts_of(params)

    def shrink(_: str, mask: Any, leaf: Any, layout: Any) -> Any:
        leaf = jnp.where(_spread(setup, mask, leaf.shape, layout), leaf, jnp.zeros((), leaf.dtype))
        norms, sizes = _norms(setup, leaf, layout), _sizes(setup, leaf.shape, layout)
        least = _spread(setup, strength * jnp.sqrt(sizes), leaf.shape, layout)
        return shrink_groups(leaf, _spread(setup, norms, leaf.shape, layout), least)

    projected = with_leaves(params, leaves_by_path(map_selected(shrink, alive, params, layouts)))
    if setup.freeze_at is not None:
        left = map_selected(lambda _, mask, w, layout: _norms(setup, w, layout) > 0, alive, projected, layouts)
        alive = map_selected(lambda _, mask, now: jnp.where(step == setup.freeze_at, now, mask), alive, left)
    return projected, TransformState((), GroupLassoState(alive, step))


def _finalize(setup: _Setup, params: Params, state: TransformState) -> Params:
    step = state.fixed.step
    if setup.freeze_at is not None and not is_traced(step) and 0 < int(step) < setup.freeze_at:
        warn_unfinished(
            f"Training ended after {int(step)} updates, before the groups were frozen at {setup.freeze_at}: the bias "
            "of the penalty was not trained away."
        )
    params = _apply(setup, params, state)
    layouts = setup.leaves.layouts_of(params)
    masks = map_selected(
        lambda _, w, layout: _spread(setup, _norms(setup, w, layout) > 0, w.shape, layout),
        setup.leaves.weights_at(state.fixed.alive, params),
        layouts,
    )
    return setup.leaves.finalize(params, masks)


def _norms(setup: _Setup, w: Float[Array, "..."], layout: LeafLayout) -> Float[Array, "..."]:
    """||w_g|| of every group, float32."""
    if isinstance(setup.grouping, Block):
        # The mean of squares times the count; a tile at the border has fewer.
        return jnp.sqrt(
            setup.grouping.units(jnp.square(w.astype(jnp.float32)), layout) * _sizes(setup, w.shape, layout)
        )
    return jnp.sqrt(jnp.square(w.astype(jnp.float32)).sum(_reduced(setup, layout), keepdims=True))


def _sizes(setup: _Setup, shape: tuple[int, ...], layout: LeafLayout) -> Float[Array, "..."]:
    """Weights per group."""
    if isinstance(setup.grouping, Block):
        return setup.grouping.counts(shape, layout)
    size = math.prod(shape[axis] for axis in _reduced(setup, layout))
    return jnp.full([1 if axis in _reduced(setup, layout) else n for axis, n in enumerate(shape)], size, jnp.float32)


def _spread(setup: _Setup, groups: Array, shape: tuple[int, ...], layout: LeafLayout) -> Array:
    """One entry per weight."""
    if isinstance(setup.grouping, Block):
        return setup.grouping.spread(groups, shape, layout)
    return jnp.broadcast_to(groups, shape)


def _reduced(setup: _Setup, layout: LeafLayout) -> tuple[int, ...]:
    return layout.input_axes if setup.grouping == "outputs" else layout.output_axes
