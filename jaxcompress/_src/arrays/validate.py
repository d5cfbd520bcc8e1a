"""The invariants of compressed arrays, checked on concrete values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.additive import AdditiveCodebookArray
from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.codebook import CodebookArray
from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.arrays.n_of_m import NMSparseArray
from jaxcompress._src.arrays.packed import PackedArray, codes_per_block
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.meshes import on_auto_axes


@on_auto_axes
def validate_array(leaf: Any) -> None:
    """Checks the invariants that the docstrings of the compressed arrays state; plain arrays pass.

    Args:
        leaf: concrete.

    Raises:
        ValueError: an invariant is broken; says which.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress._src.arrays.validate import validate_array
        >>> from jaxcompress.arrays import QuantizedArray
        >>> codes, scale = jnp.ones((4, 2), "int8"), jnp.ones((3, 2))
        >>> validate_array(QuantizedArray(data=codes, scale=scale, dtype=jnp.dtype("float32")))
        Traceback (most recent call last):
        ValueError: Scales of shape (3, 2) do not divide codes of shape (4, 2).
    """
    if isinstance(leaf, PackedArray):
        _validate_packed(leaf)
    elif isinstance(leaf, NMSparseArray):
        _validate_n_of_m(leaf)
    elif isinstance(leaf, BitmaskSparseArray):
        _validate_bitmask(leaf)
    elif isinstance(leaf, QuantizedArray):
        _validate_quantized(leaf)
    elif isinstance(leaf, CodebookArray):
        _validate_codebook(leaf)
    elif isinstance(leaf, AdditiveCodebookArray):
        _validate_additive(leaf)
    elif isinstance(leaf, LowRankArray):
        _validate_low_rank(leaf)
    elif isinstance(leaf, InputQuantizedArray):
        _validate_input_quantized(leaf)


def _require(holds: Any, message: str) -> None:
    if not bool(holds):
        raise ValueError(message)


def _finite(part: jax.Array) -> bool:
    # On the host: nothing is compiled for the shape of each leaf.
    return bool(np.isfinite(np.asarray(part)).all())


def _validate_packed(leaf: PackedArray) -> None:
    _require(1 <= leaf.bits <= 7, f"Packed codes have 1 to 7 bits, got {leaf.bits}.")
    _require(-leaf.ndim <= leaf.axis < 0, f"The packed axis is negative and in range, got {leaf.axis} of {leaf.ndim}.")
    _require(leaf.data.dtype == jnp.uint8, f"Packed codes are uint8, got {leaf.data.dtype}.")
    block = codes_per_block(leaf.bits)
    expected = -(-leaf.width // block) * block * leaf.bits // 8
    found = leaf.data.shape[leaf.axis]
    _require(found == expected, f"{leaf.width} codes of {leaf.bits} bits fill {expected} bytes, got {found}.")


def _validate_n_of_m(leaf: NMSparseArray) -> None:
    kept, run = leaf.pattern
    _require(1 <= kept <= run, f"The pattern (N, M) needs 1 <= N <= M, got {leaf.pattern}.")
    _require(leaf.values.shape == leaf.index.shape, f"Values {leaf.values.shape} and places {leaf.index.shape} differ.")
    stored = -(-leaf.width // run) * kept
    found = leaf.values.shape[leaf.axis]
    _require(found == stored, f"{leaf.width} entries of pattern {kept}:{run} store {stored} values, got {found}.")
    places = np.moveaxis(np.asarray(leaf.index.materialize()), leaf.axis, -1).reshape(-1, kept).astype(int)
    _require((places < run).all(), f"Places must be below {run}.")
    _require((np.diff(places, axis=-1) > 0).all(), "The places of one run must be distinct and ascending.")
    for part in (leaf.values, leaf.index):
        validate_array(part)


def _validate_bitmask(leaf: BitmaskSparseArray) -> None:
    rows, columns = leaf.index.shape[-2:]
    shards, longest = leaf.values.shape[-2:]
    _require(
        columns == np.prod(leaf.row_shape, dtype=int), f"Rows of shape {leaf.row_shape} do not have {columns} columns."
    )
    _require(leaf.starts.shape == leaf.index.shape[:-1], f"One start per row is needed, got {leaf.starts.shape}.")
    _require(rows % shards == 0, f"{shards} shards do not divide {rows} rows.")
    counts = np.asarray(leaf.index.materialize()).sum(-1, dtype=np.int64)
    counts = counts.reshape(*counts.shape[:-1], shards, rows // shards)
    starts = (np.cumsum(counts, -1) - counts).reshape(leaf.starts.shape)
    _require((starts == np.asarray(leaf.starts)).all(), "The starts do not count the mask.")
    _require((counts.sum(-1) <= longest).all(), f"The mask keeps more values than the {longest} stored.")
    for part in (leaf.values, leaf.index):
        validate_array(part)


def _validate_quantized(leaf: QuantizedArray) -> None:
    sizes = list(leaf.shape)
    if leaf.partial is not None:
        axis, size = leaf.partial
        _require(-leaf.ndim <= axis < 0 < size, f"Partial blocks are (negative axis, size), got {leaf.partial}.")
        found, sizes[axis] = leaf.scale.shape[axis], -(-sizes[axis] // size)
        needed = f"{leaf.shape[axis]} entries in blocks of {size} need {sizes[axis]} scales"
        _require(found == sizes[axis], f"{needed}, got {found}.")
    divides = len(leaf.scale.shape) == leaf.ndim and all(
        n % s == 0 if s else n == 0 for n, s in zip(sizes, leaf.scale.shape, strict=True)
    )
    _require(divides, f"Scales of shape {leaf.scale.shape} do not divide codes of shape {leaf.shape}.")
    if leaf.zero_point is not None:
        sizes = zip(leaf.zero_point.shape, leaf.scale.shape, strict=True)
        shapes = f"zero points {leaf.zero_point.shape}, scales {leaf.scale.shape}"
        _require(all(z in (1, s) for z, s in sizes), f"Zero points have the size of the scales or 1: {shapes}.")
        _require(leaf.zero_point.dtype != jnp.int8, "Packed zero points are unsigned.")
        validate_array(leaf.zero_point)
    _require(jnp.issubdtype(leaf.dtype, jnp.floating), f"The logical dtype is a float, got {leaf.dtype}.")
    floats = [
        part for part in jax.tree.leaves((leaf.scale, leaf.zero_point)) if jnp.issubdtype(part.dtype, jnp.floating)
    ]
    _require(all(_finite(part) for part in floats), "Scales and zero points must be finite.")
    if leaf.levels is not None:
        _require(leaf.zero_point is None, "A table of levels has no zero point.")
        largest = int(np.asarray(leaf.codes()).max(initial=0))
        _require(largest < len(leaf.levels), f"A code exceeds the {len(leaf.levels)} levels.")
    validate_array(leaf.data)


def _validate_codebook(leaf: CodebookArray) -> None:
    blocks, entries = leaf.table.shape[:-1], leaf.table.shape[-1]
    divides = len(blocks) == leaf.ndim and all(
        n % s == 0 if s else n == 0 for n, s in zip(leaf.shape, blocks, strict=True)
    )
    _require(divides, f"Tables of shape {leaf.table.shape} do not divide codes of shape {leaf.shape}.")
    _require(leaf.zero or not isinstance(leaf.data, SparseArray), "Codes that are left out need `zero`.")
    _validate_codes(leaf, entries + leaf.zero)


def _validate_additive(leaf: AdditiveCodebookArray) -> None:
    _require(-leaf.ndim <= leaf.axis < 0, f"The axis of runs is negative and in range, got {leaf.axis} of {leaf.ndim}.")
    *blocks, count, values, length = leaf.table.shape
    runs = leaf.data.shape[leaf.axis - 1]
    _require(runs == -(-leaf.width // length), f"{leaf.width} weights are not {runs} runs of {length}.")
    _require(leaf.data.shape[-1] == count, f"Each run has {leaf.data.shape[-1]} codes for {count} tables.")
    own = list(leaf.shape)
    own[leaf.axis] = 1
    for name, sizes in (("Tables", blocks), ("Scales", () if leaf.scale is None else leaf.scale.shape)):
        fit = len(sizes) == leaf.ndim and all(s in (1, n) for s, n in zip(sizes, own, strict=True))
        absent = name == "Scales" and leaf.scale is None
        _require(fit or absent, f"{name} of shape {tuple(sizes)} do not fit an array of shape {leaf.shape}.")
    _require(leaf.scale is None or _finite(leaf.scale), "Scales must be finite.")
    _validate_codes(leaf, values)


def _validate_codes(leaf: CodebookArray | AdditiveCodebookArray, values: int) -> None:
    _require(jnp.issubdtype(leaf.dtype, jnp.floating), f"The logical dtype is a float, got {leaf.dtype}.")
    _require(_finite(leaf.table), "The values of a table must be finite.")
    codes = leaf.codes()
    _require(codes.dtype == jnp.uint8, f"Codes are unsigned, got {codes.dtype}.")
    _require(int(np.asarray(codes).max(initial=0)) < values, f"A code exceeds the {values} values.")
    validate_array(leaf.data)


def _validate_low_rank(leaf: LowRankArray) -> None:
    left, right = tuple(leaf.left.shape), tuple(leaf.right.shape)
    fit = (
        len(left) == len(right)
        and left[-1:] == right[-1:]
        and all(n == m or 1 in (n, m) for n, m in zip(left[:-1], right[:-1], strict=True))
    )
    _require(fit, f"The factors {left} and {right} need equal ranks, and equal sizes or 1 on all other axes.")
    parts = [part for part in (leaf.left, leaf.right, leaf.residual) if part is not None]
    dtypes = [leaf.dtype, *(part.dtype for part in parts)]
    _require(all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes), f"All dtypes are floats, got {dtypes}.")
    if leaf.residual is not None:
        _require(
            tuple(leaf.residual.shape) == leaf.shape and leaf.residual.dtype == leaf.dtype,
            f"The residual is {leaf.residual.dtype}{tuple(leaf.residual.shape)}, the array {leaf.dtype}{leaf.shape}.",
        )
    for part in parts:
        validate_array(part)


def _validate_input_quantized(leaf: InputQuantizedArray) -> None:
    if leaf.scale is not None:
        stacked = leaf.shape[: leaf.scale.ndim]
        _require(leaf.scale.shape == stacked, f"Input scales of shape {leaf.scale.shape}, stacked axes {stacked}.")
        positive = (np.asarray(leaf.scale) > 0).all()
        _require(positive and _finite(leaf.scale), "Input scales must be positive and finite.")
    shapes = [None if part is None else part.shape for part in (leaf.scale, leaf.zero_point)]
    _require(shapes[1] in (None, shapes[0]), f"Input scales and zero points of shapes {shapes} differ.")
    validate_array(leaf.weight)
