"""The factors of low-rank leaves, as leaves of their own.

Shape letters: S stack entries, D inputs, k the rank.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.calibration.statistics import InputStatistics
from jaxcompress._src.lowrank.residual import CompressFn
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.trace.layout import LeafLayout, default_layout
from jaxcompress._src.tree.maps import leaves_by_path, map_with_path
from jaxcompress._src.tree.unselected import Unselected, is_unselected
from jaxcompress._src.types import Params, plain


@on_auto_axes
def compress_factors(
    params: Params, compress: CompressFn, *, statistics: Params | None = None, layouts: Params | None = None
) -> tuple[Params, Any]:
    """Compresses both factors of every low-rank leaf, as if they were two kernels one after the other.

    Args:
        params: the tree; leaves that are no `LowRankArray` stay as they are, and so do residuals.
        compress: `(params, statistics, layouts) -> (params, info)`, called once, with {path: {"left": ..., "right":
            ...}} of plain factors; such as `lambda p, s, at: quantization.quantize(p, spec, layouts=at)`. A
            factor has the axes of its leaf, of size 1 where it does not vary, and the rank as its last axis. The inputs
            of "left" are those of the leaf, the inputs of "right" are the rank.
        statistics: from `input_statistics`, of the leaves. Given "gram", both factors get their own: XᵀX, and LᵀXᵀX L
            for "right", with L the left factor.
        layouts: from `trace.layouts`; by default kernels are (in..., out), embeddings (rows, features).

    Returns:
        `(params, info)`: low-rank leaves with compressed factors, and what `compress` says.

    Raises:
        ValueError: there is no low-rank leaf; `layouts` do not say of a leaf that "left" has its inputs; `compress`
            returned another structure, shape or dtype.

    Example:
        >>> from jaxcompress.lowrank import svd
        >>> small, _ = svd({"kernel": jnp.arange(12.0).reshape(4, 3)}, rank=2)
        >>> def halves(params, statistics, layouts):
        ...     return jax.tree.map(lambda w: jnp.round(2 * w) / 2, params), None
        >>> smaller, _ = compress_factors(small, halves)
        >>> bool((2 * smaller["kernel"].left % 1 == 0).all())
        True
    """
    known = map_with_path(lambda *_: None, params) if layouts is None else layouts
    given = map_with_path(lambda *_: Unselected, params) if statistics is None else statistics
    parts: dict[str, dict[str, Any]] = {"params": {}, "statistics": {}, "layouts": {}}

    def note(path: str, leaf: Any, layout: LeafLayout | None, statistics: Any) -> None:
        if isinstance(leaf, LowRankArray):
            axes = layout if layout is not None and layout.is_weight else default_layout(path, leaf)
            parts["params"][path] = {"left": plain(leaf.left), "right": plain(leaf.right)}
            parts["layouts"][path] = _layouts(path, leaf, axes)
            parts["statistics"][path] = _statistics(leaf, axes, statistics)

    map_with_path(note, params, known, given)
    if not parts["params"]:
        raise ValueError("No leaf is a LowRankArray: there are no factors to compress.")
    compressed, info = compress(parts["params"], parts["statistics"], parts["layouts"])
    new = leaves_by_path(compressed)

    def put(path: str, leaf: Any) -> Any:
        if path not in parts["params"]:
            return leaf
        factors = {name: _checked(f"{path}/{name}", new, parts["params"][path][name]) for name in ("left", "right")}
        return dataclasses.replace(leaf, **factors)

    return map_with_path(put, params), info


def _layouts(path: str, leaf: LowRankArray, layout: LeafLayout) -> dict[str, LeafLayout]:
    wrong = [axis for axis in layout.input_axes if leaf.left.shape[axis] != leaf.shape[axis]]
    if wrong:
        raise ValueError(
            f"The left factor of leaf {path!r}, {tuple(leaf.left.shape)}, does not have the inputs, axes "
            f"{layout.input_axes} of {leaf.shape}; give `layouts` from `trace.layouts`."
        )
    rank, stack = leaf.ndim, layout.stack_axes
    others = {
        name: tuple(axis for axis in range(leaf.ndim) if axis not in (*stack, *axes))
        for name, axes in (("left", layout.input_axes), ("right", ()))
    }
    left = LeafLayout(
        kind="matmul", stack_axes=stack, input_axes=layout.input_axes, output_axes=(*others["left"], rank)
    )
    right = LeafLayout(kind="matmul", stack_axes=stack, input_axes=(rank,), output_axes=others["right"])
    return {"left": left, "right": right}


def _statistics(leaf: LowRankArray, layout: LeafLayout, statistics: Any) -> dict[str, Any]:
    if not isinstance(statistics, InputStatistics) or statistics.gram is None:
        return {"left": Unselected, "right": Unselected}
    rank, depth = leaf.rank, statistics.gram.shape[-1]
    axes = (*layout.stack_axes, *layout.input_axes)
    rest = [axis for axis in range(leaf.ndim) if axis not in axes]
    stack = math.prod(statistics.gram.shape[:-2])
    left = plain(leaf.left).transpose(*axes, *rest, leaf.ndim).reshape(stack, depth, rank).astype(jnp.float32)
    gram = jnp.einsum("sik,sij,sjl->skl", left, statistics.gram.reshape(stack, depth, depth), left, precision="highest")
    gram = gram.reshape(*statistics.gram.shape[:-2], rank, rank)
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    of_left = dataclasses.replace(statistics, absolute_sum=None, absolute_max=None, cross=None)
    return {"left": of_left, "right": dataclasses.replace(of_left, gram=gram, squared_sum=squares)}


def _checked(path: str, leaves: dict[str, Any], like: jax.Array) -> Any:
    new = leaves.get(path)
    if new is None or is_unselected(new) or (tuple(new.shape), new.dtype) != (tuple(like.shape), like.dtype):
        shown = "nothing" if new is None else f"{new.dtype}{tuple(new.shape)}"
        raise ValueError(f"`compress` returned {shown} for factor {path!r}, expected {like.dtype}{tuple(like.shape)}.")
    return new
