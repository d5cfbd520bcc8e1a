"""Round-to-nearest quantization of one array."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Integer, Num, Shaped

from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.packed import codes_per_block, pack
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray, sparsify, sparsify_like
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.quantization.blocks import axes_of, packing_axis, padded_shape, partial_axis
from jaxcompress._src.quantization.rounding import round_to_codes as round_to_codes
from jaxcompress._src.quantization.scales import block_scales
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.types import CompressedArray, plain


@on_auto_axes
def quantize_array(w: Float[Array, "..."] | CompressedArray, spec: QuantSpec, layout: LeafLayout) -> QuantizedArray:
    """Quantizes one leaf: scales from the ranges of its blocks, codes by rounding to nearest.

    Zeros stay exactly zero. One bit and some tables have no code for zero: there, when `w` is concrete and holds zeros,
    the codes are stored sparsely, without them.

    Args:
        w: the weights. A sparse array keeps its index, and its codes are stored under it; any other compressed array
            stands for the plain one.
        spec: format, granularity, range.
        layout: gives the axes.

    Returns:
        The quantized leaf. Codes are packed along the innermost input axis (see `packing_axis`), those of a sparse leaf
        as they are stored.

    Raises:
        ValueError: the blocks do not divide the shape, or `w` is a scalar.

    Example:
        >>> from jaxcompress.trace import LeafLayout
        >>> layout = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
        >>> leaf = quantize_array(jnp.array([[7.0, 0.5], [-3.2, -3.5]]), QuantSpec(bits=4, convention="narrow"), layout)
        >>> leaf.codes(), leaf.scale
        (Array([[ 7,  1],
               [-3, -7]], dtype=int8), Array([[1. , 0.5]], dtype=float32))
    """
    dense: Any = plain(w)
    scale, zero_point, codes = _scales_and_codes(dense, spec, axes_of(layout))
    return _stored(w, dense, codes, scale, zero_point, spec, layout)


def quantize_array_at(
    w: Float[Array, "..."] | CompressedArray,
    scale: Shaped[Array, "..."],
    zero_point: Num[Array, "..."] | None,
    spec: QuantSpec,
    layout: LeafLayout,
) -> QuantizedArray:
    """`quantize_array` with scales that are known already, such as learned ones.

    Args:
        w: the array, as for `quantize_array`.
        scale: in `spec.scale_dtype`, one entry per block.
        zero_point: None for symmetric codes.
        spec: format.
        layout: gives the axes.
    """
    dense: Any = plain(w)
    codes = cropped(round_to_codes(padded(dense, spec, layout), scale, zero_point, spec), dense.shape)
    return _stored(w, dense, codes, scale, zero_point, spec, layout)


def padded(w: Shaped[Array, "..."], spec: QuantSpec, layout: LeafLayout) -> Shaped[Array, "..."]:
    """A leaf with zeros behind its last group, if that is a partial one: they change no range that contains 0."""
    shape = padded_shape(w.shape, spec, layout)
    return w if shape == w.shape else jnp.pad(w, [(0, more - n) for n, more in zip(w.shape, shape, strict=True)])


def cropped(x: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    """What `padded` has put behind `shape` taken off again."""
    return x if x.shape == tuple(shape) else jax.lax.slice(x, (0,) * x.ndim, shape)


@on_auto_axes
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
    return sparsify_like(codes, keep).with_packed_values(bits)


def store_zero_points(zero_point: Num[Array, "..."] | None, bits: int, layout: LeafLayout) -> Any:
    """What a `QuantizedArray` keeps as `zero_point`: integers in as many bits as a code, where that is less.

    Args:
        zero_point: as `block_scales` gives it, or floats, which stay as they are.
        bits: per code.
        layout: gives the axes; stacked ones are not packed, so that scans slice the bytes.

    Returns:
        None, an array, or a `PackedArray` along the axis that needs the fewest bytes, the longest of equal ones.
    """
    if zero_point is None or zero_point.dtype != jnp.uint8 or bits == 8:
        return zero_point
    shape, block = zero_point.shape, codes_per_block(bits)
    free = [axis for axis in range(len(shape)) if axis not in layout.stack_axes]

    def stored(axis: int) -> int:
        return math.prod(shape) // max(shape[axis], 1) * (-(-shape[axis] // block) * block * bits // 8)

    axis = min(free, key=lambda axis: (stored(axis), -shape[axis]), default=None)
    if axis is None or stored(axis) >= math.prod(shape):
        return zero_point
    return pack(zero_point, bits=bits, axis=axis)


# Compiled as one: op by op, the first leaf of each shape costs some thirty compilations.
@functools.partial(jax.jit, static_argnames=("spec", "layout"), inline=True)
def _scales_and_codes(w: Float[Array, "..."], spec: QuantSpec, layout: LeafLayout) -> tuple[Array, Array | None, Array]:
    whole = padded(w, spec, layout)
    scale, zero_point = block_scales(whole, spec, layout)
    return scale, zero_point, cropped(round_to_codes(whole, scale, zero_point, spec), w.shape)


def _stored(
    w: Any, dense: Array, codes: Array, scale: Array, zero_point: Array | None, spec: QuantSpec, layout: LeafLayout
) -> QuantizedArray:
    keep = w if isinstance(w, SparseArray) else None
    if not spec.number_format.has_zero and not isinstance(dense, Tracer):
        keep = _without_zeros(jnp.not_equal(dense, 0), keep, layout)
    data = store_codes(codes, bits=spec.bits, axis=packing_axis(codes.shape, spec.bits, layout), keep=keep)
    return QuantizedArray(
        data=data,
        scale=scale,
        zero_point=store_zero_points(zero_point, spec.bits, layout),
        dtype=jnp.dtype(dense.dtype),
        levels=spec.levels,
        partial=partial_axis(dense.shape, spec, layout),
    )


def _without_zeros(nonzero: Bool[Array, "..."], keep: SparseArray | None, layout: LeafLayout) -> SparseArray | None:
    """An index of the nonzero weights, unless `keep` stores no others."""
    if bool((nonzero == (True if keep is None else keep.mask())).all()):
        return keep
    if isinstance(keep, BitmaskSparseArray):
        return sparsify(nonzero, nonzero, stack_ndim=keep.starts.ndim - 1, shards=keep.values.shape[-2])
    leading = [axis for at, axis in enumerate(layout.stack_axes) if at == axis]
    return sparsify(nonzero, nonzero, stack_ndim=len(leading))
