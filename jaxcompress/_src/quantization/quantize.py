"""Quantization of trees: which leaves, and errors that name them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.blocks import PARTIAL, cut, packing_axis
from jaxcompress._src.quantization.fake_quant import fake_quantize_array
from jaxcompress._src.quantization.formats.fixed_point import (
    Overflow,
    check_bits,
    fixed_point_codes,
    fixed_point_encode,
)
from jaxcompress._src.quantization.round_to_nearest import quantize_array, store_codes
from jaxcompress._src.quantization.rounding_info import RoundingInfo, storage_infos
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.checks import check_finite
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.tree.unselected import Unselected, is_unselected, map_selected
from jaxcompress._src.types import Params, Selector, plain
from jaxcompress._src.weights.selection import selected_layouts, without_misfits


@on_auto_axes
def quantize(
    params: Params, spec: QuantSpec, *, select: Selector | None = None, layouts: Params | None = None
) -> tuple[Params, dict[str, RoundingInfo]]:
    """Round-to-nearest quantization of the selected leaves.

    Several calls with different `select` and `spec` compose, because leaves that are quantized already are left as they
    are. Sparse leaves keep their index; other compressed leaves are materialized first.

    Args:
        params: the tree.
        spec: format, granularity, range.
        select: which leaves; by default every weight that the group size divides: one
            `trace.LeftOutWarning` names the others.
        layouts: from `trace.layouts`; without them kernels are (in..., out), embeddings (rows, features).

    Returns:
        `(params, info)`: a `QuantizedArray` for every selected leaf, and a `RoundingInfo` by path (`path[i]` for each
        entry of a stack) with the bits per weight; errors need statistics, see `rounding_errors`.

    Raises:
        ValueError: nothing is selected; or a selected leaf is no float array, holds NaN or Inf, or has axes that the
            group size does not divide. Names the leaf.

    Example:
        >>> params = {"bias": jnp.ones(8), "kernel": jnp.ones((64, 8))}
        >>> small, info = quantize(params, QuantSpec(bits=4, group_size=32))
        >>> small["kernel"].bits, small["kernel"].scale.shape, info["kernel"].bits_per_weight
        (4, (2, 8), 5.0)
    """

    def visit(path: str, leaf: Any, layout: LeafLayout) -> Any:
        check_finite(path, jnp.asarray(plain(leaf)))
        return quantize_array(leaf if isinstance(leaf, SparseArray) else jnp.asarray(plain(leaf)), spec, layout)

    selected = weight_layouts(params, select=select, layouts=layouts, spec=spec)
    small = _map_weights(visit, params, selected)
    return small, storage_infos(small, selected)


@on_auto_axes
def fake_quantize(
    params: Params,
    spec: QuantSpec,
    *,
    bits: Any = None,
    select: Selector | None = None,
    layouts: Params | None = None,
) -> Params:
    """The values of the selected leaves after quantization, with straight-through gradients; for use inside a loss.

    `materialize(quantize(params, spec)[0])` is equal to it, bit for bit. Leaves that are quantized already are left as
    they are; other compressed leaves become the plain, rounded array that they would stand for.

    Args:
        params: the tree.
        spec: format, granularity, range.
        bits: of integers, where they are traced; see `fake_quantize_array`.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        A tree of the same logical shapes and dtypes.

    Raises:
        ValueError: as `quantize`, but for NaN and Inf, which spread over their block.

    Example:
        >>> fake_quantize({"kernel": jnp.array([[7.0], [-3.2]])}, QuantSpec(bits=4, convention="narrow"))["kernel"]
        Array([[ 7.], [-3.]], dtype=float32)
    """
    return _map_weights(
        lambda _, leaf, layout: fake_quantize_array(jnp.asarray(plain(leaf)), spec, layout, bits=bits),
        params,
        weight_layouts(params, select=select, layouts=layouts, spec=spec),
    )


@on_auto_axes
def fixed_point(
    params: Params,
    bits: int,
    *,
    overflow: Overflow = "saturate",
    select: Selector | None = None,
    layouts: Params | None = None,
) -> tuple[Params, dict[str, RoundingInfo]]:
    """Fixed-point storage of the selected leaves: codes of b bits in two's complement, scale 2^-b.

    Args:
        params: the tree.
        bits: b, in [1, 8].
        overflow: what becomes of weights outside [-1/2, 1/2); see `fixed_point_encode`. Wrapping flips their sign.
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        `(params, info)`: a `QuantizedArray` for every selected leaf, with the values of `fixed_point_decode`, and a
        `RoundingInfo` by path, as from `quantize`.

    Raises:
        ValueError: as `quantize`.

    Example:
        >>> small, _ = fixed_point({"kernel": jnp.array([[0.25], [-0.5], [0.7]])}, 4)
        >>> small["kernel"].materialize()
        Array([[ 0.25  ], [-0.5   ], [ 0.4375]], dtype=float32)
    """
    check_bits(bits)

    def visit(path: str, leaf: Any, layout: LeafLayout) -> QuantizedArray:
        dense = jnp.asarray(plain(leaf))
        check_finite(path, dense)
        codes = fixed_point_codes(fixed_point_encode(dense, bits, overflow=overflow), bits)
        keep = leaf if isinstance(leaf, SparseArray) else None
        data = store_codes(codes, bits=bits, axis=packing_axis(codes.shape, bits, layout), keep=keep)
        shape = [size if axis in layout.stack_axes else 1 for axis, size in enumerate(dense.shape)]
        return QuantizedArray(data=data, scale=jnp.full(shape, 2.0**-bits, jnp.float32), dtype=jnp.dtype(dense.dtype))

    selected = weight_layouts(params, select=select, layouts=layouts)
    small = _map_weights(visit, params, selected)
    return small, storage_infos(small, selected)


def weight_layouts(
    params: Params, *, select: Selector | None, layouts: Params | None, spec: QuantSpec | None = None
) -> Params:
    """The layouts of the selected leaves that are not quantized yet, `Unselected` elsewhere.

    With `spec`, a default selection goes without the leaves that its groups do not divide; one warning names them.

    Raises:
        ValueError: nothing is selected; a selected leaf is no float array, or cannot be cut into groups.
    """

    def visit(path: str, layout: LeafLayout, leaf: Any) -> Any:
        weight = leaf.weight if isinstance(leaf, InputQuantizedArray) else leaf
        if isinstance(weight, QuantizedArray):
            return Unselected
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"Leaf {path!r} of dtype {leaf.dtype} and shape {tuple(leaf.shape)} is selected, but only floats can "
                "be quantized; exclude it."
            )
        return layout

    selected = map_selected(visit, selected_layouts(params, select=select, layouts=layouts), params)
    if spec is None or spec.group_size is None:
        return selected
    return without_misfits(selected, params, lambda _, shape, layout: cut(shape, spec, layout), select, advice=PARTIAL)


def on_weight(leaf: Any, fn: Callable[[Any], Any]) -> Any:
    """`fn(leaf)`; of a leaf whose inputs are quantized, which they stay, `fn` of its weight."""
    if isinstance(leaf, InputQuantizedArray):
        return dataclasses.replace(leaf, weight=fn(leaf.weight))
    return fn(leaf)


def _map_weights(fn: Callable[[str, Any, LeafLayout], Any], params: Params, selected: Params) -> Params:
    """`fn(path, leaf, layout)` where `selected` has a layout; the other leaves as they are."""

    def visit(path: str, leaf: Any, layout: Any) -> Any:
        return leaf if is_unselected(layout) else on_weight(leaf, lambda weight: fn(path, weight, layout))

    return map_with_path(visit, params, selected)
