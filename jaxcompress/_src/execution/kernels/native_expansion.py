"""Products with weights under a bit mask, which a compiled kernel writes out just before."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.packed import PackedArray, unpacked
from jaxcompress._src.arrays.protocol import Multiply, product_with_plain
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.execution.kernels.kernel import Kernel, unless
from jaxcompress._src.execution.kernels.matmul import Matmul
from jaxcompress._src.execution.kernels.native import library
from jaxcompress._src.execution.kernels.native.expand import BitmaskFormat, expand_bitmask
from jaxcompress._src.execution.kernels.ordering import known_when_ready
from jaxcompress._src.meshes import on_auto_axes

_FLOATS = ("float32", "bfloat16", "float16")


def _why_not(matmul: Matmul) -> str | None:
    leaf = matmul.leaf
    sparse = leaf.data if isinstance(leaf, QuantizedArray) else leaf
    if not isinstance(sparse, BitmaskSparseArray):
        return "weights are not stored under a bit mask"
    if 0 in (*sparse.shape, *sparse.values.shape):
        return "there are no weights"
    if sparse is leaf:
        return None if str(leaf.dtype) in _FLOATS else f"values are {leaf.dtype}, not one of {', '.join(_FLOATS)}"
    return unless((leaf.data.dtype not in (jnp.int8, jnp.uint8), f"codes are {leaf.data.dtype}, not int8 or uint8"))


def _multiply(matmul: Matmul, multiply: Multiply) -> jax.Array:
    del multiply
    weights = expanded_after(matmul.leaf, matmul.other)
    return product_with_plain(weights, matmul.other, matmul.side, matmul.parameters)


@on_auto_axes
def expanded_after(leaf: BitmaskSparseArray | QuantizedArray, x: jax.Array) -> jax.Array:
    """`leaf.materialize()` by the compiled kernel, once `x` is computed, see `ordering.widened_after`.

    Args:
        leaf: weights under a bit mask, perhaps quantized.
        x: what they are about to be multiplied with.
    """
    ready = known_when_ready(x)
    sparse = leaf.data if isinstance(leaf, QuantizedArray) else leaf
    index = sparse.index.data
    columns = math.prod(sparse.row_shape)
    parts = (index.reshape(-1, *index.shape[-2:]), sparse.starts.reshape(-1, index.shape[-2]), ready)
    if not isinstance(leaf, QuantizedArray):
        values = sparse.values.reshape(-1, *sparse.values.shape[-2:])
        return expand_bitmask(values, *parts, storage=BitmaskFormat(columns=columns)).reshape(leaf.shape)
    leaf = leaf if _is_cut_evenly(leaf, sparse) else leaf.with_whole_blocks()
    packed = isinstance(sparse.values, PackedArray) and sparse.values.bits == 4
    levels = leaf.levels if packed else None
    values = sparse.values.data if packed else unpacked(sparse.values)
    if leaf.levels is not None and not packed:
        values = jnp.asarray(leaf.levels, jnp.float32)[values.astype(jnp.int32)]
    scale, scale_block = _blocks(leaf, sparse, leaf.scale)
    zero, zero_block = None, (1, 1)
    if not leaf.plain_zeros():
        # Without zero points of its own, a table has 0 for all: what is not stored is to be 0 whatever code 0 is.
        none = jnp.zeros((1,) * leaf.ndim, jnp.float32)
        zero, zero_block = _blocks(leaf, sparse, none if leaf.zero_point is None else leaf.zero_points())
    storage = BitmaskFormat(
        columns=columns,
        packed=packed,
        signed=packed and sparse.values.signed,
        levels=levels,
        scale_block=scale_block,
        zero_block=zero_block,
    )
    values = values.reshape(-1, *values.shape[-2:])
    weights = expand_bitmask(values, *parts, scale, zero, storage=storage)
    return weights.reshape(leaf.shape).astype(leaf.dtype)


def _is_cut_evenly(leaf: QuantizedArray, sparse: BitmaskSparseArray) -> bool:
    """Whether partial blocks, if there are any, lie along rows, or along columns that are one axis."""
    rows = -1 - len(sparse.row_shape)
    return leaf.partial is None or leaf.partial[0] == rows or (rows, leaf.partial[0]) == (-2, -1)


def _blocks(
    leaf: QuantizedArray, sparse: BitmaskSparseArray, parameter: Any
) -> tuple[Float[Array, "E H W"], tuple[int, int]]:
    """Scales or zero points by entries, blocks of rows and blocks of columns; and the sizes of those blocks."""
    parameter = parameter.astype(jnp.float32)
    first = sparse.starts.ndim - 1
    for axis, size in enumerate(leaf.shape):
        # Entries have numbers of their own; so have columns that are several axes, unless all of a row share one.
        is_entry = axis < first
        is_column = axis > first and len(sparse.row_shape) > 1 and any(n > 1 for n in parameter.shape[first + 1 :])
        if (is_entry or is_column) and parameter.shape[axis] != size:
            parameter = jnp.repeat(parameter, size // parameter.shape[axis], axis=axis)
    shape = (math.prod(leaf.shape[:first]), leaf.shape[first], math.prod(leaf.shape[first + 1 :]))
    blocks = parameter.reshape(shape[0], parameter.shape[first], -1)
    sizes = [-(-count // blocks.shape[axis]) for axis, count in ((1, shape[1]), (2, shape[2]))]
    if leaf.partial is not None:
        axis = 0 if leaf.partial[0] == first - leaf.ndim else 1
        if blocks.shape[1 + axis] > 1:
            sizes[axis] = leaf.partial[1]
    return blocks, (sizes[0], sizes[1])


EXPANSION = Kernel(
    name="native_expansion",
    platform="cpu",
    multiply=_multiply,
    why_not=_why_not,
    error="none",
    missing=library.why_missing,
)
