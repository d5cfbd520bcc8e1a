"""Codes as the shortest bytes that one of several coders gives.

Shape letters: R rows, C columns (of one row if there is one axis; the last axis else).
"""

import enum
import math

import numpy as np
from jaxtyping import Integer

from jaxcompress._src.coding.adaptive import decode_adaptive, encode_adaptive
from jaxcompress._src.coding.bytes import Reader, Writer
from jaxcompress._src.coding.rans import PRECISION, decode_rans, encode_rans, quantized_frequencies

_LARGEST_ADAPTIVE = 1 << 19
_LONGEST_GAP = 255


class Coder(enum.IntEnum):
    """Ways to write codes; the value is the first byte.

    PLAIN: `bits` of each code, back to back. RANS: one table of frequencies, interleaved rANS. GAPS: the numbers of
    codes of the most frequent kind before each other code, and those, both by rANS. ADAPTIVE: bit by bit, with
    probabilities from row, column and neighbours. 3 and 4 were Huffman codes, which no checkpoint was written with.
    """

    PLAIN = 0
    RANS = 1
    GAPS = 2
    ADAPTIVE = 5


def encode_codes(codes: Integer[np.ndarray, "..."], *, bits: int = 8, coder: Coder | None = None) -> bytes:
    """Codes as bytes, exactly.

    Args:
        codes: from 0 to 2^bits - 1.
        bits: at most 8.
        coder: None: whichever gives the fewest bytes. ADAPTIVE is tried up to 2^19 codes only, because it is slow.

    Returns:
        The number of the coder, and what it wrote. The shape is not in it.

    Raises:
        ValueError: a code out of range, or `bits`.

    Example:
        >>> import numpy as np
        >>> codes = (np.arange(4000).reshape(40, 100) % 37 == 0).astype("uint8")
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
    tried = [coder] if coder is not None else _worth_trying(flat)
    found = [bytes([one]) + _ENCODERS[one](table, bits) for one in tried]
    return min(found, key=len)


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
    found = _DECODERS[Coder(data[0])](data[1:], as_table(shape), bits)
    if found.size and int(found.max()) >= 1 << bits:
        raise ValueError(f"a code of {bits} bits is {int(found.max())}")
    return found.astype(np.uint8).reshape(shape)


def as_table(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of an array: the last axis is that of the columns."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def _worth_trying(flat: Integer[np.ndarray, " N"]) -> list[Coder]:
    counts = np.bincount(flat) if flat.size else np.zeros(1, np.int64)
    sparse = 2 * counts.max() > flat.size
    small = flat.size <= 4096 or (4 * counts.max() > 3 * flat.size and flat.size <= _LARGEST_ADAPTIVE)
    return [Coder.PLAIN, Coder.RANS, *([Coder.GAPS] if sparse else []), *([Coder.ADAPTIVE] if small else [])]


def _encode_plain(table: Integer[np.ndarray, "R C"], bits: int) -> bytes:
    return np.packbits(table.reshape(-1, 1) >> np.arange(bits) & 1).tobytes()


def _decode_plain(data: bytes, shape: tuple[int, int], bits: int) -> Integer[np.ndarray, "R C"]:
    count = math.prod(shape)
    if len(data) != -(-count * bits // 8):
        raise ValueError(f"{count} codes of {bits} bits take {-(-count * bits // 8)} bytes, not {len(data)}")
    found = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    return (found.astype(np.int64) << np.arange(bits)).sum(axis=1).reshape(shape)


def _encode_static(symbols: Integer[np.ndarray, " N"], alphabet: int) -> bytes:
    """Frequencies (in the order of the symbols; what is missing to 2^14 is the last one's), and rANS."""
    frequencies = quantized_frequencies(np.bincount(symbols, minlength=alphabet).astype(np.int64)[None])
    writer = Writer()
    left = 1 << PRECISION
    for number in frequencies[0].tolist():
        if not left:
            break
        writer.number(number)
        left -= number
    writer.raw(encode_rans(symbols, np.zeros_like(symbols), frequencies))
    return writer.done()


def _decode_static(data: bytes, count: int, alphabet: int) -> Integer[np.ndarray, " N"]:
    reader, frequencies = Reader(data), np.zeros((1, alphabet), np.int64)
    left, at = 1 << PRECISION, 0
    while left:
        number = reader.number()
        if number > left or at == alphabet:
            raise ValueError("the frequencies do not sum to 2^14")
        frequencies[0, at] = number
        left, at = left - number, at + 1
    return decode_rans(reader.rest(), np.zeros(count, np.int64), frequencies)


def _encode_rans(table: Integer[np.ndarray, "R C"], bits: int) -> bytes:
    return _encode_static(table.ravel(), 1 << bits)


def _decode_rans(data: bytes, shape: tuple[int, int], bits: int) -> Integer[np.ndarray, "R C"]:
    return _decode_static(data, math.prod(shape), 1 << bits).reshape(shape)


def _gaps(flat: Integer[np.ndarray, " N"]) -> tuple[int, Integer[np.ndarray, " M"], Integer[np.ndarray, " M"]]:
    """The most frequent code, and for each other one how many of it come before; long gaps are cut by fillers."""
    common = int(np.bincount(flat).argmax()) if flat.size else 0
    places = np.flatnonzero(flat != common)
    gaps, values = np.diff(places, prepend=-1) - 1, flat[places]
    fillers = gaps // (_LONGEST_GAP + 1)
    # A filler is a code of the common kind behind 255 of them.
    at = np.repeat(np.arange(len(gaps)), fillers)
    return (
        common,
        np.insert(gaps % (_LONGEST_GAP + 1), at, _LONGEST_GAP),
        np.insert(values, at, common),
    )


def _encode_gaps(flat: Integer[np.ndarray, " N"], bits: int) -> bytes:
    common, gaps, values = _gaps(flat)
    writer = Writer()
    writer.numbers([common, len(gaps)])
    writer.block(_encode_static(gaps, _LONGEST_GAP + 1))
    writer.raw(_encode_static(values, 1 << bits))
    return writer.done()


def _decode_gaps(data: bytes, count: int, bits: int) -> Integer[np.ndarray, " N"]:
    reader = Reader(data)
    common, others = reader.numbers(2)
    if others > count:
        raise ValueError(f"{others} codes behind gaps do not fit into {count}")
    gaps = _decode_static(reader.block(), others, _LONGEST_GAP + 1)
    values = _decode_static(reader.rest(), others, 1 << bits)
    places = np.cumsum(gaps + 1) - 1
    if others and int(places[-1]) >= count:
        raise ValueError(f"a code is at place {int(places[-1])} of {count}")
    flat = np.full(count, common, np.int64)
    flat[places] = values
    return flat


_ENCODERS = {
    Coder.PLAIN: _encode_plain,
    Coder.RANS: _encode_rans,
    Coder.GAPS: lambda table, bits: _encode_gaps(table.ravel(), bits),
    Coder.ADAPTIVE: lambda table, bits: encode_adaptive(table, 1 << bits),
}
_DECODERS = {
    Coder.PLAIN: _decode_plain,
    Coder.RANS: _decode_rans,
    Coder.GAPS: lambda data, shape, bits: _decode_gaps(data, math.prod(shape), bits).reshape(shape),
    Coder.ADAPTIVE: lambda data, shape, bits: decode_adaptive(data, shape, 1 << bits),
}
