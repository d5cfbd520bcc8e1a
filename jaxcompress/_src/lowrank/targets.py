"""The norms in which leaves are approximated: plain, by activations, by Fisher information.

Shape letters: S stack entries, D inputs, R outputs.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float32

from jaxcompress._src.lowrank.factorize import Whitening, root_of_gram
from jaxcompress._src.lowrank.leaves import Target
from jaxcompress._src.solvers.hessian import check_damping
from jaxcompress._src.solvers.outputs import dense_targets
from jaxcompress._src.trace.left_out import warn_left_out
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.matrices import (
    CalibratedLeaf,
    MatrixLeaf,
    TableLeaf,
    calibrated_leaves_and_tables,
    checked_fisher,
    weight_leaves,
)
from jaxcompress._src.weights.unseen import fill_unseen, warn_unseen

Weighting = Literal["inputs", "outputs", "both"]
"""Which sums of the Fisher information weigh a leaf."""


def plain_targets(params: Params, *, select: Selector | None, layouts: Params | None) -> list[Target]:
    """The selected leaves in the Frobenius norm."""
    leaves = weight_leaves(params, select=select, layouts=layouts)
    return [Target(leaf=leaf, weights=leaf.matrices) for leaf in leaves]


def activation_targets(
    params: Params,
    statistics: Params,
    *,
    fisher: Params | None,
    damping: float,
    ridge: float,
    whitening: Whitening,
    select: Selector | None,
    layouts: Params | None,
) -> list[Target]:
    """The leaves that have statistics in the norm of their outputs; see `activation_svd`."""
    check_damping(damping, ridge)
    if whitening not in get_args(Whitening):
        raise ValueError(f"`whitening` must be one of {get_args(Whitening)}, got {whitening!r}.")
    leaves = calibrated_leaves_and_tables(params, statistics, needs="gram", select=select, layouts=layouts)
    grouped = {leaf.path: f"it {_GROUPED}" for leaf in leaves if leaf.layout.groups > 1}
    if grouped and select is not None:
        raise ValueError(f"Leaf {next(iter(grouped))!r} {_GROUPED}; exclude it.")
    warn_left_out(grouped, "Low rank leaves out", advice="Exclude them by `select`.", stacklevel=3)
    leaves = [leaf for leaf in leaves if leaf.path not in grouped]
    information = {} if fisher is None else _information(fisher, leaves)
    targets = [
        _lookup_target(leaf)
        if isinstance(leaf, TableLeaf)
        else _activation_target(leaf, information.get(leaf.path), damping, ridge, whitening)
        for leaf in leaves
    ]
    unseen = {target.leaf.path: target.unseen for target in targets if target.unseen is not None}
    warn_unseen(unseen, "factored as if their inputs were white noise", stacklevel=5)
    return targets


def fisher_targets(
    params: Params, fisher: Params, *, weighting: Weighting, select: Selector | None, layouts: Params | None
) -> list[Target]:
    """The selected leaves in a norm that sums of the Fisher information weight; see `fisher_svd`."""
    if weighting not in get_args(Weighting):
        raise ValueError(f"`weighting` must be one of {get_args(Weighting)}, got {weighting!r}.")
    leaves = weight_leaves(params, select=select, layouts=layouts)
    given = _information(fisher, leaves)
    targets = []
    for leaf in leaves:
        information = leaf.matrix(given[leaf.path])
        total = information.sum((1, 2))[:, None] if weighting == "both" else 1.0
        sums = information.sum(2), information.sum(1) / jnp.where(total > 0, total, 1.0)
        rows = fill_unseen(sums[0], sums[0] <= 0)
        inputs, outputs = None if weighting == "outputs" else rows, None if weighting == "inputs" else sums[1]
        targets.append(Target(leaf=leaf, weights=leaf.matrices, inputs=inputs, outputs=outputs))
    return targets


def _activation_target(
    leaf: CalibratedLeaf, fisher: jax.Array | None, damping: float, ridge: float, whitening: Whitening
) -> Target:
    gram, unseen = leaf.gram, leaf.unseen
    weights, filled = _seen(leaf.matrices, gram, leaf.cross, unseen, ridge)
    root = root_of_gram(filled, damping, whitening=whitening)
    outputs = None if fisher is None else _output_weights(leaf.matrix(fisher), gram)
    return Target(
        leaf=leaf,
        weights=weights,
        inputs=root.matrix,
        outputs=outputs,
        gram=gram,
        unseen=unseen,
        damping=root.damping,
        retries=root.retries,
    )


def _lookup_target(table: TableLeaf) -> Target:
    return Target(leaf=table, weights=table.matrices, outputs=table.counts.rows[None].astype(jnp.float32) + 1.0)


@jax.jit
def _seen(
    weights: Float32[Array, "S D R"],
    gram: Float32[Array, "S D D"],
    cross: Float32[Array, "S D D"] | None,
    unseen: Bool[Array, "S D"],
    ridge: ArrayLike,
) -> tuple[Float32[Array, "S D R"], Float32[Array, "S D D"]]:
    """What to come close to, and a Gram without inputs that were never seen.

    What a root of 0 multiplies may become anything: inputs that were never seen count as the others do.
    """
    targets = weights
    if cross is not None:
        targets = jax.lax.map(lambda parts: dense_targets(parts[0], parts[1], parts[2], ridge), (weights, gram, cross))
    level = fill_unseen(jnp.diagonal(gram, axis1=1, axis2=2), unseen)
    filled = gram + jnp.where(unseen, level, 0.0)[:, :, None] * jnp.eye(gram.shape[-1])[None]
    return jnp.where(unseen[:, :, None], weights, targets), filled


@jax.jit
def _output_weights(information: Float32[Array, "S D R"], gram: Float32[Array, "S D D"]) -> Float32[Array, "S R"]:
    trace = jnp.trace(gram, axis1=1, axis2=2)[:, None]
    return information.sum(1) / jnp.where(trace > 0, trace, 1.0)


_GROUPED = "is the kernel of a grouped convolution, whose groups have inputs of their own"


def _information(fisher: Params, leaves: Sequence[MatrixLeaf]) -> dict[str, jax.Array]:
    """The Fisher information of every leaf, checked."""
    by_path = checked_fisher(fisher, {leaf.path: leaf.weight.shape for leaf in leaves})
    return {path: information.astype(jnp.float32) for path, information in by_path.items()}
