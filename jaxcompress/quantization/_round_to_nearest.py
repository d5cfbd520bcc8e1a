"""Round-to-nearest quantization of one array."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer, Num

from jaxcompress.arrays import (
    BitmaskSparseArray,
    QuantizedArray,
    SparseArray,
    pack,
    per_block,
    sparsify,
    sparsify_like,
    split_blocks,
)
from jaxcompress.quantization._arithmetic import divide
from jaxcompress.quantization._blocks import axes_of, packing_axis
from jaxcompress.quantization._scales import block_scales
from jaxcompress.quantization._spec import QuantSpec
from jaxcompress.trace import LeafLayout
from jaxcompress.types import CompressedArray, is_compressed


def quantize_array(w: Float[Array, "..."] | CompressedArray, spec: QuantSpec, layout: LeafLayout) -> QuantizedArray:
    """Quantizes one leaf: scales from the extreme values of its blocks, codes by rounding to nearest.

    Zeros stay exactly zero. One bit has no code for zero: there, when `w` is concrete and holds zeros, the codes are
    stored sparsely, without them.

    Args:
        w: the weights. A sparse array keeps its index, and its codes are stored under it; any other compressed array
            stands for the plain one.
        spec: bits, granularity, variant.
        layout: gives the axes.

    Returns:
        The quantized leaf. Codes are packed along the innermost input axis (see `packing_axis`), those of a sparse leaf
        as they are stored.

    Raises:
        ValueError: the blocks do not divide the shape, or `w` is a scalar.

    Example:
        >>> from jaxcompress.trace import LeafLayout
        >>> layout = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
        >>> leaf = quantize_array(jnp.array([[7.0, 0.5], [-3.2, -3.5]]), QuantSpec(bits=4), layout)
        >>> leaf.codes(), leaf.scale
        (Array([[ 7,  1],
               [-3, -7]], dtype=int8), Array([[1. , 0.5]], dtype=float32))
    """
    dense: Any = w.materialize() if is_compressed(w) else w
    scale, zero_point, codes = _scales_and_codes(dense, spec, axes_of(layout))
    keep = w if isinstance(w, SparseArray) else None
    if spec.bits == 1 and not isinstance(dense, Tracer):
        keep = _without_zeros(jnp.not_equal(dense, 0), keep, layout)
    data = store_codes(codes, bits=spec.bits, axis=packing_axis(codes.shape, spec.bits, layout), keep=keep)
    return QuantizedArray(data=data, scale=scale, zero_point=zero_point, dtype=jnp.dtype(dense.dtype))


def round_to_codes(
    w: Float[Array, "..."], scale: Float[Array, "..."], zero_point: Num[Array, "..."] | None, spec: QuantSpec
) -> Integer[Array, "..."]:
    """clip(round(w / scale) + zero_point), halves to even, in float32; w >= 0 at one bit.

    Args:
        w: the weights.
        scale: one entry per block, as stored.
        zero_point: as `block_scales` gives it.
        spec: gives the range of the codes.

    Returns:
        int8 codes, uint8 unless `spec.signed`, of the shape of `w`.
    """
    if spec.bits == 1:
        return (w >= 0).astype(jnp.uint8)
    codes = jnp.round(divide(split_blocks(w, scale.shape), per_block(scale, w.shape, scale.shape)))
    if zero_point is not None:
        codes = codes + per_block(zero_point, w.shape, scale.shape)
    codes = jnp.clip(codes, *spec.code_range)
    return codes.astype(jnp.int8 if spec.signed else jnp.uint8).reshape(w.shape)


def store_codes(codes: Integer[Array, "..."], *, bits: int, axis: int, keep: SparseArray | None = None) -> Any:
    """What a `QuantizedArray` keeps as `data`.

    Args:
        codes: int8 or uint8.
        bits: per code.
        axis: negative; along which dense codes are packed.
        keep: a sparse array whose index says which codes are stored (concrete), or None.

    Returns:
        Packed codes, or a sparse array of packed codes: under a bit mask packed along their last axis, N:M along the
        axis of the pattern.
    """
    if keep is None:
        return pack(codes, bits=bits, axis=axis)
    stored = sparsify_like(codes, keep)
    along = -1 if isinstance(stored, BitmaskSparseArray) else stored.axis
    return dataclasses.replace(stored, values=pack(stored.values, bits=bits, axis=along))


# Compiled as one: op by op, the first leaf of each shape costs some thirty compilations.
@functools.partial(jax.jit, static_argnames=("spec", "layout"), inline=True)
def _scales_and_codes(w: Float[Array, "..."], spec: QuantSpec, layout: LeafLayout) -> tuple[Array, Array | None, Array]:
    scale, zero_point = block_scales(w, spec, layout)
    return scale, zero_point, round_to_codes(w, scale, zero_point, spec)


def _without_zeros(nonzero: Bool[Array, "..."], keep: SparseArray | None, layout: LeafLayout) -> SparseArray | None:
    """An index of the nonzero weights, unless `keep` stores no others."""
    if bool((nonzero == (True if keep is None else keep.mask())).all()):
        return keep
    if isinstance(keep, BitmaskSparseArray):
        return sparsify(nonzero, nonzero, stack_ndim=keep.starts.ndim - 1, shards=keep.values.shape[-2])
    leading = [axis for at, axis in enumerate(layout.stack_axes) if at == axis]
    return sparsify(nonzero, nonzero, stack_ndim=len(leading))
