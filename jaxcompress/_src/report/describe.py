"""What a leaf is, in words."""

from typing import Any

from jaxcompress._src.arrays.additive import AdditiveCodebookArray
from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.codebook import CodebookArray
from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.arrays.n_of_m import NMSparseArray
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed


@on_auto_axes
def describe_leaf(leaf: Any) -> str:
    """The kind of a leaf, such as `float32`, `int8`, `int4 g32 2:4`, `bfloat16 bitmask`, `uint4 levels g64`.

    For quantized leaves: the codes, how weights share scales, and how zeros are stored; then, where the inputs are
    quantized too, whether their ranges are dynamic or static. `g32` is a group of 32 weights on one axis, `b16x32` a
    block over several, `per-channel` one scale for all weights along some axes, `per-tensor` one for all of them. For
    low-rank leaves: their factors and the residual, such as `rank 16 float32 + int4 g32`. For codebooks: how many
    values, and how their codes are stored, such as `16 values uint4 bitmask`; for sums of runs, the tables too, such as
    `2 tables of 256x8 uint8`.

    Args:
        leaf: an array, a compressed array, or the abstract form of either.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress._src.arrays.packed import pack
        >>> from jaxcompress.arrays import QuantizedArray
        >>> codes = pack(jnp.ones((64, 8), "int8"), bits=4, axis=0)
        >>> describe_leaf(QuantizedArray(data=codes, scale=jnp.ones((2, 8)), dtype=jnp.dtype("float32")))
        'int4 g32'
    """
    if isinstance(leaf, QuantizedArray):
        codes = leaf.data.values if isinstance(leaf.data, BitmaskSparseArray | NMSparseArray) else leaf.data
        words = [_codes(codes), "levels" if leaf.levels is not None else "", _blocks(leaf), _pattern(leaf.data)]
        return " ".join(word for word in words if word)
    if isinstance(leaf, CodebookArray):
        codes = leaf.data.values if isinstance(leaf.data, BitmaskSparseArray | NMSparseArray) else leaf.data
        words = [f"{leaf.table.shape[-1] + leaf.zero} values", _codes(codes), _pattern(leaf.data)]
        return " ".join(word for word in words if word)
    if isinstance(leaf, AdditiveCodebookArray):
        *_, count, values, length = leaf.table.shape
        return f"{count} table{'s' * (count > 1)} of {values}x{length} {_codes(leaf.data)}"
    if isinstance(leaf, InputQuantizedArray):
        return f"{describe_leaf(leaf.weight)}, {'dynamic' if leaf.scale is None else 'static'} inputs"
    if isinstance(leaf, BitmaskSparseArray | NMSparseArray):
        return f"{_codes(leaf.values)} {_pattern(leaf)}"
    if isinstance(leaf, LowRankArray):
        kinds = dict.fromkeys(describe_leaf(factor) for factor in (leaf.left, leaf.right))
        factors = f"rank {leaf.rank} {' and '.join(kinds)}"
        return factors if leaf.residual is None else f"{factors} + {describe_leaf(leaf.residual)}"
    if isinstance(leaf, PackedArray):
        return _codes(leaf)
    return type(leaf).__name__ if is_compressed(leaf) else str(leaf.dtype)


def _codes(values: Any) -> str:
    if isinstance(values, PackedArray):
        return f"{'int' if values.signed else 'uint'}{values.bits}"
    return str(values.dtype)


def _pattern(data: Any) -> str:
    if isinstance(data, NMSparseArray):
        return f"{data.pattern[0]}:{data.pattern[1]}"
    return "bitmask" if isinstance(data, BitmaskSparseArray) else ""


def _blocks(leaf: QuantizedArray) -> str:
    scales = tuple(leaf.scale.shape)
    sizes = [n // max(s, 1) for n, s in zip(leaf.shape, scales, strict=True)]
    grouped = [size for size, s in zip(sizes, scales, strict=True) if s > 1 and size > 1]
    if not any(s > 1 for s in scales):
        return "per-tensor"
    if not grouped:
        return "per-channel" if any(size > 1 for size in sizes) else "per-weight"
    return f"g{grouped[0]}" if len(grouped) == 1 else f"b{'x'.join(map(str, grouped))}"
