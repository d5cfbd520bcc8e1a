"""Magnitude pruning in one shot."""

from jaxcompress._src.pruning.leaf_info import LeafInfo
from jaxcompress._src.pruning.masks import apply_masks, magnitude_masks
from jaxcompress._src.pruning.patterns import NOfM, Pattern, unstructured
from jaxcompress._src.pruning.ranking import Scope
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.unselected import is_unselected
from jaxcompress._src.types import Params, Selector

_UNSTRUCTURED = unstructured()


def magnitude(
    params: Params,
    *,
    sparsity: float | None = None,
    pattern: Pattern = _UNSTRUCTURED,
    scope: Scope = "leaf",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, LeafInfo]]:
    """Zeros the weights of least magnitude: the baseline that every other one-shot method must beat.

    Args:
        params: the tree; a compressed leaf counts as the array it stands for.
        sparsity: share of pruned weights in [0, 1]. A pattern n of m implies it.
        pattern: `unstructured()`, `n_of_m(2, 4)` (two of every four consecutive inputs are kept) or `block(32, 32)`.
        scope: what is ranked together; see `masks_from_scores`.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`; needed for rows and patterns where kernels are not (in..., out).

    Returns:
        `(params, info)`: plain leaves with zeros, and a `LeafInfo` for each of them by path.

    Raises:
        ValueError: no sparsity where the pattern does not imply one; as for `masks_from_scores`.

    Example:
        >>> import jax.numpy as jnp
        >>> pruned, info = magnitude({"kernel": jnp.array([[3.0, 1.0], [-2.0, 0.5]])}, sparsity=0.5)
        >>> pruned["kernel"].tolist(), info["kernel"].sparsity
        ([[3.0, 0.0], [-2.0, 0.0]], 0.5)
    """
    if sparsity is None:
        if not isinstance(pattern, NOfM):
            raise ValueError("`sparsity` is needed: only patterns n of m imply one.")
        sparsity = pattern.allowed
    masks = magnitude_masks(params, sparsity=sparsity, scope=scope, pattern=pattern, select=select, layouts=layouts)
    entries = [(path, mask) for path, mask in leaves_with_paths(masks) if not is_unselected(mask)]
    return apply_masks(params, masks), {path: LeafInfo(sparsity=1 - float(mask.mean())) for path, mask in entries}
