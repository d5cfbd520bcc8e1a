"""N:M sparsity from the first step on: straight-through, with a pull on the pruned weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.pruning.patterns import n_of_m
from jaxcompress._src.pruning.ranked_leaves import RankedLeaves, Store
from jaxcompress._src.pruning.scheduled_masks import MaskState
from jaxcompress._src.pruning.straight_through import apply_straight_through
from jaxcompress._src.transforms import identity
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params, Selector, Transform, TransformState, plain


@transform_on_auto_axes
def sr_ste(
    n: int,
    m: int,
    *,
    strength: float = 2e-4,
    store: Store = "sparse",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Trains with `n` of every `m` consecutive inputs: dL/dw = dL/dw' + λ (1 - mask) w, where w' = mask(w) w.

    The mask keeps the largest of every run and is that of the present weights at every step. The second term pulls the
    pruned weights towards zero, so that fewer of them change places. It comes out of a penalty, λ/2 Σ ((1 - mask) w)²,
    on the weights as this stage gets them: its gradient is that term, whatever the optimizer does with it, and the loss
    that a train step reports includes it.

    Args:
        n: number of weights that stay of every `m`.
        m: number of consecutive inputs that are counted together.
        strength: λ, 2e-4 in the paper; 0 is plain straight-through.
        store: what `finalize` makes of the leaves: "sparse" arrays, or "dense" ones with zeros.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        The transform; its fixed state is a `MaskState`.

    Raises:
        ValueError: a negative `strength`, or not 1 <= n <= m; from `init` as `gradual`.

    Example:
        >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
        >>> transform = sr_ste(2, 4, strength=0.5)
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> transform.apply(params, state)["kernel"].ravel().tolist()
        [4.0, 3.0, 0.0, 0.0]
        >>> jax.grad(lambda p: transform.penalty(state, p, loss=0.0))(params)["kernel"].ravel().tolist()
        [0.0, 0.0, 1.0, 0.5]

    References:
        Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch", equation 9.
    """
    if not strength >= 0:
        raise ValueError(f"`strength` must not be negative, got {strength}.")
    leaves = RankedLeaves(select=select, layouts=layouts, pattern=n_of_m(n, m), store=store)
    return identity()._replace(
        init=functools.partial(_init, leaves),
        apply=apply_straight_through,
        penalty=functools.partial(_penalty, strength),
        update=functools.partial(_update, leaves),
        finalize=functools.partial(_finalize, leaves),
    )


def _init(leaves: RankedLeaves, params: Params, *, key: jax.Array, statistics: Any = None) -> TransformState:
    del key, statistics
    return TransformState((), _state(leaves, leaves.weights(params), params, jnp.zeros((), jnp.int32)))


def _penalty(strength: float, state: TransformState, params: Params, *, loss: Any) -> jax.Array:
    del loss
    total = jnp.zeros((), jnp.float32)

    def add(_: str, mask: jax.Array, leaf: Any) -> None:
        nonlocal total
        pruned = jnp.where(mask, 0.0, plain(leaf).astype(jnp.float32))
        total = total + jnp.square(pruned).sum()

    map_selected(add, state.fixed.masks, params)
    return strength / 2 * total


def _update(
    leaves: RankedLeaves, grads: Params, state: TransformState, params: Params, *, key: jax.Array, loss: Any
) -> tuple[TransformState, None]:
    del grads, key, loss
    weights = leaves.weights_at(state.fixed.masks, params)
    return TransformState((), _state(leaves, weights, params, state.fixed.step + 1)), None


def _finalize(leaves: RankedLeaves, params: Params, state: TransformState) -> Params:
    return leaves.finalize(params, state.fixed.masks)


def _state(leaves: RankedLeaves, weights: Params, params: Params, step: jax.Array) -> MaskState:
    sparsity = leaves.pattern.allowed
    # At its full sparsity the pattern compares within runs only, and ranks nothing.
    masks = leaves.masks(weights, params, sparsity, score=jnp.abs)
    return MaskState(masks, step, jnp.asarray(sparsity, jnp.float32))
