"""What kinds have in common that store codes in the logical shape, and a few numbers for each block of them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, Shaped

from jaxcompress._src.arrays.packed import PackedArray, pack, unpacked
from jaxcompress._src.arrays.protocol import (
    StoredArray,
    can_unstack,
    describe_leaf,
    product_with_plain,
    slice_axis,
    transpose,
)
from jaxcompress._src.arrays.reshaping import reshape_runs, reshaped_blocks
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.arrays.symbolic import surely_at_most
from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import is_compressed, plain

# XLA on the CPU writes a widened weight to a temporary at every call. With few tokens that write dominates (12x at one
# token, 4096 x 4096), and blocks that stay in the cache avoid it; with many tokens the matmul dominates, and runs best
# whole. Other backends fuse the widening, and run whole.
_FEW_TOKENS = 16
_BLOCKS = 16
_LARGE = 2**18


class CodedArray(StoredArray):
    """Codes in `data`, of the logical shape: integers, a `PackedArray`, or a sparse array of either."""

    data: Any

    @property
    def shape(self) -> tuple[Any, ...]:
        """Logical shape; of quantized inputs, sizes may be symbolic."""
        return tuple(self.data.shape)

    @property
    def bits(self) -> int:
        """Bits per stored code, without what belongs to blocks and without indices."""
        codes = self.data.values if isinstance(self.data, SparseArray) else self.data
        return codes.bits if isinstance(codes, PackedArray) else 8

    @on_auto_axes
    def codes(self) -> Integer[Array, "..."]:
        """The codes as int8 or uint8, of the logical shape; 0 where nothing is stored."""
        return plain(self.data)

    def block_parts(self) -> list[Any]:
        """What has one entry per block, as arrays (abstract ones, perhaps) with the logical axes."""
        raise NotImplementedError(f"{type(self).__name__} must say what `block_parts` gives.")

    def with_parts(self, data: Any, move: Callable[[Any], Any]) -> Any:
        """The array with other codes, and `move` applied to each of the `block_parts`."""
        raise NotImplementedError(f"{type(self).__name__} must say what `with_parts` gives.")

    def plain_zeros(self) -> bool:
        """Whether code 0 stands for 0, so that codes that a sparse array leaves out may be written as 0."""
        return True

    def with_plain_parts(self) -> Any:
        """The same array, of which no part but `data` is packed."""
        return self

    @on_auto_axes
    def expanded(self) -> Any:
        """All codes, packed along the axis of the pattern or of rows; plain where absent codes are not code 0."""
        if not isinstance(self.data, SparseArray):
            return self
        codes = self._moved_codes(lambda codes: codes)
        if codes is None:
            return self.materialize()
        packed = pack(codes, bits=self.bits, axis=self.data.packing_axis)
        return dataclasses.replace(self, data=packed)  # type: ignore[type-var]

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The axes in another order; sparse codes become dense."""
        data = transpose(self.data, permutation)
        data = self._moved_codes(lambda codes: codes.transpose(permutation)) if data is None else data
        return None if data is None else self.with_parts(data, lambda part: part.transpose(permutation))

    def reshape(self, shape: Sequence[int]) -> Any:
        """Another shape, in which blocks are blocks."""
        runs = reshape_runs(self.shape, shape)
        sizes = [reshaped_blocks(self.shape, shape, part.shape, runs) for part in self.block_parts()]
        if None in sizes:
            return None
        data = reshape_codes(self.data, shape, runs)
        data = self._moved_codes(lambda codes: codes.reshape(shape)) if data is None else data
        targets = iter(sizes)
        return None if data is None else self.with_parts(data, lambda part: part.reshape(next(targets)))

    def slice_axis(self, axis: int, start: Any, size: int) -> Any:
        """Entries along one axis, in whole blocks."""
        length = self.shape[axis]
        if not all(_sliceable(part.shape[axis], length, start, size) for part in self.block_parts()):
            return None
        data = slice_axis(self.data, axis, start, size)
        data = self._moved_codes(lambda codes: slice_axis(codes, axis, start, size)) if data is None else data
        if data is None:
            return None
        return self.with_parts(data, lambda part: _slice_blocks(part, length, axis, start, size))

    def cast(self, dtype: Any) -> Any:
        """Another logical dtype: a narrowing cast of float32 only, elsewhere the plain array is rounded twice."""
        same = self.dtype == dtype or self.dtype == jnp.float32
        return dataclasses.replace(self, dtype=jnp.dtype(dtype)) if same else None  # type: ignore[type-var]

    def can_unstack(self) -> bool:
        """If there is a block, or several, for each entry of the first axis."""
        parts = self.block_parts()
        return can_unstack(self.data) and all(part.shape[0] == self.shape[0] and can_unstack(part) for part in parts)

    def dot(self, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> jax.Array:
        """The product of the plain array: block by block for few tokens on the CPU, else whole."""

        def whole(leaf: Any, other: Any) -> jax.Array:
            return product_with_plain(leaf.materialize(), other, side, parameters)

        axis = self._block_axis(side, other, parameters)
        if axis is None:
            return whole(self, other)

        def by_blocks(leaf: Any, other: Any) -> jax.Array:
            return leaf._dot_by_blocks(axis, other, side, parameters)

        return jax.lax.platform_dependent(self, other, cpu=by_blocks, default=whole)

    def _block_axis(self, side: int, other: jax.Array, parameters: Mapping[str, Any]) -> int | None:
        """The output axis to cut into blocks, or None to run whole."""
        contracted, batch = parameters["dimension_numbers"]
        if batch[side] or self.size < _LARGE:
            return None
        tokens = other.size // max(math.prod(other.shape[axis] for axis in contracted[1 - side]), 1)
        if not surely_at_most(tokens, _FEW_TOKENS):
            return None
        free = [axis for axis in range(self.ndim) if axis not in contracted[side]]
        fit = [axis for axis in free if self.shape[axis] % _BLOCKS == 0 and self._can_cut(axis)]
        return max(fit, key=lambda axis: self.shape[axis], default=None)

    def _can_cut(self, axis: int) -> bool:
        codes = jax.eval_shape(lambda leaf: slice_axis(leaf.data, axis, 0, leaf.shape[axis] // _BLOCKS), self)
        return codes is not None and all(part.shape[axis] in (1, self.shape[axis]) for part in self.block_parts())

    def _dot_by_blocks(self, axis: int, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> jax.Array:
        contracted, _ = parameters["dimension_numbers"]
        size = self.shape[axis] // _BLOCKS
        # Packed parts would be unpacked anew, as a whole, for every block.
        leaf = self.with_plain_parts()

        def block(start: jax.Array) -> jax.Array:
            return product_with_plain(leaf.slice_axis(axis, start, size).materialize(), other, side, parameters)

        results = jax.lax.map(block, size * jnp.arange(_BLOCKS))
        # The output's axes are the left operand's free axes, then the right one's.
        place = [i for i in range(self.ndim) if i not in contracted[side]].index(axis)
        at = place if side == 0 else other.ndim - len(contracted[1 - side]) + place
        results = jnp.moveaxis(results, 0, at)
        return results.reshape(*results.shape[:at], _BLOCKS * size, *results.shape[at + 2 :])

    def _moved_codes(self, move: Callable[[Any], Any]) -> Any:
        """The codes as plain integers, moved; None where absent codes must stay distinguishable from code 0."""
        return None if isinstance(self.data, SparseArray) and not self.plain_zeros() else move(self.codes())


def describe_codes(data: Any) -> tuple[str, str]:
    """Codes in words, and how those that are 0 are left out: `("int4", "2:4")`; the second is empty for dense codes."""
    sparse = isinstance(data, SparseArray)
    return describe_leaf(data.values if sparse else data), data.pattern_name if sparse else ""


def reshape_codes(data: Any, shape: Sequence[int], runs: list[tuple[list[int], list[int]]]) -> Any:
    """Codes in another shape; None where only plain ones can be reshaped."""
    if not is_compressed(data):
        return data.reshape(shape)
    return data.reshape_to(shape, runs) if isinstance(data, PackedArray) else None


def take_code_rows(data: Any, rows: Integer[Array, "..."]) -> Shaped[Array, "..."]:
    """`codes[rows]`, unpacking those rows only; of a plain array its rows."""
    if isinstance(data, PackedArray) and data.axis != -data.ndim:
        return dataclasses.replace(data, data=data.data[rows]).materialize()
    return unpacked(data)[rows]


def take_parameter_rows(parameter: Any, rows: Integer[Array, "..."], length: int) -> Any:
    """What belongs to `rows`, flattened, of an array of `length` rows: one entry per block of rows, or one for all."""
    if parameter is None or parameter.shape[0] == 1:
        return unpacked(parameter)
    rows_per_block = length // parameter.shape[0]
    return take_code_rows(parameter, (rows // rows_per_block).reshape(-1))


def _sliceable(blocks: int, length: int, start: Any, size: int) -> bool:
    if size == length or blocks in (1, length):
        return True
    block = length // blocks
    return isinstance(start, int) and start % block == 0 and size % block == 0


def _slice_blocks(part: Any, length: int, axis: int, start: Any, size: int) -> Any:
    blocks = part.shape[axis]
    if blocks == 1 or size == length:
        return part
    block = length // blocks
    return slice_axis(part, axis, start // block, size // block)
