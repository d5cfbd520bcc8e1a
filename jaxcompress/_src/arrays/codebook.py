"""Codes that point into a table of shared values."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Integer

from jaxcompress._src.arrays.coded import CodedArray, describe_codes, take_code_rows, take_parameter_rows
from jaxcompress._src.arrays.protocol import array_kind
from jaxcompress._src.arrays.quantized import is_split, split_blocks
from jaxcompress._src.arrays.sharding import component_shardings
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.arrays.static_fields import BOOL, DTYPE
from jaxcompress._src.arrays.validate import is_finite, require, validate_array
from jaxcompress._src.meshes import on_auto_axes


@array_kind(dtype=DTYPE, zero=BOOL)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CodebookArray(CodedArray):
    """Codes, and the table of the values that they stand for.

    Invariant: `original ≈ table[block, codes]`; with `zero`, code 0 stands for exactly 0 and has no entry:
    `original ≈ (0 if codes == 0 else table[block, codes - 1])`. The axes of `table` but the last are those of the
    array; its size on each of them divides the array's, and each of its entries belongs to one block: size 1 on all
    axes is one table for the leaf, the size of the array on a stacked axis one for each copy, on an output axis one for
    each channel. Codes are below the number of values.

    Attributes:
        data: the codes: uint8, an unsigned `PackedArray`, or, with `zero`, a sparse array of either that leaves out
            code 0.
        table: float32 or bfloat16, (*blocks, entries).
        dtype: logical dtype.
        zero: whether code 0 stands for 0, whatever the table holds: what is pruned stays pruned while a table is
            trained.
    """

    data: Any
    table: Any
    dtype: jnp.dtype
    zero: bool = False

    @on_auto_axes
    def materialize(self) -> jax.Array:
        """The plain array, of the logical shape and dtype."""
        return look_up(self.codes(), self.table, zero=self.zero, dtype=self.dtype)

    @on_auto_axes
    def take_rows(self, rows: Integer[Array, "..."]) -> jax.Array:
        """`materialize()[rows]`, looking up those rows only; `rows` index the first axis and must be in range."""
        sparse = isinstance(self.data, SparseArray)
        codes = self.data.take_rows(rows) if sparse else take_code_rows(self.data, rows)
        table = take_parameter_rows(self.table, rows, self.shape[0])
        plain = look_up(codes.reshape(-1, *self.shape[1:]), table, zero=self.zero, dtype=self.dtype)
        return plain.reshape(*rows.shape, *self.shape[1:])

    def block_parts(self) -> list[Any]:
        """The tables, without the axis of their entries."""
        return [jax.ShapeDtypeStruct(self.table.shape[:-1], self.table.dtype)]

    def with_parts(self, data: Any, move: Callable[[Any], Any]) -> "CodebookArray":
        """The array with other codes, and moved tables, whose entries stay along the last axis."""
        return dataclasses.replace(self, data=data, table=jax.vmap(move, in_axes=-1, out_axes=-1)(self.table))

    def shardings(self, sharding: NamedSharding) -> Any:
        """Whole blocks on every device."""
        data, table = component_shardings(self.data, sharding), component_shardings(self.table, sharding)
        return dataclasses.replace(self, data=data, table=table)

    def describe(self) -> str:
        """Such as `16 values uint4 bitmask`."""
        words = [f"{self.table.shape[-1] + self.zero} values", *describe_codes(self.data)]
        return " ".join(word for word in words if word)

    def validate(self) -> None:
        """Checks the invariants."""
        blocks, entries = self.table.shape[:-1], self.table.shape[-1]
        divides = len(blocks) == self.ndim and all(
            n % s == 0 if s else n == 0 for n, s in zip(self.shape, blocks, strict=True)
        )
        require(divides, f"Tables of shape {self.table.shape} do not divide codes of shape {self.shape}.")
        require(self.zero or not isinstance(self.data, SparseArray), "Codes that are left out need `zero`.")
        validate_codes(self, entries + self.zero)


def validate_codes(leaf: Any, count: int) -> None:
    """Checks codes that point into tables.

    Args:
        leaf: with `data`, `codes`, `table` and `dtype`.
        count: of the values that a code may stand for.
    """
    require(jnp.issubdtype(leaf.dtype, jnp.floating), f"The logical dtype is a float, got {leaf.dtype}.")
    require(is_finite(leaf.table), "The values of a table must be finite.")
    codes = leaf.codes()
    require(codes.dtype == jnp.uint8, f"Codes are unsigned, got {codes.dtype}.")
    require(int(np.asarray(codes).max(initial=0)) < count, f"A code exceeds the {count} values.")
    validate_array(leaf.data)


@on_auto_axes
@functools.partial(jax.jit, static_argnames=("zero", "dtype"), inline=True)
def look_up(
    codes: Integer[Array, "..."], table: Float[Array, "... entries"], *, zero: bool = False, dtype: Any = jnp.float32
) -> Float[Array, "..."]:
    """table[block, codes], or 0 for code 0 and table[block, codes - 1] for the others.

    The gradient of an entry is the sum of those of its codes (Deep Compression, figure 3), and that of 0 is dropped.

    Args:
        codes: unsigned integers of any shape.
        table: one row of entries per block; see `CodebookArray`.
        zero: whether code 0 stands for 0.
        dtype: of the result.

    Returns:
        The values, of the shape of `codes`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> codes, table = jnp.array([[0, 1, 2, 1]], "uint8"), jnp.array([[[-0.5, 0.25]]])
        >>> look_up(codes, table, zero=True)
        Array([[ 0.  , -0.5 ,  0.25, -0.5 ]], dtype=float32)
        >>> jax.grad(lambda t: (look_up(codes, t, zero=True) * jnp.arange(4.0)[None]).sum())(table)
        Array([[[4., 2.]]], dtype=float32)

    References:
        Han, Mao and Dally 2016, "Deep Compression", section 3.
    """
    if zero:
        table = jnp.concatenate([jnp.zeros((*table.shape[:-1], 1), table.dtype), table], axis=-1)
    return _pick(codes, table).astype(dtype)


@jax.custom_vjp
def _pick(codes: Integer[Array, "..."], table: Float[Array, "... entries"]) -> Float[Array, "..."]:
    blocks, entries = table.shape[:-1], table.shape[-1]
    starts = entries * jnp.arange(math.prod(blocks), dtype=jnp.int32).reshape(blocks)
    places = split_blocks(codes.astype(jnp.int32), blocks) + starts.reshape(_split_shape(codes.shape, blocks))
    return table.reshape(-1)[places.reshape(codes.shape)]


def _pick_forward(codes: Integer[Array, "..."], table: Float[Array, "... entries"]) -> tuple[Array, Any]:
    return _pick(codes, table), (codes, table)


def _pick_backward(saved: Any, gradient: Float[Array, "..."]) -> tuple[Any, Array]:
    """Sums by code, a pass each: the gradient of a gather is a scatter, which XLA runs one by one on the CPU."""
    codes, table = saved
    blocks = table.shape[:-1]
    axes = _inner_axes(codes.shape, blocks)
    codes_split, gradient = split_blocks(codes, blocks), split_blocks(gradient.astype(jnp.float32), blocks)

    def of_code(code: Array) -> Array:
        return jnp.where(codes_split == code, gradient, 0.0).sum(axis=axes).reshape(blocks)

    sums = jax.lax.map(of_code, jnp.arange(table.shape[-1], dtype=codes.dtype))
    no_gradient = np.zeros(codes.shape, jax.dtypes.float0)
    return no_gradient, jnp.moveaxis(sums, 0, -1).astype(table.dtype)


_pick.defvjp(_pick_forward, _pick_backward)


def _split_shape(shape: tuple[Any, ...], blocks: tuple[Any, ...]) -> list[Any]:
    """The shape in which one number per block broadcasts against `split_blocks`."""
    return [part for n, s in zip(shape, blocks, strict=True) for part in ((s, 1) if is_split(n, s) else (s,))]


def _inner_axes(shape: tuple[Any, ...], blocks: tuple[Any, ...]) -> tuple[int, ...]:
    """The axes of `split_blocks` that lie within one block."""
    axes, at = [], 0
    for n, s in zip(shape, blocks, strict=True):
        split = is_split(n, s)
        if split or s == 1:
            axes.append(at + split)
        at += 1 + split
    return tuple(axes)
