"""Weights under a bit mask, written out with their zeros by the compiled CPU kernels, as a JAX function.

As the products in `matmul.py`, it is a `custom_jvp` around a `custom_vmap` around a `custom_partitioning` around the
foreign call.

Shapes: E entries of a stack, R rows, C columns, S runs of rows, V stored values of each run, H and W blocks of rows and
of columns.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int32, Shaped, UInt8

from jaxcompress._src.arrays.bitmask import BitmaskSparseArray
from jaxcompress._src.arrays.packed import PackedArray
from jaxcompress._src.execution.kernels.native import library
from jaxcompress._src.execution.kernels.native.exported import unless_exported
from jaxcompress._src.execution.kernels.native.placement import partitioned_rows
from jaxcompress._src.meshes import varying, varying_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitmaskFormat:
    """How weights are stored; static.

    Attributes:
        columns: of a row.
        packed: whether values are codes of 4 bits, two to a byte, the even one in the low nibble.
        signed: whether those are signed (two's complement).
        levels: what they stand for, or None: for themselves.
        scale_block: rows and columns that share a scale; the last block may be smaller.
        zero_block: rows and columns that share a zero point.
    """

    columns: int
    packed: bool = False
    signed: bool = True
    levels: tuple[float, ...] | None = None
    scale_block: tuple[int, int] = (1, 1)
    zero_block: tuple[int, int] = (1, 1)

    def __post_init__(self):
        """Checks the fields."""
        if self.levels is not None and (not self.packed or len(self.levels) > 16):
            raise ValueError(f"`levels` are at most 16, for codes of 4 bits, got {len(self.levels)}.")


def expand_bitmask(
    values: Shaped[Array, "E S V"],
    bits: UInt8[Array, "E R B"],
    starts: Int32[Array, "E R"],
    ready: Float[Array, ""],
    scale: Float[Array, "E H W"] | None = None,
    zero: Float[Array, "E I X"] | None = None,
    *,
    storage: BitmaskFormat,
) -> Float[Array, "E R C"]:
    """The plain weights: `(value - zero) * scale` where the mask is set, else 0; values as they are without scales.

    Equal to `plain_expand_bitmask` bit for bit. Works under `jit`, `vmap`, `scan`, forward and reverse derivatives (of
    float values, scales and zero points), and on sharded arrays: entries and runs of rows stay where they are.

    Args:
        values: float32, bfloat16 or float16; with scales, float32 or codes: int8, uint8, or packed.
        bits: one for each column, eight to a byte, the lowest first.
        starts: where the values of each row begin among those of its run.
        ready: what the weights are to wait for; its value must be 0.
        scale: for each block of rows and columns.
        zero: of codes. Without it, what is not stored is 0 times the scale; with it, 0.
        storage: how they are stored.

    Returns:
        Of the dtype of the values; float32 with scales.
    """
    return _expand(storage, values, bits, starts, ready, scale, zero)


def plain_expand_bitmask(
    values: Shaped[Array, "E S V"],
    bits: UInt8[Array, "E R B"],
    starts: Int32[Array, "E R"],
    ready: Float[Array, ""],
    scale: Float[Array, "E H W"] | None = None,
    zero: Float[Array, "E I X"] | None = None,
    *,
    storage: BitmaskFormat,
) -> Float[Array, "E R C"]:
    """What `expand_bitmask` computes, in plain JAX: its derivatives, and what exported programs hold.

    Args:
        values: as for `expand_bitmask`.
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
    index = PackedArray(data=bits, bits=1, signed=False, axis=-1, width=storage.columns)
    stored: Any = values
    if storage.packed:
        stored = PackedArray(data=values, bits=4, signed=storage.signed, axis=-1, width=2 * values.shape[-1])
    sparse = BitmaskSparseArray(
        values=stored, index=index, starts=starts + ready.astype(starts.dtype), row_shape=(storage.columns,)
    )
    if scale is None:
        return sparse.materialize()
    shape, codes = sparse.shape, sparse.materialize()
    levels = storage.levels
    wide = codes.astype(jnp.float32) if levels is None else jnp.asarray(levels, jnp.float32)[codes.astype(jnp.int32)]
    if zero is None:
        return wide * _spread(scale, storage.scale_block, shape)
    wide = (wide - _spread(zero, storage.zero_block, shape)) * _spread(scale, storage.scale_block, shape)
    return jnp.where(sparse.mask(), wide, jnp.zeros((), wide.dtype))


def _spread(parameter: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """One number for every row and column of each entry; axes with one number stay."""
    for axis, size in zip((1, 2), block, strict=True):
        if parameter.shape[axis] not in (1, shape[axis]):
            repeated = jnp.repeat(parameter, size, axis=axis)
            parameter = jax.lax.slice_in_dim(repeated, 0, shape[axis], axis=axis)
    return parameter


# ---- derivatives: those of the plain expansion


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _expand(
    storage: BitmaskFormat, values: Array, bits: Array, starts: Array, ready: Array, scale: Any, zero: Any
) -> Array:
    operands = tuple(part for part in (values, bits, starts, ready, scale, zero) if part is not None)
    return varying(_batched(storage)(*operands), varying_axes(operands))


@functools.partial(_expand.defjvp, symbolic_zeros=True)
def _expand_jvp(storage: BitmaskFormat, primals: Any, tangents: Any) -> tuple[Array, Any]:
    weights = _expand(storage, *primals)
    names = ("values", "bits", "starts", "ready", "scale", "zero")
    parts: dict[str, Any] = dict(zip(names, primals, strict=True))
    varied = {
        name: tangent
        for name, tangent in zip(names, tangents, strict=True)
        if name in ("values", "scale", "zero")
        and parts[name] is not None
        and jnp.issubdtype(parts[name].dtype, jnp.floating)
        and not isinstance(tangent, SymbolicZero)
    }
    if not varied:
        return weights, jnp.zeros_like(weights)

    def plain(*floats: Array) -> Array:
        return plain_expand_bitmask(**(parts | dict(zip(varied, floats, strict=True))), storage=storage)

    _, tangent = jax.jvp(plain, tuple(parts[name] for name in varied), tuple(varied.values()))
    return weights, tangent


# ---- batches, devices, the foreign call


@functools.cache
def _batched(storage: BitmaskFormat) -> Callable[..., Array]:
    call = functools.partial(_call, storage)
    expansion = unless_exported(partitioned_rows(call), functools.partial(plain_expand_bitmask, storage=storage))

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


def _call(storage: BitmaskFormat, values: Array, bits: Array, starts: Array, ready: Array, *parameters: Array) -> Array:
    dtype = jnp.float32 if parameters else values.dtype
    call = jax.ffi.ffi_call(library.EXPAND, jax.ShapeDtypeStruct((*bits.shape[:2], storage.columns), dtype))
    table = np.arange(16, dtype=np.float32)
    if storage.signed:
        table = np.where(table < 8, table, table - 16).astype(np.float32)
    if storage.levels is not None:
        table = np.pad(np.asarray(storage.levels, np.float32), (0, 16 - len(storage.levels)))
    return call(
        *(values, bits, starts, ready, *parameters),
        packed=np.int32(storage.packed),
        block_sizes=np.asarray((*storage.scale_block, *storage.zero_block), np.int32),
        table=table,
    )
