"""The norms in which leaves are approximated: plain, by activations, by Fisher information.

Shape letters: S stack entries, D inputs, R outputs.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float32

from jaxcompress._src.calibration.statistics import InputStatistics, LookupCounts
from jaxcompress._src.lowrank.factorize import Whitening, root_of_gram
from jaxcompress._src.lowrank.leaves import Target, shape_of
from jaxcompress._src.solvers.hessian import check_damping
from jaxcompress._src.solvers.outputs import dense_targets
from jaxcompress._src.trace.left_out import warn_left_out
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.matrices import MatrixLeaf, checked_fisher, entries, matrices
from jaxcompress._src.weights.unseen import fill_unseen, unseen_inputs, warn_unseen

Side = Literal["inputs", "outputs", "both"]
Targets = tuple[Params, list[Target]]


def plain_targets(params: Params, *, select: Selector | None, layouts: Params | None) -> Targets:
    """The selected leaves in the Frobenius norm: a partial tree of `MatrixLeaf`, and one target for each."""
    chosen = matrices(params, select=select, layouts=layouts)
    return chosen, [Target(leaf=leaf, weights=_weights(leaf)) for leaf in entries(chosen)]


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
) -> Targets:
    """The leaves that have statistics in the norm of their outputs; see `activation_svd`."""
    check_damping(damping, ridge)
    if whitening not in ("eigen", "cholesky"):
        raise ValueError(f"`whitening` must be 'eigen' or 'cholesky', got {whitening!r}.")
    grouped = _grouped(statistics, layouts)
    chosen = matrices(params, select=_with_statistics(statistics, select, grouped), layouts=layouts)
    if wanted := [leaf.path for leaf in entries(chosen) if leaf.path in grouped]:
        raise ValueError(f"Leaf {wanted[0]!r} {_GROUPED}; exclude it.")
    if select is None:
        warn_left_out(grouped, "Low rank leaves out", advice="Exclude them by `select`.", stacklevel=3)
    evidence = dict(leaves_with_paths(statistics, is_leaf=_is_evidence))
    weights = _by_path(fisher, chosen)
    targets = [
        _activation_target(leaf, evidence.get(leaf.path), weights.get(leaf.path), damping, ridge, whitening)
        for leaf in entries(chosen)
    ]
    unseen = {target.leaf.path: target.unseen for target in targets if target.unseen is not None}
    warn_unseen(unseen, "factored as if their inputs were white noise", stacklevel=5)
    return chosen, targets


def fisher_targets(
    params: Params, fisher: Params, *, weights: Side, select: Selector | None, layouts: Params | None
) -> Targets:
    """The selected leaves in a norm that sums of the Fisher information weight; see `fisher_svd`."""
    if weights not in ("inputs", "outputs", "both"):
        raise ValueError(f"`weights` must be 'inputs', 'outputs' or 'both', got {weights!r}.")
    chosen = matrices(params, select=select, layouts=layouts)
    given = _by_path(fisher, chosen)
    targets = []
    for leaf in entries(chosen):
        information = leaf.matrix(given[leaf.path])
        total = information.sum((1, 2))[:, None] if weights == "both" else 1.0
        sums = information.sum(2), information.sum(1) / jnp.where(total > 0, total, 1.0)
        rows = fill_unseen(sums[0], sums[0] <= 0)
        inputs, outputs = None if weights == "outputs" else rows, None if weights == "inputs" else sums[1]
        targets.append(Target(leaf=leaf, weights=_weights(leaf), inputs=inputs, outputs=outputs))
    return chosen, targets


def _weights(leaf: MatrixLeaf) -> jax.Array:
    return leaf.matrix(leaf.weight).astype(jnp.float32)


def _activation_target(
    leaf: MatrixLeaf, found: Any, fisher: jax.Array | None, damping: float, ridge: float, whitening: Whitening
) -> Target:
    if isinstance(found, LookupCounts):
        return _lookup_target(leaf, found)
    if not isinstance(found, InputStatistics) or found.gram is None:
        raise ValueError(f"Leaf {leaf.path!r} has no statistic 'gram'; gather it with `input_statistics`.")
    stack, depth, _ = shape_of(leaf)
    if found.gram.shape[-1] != depth or found.count.size != stack:
        raise ValueError(
            f"Leaf {leaf.path!r} has {stack} stack entries and {depth} inputs, its statistics have {found.count.size} "
            f"and {found.gram.shape[-1]}; give `layouts` from `trace.layouts`."
        )
    if not bool((found.count > 0).any()):
        raise ValueError(f"The statistics of leaf {leaf.path!r} are of no rows.")
    gram = found.gram.reshape(stack, depth, depth)
    if not bool(jnp.isfinite(gram).all()):
        raise ValueError(f"The statistics of leaf {leaf.path!r} hold NaN or Inf.")
    weights = _weights(leaf)
    if found.cross is not None:
        weights = _dense_targets(weights, gram, found.cross.reshape(gram.shape), ridge)
    # What a root of 0 multiplies may become anything: inputs that were never seen count as the others do.
    unseen = unseen_inputs(found).reshape(stack, depth)
    level = fill_unseen(jnp.diagonal(gram, axis1=1, axis2=2), unseen)
    filled = gram + jnp.where(unseen, level, 0.0)[:, :, None] * jnp.eye(depth)[None]
    weights = jnp.where(unseen[:, :, None], _weights(leaf), weights)
    root = root_of_gram(filled, damping, whitening=whitening)
    trace = jnp.trace(gram, axis1=1, axis2=2)[:, None]
    outputs = None if fisher is None else leaf.matrix(fisher).sum(1) / jnp.where(trace > 0, trace, 1.0)
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


def _lookup_target(leaf: MatrixLeaf, found: LookupCounts) -> Target:
    stack, _, rows = shape_of(leaf)
    if stack != 1 or found.rows.shape != (rows,):
        raise ValueError(
            f"Leaf {leaf.path!r} has {rows} rows, its statistics have {found.rows.shape}; give `layouts` from "
            "`trace.layouts`."
        )
    return Target(leaf=leaf, weights=_weights(leaf), outputs=found.rows[None].astype(jnp.float32) + 1.0)


@jax.jit
def _dense_targets(
    weights: Float32[Array, "S D R"], gram: Float32[Array, "S D D"], cross: Float32[Array, "S D D"], ridge: ArrayLike
) -> Float32[Array, "S D R"]:
    return jax.lax.map(lambda parts: dense_targets(parts[0], parts[1], parts[2], ridge), (weights, gram, cross))


_GROUPED = "is the kernel of a grouped convolution, whose groups have inputs of their own"


def _grouped(statistics: Params, layouts: Params | None) -> dict[str, str]:
    """Kernels of grouped convolutions with statistics: no pair of factors stands for all of their groups."""
    found = dict(leaves_with_paths(statistics, is_leaf=_is_evidence))
    known = [] if layouts is None else leaves_with_paths(layouts)
    return {path: f"it {_GROUPED}" for path, layout in known if layout.groups > 1 and path in found}


def _with_statistics(statistics: Params, select: Selector | None, grouped: Mapping[str, str]) -> Selector:
    """By default, all leaves that have statistics to go by."""
    if select is not None:
        return select
    found = dict(leaves_with_paths(statistics, is_leaf=_is_evidence))

    def usable(path: str, _: Any) -> bool:
        own = None if path in grouped else found.get(path)
        return isinstance(own, LookupCounts) or (isinstance(own, InputStatistics) and own.gram is not None)

    def chosen(params: Params) -> Params:
        marks = map_with_path(usable, params)
        if not any(jax.tree.leaves(marks)):
            raise ValueError("No leaf has the statistic 'gram': there is nothing to compress.")
        return marks

    return chosen


def _is_evidence(node: Any) -> bool:
    return isinstance(node, InputStatistics | LookupCounts)


def _by_path(fisher: Params | None, chosen: Params) -> dict[str, jax.Array]:
    """The Fisher information of every chosen leaf, checked."""
    if fisher is None:
        return {}
    found = checked_fisher(fisher, {leaf.path: leaf.weight.shape for leaf in entries(chosen)})
    return {path: information.astype(jnp.float32) for path, information in found.items()}
