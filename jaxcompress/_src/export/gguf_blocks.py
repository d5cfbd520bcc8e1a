"""Blocks of 32 weights, as GGUF files have them: a float16 scale (and an offset), then codes."""

import dataclasses

import numpy as np

from jaxcompress._src.export.info import CannotHoldError
from jaxcompress._src.export.integers import IntegerRows, float16_scales

BLOCK = 32
"""Weights of one row that share a scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """A matrix in blocks.

    Attributes:
        kind: name of the type, such as "Q4_0".
        data: (O, bytes of a row) uint8.
        values: (O, I) float32, what the blocks stand for.
    """

    kind: str
    data: np.ndarray
    values: np.ndarray


def blocks_of(rows: IntegerRows) -> Blocks:
    """Integers as blocks: up to 4 bits Q4_0 (symmetric) or Q4_1, 5 bits Q5_0 or Q5_1, more Q8_0.

    Q4_0, Q5_0, Q8_0: d q, with d the scale in float16. Q4_1, Q5_1: d q + m, with m = -scale x zero point in float16.

    Raises:
        CannotHoldError: groups are no multiples of 32, a scale is out of range for float16, or asymmetric codes have
            more than 5 bits.

    Example:
        >>> codes = np.arange(-8, 8, dtype=np.int16).repeat(2)[None]
        >>> rows = IntegerRows(codes=codes, scale=np.array([[0.5]], np.float32), zero_point=None, bits=4)
        >>> blocks = blocks_of(rows)
        >>> blocks.kind, blocks.data.shape, blocks.values[0, :3].tolist()
        ('Q4_0', (1, 18), [-4.0, -4.0, -3.5])
    """
    if rows.group_size % BLOCK:
        raise CannotHoldError(f"groups of {rows.group_size} inputs are no multiple of {BLOCK}, the block of the format")
    rows = rows.with_groups_of(BLOCK)
    scale = float16_scales(rows.scale)
    if rows.zero_point is None:
        return _symmetric(rows, scale)
    if rows.bits > 5:
        raise CannotHoldError(
            f"it has {rows.bits} bits with zero points; blocks with an offset have 4 or 5: quantize it symmetrically"
        )
    bits = 4 if rows.bits <= 4 else 5
    codes = rows.codes.astype(np.uint8).reshape(*rows.scale.shape, BLOCK)
    offset = float16_scales(-rows.zero_point * rows.scale)
    values = scale.astype(np.float32)[..., None] * codes.astype(np.float32) + offset.astype(np.float32)[..., None]
    data = [_bytes(scale), _bytes(offset), *_planes(codes, bits)]
    return _blocks(f"Q{bits}_1", data, values)


def _symmetric(rows: IntegerRows, scale: np.ndarray) -> Blocks:
    codes = rows.codes.reshape(*rows.scale.shape, BLOCK)
    values = scale.astype(np.float32)[..., None] * codes.astype(np.float32)
    if rows.bits > 5:
        return _blocks("Q8_0", [_bytes(scale), codes.astype(np.int8).view(np.uint8)], values)
    bits = 4 if rows.bits <= 4 else 5
    unsigned = (codes + 2 ** (bits - 1)).astype(np.uint8)
    return _blocks(f"Q{bits}_0", [_bytes(scale), *_planes(unsigned, bits)], values)


def _planes(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """The fifth bits as 4 bytes, if there are any; then bytes of which byte i has codes i (low half) and i + 16."""
    low = codes & np.uint8(15)
    nibbles = low[..., :16] | (low[..., 16:] << np.uint8(4))
    return [nibbles] if bits == 4 else [np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little"), nibbles]


def _bytes(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers.astype("<f2"))[..., None].view(np.uint8)


def _blocks(kind: str, parts: list[np.ndarray], values: np.ndarray) -> Blocks:
    data = np.concatenate(parts, axis=-1)
    return Blocks(kind=kind, data=data.reshape(len(data), -1), values=values.reshape(len(values), -1))
