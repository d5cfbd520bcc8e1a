"""Leaves, the norms in which they are approximated, and their factors in the leaves' own axes.

Shape letters: S stack entries, D inputs, R outputs, k the rank.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.lowrank.factorize import Directions, apply_norm, directions, output_scale, truncate
from jaxcompress._src.lowrank.ranks import RankRule, Spectrum, as_rule, spectrum
from jaxcompress._src.solvers.outputs import output_errors, unit_of
from jaxcompress._src.tree.maps import with_leaves
from jaxcompress._src.types import Params, plain
from jaxcompress._src.weights.infos import Info, entry_infos
from jaxcompress._src.weights.matrices import MatrixLeaf


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One leaf, and the norm to approximate it in.

    Attributes:
        leaf: the leaf.
        weights: (S, D, R), what its factors should come close to; float32.
        inputs: what the inputs weigh: (S, D, D), (S, D) or None; see `directions`.
        outputs: what the outputs weigh: (S, R) or None.
        damping: (S,), share of the mean diagonal that was added; None where nothing was.
        retries: (S,), how often the damping had to grow; None where nothing was added.
        gram: (S, D, D), XᵀX, with which errors are measured; None: X is the unit matrix.
        unseen: (S, D), inputs that are 0 in every row; None without `gram`.
    """

    leaf: MatrixLeaf
    weights: jax.Array
    inputs: jax.Array | None = None
    outputs: jax.Array | None = None
    damping: jax.Array | None = None
    retries: jax.Array | None = None
    gram: jax.Array | None = None
    unseen: jax.Array | None = None

    def errors(self, leaf: Any) -> Float[Array, " S"]:
        """||X W - X W'|| / ||X W|| of what the leaf became."""
        changed = self.leaf.matrix(plain(leaf)).astype(jnp.float32)
        if self.gram is not None:
            return output_errors(self.gram, self.weights, changed)
        return _weighted_errors(self.weights, changed, self.inputs, self.outputs)

    def directions(self) -> Directions:
        """Of the weights in that norm."""
        return directions(self.weights, self.inputs, self.outputs)

    def infos(
        self, leaf: Any, *, rank: int | None, parameters: int, losses: Float[np.ndarray, " S"]
    ) -> dict[str, "LowRankInfo"]:
        """What happened, by the names of the stack entries.

        Args:
            leaf: what the leaf became.
            rank: of its factors, if it has any.
            parameters: of one stack entry.
            losses: Σ of the dropped σ².
        """
        _, depth, width = self.leaf.sizes
        share = parameters / (depth * width) if depth * width else 1.0
        make = functools.partial(LowRankInfo, rank=rank, parameters=parameters, share=share)
        figures = {"damping": self.damping, "retries": self.retries}
        figures = {"loss": losses} | {field: values for field, values in figures.items() if values is not None}
        return entry_infos(self.leaf, make, errors={"error": self.errors(leaf)}, unseen=self.unseen, **figures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankInfo(Info):
    """What factors made of one leaf, or of one stack entry; see `Info` for the other fields.

    In `error`, without statistics of inputs X is the unit matrix; the Fisher information, and how often a row was
    looked up (plus one), weigh as in the norm that was minimised.

    Attributes:
        rank: of its factors; None: it stayed dense.
        parameters: of the factors, or of the dense leaf or entry.
        share: of the dense parameters.
        loss: Σ of the dropped σ², in the norm that was minimised.
    """

    rank: int | None
    parameters: int
    share: float
    loss: float


def factored(
    params: Params, targets: Sequence[Target], rank: int | Mapping[str, int | None] | RankRule
) -> tuple[Params, dict[str, LowRankInfo]]:
    """`params` with a `LowRankArray` for every target whose rank is not None.

    Args:
        params: the tree.
        targets: the leaves, and what they should come close to.
        rank: ranks or a rule.
    """
    bases = [target.directions() for target in targets]
    spectra = [_spectrum(target, basis) for target, basis in zip(targets, bases, strict=True)]
    ranks = as_rule(rank)(spectra)
    leaves, info = {}, {}
    for target, basis in zip(targets, bases, strict=True):
        chosen_rank = ranks[target.leaf.path]
        leaves[target.leaf.path] = factor_leaf(target, basis, chosen_rank)
        info |= _infos(target, basis, chosen_rank, leaves[target.leaf.path])
    return with_leaves(params, leaves), info


def factor_leaf(target: Target, basis: Directions, rank: int | None) -> Any:
    """The factors of one target as a leaf; the plain leaf for None."""
    if rank is None:
        return target.leaf.weight
    left, right = truncate(target.weights, basis, rank=rank)
    return low_rank_leaf(target.leaf, left, right)


def low_rank_leaf(leaf: MatrixLeaf, left: Float[Array, "S D k"], right: Float[Array, "S R k"]) -> LowRankArray:
    """Factors of matrices, in the axes and the dtype of the leaf."""
    dtype, layout = leaf.weight.dtype, leaf.layout
    return LowRankArray(
        left=_spread(leaf, left, (*layout.stack_axes, *layout.input_axes)).astype(dtype),
        right=_spread(leaf, right, (*layout.stack_axes, *layout.output_axes)).astype(dtype),
        dtype=jnp.dtype(dtype),
    )


def spectrum_of(leaf: MatrixLeaf, values: Any) -> Spectrum:
    """What ranks of a leaf cost and lose, from its singular values, (S, K)."""
    _, depth, width = leaf.sizes
    return spectrum(leaf.path, values, inputs=depth, outputs=width, itemsize=leaf.weight.dtype.itemsize)


def _spectrum(target: Target, basis: Directions) -> Spectrum:
    return spectrum_of(target.leaf, jax.device_get(basis.values))


def _spread(leaf: MatrixLeaf, factor: Float[Array, "S N k"], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """(S, N, k) over some axes of the leaf, with 1 for the others and the rank as the last axis."""
    shape, rank = leaf.weight.shape, factor.shape[-1]
    rest = [axis for axis in range(len(shape)) if axis not in axes]
    wide = factor.reshape(*(shape[axis] for axis in axes), *(1 for _ in rest), rank)
    return wide.transpose(*np.argsort([*axes, *rest]).tolist(), len(shape))


def _infos(target: Target, basis: Directions, rank: int | None, leaf: Any) -> dict[str, LowRankInfo]:
    stack, depth, width = target.leaf.sizes
    if rank is None:
        return target.infos(leaf, rank=None, parameters=depth * width, losses=np.zeros(stack))
    losses = np.square(np.asarray(basis.values, np.float64))[:, rank:].sum(axis=1)
    return target.infos(leaf, rank=rank, parameters=rank * (depth + width), losses=losses)


@jax.jit
def _weighted_errors(
    weights: jax.Array, changed: jax.Array, inputs: jax.Array | None, outputs: jax.Array | None
) -> Float[Array, " S"]:
    scale, unit = output_scale(weights, outputs), jax.vmap(unit_of)(weights)[:, None, None]
    parts = weights / unit, (weights - changed) / unit
    total, lost = (jnp.linalg.norm(apply_norm(part, inputs, scale), axis=(1, 2)) for part in parts)
    return jnp.where(total > 0, lost / jnp.where(total > 0, total, 1.0), 0.0)
