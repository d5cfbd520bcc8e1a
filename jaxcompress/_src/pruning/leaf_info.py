"""What pruning did to a leaf, or to each entry of a stack.

Shape letters: E stack entries, S matrices, one for each stack entry and group.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Num

from jaxcompress._src.weights.infos import Info, entry_infos
from jaxcompress._src.weights.matrices import CalibratedLeaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafInfo(Info):
    """What pruning did to one leaf, or to one stack entry; see `Info` for the other fields.

    `error_before` is with the same zeros and all other weights as they were; errors are None without "gram" statistics.

    Attributes:
        sparsity: share of zeros.
    """

    sparsity: float


def leaf_infos(
    entry: CalibratedLeaf,
    pruned: Float[Array, "..."],
    errors: Mapping[str, Float32[Array, " E"]],
    **figures: Num[Array, " S"],
) -> dict[str, LeafInfo]:
    """One for each stack entry of a pruned leaf, by name.

    Args:
        entry: the dense leaf.
        pruned: what became of it.
        errors: by field.
        figures: by field.
    """
    zeros = entry.rows(pruned) == 0
    sparsity = zeros.mean(axis=1) if zeros.size else jnp.zeros(len(zeros))
    return entry_infos(entry, LeafInfo, errors=errors, unseen=entry.unseen, sparsity=sparsity, **figures)
