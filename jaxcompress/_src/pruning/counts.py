"""How many weights of each leaf to prune."""

from collections.abc import Sequence
from typing import Any, get_args

from jaxcompress._src.pruning.patterns import Pattern
from jaxcompress._src.pruning.ranking import check_sparsity, implied_sparsity, is_tree
from jaxcompress._src.tree.maps import leaves_by_path
from jaxcompress._src.weights.matrices import MatrixLeaf


def check_counting(counting: str, rules: Any) -> None:
    """Raises when the rule is none of those of a `Literal`."""
    if counting not in get_args(rules):
        raise ValueError(f"`counting` must be one of {get_args(rules)}, got {counting!r}.")


def sparsity_by_path(sparsity: Any, leaves: Sequence[MatrixLeaf], pattern: Pattern) -> dict[str, float]:
    """The share to prune of each leaf.

    Args:
        sparsity: one number, a partial tree of numbers, or None: what the pattern n of m prunes.
        leaves: those to prune.
        pattern: of the masks.

    Raises:
        ValueError: a number outside [0, 1] or above what the pattern allows; none at all where the pattern does not
            give one; a leaf that the tree does not have.
    """
    sparsity = implied_sparsity(sparsity, pattern)
    check_sparsity(sparsity)
    given = leaves_by_path(sparsity) if is_tree(sparsity) else {}
    shares = {}
    for leaf in leaves:
        share = given.get(leaf.path) if is_tree(sparsity) else sparsity
        if share is None:
            raise ValueError(f"`sparsity` has no entry for leaf {leaf.path!r}.")
        if float(share) > pattern.allowed + 1e-6:
            raise ValueError(
                f"The pattern allows a `sparsity` of at most {pattern.allowed:g}, got {share} at {leaf.path!r}."
            )
        shares[leaf.path] = float(share)
    return shares
