"""Weights of which only some are stored, by the compiled CPU kernels, as JAX functions: written out, or multiplied.

As the products in `matmul.py`, each is a `custom_jvp` around a `custom_vmap` around a `custom_partitioning` around the
foreign call.

Shapes: E entries of a stack, R rows, C columns, H and W blocks of rows and of columns. Values: "E S V", bits: "E P B".
Under a mask, S is runs of rows with V stored values each, P is R, and B bytes of C bits. By places along rows, S and P
are R, V and B what is stored of a row; by places across rows, V and B are C, S and P what is stored of a column.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int32, Shaped, UInt8

from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.n_of_m import NMSparseArray
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.execution.kernels.native import library
from jaxcompress._src.execution.kernels.native.expand_placement import partitioned_expansion, partitioned_sparse_product
from jaxcompress._src.execution.kernels.native.exported import unless_exported
from jaxcompress._src.execution.kernels.native.placement import with_rows_merged
from jaxcompress._src.execution.kernels.ordering import known_when_ready
from jaxcompress._src.meshes import varying, varying_axes

Layout = Literal["mask", "along rows", "across rows"]

_LAYOUTS: tuple[Layout, ...] = ("mask", "along rows", "across rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseFormat:
    """How weights are stored; static.

    Attributes:
        rows: of an entry.
        columns: of a row.
        layout: whether a mask says what is stored, or places in runs along each row, or in runs of rows.
        pattern: (N, M): N places in each run of M, at most 256; None under a mask.
        place_bits: of a place: 1, 2, 4 or 8; those below 8 are packed, the lowest first.
        packed: whether values are codes of 4 bits, two to a byte, the even one in the low nibble.
        signed: whether those are signed (two's complement).
        levels: what they stand for, or None: for themselves.
        scale_block: rows and columns that share a scale; the last block may be smaller.
        zero_block: rows and columns that share a zero point.
    """

    rows: int
    columns: int
    layout: Layout = "mask"
    pattern: tuple[int, int] | None = None
    place_bits: int = 8
    packed: bool = False
    signed: bool = True
    levels: tuple[float, ...] | None = None
    scale_block: tuple[int, int] = (1, 1)
    zero_block: tuple[int, int] = (1, 1)

    def __post_init__(self):
        """Checks the fields."""
        if self.levels is not None and (not self.packed or len(self.levels) > 16):
            raise ValueError(f"`levels` are at most 16, for codes of 4 bits, got {len(self.levels)}.")
        if (self.layout == "mask") != (self.pattern is None):
            raise ValueError(f"`pattern` goes with places and not with a mask, got {self.pattern} for {self.layout}.")
        if self.pattern is not None and not 1 <= self.pattern[0] <= self.pattern[1] <= 256:
            raise ValueError(f"`pattern` (N, M) needs 1 <= N <= M <= 256, got {self.pattern}.")
        if self.place_bits not in (1, 2, 4, 8):
            raise ValueError(f"`place_bits` must be 1, 2, 4 or 8, got {self.place_bits}.")

    def slots(self, size: int) -> int:
        """Values of a row or column of `size` entries, by places."""
        if self.pattern is None:
            raise ValueError("Under a mask, rows store any number of values.")
        return -(-size // self.pattern[1]) * self.pattern[0]


def expand_sparse(
    values: Shaped[Array, "E S V"],
    bits: UInt8[Array, "E P B"],
    starts: Int32[Array, "E R"] | None,
    ready: Float[Array, ""],
    scale: Float[Array, "E H W"] | None = None,
    zero: Float[Array, "E I X"] | None = None,
    *,
    storage: SparseFormat,
) -> Float[Array, "E R C"]:
    """The plain weights: `(value - zero) * scale` where they are stored, else 0; values as they are without scales.

    Equal to `plain_expand_sparse` bit for bit. Works under `jit`, `vmap`, `scan`, forward and reverse derivatives (of
    float values, scales and zero points), and on sharded arrays: entries, runs of rows and, across rows, columns stay
    where they are.

    Args:
        values: float32, bfloat16 or float16; with scales, float32 or codes: int8, uint8, or packed.
        bits: one for each column, eight to a byte, the lowest first; or places in runs.
        starts: where the values of each row begin among those of its run, under a mask; else None.
        ready: what the weights are to wait for; its value must be 0.
        scale: for each block of rows and columns; float32 or bfloat16, as `zero`.
        zero: of codes. Without it, what is not stored is 0 times the scale; with it, 0.
        storage: how they are stored.

    Returns:
        Of the dtype of the values; float32 with scales.
    """
    return _expand(storage, values, bits, starts, ready, scale, zero)


def sparse_matmul(
    x: Float[Array, "n in"],
    values: Shaped[Array, "1 S V"],
    bits: UInt8[Array, "1 P B"],
    starts: Int32[Array, "1 R"] | None = None,
    scale: Float[Array, "1 H W"] | None = None,
    zero: Float[Array, "1 I X"] | None = None,
    *,
    storage: SparseFormat,
    sums_columns: bool = False,
) -> Float[Array, "n out"]:
    """Few rows times the plain weights, which are written out piece by piece into the first caches.

    y[m, c] = Σ_r x[m, r] w[r, c], or y[m, r] = Σ_c x[m, c] w[r, c] if `sums_columns`

    in float32: the product with the plain weights but for the order of the sums. Transformed as `expand_sparse` is;
    batches of x are more rows.

    Args:
        x: float32.
        values: float32 or codes, of one entry.
        bits: as for `expand_sparse`.
        starts: of that function, too.
        scale: of that function, too.
        zero: of that function, too.
        storage: how the weights are stored.
        sums_columns: whether sums run over the columns.

    Returns:
        y, float32.
    """
    return _matmul(storage, sums_columns, x, values, bits, starts, scale, zero)


def plain_expand_sparse(
    values: Shaped[Array, "E S V"],
    bits: UInt8[Array, "E P B"],
    starts: Int32[Array, "E R"] | None,
    ready: Float[Array, ""],
    scale: Float[Array, "E H W"] | None = None,
    zero: Float[Array, "E I X"] | None = None,
    *,
    storage: SparseFormat,
) -> Float[Array, "E R C"]:
    """What `expand_sparse` computes, in plain JAX: its derivatives, and what exported programs hold.

    Args:
        values: as for `expand_sparse`.
        bits: of that function, too.
        starts: of that function, too.
        ready: of that function, too.
        scale: of that function, too.
        zero: of that function, too.
        storage: how they are stored.

    Returns:
        The plain weights.
    """
    bits = bits + ready.astype(bits.dtype)
    sparse: Any
    if storage.layout == "mask":
        index = PackedArray(data=bits, bits=1, signed=False, axis=-1, width=storage.columns)
        assert starts is not None
        stored = _stored(values, storage, -1, 2 * values.shape[-1])
        starts = starts + ready.astype(starts.dtype)
        sparse = BitmaskSparseArray(values=stored, index=index, starts=starts, row_shape=(storage.columns,))
    else:
        axis, size = (-1, storage.columns) if storage.layout == "along rows" else (-2, storage.rows)
        slots = storage.slots(size)
        stored = _stored(values, storage, axis, slots)
        places: Any = jax.lax.slice_in_dim(bits, 0, slots, axis=bits.ndim + axis) if storage.place_bits == 8 else bits
        if storage.place_bits < 8:
            places = PackedArray(data=bits, bits=storage.place_bits, signed=False, axis=axis, width=slots)
        assert storage.pattern is not None
        sparse = NMSparseArray(values=stored, index=places, pattern=storage.pattern, axis=axis, width=size)
    if scale is None:
        return sparse.materialize()
    shape, codes = sparse.shape, sparse.materialize()
    levels = storage.levels
    wide = codes.astype(jnp.float32) if levels is None else jnp.asarray(levels, jnp.float32)[codes.astype(jnp.int32)]
    if zero is None:
        return wide * _spread(scale, storage.scale_block, shape)
    wide = (wide - _spread(zero, storage.zero_block, shape)) * _spread(scale, storage.scale_block, shape)
    return jnp.where(sparse.mask(), wide, jnp.zeros((), wide.dtype))


def _stored(values: Array, storage: SparseFormat, axis: int, width: int) -> Any:
    if storage.packed:
        return PackedArray(data=values, bits=4, signed=storage.signed, axis=axis, width=width)
    return values


def _spread(parameter: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """One number for every row and column of each entry; axes with one number stay."""
    parameter = parameter.astype(jnp.float32)
    for axis, size in zip((1, 2), block, strict=True):
        if parameter.shape[axis] not in (1, shape[axis]):
            repeated = jnp.repeat(parameter, size, axis=axis)
            parameter = jax.lax.slice_in_dim(repeated, 0, shape[axis], axis=axis)
    return parameter


def _product(x: Array, weights: Array, sums_columns: bool) -> Array:
    dimensions = (((1,), (1 if sums_columns else 0,)), ((), ()))
    return jax.lax.dot_general(x, weights[0], dimensions, precision=jax.lax.Precision.HIGHEST)


# ---- derivatives: those of the plain expansion


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _expand(
    storage: SparseFormat, values: Array, bits: Array, starts: Any, ready: Array, scale: Any, zero: Any
) -> Array:
    operands = tuple(part for part in (values, bits, starts, ready, scale, zero) if part is not None)
    return varying(_batched(storage)(*operands), varying_axes(operands))


@functools.partial(_expand.defjvp, symbolic_zeros=True)
def _expand_jvp(storage: SparseFormat, primals: Any, tangents: Any) -> tuple[Array, Any]:
    weights = _expand(storage, *primals)
    names = ("values", "bits", "starts", "ready", "scale", "zero")
    parts: dict[str, Any] = dict(zip(names, primals, strict=True))
    varied = _varied(("values", "scale", "zero"), names, primals, tangents)
    if not varied:
        return weights, jnp.zeros_like(weights)

    def plain(*floats: Array) -> Array:
        return plain_expand_sparse(**(parts | dict(zip(varied, floats, strict=True))), storage=storage)

    _, tangent = jax.jvp(plain, tuple(parts[name] for name in varied), tuple(varied.values()))
    return weights, tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _matmul(
    storage: SparseFormat, sums_columns: bool, x: Array, values: Array, bits: Array, starts: Any, scale: Any, zero: Any
) -> Array:
    operands = tuple(part for part in (x, values, bits, starts, scale, zero) if part is not None)
    return varying(_batched_matmul(storage, sums_columns)(*operands), varying_axes(operands))


@functools.partial(_matmul.defjvp, symbolic_zeros=True)
def _matmul_jvp(storage: SparseFormat, sums_columns: bool, primals: Any, tangents: Any) -> tuple[Array, Any]:
    y = _matmul(storage, sums_columns, *primals)
    names = ("x", "values", "bits", "starts", "scale", "zero")
    parts: dict[str, Any] = dict(zip(names, primals, strict=True))
    varied = _varied(("x", "values", "scale", "zero"), names, primals, tangents)
    if not varied:
        return y, jnp.zeros_like(y)

    def expanded(*floats: Array) -> Array:
        whole = parts | dict(zip(varied, floats, strict=True))
        x = whole.pop("x")
        return _product(x, expand_sparse(**whole, ready=known_when_ready(x), storage=storage), sums_columns)

    _, tangent = jax.jvp(expanded, tuple(parts[name] for name in varied), tuple(varied.values()))
    return y, tangent


def _varied(
    candidates: Sequence[str], names: Sequence[str], primals: Sequence[Any], tangents: Sequence[Any]
) -> dict[str, Any]:
    """Tangents by name, of floats that have one."""
    return {
        name: tangent
        for name, primal, tangent in zip(names, primals, tangents, strict=True)
        if name in candidates
        and primal is not None
        and jnp.issubdtype(primal.dtype, jnp.floating)
        and not isinstance(tangent, SymbolicZero)
    }


# ---- batches, devices, the foreign calls


@functools.cache
def _batched(storage: SparseFormat) -> Callable[..., Array]:
    call = functools.partial(_call, storage)
    plain = functools.partial(_plain_expansion, storage)
    expansion = unless_exported(partitioned_expansion(call, storage), plain)

    @jax.custom_batching.custom_vmap
    def batched(*operands: Array) -> Array:
        return expansion(*operands)

    @batched.def_vmap
    def rule(size: int, is_batched: Sequence[bool], *operands: Array) -> tuple[Array, bool]:
        """Entries of a batch are entries of a stack."""

        def stacked(part: Array, is_in: bool) -> Array:
            if part.ndim == is_in:
                # What is waited for; its value is 0.
                return part.sum() if is_in else part
            whole = part if is_in else jnp.broadcast_to(part, (size, *part.shape))
            return whole.reshape(size * whole.shape[1], *whole.shape[2:])

        weights = batched(*map(stacked, operands, is_batched))
        return weights.reshape(size, operands[0].shape[is_batched[0]], *weights.shape[1:]), True

    return batched


@functools.cache
def _batched_matmul(storage: SparseFormat, sums_columns: bool) -> Callable[..., Array]:
    call = functools.partial(_call_matmul, storage, sums_columns)

    def plain(x: Array, *parts: Array) -> Array:
        at = 3 if storage.layout == "mask" else 2
        operands = (*parts[:at], jnp.zeros((), jnp.float32), *parts[at:])
        return _product(x, _plain_expansion(storage, *operands), sums_columns)

    return with_rows_merged(unless_exported(partitioned_sparse_product(call, storage, sums_columns), plain))


def _plain_expansion(storage: SparseFormat, values: Array, bits: Array, *rest: Array) -> Array:
    starts, ready, *parameters = rest if storage.layout == "mask" else (None, *rest)
    return plain_expand_sparse(values, bits, starts, ready, *parameters, storage=storage)


def _call(storage: SparseFormat, values: Array, bits: Array, *rest: Array) -> Array:
    """Of what one device has."""
    has_scale = len(rest) > (2 if storage.layout == "mask" else 1)
    rows, columns = local_sizes(storage, values, bits)
    result = jax.ShapeDtypeStruct((bits.shape[0], rows, columns), jnp.float32 if has_scale else values.dtype)
    return jax.ffi.ffi_call(library.EXPAND, result)(values, bits, *rest, **_attributes(storage))


def _call_matmul(
    storage: SparseFormat, sums_columns: bool, x: Array, values: Array, bits: Array, *rest: Array
) -> Array:
    rows, columns = local_sizes(storage, values, bits)
    result = jax.ShapeDtypeStruct((x.shape[0], rows if sums_columns else columns), jnp.float32)
    call = jax.ffi.ffi_call(library.SPARSE_PRODUCT, result)
    return call(x, values, bits, *rest, sums_columns=np.int32(sums_columns), **_attributes(storage))


def local_sizes(storage: SparseFormat, values: Array, bits: Array) -> tuple[int, int]:
    """Rows and columns of a share of the weights.

    Args:
        storage: of the whole.
        values: of the share; by places across rows, whole runs.
        bits: of the share.
    """
    if storage.layout != "across rows":
        return bits.shape[1], storage.columns
    assert storage.pattern is not None
    slots = values.shape[1] * (2 if storage.packed else 1)
    return min(storage.rows, slots // storage.pattern[0] * storage.pattern[1]), bits.shape[2]


def _attributes(storage: SparseFormat) -> dict[str, Any]:
    table = np.arange(16, dtype=np.float32)
    if storage.signed:
        table = np.where(table < 8, table, table - 16).astype(np.float32)
    if storage.levels is not None:
        table = np.pad(np.asarray(storage.levels, np.float32), (0, 16 - len(storage.levels)))
    return {
        "packed": np.int32(storage.packed),
        "layout": np.asarray(
            (_LAYOUTS.index(storage.layout), *(storage.pattern or (0, 0)), storage.place_bits), np.int32
        ),
        "block_sizes": np.asarray((*storage.scale_block, *storage.zero_block), np.int32),
        "table": table,
    }
