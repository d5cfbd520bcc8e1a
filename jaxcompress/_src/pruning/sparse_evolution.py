"""SET, sparse evolutionary training: connections grow at random."""

from jaxcompress._src.meshes import transform_on_auto_axes
from jaxcompress._src.pruning.allocation import Allocation, erdos_renyi
from jaxcompress._src.pruning.ranked_leaves import Store
from jaxcompress._src.pruning.rewiring import rewiring
from jaxcompress._src.types import Params, Schedule, Selector, Transform


@transform_on_auto_axes
def sparse_evolution(
    *,
    sparsity: float | Params,
    until: int,
    every: int = 100,
    fraction: float | Schedule = 0.3,
    allocation: Allocation = erdos_renyi,
    store: Store = "sparse",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Transform:
    """Trains a network that is sparse from the start: the smallest weights are replaced by random others (SET).

    As `rigl`, with two differences: connections grow at random among those that are not kept, and the share that is
    replaced does not decay. They begin at zero, as in RigL's comparisons (in the paper: at a random value); the
    smallest are those nearest to zero of either sign.

    Args:
        sparsity: of all chosen leaves together, or a partial tree of sparsities.
        until: masks stay from this update on.
        every: updates between two changes; an epoch in the paper.
        fraction: share of the kept weights that is replaced, ζ; or update -> share.
        allocation: how a single sparsity is spread over leaves.
        store: what `finalize` makes of the leaves: "sparse" arrays, or "dense" ones with zeros.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        The transform; its fixed state is a `RewiringState`. Masks are drawn at random in `init`.

    Raises:
        ValueError: as `rigl`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> transform = sparse_evolution(sparsity=0.5, until=100, every=1)
        >>> params = {"kernel": jnp.ones((4, 4))}
        >>> state = transform.init(params, key=jax.random.key(0))
        >>> int(state.fixed.masks["kernel"].sum())
        8

    References:
        Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
        by network science", algorithm 1.
    """
    return rewiring(
        sparsity=sparsity,
        allocation=allocation,
        every=every,
        until=until,
        fraction=fraction,
        decay=False,
        grow="random",
        select=select,
        layouts=layouts,
        store=store,
    )
