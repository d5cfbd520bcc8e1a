"""Pruning by magnitude with a gradient for every weight, the pruned ones too."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.pruning.gradual import gradual
from jaxcompress._src.pruning.patterns import Pattern, unstructured
from jaxcompress._src.pruning.ranked_leaves import ScoreFn, Store
from jaxcompress._src.pruning.ranking import Scope
from jaxcompress._src.tree.maps import leaves_by_path, with_leaves
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params, Schedule, Selector, Transform, TransformState, plain


@transform_on_auto_axes
def straight_through_magnitude(
    *,
    schedule: Schedule,
    every: int = 1,
    freeze_at: int | None = None,
    scope: Scope = "leaf",
    pattern: Pattern = unstructured(),  # noqa: B008 (a frozen dataclass)
    score: ScoreFn = jnp.abs,
    sparsities: Params | None = None,
    store: Store = "sparse",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """The largest weights in the forward pass; all weights move: dL/dw = dL/dw', where w' = mask(w) w.

    A pruned weight goes on collecting gradients underneath, and comes back when it has grown enough; masks are ranked
    anew at the given pace, whether the sparsity changes or not. After `freeze_at` the masks stay (the raw weights
    underneath drift on, which nobody sees).

    Args:
        schedule: step -> sparsity; `schedules.constant` for a fixed one. See `gradual` for what `finalize` makes of it.
        every: updates between rankings; see `gradual`. At 1 the mask is always that of the present weights, which costs
            20 to 45 reads of them at every step (two to three under `n_of_m` with a constant sparsity).
        freeze_at: the first update from which the masks stay as they are; not before the end of the schedule.
        scope: what is ranked together: "leaf", "global" (all leaves), or "row" (the inputs of one output unit).
        pattern: `unstructured()`, `n_of_m(2, 4)` (two of every four consecutive inputs are kept) or `block(32, 32)`.
        score: magnitude by default.
        sparsities: a partial tree of factors on the schedule, one for each leaf, such as `erdos_renyi` returns it.
        store: what `finalize` makes of the leaves: "sparse" arrays, or "dense" ones with zeros.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        The transform; its fixed state is a `MaskState`.

    Raises:
        ValueError: as `gradual`.

    Example:
        >>> from jaxcompress.schedules import constant
        >>> params = {"kernel": jnp.array([[3.0], [-1.0]])}
        >>> transform = straight_through_magnitude(schedule=constant(0.5))
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> state, _ = transform.update(params, state, params, key=jax.random.key(1), loss=0.0)
        >>> jax.grad(lambda p: transform.apply(p, state)["kernel"].sum())(params)["kernel"].tolist()
        [[1.0], [1.0]]

    References:
        Lin et al. 2020, "Dynamic model pruning with feedback", algorithm 1; Bengio et al. 2013, "Estimating or
        propagating gradients through stochastic neurons".
    """
    following = gradual(
        schedule=schedule,
        every=every,
        freeze_at=freeze_at,
        rerank=True,
        select=select,
        layouts=layouts,
        scope=scope,
        pattern=pattern,
        score=score,
        sparsities=sparsities,
        store=store,
    )
    return following._replace(apply=apply_straight_through)


def apply_straight_through(params: Params, state: TransformState, *, key: jax.Array | None = None) -> Params:
    """`apply_masks` with `state.fixed.masks`, whose gradient passes as if there were no masks."""
    del key
    masked = map_selected(lambda _, mask, leaf: keep_straight_through(mask, plain(leaf)), state.fixed.masks, params)
    return with_leaves(params, leaves_by_path(masked))


@jax.custom_jvp
def keep_straight_through(mask: Bool[Array, "*shape"], w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`w` where the mask is set, 0 elsewhere; every entry of `w` gets the gradient.

    Unlike `w + stop_gradient(masked - w)` it is exactly zero where it should be.
    """
    return jnp.where(mask, w, jnp.zeros((), w.dtype))


@keep_straight_through.defjvp
def _keep_straight_through_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return keep_straight_through(*primals), tangents[1]
