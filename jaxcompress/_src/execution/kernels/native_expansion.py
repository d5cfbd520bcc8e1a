"""Products with sparse weights: a compiled kernel writes them out just before, or piece by piece for few rows."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.n_of_m import NMSparseArray
from jaxcompress._src.arrays.packed import PackedArray, unpacked
from jaxcompress._src.arrays.protocol import Multiply, product_with_plain
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.execution.kernels.kernel import Kernel, unless
from jaxcompress._src.execution.kernels.matmul import Matmul
from jaxcompress._src.execution.kernels.native import library
from jaxcompress._src.execution.kernels.native.expand import SparseFormat, expand_sparse, sparse_matmul
from jaxcompress._src.execution.kernels.ordering import known_when_ready
from jaxcompress._src.meshes import on_auto_axes

_FLOATS = ("float32", "bfloat16", "float16")

_CACHED = 2**22
"""So many float32 weights, 16 MB, are written and read again in the cache; more of them go through memory."""

_FEW_ROWS, _FEW_ROWS_BEYOND_CACHE = 8, 128
"""Up to there pieces are faster than the expansion, or nearly so, and take no memory."""


@dataclasses.dataclass(frozen=True)
class _View:
    """Sparse weights as entries of rows of columns.

    Attributes:
        first: the axis of the rows; those before it are entries, those behind it columns.
        shape: entries, rows, columns.
        layout: as in `SparseFormat`.
    """

    first: int
    shape: tuple[int, int, int]
    layout: Any


def _viewed(sparse: SparseArray) -> _View:
    if isinstance(sparse, BitmaskSparseArray):
        first, layout = sparse.starts.ndim - 1, "mask"
    else:
        first, layout = (
            (sparse.ndim - 2, "along rows") if sparse.axis == -1 else (sparse.ndim + sparse.axis, "across rows")
        )
    sizes = (math.prod(sparse.shape[:first]), sparse.shape[first], math.prod(sparse.shape[first + 1 :]))
    return _View(first, sizes, layout)


def _sparse(leaf: Any) -> Any:
    return leaf.data if isinstance(leaf, QuantizedArray) else leaf


def _why_not(matmul: Matmul) -> str | None:
    leaf, sparse = matmul.leaf, _sparse(matmul.leaf)
    if not isinstance(sparse, SparseArray):
        return "weights are not stored sparsely"
    if 0 in (*sparse.shape, *sparse.values.shape):
        return "there are no weights"
    if isinstance(sparse, NMSparseArray) and sparse.ndim == 1:
        return "weights have one axis"
    if sparse is leaf:
        return None if str(leaf.dtype) in _FLOATS else f"values are {leaf.dtype}, not one of {', '.join(_FLOATS)}"
    return unless((leaf.data.dtype not in (jnp.int8, jnp.uint8), f"codes are {leaf.data.dtype}, not int8 or uint8"))


def _multiply(matmul: Matmul, multiply: Multiply) -> jax.Array:
    del multiply
    weights = expanded_after(matmul.leaf, matmul.other)
    return product_with_plain(weights, matmul.other, matmul.side, matmul.parameters)


def _why_not_few(matmul: Matmul) -> str | None:
    reason = _why_not(matmul)
    if reason is not None:
        return reason
    view = _viewed(_sparse(matmul.leaf))
    sizes = (matmul.inputs, matmul.outputs) if matmul.order == "inputs first" else (matmul.outputs, matmul.inputs)
    limit = _FEW_ROWS if matmul.inputs * matmul.outputs <= _CACHED else _FEW_ROWS_BEYOND_CACHE
    return unless(
        (matmul.order is None, "the axes of the weight are stacked or mixed"),
        (matmul.rows > limit, f"{matmul.rows} rows: for up to {limit} at {matmul.inputs} x {matmul.outputs} weights"),
        (view.shape != (1, *sizes), "what is stored is not a matrix of inputs and outputs"),
        (str(matmul.other.dtype) not in _FLOATS, f"inputs are {matmul.other.dtype}, not one of {', '.join(_FLOATS)}"),
        (str(matmul.dtype) not in _FLOATS, f"outputs are {matmul.dtype}, not one of {', '.join(_FLOATS)}"),
        (str(matmul.leaf.dtype) != "float32", f"weights are {matmul.leaf.dtype}, not float32"),
    )


def _multiply_few(matmul: Matmul, multiply: Multiply) -> jax.Array:
    del multiply
    y = _product_by_pieces(matmul.leaf, matmul.flat_other().astype(jnp.float32), matmul.order == "outputs first")
    return matmul.unflattened(y.astype(matmul.dtype))


@on_auto_axes
def _product_by_pieces(leaf: Any, x: jax.Array, sums_columns: bool) -> jax.Array:
    parts, parameters, storage = _stored_parts(leaf)
    return sparse_matmul(x, *parts, *parameters, storage=storage, sums_columns=sums_columns)


@on_auto_axes
def expanded_after(leaf: SparseArray | QuantizedArray, x: jax.Array) -> jax.Array:
    """`leaf.materialize()` by the compiled kernel, once `x` is computed, see `ordering.widened_after`.

    Args:
        leaf: sparse weights, perhaps quantized.
        x: what they are about to be multiplied with.
    """
    parts, parameters, storage = _stored_parts(leaf)
    weights = expand_sparse(*parts, known_when_ready(x), *parameters, storage=storage)
    return weights.reshape(leaf.shape).astype(leaf.dtype)


def _stored_parts(leaf: Any) -> tuple[tuple[Any, Any, Any], tuple[Any, Any], SparseFormat]:
    """Values, bits and starts; scales and zero points, or None; and how they are stored."""
    sparse, view = _sparse(leaf), _viewed(_sparse(leaf))
    entries, rows, columns = view.shape
    axis = sparse.axis if isinstance(sparse, NMSparseArray) else -1
    packed = isinstance(sparse.values, PackedArray) and (sparse.values.bits, sparse.values.axis) == (4, axis)
    pattern: dict[str, Any] = {}
    starts = None
    if isinstance(sparse, BitmaskSparseArray):
        bits = sparse.index.data
        starts = sparse.starts.reshape(-1, rows)
    else:
        index = sparse.index
        as_stored = isinstance(index, PackedArray) and index.axis == axis and 8 % index.bits == 0
        bits = index.data if as_stored else unpacked(index)
        pattern = {"layout": view.layout, "pattern": sparse.pattern, "place_bits": index.bits if as_stored else 8}
    storage = SparseFormat(rows=rows, columns=columns, packed=packed, signed=packed and sparse.values.signed, **pattern)

    def stacked(part: Array) -> Array:
        shape = {
            "mask": (entries, *part.shape[-2:]),
            "along rows": (entries, rows, part.shape[-1]),
            "across rows": (entries, part.shape[view.first], columns),
        }[view.layout]
        return part.reshape(shape)

    values = sparse.values.data if packed else unpacked(sparse.values)
    if not isinstance(leaf, QuantizedArray):
        return (stacked(values), stacked(bits), starts), (None, None), storage
    leaf = leaf if _is_cut_evenly(leaf, view) else leaf.with_whole_blocks()
    if leaf.levels is not None and not packed:
        values = jnp.asarray(leaf.levels, jnp.float32)[values.astype(jnp.int32)]
    scale, scale_block = _blocks(leaf, view, leaf.scale)
    zero, zero_block = None, (1, 1)
    if not leaf.plain_zeros():
        # Without zero points of its own, a table has 0 for all: what is not stored is to be 0 whatever code 0 is.
        none = jnp.zeros((1,) * leaf.ndim, jnp.float32)
        zero, zero_block = _blocks(leaf, view, none if leaf.zero_point is None else leaf.zero_points())
    levels = leaf.levels if packed else None
    storage = dataclasses.replace(storage, levels=levels, scale_block=scale_block, zero_block=zero_block)
    return (stacked(values), stacked(bits), starts), (scale, zero), storage


def _is_cut_evenly(leaf: QuantizedArray, view: _View) -> bool:
    """Whether partial blocks, if there are any, lie along rows, or along columns that are one axis."""
    rows = view.first - leaf.ndim
    return leaf.partial is None or leaf.partial[0] == rows or (rows, leaf.partial[0]) == (-2, -1)


def _blocks(leaf: QuantizedArray, view: _View, parameter: Any) -> tuple[Float[Array, "E H W"], tuple[int, int]]:
    """Scales or zero points by entries, blocks of rows and blocks of columns; and the sizes of those blocks."""
    parameter = parameter if parameter.dtype == jnp.bfloat16 else parameter.astype(jnp.float32)
    first = view.first
    for axis, size in enumerate(leaf.shape):
        # Entries have numbers of their own; so have columns that are several axes, unless all of a row share one.
        is_entry = axis < first
        is_column = axis > first and leaf.ndim - first > 2 and any(n > 1 for n in parameter.shape[first + 1 :])
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


SPARSE = Kernel(
    name="native_sparse",
    platform="cpu",
    multiply=_multiply_few,
    why_not=_why_not_few,
    error="the order of float32 sums",
    missing=library.why_missing,
)
EXPANSION = Kernel(
    name="native_expansion",
    platform="cpu",
    multiply=_multiply,
    why_not=_why_not,
    error="none",
    missing=library.why_missing,
)
