"""Canonical Huffman codes: a table of lengths, then bits.

Shape letters: N symbols, A symbols of the alphabet.
"""

import heapq

import numpy as np
from jaxtyping import Integer

from jaxcompress._src.clustering.bytes import Reader, Writer

LONGEST = 15
"""Bits of the longest code."""

_RUN = 4096


def code_lengths(counts: Integer[np.ndarray, " A"]) -> Integer[np.ndarray, " A"]:
    """The lengths of an optimal prefix code, 0 where there is no count; at most 15 bits.

    Where a code would be longer, small counts are raised until none is: at most a few thousandths of a bit are lost.

    Example:
        >>> code_lengths(np.array([5, 1, 0, 2]))
        array([1, 2, 0, 2])
    """
    counts = np.asarray(counts, np.int64)
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), np.int64)
    if len(used) < 2:
        lengths[used] = 1
        return lengths
    floor = 1
    while True:
        found = _tree_depths(np.maximum(counts[used], floor))
        if found.max() <= LONGEST:
            lengths[used] = found
            return lengths
        floor = max(2 * floor, int(counts.sum()) >> (LONGEST + 2))


def encode_huffman(symbols: Integer[np.ndarray, " N"], alphabet: int) -> bytes:
    """Symbols as bytes: lengths of codes, where every 4,096th symbol begins, and the bits.

    Args:
        symbols: below `alphabet`.
        alphabet: A, at most 4,096.

    Example:
        >>> decode_huffman(encode_huffman(np.array([0, 2, 0, 0, 1]), 3), 5, 3)
        array([0, 2, 0, 0, 1])
    """
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    own, words = lengths[symbols], _codes(lengths)[symbols]
    ends = np.cumsum(own)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for at in range(LONGEST):
        # Bit `at` of every code that is long enough, counted from its last one.
        has = own > at
        bits[ends[has] - 1 - at] = words[has] >> at & 1
    writer = Writer()
    writer.raw(np.packbits(_nibbles(lengths)).tobytes())
    writer.numbers(int(number) for number in np.diff((ends - own)[::_RUN]))
    writer.raw(np.packbits(bits).tobytes())
    return writer.done()


def decode_huffman(data: bytes, count: int, alphabet: int) -> Integer[np.ndarray, " N"]:
    """The inverse of `encode_huffman`; runs of 4,096 symbols are decoded side by side.

    Raises:
        ValueError: the lengths make no prefix code, or the bits end early or late.
    """
    reader = Reader(data)
    nibbles = np.unpackbits(np.frombuffer(reader.raw(-(-alphabet // 2)), np.uint8)).reshape(-1, 4)[:alphabet]
    lengths = (nibbles @ np.array([8, 4, 2, 1])).astype(np.int64)
    runs = -(-count // _RUN)
    places = np.cumsum([0, *reader.numbers(max(runs - 1, 0))])[:runs]
    bits = np.unpackbits(np.frombuffer(reader.rest(), np.uint8))
    table = _table(lengths)
    symbols = np.zeros((runs, _RUN), np.int64)
    padded = np.concatenate([bits, np.zeros(LONGEST, np.uint8)])
    # The number that begins at every bit.
    windows = np.zeros(len(bits) + 1, np.int64)
    for at in range(LONGEST):
        windows |= padded[at : at + len(windows)].astype(np.int64) << (LONGEST - 1 - at)
    for step in range(min(_RUN, count)):
        active = len(range(step, count, _RUN))
        if (places[:active] > len(bits)).any():
            raise ValueError("the bits end within a code")
        found = table[windows[places[:active]]]
        symbols[:active, step], places[:active] = found, places[:active] + lengths[found]
    if count and not 0 <= len(bits) - int(places[-1]) < 8:
        raise ValueError(f"{len(bits)} bits are stored, the codes end at bit {int(places[-1])}")
    return symbols.reshape(-1)[:count]


def _tree_depths(counts: Integer[np.ndarray, " A"]) -> Integer[np.ndarray, " A"]:
    heap = [(int(count), at) for at, count in enumerate(counts)]
    heapq.heapify(heap)
    parents: dict[int, int] = {}
    for node in range(len(counts), 2 * len(counts) - 1):
        (first, x), (second, y) = heapq.heappop(heap), heapq.heappop(heap)
        parents[x] = parents[y] = node
        heapq.heappush(heap, (first + second, node))
    depths = {2 * len(counts) - 2: 0}
    for node in range(2 * len(counts) - 3, -1, -1):
        depths[node] = depths[parents[node]] + 1
    return np.array([depths[at] for at in range(len(counts))])


def _codes(lengths: Integer[np.ndarray, " A"]) -> Integer[np.ndarray, " A"]:
    """The canonical codes: counted up in the order of length, then of symbol."""
    codes = np.zeros(len(lengths), np.int64)
    code, before = 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        if lengths[symbol]:
            code <<= int(lengths[symbol]) - before
            codes[symbol], before = code, int(lengths[symbol])
            code += 1
    return codes


def _table(lengths: Integer[np.ndarray, " A"]) -> Integer[np.ndarray, " windows"]:
    """The symbol of every window of 15 bits."""
    table = np.zeros(1 << LONGEST, np.int64)
    if sum(1 << (LONGEST - int(length)) for length in lengths if length) > len(table):
        raise ValueError("the lengths make no prefix code")
    for symbol, (length, code) in enumerate(zip(lengths, _codes(lengths), strict=True)):
        if length:
            first = int(code) << (LONGEST - int(length))
            table[first : first + (1 << (LONGEST - int(length)))] = symbol
    return table


def _nibbles(lengths: Integer[np.ndarray, " A"]) -> Integer[np.ndarray, " bits"]:
    return (lengths[:, None] >> np.array([3, 2, 1, 0]) & 1).astype(np.uint8).ravel()
