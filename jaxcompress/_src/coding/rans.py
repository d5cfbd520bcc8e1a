"""Range asymmetric numeral systems: near-entropy coding, in many interleaved lanes so that NumPy runs it.

Integers only, so that every platform decodes the same. Shape letters: N symbols, L lanes, C contexts, A symbols of the
alphabet.
"""

import numpy as np
from jaxtyping import Int64, Integer, Shaped

from jaxcompress._src.coding.bytes import Reader, Writer

PRECISION = 14
"""Frequencies of a model sum to 2^14."""

_LOW = 1 << 16
_BYTES_PER_LANE = 1024


def encode_rans(
    symbols: Integer[np.ndarray, " N"], contexts: Integer[np.ndarray, " N"], frequencies: Int64[np.ndarray, "C A"]
) -> bytes:
    """Symbols as bytes, given the model.

    Args:
        symbols: below A.
        contexts: the row of `frequencies` that holds for each symbol.
        frequencies: rows that sum to 2^14, positive for every symbol that occurs.

    Returns:
        The number of lanes, their final states, and 16-bit words.
    """
    starts = np.cumsum(frequencies, axis=1) - frequencies
    freq, start = frequencies[contexts, symbols], starts[contexts, symbols]
    cost = int(np.sum(PRECISION - np.log2(np.maximum(freq, 1)))) // 8 if len(symbols) else 0
    lanes = int(np.clip(cost // _BYTES_PER_LANE, 1, 1 << 14))
    steps = -(-len(symbols) // lanes)
    # Symbols that fill up the last step take no bits: they have the whole range.
    whole = np.full(steps * lanes - len(symbols), 1 << PRECISION)
    freq = np.concatenate([freq, whole]).reshape(steps, lanes)
    start = np.concatenate([start, np.zeros_like(whole)]).reshape(steps, lanes)
    state = np.full(lanes, _LOW, np.int64)
    words = []
    for width, first in zip(freq[::-1], start[::-1], strict=True):
        full = state >= width << (32 - PRECISION)
        words.append((state[full] & 0xFFFF).astype("<u2"))
        state = np.where(full, state >> 16, state)
        quotient, remainder = np.divmod(state, width)
        state = (quotient << PRECISION) + remainder + first
    writer = Writer()
    writer.number(lanes)
    writer.raw(state.astype("<u4").tobytes())
    writer.raw(b"".join(word.tobytes() for word in reversed(words)))
    return writer.done()


def decode_rans(
    data: bytes, contexts: Integer[np.ndarray, " N"], frequencies: Int64[np.ndarray, "C A"]
) -> Integer[np.ndarray, " N"]:
    """The inverse of `encode_rans`.

    Raises:
        ValueError: the data end early or late, or the states do not come back to where the encoder began.
    """
    reader = Reader(data)
    lanes = reader.number()
    if not 1 <= lanes <= 1 << 14:
        raise ValueError(f"{lanes} lanes are not possible")
    state = np.frombuffer(reader.raw(4 * lanes), "<u4").astype(np.int64)
    rest = reader.rest()
    if len(rest) % 2:
        raise ValueError("half a word is left")
    words, at = np.frombuffer(rest, "<u2").astype(np.int64), 0
    find, starts = _slots(frequencies), np.cumsum(frequencies, axis=1) - frequencies
    steps = -(-len(contexts) // lanes)
    rows = np.resize(contexts, steps * lanes).reshape(steps, lanes) if steps else np.zeros((0, lanes), np.int64)
    symbols = np.zeros((steps, lanes), np.int64)
    for step, row in enumerate(rows):
        active = min(lanes, len(contexts) - step * lanes)
        row, current = row[:active], state[:active]
        slot = current & ((1 << PRECISION) - 1)
        decoded = find[row, slot]
        symbols[step, :active] = decoded
        current = frequencies[row, decoded] * (current >> PRECISION) + slot - starts[row, decoded]
        low = np.flatnonzero(current < _LOW)
        if at + len(low) > len(words):
            raise ValueError("words are missing")
        current[low] = current[low] << 16 | words[at : at + len(low)]
        state[:active], at = current, at + len(low)
    if at != len(words) or (state != _LOW).any():
        raise ValueError("words are left, or a state is not that of the start")
    return symbols.reshape(-1)[: len(contexts)]


def encode_static(symbols: Integer[np.ndarray, " N"], alphabet: int) -> bytes:
    """Symbols below `alphabet` as bytes: frequencies, and what `encode_rans` makes of them.

    Frequencies are in the order of the symbols; what is missing to 2^14 is that of the last one.
    """
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


def decode_static(data: bytes, count: int, alphabet: int) -> Integer[np.ndarray, " N"]:
    """The inverse of `encode_static`.

    Raises:
        ValueError: the frequencies do not sum to 2^14, or the rest is not of such symbols.
    """
    reader, frequencies = Reader(data), np.zeros((1, alphabet), np.int64)
    left, at = 1 << PRECISION, 0
    while left:
        number = reader.number()
        if number > left or at == alphabet:
            raise ValueError("the frequencies do not sum to 2^14")
        frequencies[0, at] = number
        left, at = left - number, at + 1
    return decode_rans(reader.rest(), np.zeros(count, np.int64), frequencies)


def quantized_frequencies(counts: Int64[np.ndarray, "C A"]) -> Int64[np.ndarray, "C A"]:
    """Counts as frequencies that sum to 2^14 in each row: in proportion, but at least 1 where there is a count.

    A row without counts gives everything to symbol 0. What rounding leaves over or short goes where it costs least:
    to the largest frequencies.

    Example:
        >>> quantized_frequencies(np.array([[3, 0, 1], [0, 0, 0]]))
        array([[12288,     0,  4096],
               [16384,     0,     0]])
    """
    total = 1 << PRECISION
    counts = counts.copy()
    counts[counts.sum(axis=1) == 0, 0] = 1
    frequencies = np.maximum(counts * total // counts.sum(axis=1, keepdims=True), (counts > 0).astype(np.int64))
    for row, row_counts in zip(frequencies, counts, strict=True):
        # One at a time: each time to (or from) the symbol whose cost changes the most (least).
        while (short := total - row.sum()) > 0:
            row[_best(row_counts, row, 1)] += min(short, max(1, short // 2))
        while (over := row.sum() - total) > 0:
            row[_best(row_counts, row, -1)] -= min(over, 1)
    return frequencies


def _best(counts: Int64[np.ndarray, " A"], frequencies: Int64[np.ndarray, " A"], step: int) -> int:
    after = frequencies + step
    allowed = (counts > 0) & (after > 0)
    # Integers only: log2 would round differently from one platform to another. counts / frequency is its slope.
    slope = np.where(allowed, counts * (1 << 20) // np.maximum(frequencies, 1), -1 if step > 0 else 1 << 62)
    return int(slope.argmax() if step > 0 else slope.argmin())


def _slots(frequencies: Int64[np.ndarray, "C A"]) -> Shaped[np.ndarray, "C slots"]:
    """The symbol of every slot, for each context."""
    symbols = np.arange(frequencies.shape[1])
    return np.stack([np.repeat(symbols, row) for row in frequencies])
