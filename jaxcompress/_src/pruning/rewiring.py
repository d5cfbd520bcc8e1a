"""Sparse training with a fixed number of weights per leaf: drop some, grow as many. Under RigL and SET."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress._src.meshes import on_auto_axes, transform_on_auto_axes
from jaxcompress._src.pruning.allocation import Allocation
from jaxcompress._src.pruning.evidence_scores import random_scores
from jaxcompress._src.pruning.gradual import apply_state_masks
from jaxcompress._src.pruning.masks import masks_from_scores
from jaxcompress._src.pruning.ranked_leaves import RankedLeaves, Store
from jaxcompress._src.pruning.ranking import check_sparsity, is_tree
from jaxcompress._src.schedules import constant, warn_unfinished
from jaxcompress._src.solvers.counting import count_true
from jaxcompress._src.solvers.rank import keep_largest
from jaxcompress._src.solvers.share import share_of
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.tree.keys import split_key
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.tree.unselected import is_unselected, map_selected
from jaxcompress._src.types import Params, Schedule, Selector, Transform, TransformState, exportable, is_compressed


@exportable
class RewiringState(NamedTuple):
    """Fixed state.

    Attributes:
        masks: partial tree of bool, True = kept; each leaf keeps the same number at all times.
        grown: partial tree of bool: kept since the last update only. `project` sets these weights to zero.
        step: int32, number of updates so far.
    """

    masks: Params
    grown: Params
    step: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rewiring:
    """Settings.

    Attributes:
        leaves: which leaves.
        sparsity: of all, or a partial tree.
        allocation: spreads a single sparsity over the leaves.
        every: updates between rewirings.
        until: from this update on the masks stay.
        fraction: update -> share of the kept weights that is replaced.
        grow: "gradient" (largest magnitude) or "random".
    """

    leaves: RankedLeaves
    sparsity: float | Params
    allocation: Allocation
    every: int
    until: int
    fraction: Schedule
    grow: Literal["gradient", "random"]

    def __post_init__(self) -> None:
        """Checks the options."""
        check_sparsity(self.sparsity)
        if self.every < 1 or self.until < 1:
            raise ValueError(f"`every` and `until` must be at least 1, got {self.every} and {self.until}.")
        if self.every >= self.until:
            raise ValueError(
                f"`every` is {self.every} and `until` {self.until}: the masks would stay before they change for the "
                "first time."
            )


@transform_on_auto_axes
def rewiring(
    *,
    sparsity: float | Params,
    allocation: Allocation,
    every: int,
    until: int,
    fraction: float | Schedule,
    decay: bool,
    grow: Literal["gradient", "random"],
    store: Store,
    select: Selector | None,
    layouts: Params | None,
) -> Transform:
    """The transform under `rigl` and `sparse_evolution`."""
    if not callable(fraction) and not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must be in [0, 1], got {fraction}.")
    setup = Rewiring(
        leaves=RankedLeaves(select=select, layouts=layouts, store=store),
        sparsity=sparsity,
        allocation=allocation,
        every=every,
        until=until,
        fraction=_fraction(fraction, until, decay=decay),
        grow=grow,
    )
    return identity()._replace(
        init=functools.partial(_init, setup),
        apply=apply_state_masks,
        update=functools.partial(_update, setup),
        project=_project,
        finalize=functools.partial(_finalize, setup),
    )


def _fraction(fraction: float | Schedule, until: int, *, decay: bool) -> Schedule:
    if callable(fraction):
        return fraction
    if not decay:
        return constant(fraction)
    cosine = optax.schedules.cosine_decay_schedule(fraction, until)
    return lambda step: jnp.asarray(cosine(step), jnp.float32)


@on_auto_axes
def rewire(
    masks: list[jax.Array], weights: list[jax.Array], candidates: list[jax.Array], fraction: jax.Array
) -> list[jax.Array]:
    """In every leaf, drops the smallest of the kept weights, and grows as many with the largest candidates.

    A dropped weight may be grown again at once, and was then never gone. Ties keep the lowest index.

    Args:
        masks: bool, True = kept.
        weights: of their shapes.
        candidates: of their shapes; their magnitude counts.
        fraction: float32 scalar; int(kept · fraction) weights of a leaf are replaced.

    Returns:
        The new masks, with as many kept.

    Example:
        >>> mask, w = jnp.array([True, True, False, False]), jnp.array([2.0, 1.0, 0.0, 0.0])
        >>> rewire([mask], [w], [jnp.array([9.0, 1.0, 5.0, 3.0])], jnp.float32(0.5))
        [Array([ True, False,  True, False], dtype=bool)]
    """
    sizes = jnp.array([mask.size for mask in masks], jnp.int32)
    counts = jnp.stack([count_true(mask).reshape(()) for mask in masks])
    moved = share_of(counts, jnp.broadcast_to(fraction.astype(jnp.float32), counts.shape), rounding="down")
    axes = tuple(tuple(range(mask.ndim)) for mask in masks)
    # All leaves in one search: one loop to compile.
    stay = keep_largest(list(zip(masks, weights, strict=True)), sizes - counts + moved, axes=axes, score=_among_kept)
    new = keep_largest(list(zip(stay, candidates, strict=True)), sizes - moved, axes=axes, score=_among_dropped)
    return [mask | grown for mask, grown in zip(stay, new, strict=True)]


def _among_kept(leaf: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.where(leaf[0], jnp.abs(leaf[1]).astype(jnp.float32), -1.0)


def _among_dropped(leaf: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.where(leaf[0], -1.0, jnp.abs(leaf[1]).astype(jnp.float32))


def _init(setup: Rewiring, params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
    del statistics
    weights = setup.leaves.weights(params)
    marks = map_with_path(lambda _, leaf: not is_unselected(leaf), weights, is_leaf=is_unselected)
    options = {"select": lambda _: marks, "layouts": setup.leaves.layouts}
    shares = setup.sparsity
    if not is_tree(shares):
        shares = setup.allocation(params, sparsity=shares, **options)
    masks = masks_from_scores(random_scores(params, key=key, **options), sparsity=shares)
    grown = map_selected(lambda _, leaf: jnp.zeros_like(leaf, bool), weights)
    return TransformState((), RewiringState(masks, grown, jnp.zeros((), jnp.int32)))


def _update(
    setup: Rewiring, grads: Params, state: TransformState, params: Params, *, key: jax.Array, loss: Any
) -> tuple[TransformState, Params]:
    del loss
    masks, _, before = state.fixed
    step = before + 1
    due = (step % setup.every == 0) & (step < setup.until)
    fraction = jnp.asarray(setup.fraction(step), jnp.float32)
    weights = setup.leaves.weights_at(masks, params)

    def change(operands: tuple[Params, Params]) -> Params:
        return _rewired(setup, masks, *operands, fraction, key)

    new = jax.lax.cond(due, change, lambda _: masks, (weights, _like(weights, grads)))
    grown = map_selected(lambda _, now, then: now & ~then, new, masks)
    # Dropped weights lose their moments too: their optimizer would go on moving them.
    fresh = map_selected(lambda _, now, then: now != then, new, masks)
    return TransformState((), RewiringState(new, grown, step)), fresh


def _rewired(
    setup: Rewiring, masks: Params, weights: Params, grads: Params, fraction: jax.Array, key: jax.Array
) -> Params:
    if setup.grow == "random":
        keys = split_key(key, weights)
        candidates = map_selected(lambda _, leaf, leaf_key: jax.random.uniform(leaf_key, leaf.shape), weights, keys)
    else:
        candidates = grads
    flat_masks, flat_weights, flat_candidates = (
        [leaf for _, leaf in leaves_with_paths(tree)] for tree in (masks, weights, candidates)
    )
    new = iter(rewire(flat_masks, flat_weights, flat_candidates, fraction))
    return map_selected(lambda *_: next(new), masks)


def _project(params: Params, state: TransformState) -> tuple[Params, TransformState]:
    """Pruned and newly grown weights are zero underneath, too."""

    def visit(_: str, mask: Any, leaf: Any, grown: Any) -> Any:
        if is_unselected(mask) or is_compressed(leaf):
            return leaf
        return jnp.where(mask & ~grown, leaf, jnp.zeros((), leaf.dtype))

    return map_with_path(visit, state.fixed.masks, params, state.fixed.grown, is_leaf=is_unselected), state


def _like(weights: Params, grads: Params) -> Params:
    """The gradients of the chosen leaves."""
    return map_selected(lambda _, leaf, grad: grad, weights, grads)


def _finalize(setup: Rewiring, params: Params, state: TransformState) -> Params:
    step = state.fixed.step
    if not is_traced(step) and 0 < int(step) < setup.every:
        warn_unfinished(
            f"Training ended after {int(step)} updates, and the masks change every {setup.every}: they are those that "
            "were drawn at random at the start."
        )
    return setup.leaves.finalize(params, state.fixed.masks)
