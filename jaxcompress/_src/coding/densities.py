"""Sparse tables of codes, by how dense their rows and columns are: as fast as NumPy, whatever the size.

Shape letters: R rows, C columns, A symbols of the alphabet.
"""

import numpy as np
from jaxtyping import Int64, Integer

from jaxcompress._src.coding.arithmetic import CERTAIN, STRETCH_UNIT, squash, stretch
from jaxcompress._src.coding.bytes import Reader, Writer
from jaxcompress._src.coding.rans import PRECISION, decode_rans, decode_static, encode_rans, encode_static

_STEP = STRETCH_UNIT // 2
_MIDDLE = 15


def encode_densities(codes: Integer[np.ndarray, "R C"], alphabet: int) -> bytes:
    """Codes as bytes: classes of rows and columns, which codes are not the most frequent one, and those codes.

    The log odds that the code of row r and column c is not the most frequent one are taken to be those of all codes,
    plus half of `a[r] - 15`, plus half of `b[c] - 15`: the classes a and b, in [0, 30], follow from the counts of each
    row and column. What is left is coded by rANS, and needs no adaptation.

    Args:
        codes: below `alphabet`.
        alphabet: A.

    Returns:
        A header, the classes, one bit for each code, and the other codes.
    """
    common = int(np.bincount(codes.ravel(), minlength=alphabet).argmax()) if codes.size else 0
    rare = codes != common
    share = min(max(int(np.count_nonzero(rare)) * CERTAIN // max(codes.size, 1), 4), CERTAIN - 4)
    rows, columns = (_classes(rare.sum(axis=axis), codes.shape[axis], share) for axis in (1, 0))
    contexts, frequencies = _model(rows, columns, share)
    writer = Writer()
    writer.numbers([common, share])
    writer.block(encode_static(rows, 2 * _MIDDLE + 1))
    writer.block(encode_static(columns, 2 * _MIDDLE + 1))
    writer.block(encode_rans(rare.ravel().astype(np.int64), contexts, frequencies))
    writer.number(int(np.count_nonzero(rare)))
    writer.raw(encode_static(codes[rare], alphabet))
    return writer.done()


def decode_densities(data: bytes, shape: tuple[int, int], alphabet: int) -> Integer[np.ndarray, "R C"]:
    """The inverse of `encode_densities`.

    Raises:
        ValueError: the header is impossible, or a part ends early or late.
    """
    reader = Reader(data)
    common, share = reader.numbers(2)
    if common >= max(alphabet, 1) or not 4 <= share <= CERTAIN - 4:
        raise ValueError(f"symbol {common} of {alphabet} with the probability {share} is not possible")
    rows, columns = (decode_static(reader.block(), size, 2 * _MIDDLE + 1) for size in shape)
    contexts, frequencies = _model(rows, columns, share)
    rare = decode_rans(reader.block(), contexts, frequencies).reshape(shape).astype(bool)
    count = reader.number()
    if count != np.count_nonzero(rare):
        raise ValueError(f"{count} codes are stored for {np.count_nonzero(rare)} places")
    codes = np.full(shape, common, np.int64)
    codes[rare] = decode_static(reader.rest(), count, alphabet)
    return codes


def _classes(counts: Integer[np.ndarray, " N"], size: int, share: int) -> Int64[np.ndarray, " N"]:
    """The class of every row (or column) of `size` codes: how far its log odds are from those of all, in halves."""
    base = stretch(share)
    # By the tables, which are the same on every platform.
    of_count = {
        count: (stretch(min(max((2 * count + 1) * CERTAIN // (2 * size + 2), 4), CERTAIN - 4)) - base + _STEP // 2)
        // _STEP
        for count in set(counts.tolist())
    }
    classes = np.array([of_count[count] for count in counts.tolist()], np.int64)
    return np.clip(classes, -_MIDDLE, _MIDDLE) + _MIDDLE


def _model(
    rows: Integer[np.ndarray, " R"], columns: Integer[np.ndarray, " C"], share: int
) -> tuple[Int64[np.ndarray, " RC"], Int64[np.ndarray, "sums 2"]]:
    """The sum of both classes for every code, and the frequencies of both outcomes for every sum."""
    contexts = (rows.astype(np.int64)[:, None] + columns.astype(np.int64)).ravel()
    whole, base = 1 << PRECISION, stretch(share)
    sums = range(-2 * _MIDDLE, 2 * _MIDDLE + 1)
    ones = [min(max(squash(base + _STEP * total) * whole // CERTAIN, 1), whole - 1) for total in sums]
    return contexts, np.array([[whole - one, one] for one in ones], np.int64)
