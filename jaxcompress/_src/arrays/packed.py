"""Integers of 1 to 8 bits in bytes."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Integer, UInt8

from jaxcompress._src.arrays.protocol import PartCoding, StoredArray, array_kind, product_with_plain, slice_axis
from jaxcompress._src.arrays.sharding import entries_here, whole_blocks
from jaxcompress._src.arrays.static_fields import BOOL, INT
from jaxcompress._src.arrays.validate import require
from jaxcompress._src.meshes import on_auto_axes


@array_kind(bits=INT, signed=BOOL, axis=INT, width=INT)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PackedArray(StoredArray):
    """Integers below 8 bits, packed along one axis; lowest bits first.

    Blocks of `8 // bits` codes (of 8 codes for 3, 5, 6 and 7 bits) fill whole bytes, so that an axis can be cut, and
    sharded, at every block. A block of 8 codes of 3, 5, 6 or 7 bits holds one plane for each power of two in `bits`
    (5 = 4 + 1), the widest first; the widest plane holds the lowest bits of the code.

    Invariants: `-data.ndim <= axis < 0`; `data.shape[axis]` bytes hold `width` codes and less than one block of zeros;
    in `jax.shard_map`, they may be one of equal shares of whole blocks, and the shape is that of the share.

    Attributes:
        data: uint8, of the logical shape but for the packed axis.
        bits: bits per code, in [1, 7].
        signed: two's complement if True (int8 comes out), else unsigned (uint8 comes out).
        axis: the packed axis, negative, so that leading axes may come and go.
        width: number of codes along it.
    """

    data: Any
    bits: int
    signed: bool
    axis: int
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        shape = list(self.data.shape)
        shape[self.axis] = self._codes_here
        return tuple(shape)

    @property
    def _codes_here(self) -> int:
        block = codes_per_block(self.bits)
        stored = self.data.shape[self.axis]
        return entries_here(self.width, stored, block=block, stored_per_block=block * self.bits // 8)

    def why_no_share(self) -> str | None:
        """Bytes that are no whole blocks."""
        block, axis, stored = codes_per_block(self.bits), self.axis + self.data.ndim, self.data.shape[self.axis]
        if stored == -(-self._codes_here // block) * block * self.bits // 8:
            return None
        return (
            f"{stored} bytes along axis {axis} of codes are no share of {self.width} codes of {self.bits} bits in "
            f"whole blocks of {block}"
        )

    @property
    def dtype(self) -> jnp.dtype:
        """int8 if signed, else uint8."""
        return jnp.dtype("int8" if self.signed else "uint8")

    @on_auto_axes
    def materialize(self) -> Integer[Array, "..."]:
        """The codes as int8 or uint8."""
        return _unpack(self.data, self.bits, self.axis, self._codes_here, self.signed)

    @on_auto_axes
    def take(self, positions: Integer[Array, "..."]) -> Integer[Array, "..."]:
        """The codes at `positions` along the last axis, which must be the packed one (`take_along_axis`).

        Only the bytes asked for are read, except at 3, 5, 6 and 7 bits.
        """
        if 8 % self.bits:
            return jnp.take_along_axis(self.materialize(), positions, axis=-1)
        per_byte = 8 // self.bits
        packed_codes = jnp.take_along_axis(self.data, positions // per_byte, axis=-1)
        shift = (positions % per_byte * self.bits).astype(jnp.uint8)
        codes = (packed_codes >> shift) & jnp.uint8(2**self.bits - 1)
        return _extend_sign(codes, self.bits) if self.signed else codes

    def transpose(self, permutation: Sequence[int]) -> Any:
        """The axes in another order."""
        axis = tuple(permutation).index(self.axis + self.ndim) - self.ndim
        return dataclasses.replace(self, data=self.data.transpose(permutation), axis=axis)

    def slice_axis(self, axis: int, start: Any, size: int) -> Any:
        """Codes along an axis that is not packed."""
        if axis == self.axis + self.ndim:
            return None
        return dataclasses.replace(self, data=slice_axis(self.data, axis, start, size))

    def reshape_to(self, shape: Sequence[int], runs: list[tuple[list[int], list[int]]]) -> Any:
        """Another shape, if the packed axis only changes its place; None if it is split or merged.

        Args:
            shape: of the codes.
            runs: the axes before and after, as `reshape_runs` gives them.
        """
        at = self.axis + self.ndim
        before, after = next(run for run in runs if at in run[0])
        if len(before) != 1 or len(after) != 1:
            return None
        stored = list(shape)
        stored[after[0]] = self.data.shape[at]
        return dataclasses.replace(self, data=self.data.reshape(stored), axis=after[0] - len(shape))

    def can_unstack(self) -> bool:
        """Unless the first axis is packed."""
        return self.axis != -self.ndim

    def dot(self, other: jax.Array, side: int, parameters: Mapping[str, Any]) -> jax.Array:
        """The product of the codes."""
        return product_with_plain(self.materialize(), other, side, parameters)

    def shardings(self, sharding: NamedSharding) -> Any:
        """Whole bytes on every device."""
        return dataclasses.replace(self, data=whole_blocks(self, self.axis, codes_per_block(self.bits), sharding))

    def describe(self) -> str:
        """Such as `int4`."""
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    def validate(self) -> None:
        """Checks shapes, which are all there is to check."""
        self.validate_shapes()

    def validate_shapes(self) -> None:
        """Checks that the bytes are those of so many codes."""
        require(1 <= self.bits <= 7, f"Packed codes have 1 to 7 bits, got {self.bits}.")
        require(
            -self.ndim <= self.axis < 0, f"The packed axis is negative and in range, got {self.axis} of {self.ndim}."
        )
        require(self.data.dtype == jnp.uint8, f"Packed codes are uint8, got {self.data.dtype}.")
        block = codes_per_block(self.bits)
        expected = -(-self.width // block) * block * self.bits // 8
        nbytes = self.data.shape[self.axis]
        require(nbytes == expected, f"{self.width} codes of {self.bits} bits fill {expected} bytes, got {nbytes}.")

    def part_coding(self, name: str) -> PartCoding:
        """The codes, unsigned."""
        del name

        def unpack(data: np.ndarray) -> np.ndarray:
            return _unpack_by(np, data, self.bits, self.axis, self.width, False)

        def packed(codes: np.ndarray) -> np.ndarray:
            return _pack_by(np, codes, self.bits, self.axis)

        return PartCoding(self.bits, self.shape, unpack, packed)


@on_auto_axes
def pack(codes: Integer[Array | np.ndarray, "..."], *, bits: int, axis: int = -1) -> PackedArray | jax.Array:
    """Packs integers into `bits` bits each; 8 bits need no packing and stay a plain array.

    Args:
        codes: signed or unsigned integers that fit into `bits` bits, with at least one axis. A NumPy array is packed
            by NumPy, without a program for its shape.
        bits: in [1, 8].
        axis: the axis to pack along.

    Returns:
        A `PackedArray` of the same logical shape, or an int8 / uint8 array for 8 bits.

    Raises:
        ValueError: `bits` or `axis` out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> packed = pack(jnp.array([1, -2, 7], "int8"), bits=4)
        >>> packed.data, packed.materialize()
        (Array([225,   7], dtype=uint8), Array([ 1, -2,  7], dtype=int8))
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"`bits` must be in [1, 8], got {bits}.")
    if not -codes.ndim <= axis < codes.ndim:
        raise ValueError(f"`axis` must be an axis of an array of shape {codes.shape}, got {axis}.")
    axis = axis if axis < 0 else axis - codes.ndim
    signed = jnp.issubdtype(codes.dtype, jnp.signedinteger)
    if bits == 8:
        return jnp.asarray(codes, jnp.int8 if signed else jnp.uint8)
    on_host = isinstance(codes, np.ndarray)
    data = jnp.asarray(_pack_by(np, codes, bits, axis)) if on_host else _pack(codes, bits, axis)
    return PackedArray(data=data, bits=bits, signed=bool(signed), axis=axis, width=codes.shape[axis])


@on_auto_axes
def unpacked(part: Any) -> Any:
    """The codes of a `PackedArray`; anything else (an array, None) as it is."""
    return part.materialize() if isinstance(part, PackedArray) else part


def codes_per_block(bits: int) -> int:
    """The number of codes that fill whole bytes."""
    return 8 // bits if 8 % bits == 0 else 8


def _planes(bits: int) -> list[tuple[int, int]]:
    """`(width, offset)` of the planes of a code, the widest first: 5 bits -> [(4, 0), (1, 4)]."""
    planes, offset = [], 0
    for width in (4, 2, 1):
        if bits & width:
            planes.append((width, offset))
            offset += width
    return planes


# Compiled as one: called op by op, each new shape would cost a dozen compilations, and each call a dozen passes.
@functools.partial(jax.jit, static_argnames=("bits", "axis"), inline=True)
def _pack(codes: Integer[Array, "..."], bits: int, axis: int) -> UInt8[Array, "..."]:
    return _pack_by(jnp, codes, bits, axis)


@functools.partial(jax.jit, static_argnames=("bits", "axis", "width", "signed"), inline=True)
def _unpack(data: UInt8[Array, "..."], bits: int, axis: int, width: int, signed: bool) -> Integer[Array, "..."]:
    return _unpack_by(jnp, data, bits, axis, width, signed)


def _pack_by(xp: Any, codes: Any, bits: int, axis: int) -> Any:
    """The bytes; `xp` is NumPy, or JAX's."""
    at = axis + codes.ndim
    signed = jnp.issubdtype(codes.dtype, jnp.signedinteger)
    codes = codes.astype(np.int8 if signed else np.uint8).view(np.uint8) & np.uint8(2**bits - 1)
    per_block = codes_per_block(bits)
    codes = xp.pad(codes, [(0, -codes.shape[at] % per_block if i == at else 0) for i in range(codes.ndim)])
    before, after = codes.shape[:at], codes.shape[at + 1 :]
    parts = []
    for width, offset in _planes(bits):
        plane = (codes >> np.uint8(offset)) & np.uint8(2**width - 1)
        blocks = plane.reshape(*before, codes.shape[at] // per_block, per_block * width // 8, 8 // width, *after)
        parts.append((blocks << _shifts(xp, width, at + 2, blocks.ndim)).sum(axis=at + 2, dtype=np.uint8))
    return xp.concatenate(parts, axis=at + 1).reshape(*before, codes.shape[at] * bits // 8, *after)


def _unpack_by(xp: Any, data: Any, bits: int, axis: int, width: int, signed: bool) -> Any:
    """The codes; `xp` is NumPy, or JAX's."""
    at = axis + data.ndim
    before, after = data.shape[:at], data.shape[at + 1 :]
    per_block = codes_per_block(bits)
    block_bytes = per_block * bits // 8
    count = data.shape[at] // block_bytes
    blocks = data.reshape(*before, count, block_bytes, *after)
    codes, start = None, 0
    for plane_width, offset in _planes(bits):
        stop = start + per_block * plane_width // 8
        plane = xp.expand_dims(_cut(blocks, start, stop, at + 1), at + 2)
        plane = (plane >> _shifts(xp, plane_width, at + 2, plane.ndim)) & np.uint8(2**plane_width - 1)
        plane = plane.reshape(*before, count * per_block, *after) << np.uint8(offset)
        codes = plane if codes is None else codes | plane
        start = stop
    codes = _cut(codes, 0, width, at)
    return _extend_sign(codes, bits) if signed else codes


def _cut(x: Any, start: int, stop: int, axis: int) -> Any:
    if isinstance(x, np.ndarray):
        return x[(slice(None),) * axis + (slice(start, stop),)]
    return jax.lax.slice_in_dim(x, start, stop, axis=axis)


def _shifts(xp: Any, width: int, at: int, ndim: int) -> Any:
    shape = [1] * ndim
    shape[at] = 8 // width
    return (np.uint8(width) * xp.arange(8 // width, dtype=np.uint8)).reshape(shape)


def _extend_sign(codes: Any, bits: int) -> Any:
    sign = np.uint8(2 ** (bits - 1))
    return ((codes ^ sign) - sign).view(np.int8)
