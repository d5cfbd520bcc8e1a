"""Shared values for the leaves of a tree: which leaves, and what happened to them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.codebook import CodebookArray
from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.arrays.sparse import SparseArray, sparsify_like
from jaxcompress._src.clustering.fit import fit_tables, nearest_codes
from jaxcompress._src.clustering.leaves import checked_importance, checked_leaf, clusterable, weighed_errors
from jaxcompress._src.clustering.spec import CodebookSpec
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.unselected import Unselected, is_unselected
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.infos import Info, entry_names
from jaxcompress._src.weights.matrices import MatrixLeaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterInfo(Info):
    """What sharing values made of one leaf, or of one stack entry; see `Info` for the other fields.

    `error` is sqrt(Σ h (w - w')² / Σ h w²); h is the importance, or 1.

    Attributes:
        zeros: share of weights that are 0 now.
        values: number of values in use, 0 included, over all tables of the leaf or entry.
        entropy_bits: mean of -log2 of the share of a code: bits per weight of an ideal coder that knows the shares.
    """

    zeros: float
    values: int
    entropy_bits: float


@on_auto_axes
def cluster(
    params: Params,
    spec: CodebookSpec,
    *,
    importance: Params | None = None,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, ClusterInfo]]:
    """Lets the weights of a leaf share a few values: Σ h (w - value)² is minimised by k-means.

    Leaves that are clustered already are left as they are, so that calls with different `select` and `spec` compose.
    Sparse leaves keep their index; other compressed leaves are materialized first.

    Args:
        params: the tree.
        spec: how many values, which weights share a table, and what a code costs.
        importance: h, a partial tree of arrays that broadcast against the leaves: `calibration.fisher`, or
            `input_importance` of input statistics. `Unselected`, None or no tree: 1.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`; without them kernels are (in..., out), embeddings (rows, features).

    Returns:
        `(params, info)`: a `CodebookArray` for every selected leaf, and a `ClusterInfo` by path (`path[i]` for each
        entry of a stack).

    Raises:
        ValueError: nothing is selected; a selected leaf is no float array, is sparse though `spec.zero` is False, or
            holds NaN or Inf; importance that is negative, not finite or of another shape. Names the leaf.
        TypeError: inside `jit`, `grad` or `vmap`: it runs on the host only. Names the leaf.

    Example:
        >>> small, info = cluster({"kernel": jnp.array([[0.0, 1.0], [1.2, -2.0]])}, CodebookSpec(values=3))
        >>> small["kernel"].table, small["kernel"].materialize()
        (Array([[[-2. ,  1.1]]], dtype=float32), Array([[ 0. ,  1.1], [ 1.1, -2. ]], dtype=float32))
        >>> info["kernel"].values, info["kernel"].entropy_bits
        (3, 1.5)

    References:
        Han, Mao and Dally 2016, "Deep Compression: compressing deep neural networks with pruning, trained quantization
        and Huffman coding"; Choi, El-Khamy and Lee 2017, "Towards the limit of network quantization" (weighting by
        second derivatives, entropy-constrained codes).
    """
    info: dict[str, ClusterInfo] = {}

    def visit(path: str, leaf: Any, layout: Any, weight: Any) -> Any:
        if is_unselected(layout) or isinstance(leaf, CodebookArray):
            return leaf
        dense, h = checked_leaf(path, leaf, zero=spec.zero), checked_importance(path, leaf, weight)
        tables = fit_tables(dense, spec, spec.blocks(dense.shape, layout), h)
        codes = nearest_codes(dense, tables, spec, h)
        stored = store_codes(codes, tables, spec, layout, leaf)
        info.update(describe(MatrixLeaf(path=path, weight=dense, layout=layout), stored, codes, h))
        return stored

    known = map_with_path(lambda *_: Unselected, params) if importance is None else importance
    selected = clusterable(params, spec, select=select, layouts=layouts)
    return map_with_path(visit, params, selected, known), info


def store_codes(
    codes: jax.Array, tables: jax.Array, spec: CodebookSpec, layout: LeafLayout, leaf: Any
) -> CodebookArray:
    """Codes and tables as a leaf; under the index of `leaf`, if it is sparse."""
    if isinstance(leaf, SparseArray):
        sparse = sparsify_like(codes, leaf)
        data = dataclasses.replace(sparse, values=pack(sparse.values, bits=spec.bits, axis=getattr(sparse, "axis", -1)))
    else:
        data = pack(codes, bits=spec.bits, axis=_packing_axis(codes.shape, layout))
    return CodebookArray(data=data, table=tables, dtype=jnp.dtype(leaf.dtype), zero=spec.zero)


def describe(
    leaf: MatrixLeaf, stored: CodebookArray, codes: jax.Array, importance: jax.Array | None
) -> dict[str, ClusterInfo]:
    """Error and entropy of a clustered leaf, entry by entry."""
    errors = weighed_errors(leaf, stored, jnp.ones(()) if importance is None else jnp.asarray(importance))
    rows = np.asarray(leaf.rows(codes)), np.asarray(leaf.rows(stored.materialize()))
    named = zip(entry_names(leaf.path, leaf.weight.shape, leaf.layout), errors, *rows, strict=True)
    return {name: _info(error, entry_codes, values) for name, error, entry_codes, values in named}


def _info(error: float, codes: np.ndarray, values: np.ndarray) -> ClusterInfo:
    counts = np.bincount(codes, minlength=1)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return ClusterInfo(
        error=error,
        zeros=float(np.mean(values == 0)) if values.size else 0.0,
        values=len(shares),
        entropy_bits=float(np.abs(shares @ np.log2(shares))) if len(shares) else 0.0,
    )


def _packing_axis(shape: tuple[int, ...], layout: LeafLayout) -> int:
    """The longest axis that is not stacked, the last of equal ones: fewest padded codes."""
    free = [axis for axis in range(len(shape)) if axis not in layout.stack_axes] or list(range(len(shape)))
    return max(free, key=lambda axis: (shape[axis], axis)) - len(shape)
