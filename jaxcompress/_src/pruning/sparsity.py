"""How sparse masks are."""

import jax

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params


@on_auto_axes
def sparsity_of(masks: Params) -> float:
    """The share of pruned weights among all that have masks; 0 where there are none. Outside `jit`.

    Args:
        masks: a partial tree of bool, True = kept.

    Example:
        >>> import jax.numpy as jnp
        >>> sparsity_of({"a": jnp.array([True, False]), "b": jnp.array([True, True])})
        0.25
    """
    pruned = [(_pruned(mask), mask.size) for _, mask in leaves_with_paths(masks)]
    total = sum(size for _, size in pruned)
    return sum(count for count, _ in pruned) / total if total else 0.0


@on_auto_axes
def leaf_sparsities(masks: Params) -> Params:
    """The share of pruned weights of every leaf: a partial tree of floats, as the allocations return it.

    Example:
        >>> import jax.numpy as jnp
        >>> leaf_sparsities({"a": jnp.array([True, False]), "b": jnp.array([True, True])})
        {'a': 0.5, 'b': 0.0}
    """
    return map_selected(lambda _, mask: _pruned(mask) / mask.size if mask.size else 0.0, masks)


def _pruned(mask: jax.Array) -> int:
    return mask.size - int(mask.sum())
