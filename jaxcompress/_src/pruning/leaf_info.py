"""What a one-shot method did to a leaf, or to each entry of a stack.

Shape letters: E stack entries, S matrices, one for each stack entry and group.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Num

from jaxcompress._src.weights.infos import entry_infos
from jaxcompress._src.weights.matrices import Calibrated


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafInfo:
    """What happened to one leaf, or to one stack entry.

    Errors are relative: ||X W - X W'|| / ||X W|| over the calibration rows.

    Attributes:
        sparsity: share of zeros.
        error_before: with the same zeros and all other weights as they were; None without "gram" statistics, and where
            no row was seen.
        error: with the new weights; None in the same cases.
        damping: share of the mean diagonal that was added to X'X; None where nothing is inverted.
        retries: how often the damping had to grow; above 0 the matrix was singular beyond the damping asked for.
        unseen_inputs: number of inputs that are 0 in every row; see the argument `unseen`.
        unseen_entries: 1 if all inputs are such (an expert that no row reached), otherwise 0.
    """

    sparsity: float
    error_before: float | None = None
    error: float | None = None
    damping: float | None = None
    retries: int = 0
    unseen_inputs: int = 0
    unseen_entries: int = 0


def leaf_infos(
    entry: Calibrated,
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
