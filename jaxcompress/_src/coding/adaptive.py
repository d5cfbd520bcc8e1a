"""Sparse tables of codes, bit by bit: where nonzeros are is learned from rows, columns and neighbours on the way.

Shape letters: R rows, C columns, A symbols of the alphabet.
"""

from typing import Any

import numpy as np
from jaxtyping import Integer

from jaxcompress._src.coding.arithmetic import CERTAIN, BitDecoder, BitEncoder, squash_table, stretch_tables
from jaxcompress._src.coding.bytes import Reader, Writer

# 22 bits for probabilities that are learned, so that small ones still move.
_FINE = 22
_SLOWEST = 1023
_WEIGHTS = (20000, 30000, 24000)
_RATE = 17


def encode_adaptive(codes: Integer[np.ndarray, "R C"], alphabet: int) -> bytes:
    """Codes as bytes; the better of both orientations.

    For every code, first whether it is the most frequent one, with a probability that is mixed from those of its row
    (which starts from the rows before), its column and its neighbours; then which of the others, by adaptive bits.

    Args:
        codes: below `alphabet`.
        alphabet: A.

    Returns:
        A header, then the bits of an arithmetic coder.

    References:
        Mahoney 2005, "Adaptive weighing of context models for lossless data compression" (mixing in the logistic
        domain, with weights that are learned).
    """
    common = int(np.bincount(codes.ravel(), minlength=alphabet).argmax()) if codes.size else 0
    share = int(np.count_nonzero(codes != common)) * CERTAIN // max(codes.size, 1)
    share = min(max(share, 4), CERTAIN - 4)
    candidates = []
    for turned in (0, 1):
        table = codes.T if turned else codes
        period = _period((table != common).sum(axis=1))
        encoder, writer = BitEncoder(), Writer()
        _walk(encoder, table.shape, common, alphabet, share, period, table.tolist())
        writer.numbers([common, share, 2 * period + turned])
        writer.raw(encoder.done())
        candidates.append(writer.done())
    return min(candidates, key=len)


def decode_adaptive(data: bytes, shape: tuple[int, int], alphabet: int) -> Integer[np.ndarray, "R C"]:
    """The inverse of `encode_adaptive`.

    Raises:
        ValueError: the header is impossible, or bytes are left.
    """
    reader = Reader(data)
    common, share, turned = reader.numbers(3)
    if common >= max(alphabet, 1) or not 4 <= share <= CERTAIN - 4:
        raise ValueError(f"symbol {common} of {alphabet} with the probability {share} is not possible")
    decoder = BitDecoder(reader.rest())
    size = (shape[1], shape[0]) if turned % 2 else shape
    codes = np.array(_walk(decoder, size, common, alphabet, share, turned // 2, None), np.int64).reshape(size)
    decoder.check_done()
    return codes.T if turned % 2 else codes


def _period(counts: Integer[np.ndarray, " R"]) -> int:
    """The distance at which rows are most alike (the width of an image, for a layer that reads its pixels), or 0."""
    centered = counts - counts.mean() if len(counts) else counts
    lags = range(4, min(len(counts) // 4, 128))
    alike = [float(centered[lag:] @ centered[:-lag]) for lag in lags]
    best = int(np.argmax(alike)) if alike else 0
    return lags[best] if alike and alike[best] > 0.3 * float(centered @ centered) else 0


def _walk(
    coder: Any,
    shape: tuple[int, int],
    common: int,
    alphabet: int,
    share: int,
    period: int,
    given: list[list[int]] | None,
) -> list[list[int]]:
    """Encodes `given`, or decodes and returns it. All numbers are integers."""
    rows, columns = shape
    fine = share << (_FINE - 16)
    small, coarse = stretch_tables()
    squashed, middle = squash_table(), len(squash_table()) // 2
    code, weights = coder.code, list(_WEIGHTS)
    column, seen = [fine] * columns, [3] * columns
    near, near_seen = [fine] * 16, [5] * 16
    values = _Values(coder, [symbol for symbol in range(alphabet) if symbol != common])
    blank = [0] * (columns + 1)
    marks: list[list[int]] = []
    counts: list[int] = []
    result: list[list[int]] = []
    strength = columns // 10 + 5
    for i in range(rows):
        above = marks[i - 1] if i else blank
        second = marks[i - 2] if i > 1 else blank
        far = marks[i - period] if 0 < period <= i else blank
        hits = strength * _row_share(counts, i, period, share, columns)
        total, marked, line, source = strength, [0] * (columns + 1), [common] * columns, given[i] if given else None
        # The place behind the last column stands for the one before the first.
        for j in range(columns):
            place = above[j] | far[j] << 1 | second[j] << 2 | marked[j - 1] << 3
            p = hits // total
            x = small[p] if p < 4096 else coarse[p >> 4]
            p = column[j] >> (_FINE - 16)
            y = small[p] if p < 4096 else coarse[p >> 4]
            p = near[place] >> (_FINE - 16)
            z = small[p] if p < 4096 else coarse[p >> 4]
            at = (weights[0] * x + weights[1] * y + weights[2] * z >> 16) + middle
            p = squashed[at if 0 <= at <= 2 * middle else 0 if at < 0 else -1]
            bit = code(p, int(source[j] != common) if source else 0)
            error = (bit << 16) - p
            weights[0] += error * x >> _RATE
            weights[1] += error * y >> _RATE
            weights[2] += error * z >> _RATE
            target = bit << _FINE
            column[j] += (target - column[j]) * 2 // seen[j]
            seen[j] += 2 if seen[j] < 2 * _SLOWEST else 0
            near[place] += (target - near[place]) * 2 // near_seen[place]
            near_seen[place] += 2 if near_seen[place] < 2 * _SLOWEST else 0
            total += 1
            if bit:
                hits += CERTAIN
                marked[j] = 1
                line[j] = values.code(source[j] if source else 0)
        marks.append(marked)
        counts.append(sum(marked))
        result.append(line)
    return result


def _row_share(counts: list[int], row: int, period: int, share: int, columns: int) -> int:
    """What a row is expected to hold: as the one before it and the one a period before, and the mean."""
    total, weight = share * columns, columns
    for distance in (1, period):
        if 0 < distance <= row:
            total += counts[row - distance] << 16
            weight += columns
    return min(total // max(weight, 1), CERTAIN - 1)


class _Values:
    """Symbols by adaptive bits: a binary tree over the alphabet with a probability in each node."""

    def __init__(self, coder: Any, symbols: list[int]) -> None:
        self._coder, self._symbols = coder, symbols
        self._numbers = {symbol: number for number, symbol in enumerate(symbols)}
        self._bits = max(len(symbols) - 1, 0).bit_length()
        self._nodes, self._seen = [1 << (_FINE - 1)] * (1 << self._bits), [4] * (1 << self._bits)

    def code(self, symbol: int) -> int:
        """Encodes a symbol, or decodes one."""
        number, node = self._numbers.get(symbol, 0), 1
        for at in reversed(range(self._bits)):
            p = self._nodes[node] >> (_FINE - 16)
            bit = self._coder.code(min(max(p, 4), CERTAIN - 4), number >> at & 1)
            self._nodes[node] += ((bit << _FINE) - self._nodes[node]) * 2 // self._seen[node]
            self._seen[node] += 2 if self._seen[node] < 2 * _SLOWEST else 0
            node = node << 1 | bit
        place = node - (1 << self._bits)
        if place >= len(self._symbols):
            raise ValueError("a code is not in the alphabet")
        return self._symbols[place]
