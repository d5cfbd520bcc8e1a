"""Codes as the shortest bytes that one of several coders gives.

Shape letters: R rows, C columns (of one row if there is one axis; the last axis else).
"""

import enum
import math

import numpy as np
from jaxtyping import Integer

from jaxcompress._src.coding.adaptive import decode_adaptive, encode_adaptive
from jaxcompress._src.coding.bytes import Reader
from jaxcompress._src.coding.densities import decode_densities, encode_densities
from jaxcompress._src.coding.rans import decode_static, encode_static

# ADAPTIVE is a loop in Python, 3 to 10 s for a million codes. It saves the tables of small arrays, and .6 to 2.5 % more
# than DENSITIES on sparse ones (`examples/benchmarks/coders.py`): worth its time up to the size of a LeNet's layers.
_LARGEST_ADAPTIVE = 1 << 18
_SMALL = 1024
_FEWEST_ROWS = 16
_LONGEST_GAP = 255


class Coder(enum.IntEnum):
    """Ways to write codes; the value is the first byte.

    PLAIN: `bits` of each code, back to back. RANS: one table of frequencies, interleaved rANS. GAPS: the numbers of
    codes of the most frequent kind before each other code, and those, both by rANS; only read, because DENSITIES or
    RANS gave fewer bytes wherever it was measured. ADAPTIVE: bit by bit, with probabilities from row, column and
    neighbours; a few microseconds per code. DENSITIES: rANS, with probabilities from classes of rows and columns. The
    numbers 3 and 4 stood for Huffman codes, which no checkpoint was written with.
    """

    PLAIN = 0
    RANS = 1
    GAPS = 2
    ADAPTIVE = 5
    DENSITIES = 6


def encode_codes(codes: Integer[np.ndarray, "..."], *, bits: int = 8, coder: Coder | None = None) -> bytes:
    """Codes as bytes, exactly.

    Args:
        codes: from 0 to 2^bits - 1.
        bits: at most 8.
        coder: None: whichever gives the fewest bytes. ADAPTIVE is tried up to 2^18 codes only, because it is slow. GAPS
            is only read.

    Returns:
        The number of the coder, and what it wrote. The shape is not in it.

    Raises:
        ValueError: a code, `bits` or `coder` out of range.

    Example:
        >>> import numpy as np
        >>> codes = (np.arange(4000).reshape(40, 100) % 20 == 0).astype("uint8")
        >>> len(encode_codes(codes, bits=1, coder=Coder.PLAIN)), len(encode_codes(codes, bits=1)) < 100
        (501, True)
        >>> bool((decode_codes(encode_codes(codes, bits=1), codes.shape, bits=1) == codes).all())
        True
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"`bits` must be in [1, 8], got {bits}.")
    flat = np.ascontiguousarray(codes).ravel().astype(np.int64)
    if flat.size and not (flat.min() >= 0 and flat.max() < 1 << bits):
        raise ValueError(f"Codes of {bits} bits are from 0 to {(1 << bits) - 1}, got {flat.min()} to {flat.max()}.")
    table = flat.reshape(as_table(codes.shape))
    if coder is not None and coder not in _ENCODERS:
        raise ValueError(f"`coder` must be one of {', '.join(one.name for one in _ENCODERS)}, got {coder.name}.")
    tried = [coder] if coder is not None else _worth_trying(table)
    candidates = [bytes([one]) + _ENCODERS[one](table, bits) for one in tried]
    return min(candidates, key=len)


def decode_codes(data: bytes, shape: tuple[int, ...], *, bits: int = 8) -> Integer[np.ndarray, "..."]:
    """The codes that `encode_codes` wrote, as uint8.

    Args:
        data: all of the bytes.
        shape: of the codes.
        bits: as given to `encode_codes`.

    Raises:
        ValueError: the data are not of this form, or do not hold codes of this shape; says what is wrong.
    """
    if not data or data[0] not in list(Coder):
        raise ValueError(f"coder {data[0] if data else 'nothing'} is unknown")
    codes = _DECODERS[Coder(data[0])](data[1:], as_table(shape), bits)
    if codes.size and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {bits} bits is {int(codes.max())}")
    return codes.astype(np.uint8).reshape(shape)


def as_table(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of an array: the last axis is that of the columns."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def _worth_trying(table: Integer[np.ndarray, "R C"]) -> list[Coder]:
    counts = np.bincount(table.ravel()) if table.size else np.zeros(1, np.int64)
    sparse = 2 * counts.max() > table.size and min(table.shape) >= _FEWEST_ROWS
    adaptive = table.size <= _SMALL or (4 * counts.max() > 3 * table.size and table.size <= _LARGEST_ADAPTIVE)
    return [Coder.PLAIN, Coder.RANS, *([Coder.DENSITIES] if sparse else []), *([Coder.ADAPTIVE] if adaptive else [])]


def _encode_plain(table: Integer[np.ndarray, "R C"], bits: int) -> bytes:
    return np.packbits(table.reshape(-1, 1) >> np.arange(bits) & 1).tobytes()


def _decode_plain(data: bytes, shape: tuple[int, int], bits: int) -> Integer[np.ndarray, "R C"]:
    count = math.prod(shape)
    if len(data) != -(-count * bits // 8):
        raise ValueError(f"{count} codes of {bits} bits take {-(-count * bits // 8)} bytes, not {len(data)}")
    digits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    return (digits.astype(np.int64) << np.arange(bits)).sum(axis=1).reshape(shape)


def _encode_rans(table: Integer[np.ndarray, "R C"], bits: int) -> bytes:
    return encode_static(table.ravel(), 1 << bits)


def _decode_rans(data: bytes, shape: tuple[int, int], bits: int) -> Integer[np.ndarray, "R C"]:
    return decode_static(data, math.prod(shape), 1 << bits).reshape(shape)


def _decode_gaps(data: bytes, count: int, bits: int) -> Integer[np.ndarray, " N"]:
    reader = Reader(data)
    common, others = reader.numbers(2)
    if others > count:
        raise ValueError(f"{others} codes behind gaps do not fit into {count}")
    gaps = decode_static(reader.block(), others, _LONGEST_GAP + 1)
    values = decode_static(reader.rest(), others, 1 << bits)
    places = np.cumsum(gaps + 1) - 1
    if others and int(places[-1]) >= count:
        raise ValueError(f"a code is at place {int(places[-1])} of {count}")
    flat = np.full(count, common, np.int64)
    flat[places] = values
    return flat


_ENCODERS = {
    Coder.PLAIN: _encode_plain,
    Coder.RANS: _encode_rans,
    Coder.ADAPTIVE: lambda table, bits: encode_adaptive(table, 1 << bits),
    Coder.DENSITIES: lambda table, bits: encode_densities(table, 1 << bits),
}
_DECODERS = {
    Coder.PLAIN: _decode_plain,
    Coder.RANS: _decode_rans,
    Coder.GAPS: lambda data, shape, bits: _decode_gaps(data, math.prod(shape), bits).reshape(shape),
    Coder.ADAPTIVE: lambda data, shape, bits: decode_adaptive(data, shape, 1 << bits),
    Coder.DENSITIES: lambda data, shape, bits: decode_densities(data, shape, 1 << bits),
}
