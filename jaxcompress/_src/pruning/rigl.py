"""RigL: sparse training that grows connections where the gradient is large."""

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.pruning.allocation import Allocation, erdos_renyi_kernel
from jaxcompress._src.pruning.ranked_leaves import Store
from jaxcompress._src.pruning.rewiring import rewiring
from jaxcompress._src.types import Params, Schedule, Selector, Transform


@transform_on_auto_axes
def rigl(
    *,
    sparsity: float | Params,
    until: int,
    every: int = 100,
    fraction: float | Schedule = 0.3,
    allocation: Allocation = erdos_renyi_kernel,
    store: Store = "sparse",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Trains a network that is sparse from the start: the smallest weights are replaced by those with large gradients.

    Every `every` updates, in each leaf, int(kept · f) of the kept weights with the smallest |w| are dropped, and as
    many others with the largest |dL/dw'| grow; f = fraction / 2 (1 + cos(π t / until)). They begin at zero, with blank
    moments in the optimizer. A weight that is dropped and grown in the same update keeps its value. The gradient is
    that of the masked model with respect to all weights.

    Unlike in the reference, the optimizer also steps at an update of the masks.

    Args:
        sparsity: of all chosen leaves together, or a partial tree of sparsities.
        until: masks stay from this update on; 3/4 of the training in the paper.
        every: updates between two changes; update t = 1 is the first. After a training too short for any change,
            `finalize` warns (`UnfinishedScheduleWarning`).
        fraction: share of the kept weights replaced at first, decaying by the cosine; or update -> share. The paper
            uses 0.3, its code 0.1 by default.
        allocation: how a single sparsity is spread over leaves.
        store: what `finalize` makes of the leaves: "sparse" arrays, or "dense" ones with zeros.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        The transform; its fixed state is a `RewiringState`. Masks are drawn at random in `init`.

    Raises:
        ValueError: a sparsity or fraction outside [0, 1], `every` below 1 or not below `until`; from `init` as
            `gradual`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> transform = rigl(sparsity=0.5, until=10, every=2, fraction=1.0)
        >>> params, key = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}, jax.random.key(0)
        >>> state, grads = transform.init(params, key=key), {"kernel": jnp.array([[9.0, 0.0, 8.0, 0.0]])}
        >>> for _ in range(2):
        ...     state, fresh = transform.update(grads, state, params, key=key, loss=0.0)
        >>> int(state.fixed.masks["kernel"].sum())
        2

    References:
        Evci et al. 2020, "Rigging the lottery: making all tickets winners", section 3 and algorithm 1.
    """
    return rewiring(
        sparsity=sparsity,
        allocation=allocation,
        every=every,
        until=until,
        fraction=fraction,
        decay=True,
        grow="gradient",
        select=select,
        layouts=layouts,
        store=store,
    )
