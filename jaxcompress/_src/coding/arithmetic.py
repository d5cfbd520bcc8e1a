"""Binary arithmetic coding with probabilities that are given bit by bit, and the tables that mix probabilities.

Integers only, so that every platform decodes the same.
"""

import decimal
import functools

CERTAIN = 1 << 16
"""Probabilities are integers p, for p / 2^16."""

STRETCH_UNIT = 256
"""`stretch` counts ln(p / (1 - p)) in 256ths."""

_LIMIT = 2560


class BitEncoder:
    """Bits to bytes; `code` returns the bit that it is given, so that one walk serves to encode and to decode.

    References:
        Mahoney 2005, "Adaptive weighing of context models for lossless data compression" (the carry-free coder of PAQ).
    """

    def __init__(self) -> None:
        self._low, self._high = 0, 0xFFFFFFFF
        self._out = bytearray()

    def code(self, probability: int, bit: int) -> int:
        """Takes one bit, whose probability to be 1 is `probability` / 2^16, in [1, 2^16 - 1]."""
        width = self._high - self._low
        middle = self._low + (width >> 16) * probability + ((width & 0xFFFF) * probability >> 16)
        if bit:
            self._high = middle
        else:
            self._low = middle + 1
        while not (self._low ^ self._high) & 0xFF000000:
            self._out.append(self._high >> 24)
            self._low = self._low << 8 & 0xFFFFFFFF
            self._high = self._high << 8 & 0xFFFFFFFF | 0xFF
        return bit

    def done(self) -> bytes:
        """All bytes. Behind them the decoder reads zeros, so the fewest that lead into the last interval are enough."""
        for count in range(5):
            step = 1 << 8 * (4 - count)
            value = -(-self._low // step) * step
            if value <= self._high:
                self._out += (value >> 8 * (4 - count)).to_bytes(count, "big")
                break
        while self._out and not self._out[-1]:
            self._out.pop()
        return bytes(self._out)


class BitDecoder:
    """The inverse of `BitEncoder`."""

    def __init__(self, data: bytes) -> None:
        self._low, self._high = 0, 0xFFFFFFFF
        self._data, self._at = data, 4
        self._value = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def code(self, probability: int, bit: int = 0) -> int:
        """The next bit; `bit` is not looked at."""
        width = self._high - self._low
        middle = self._low + (width >> 16) * probability + ((width & 0xFFFF) * probability >> 16)
        bit = int(self._value <= middle)
        if bit:
            self._high = middle
        else:
            self._low = middle + 1
        while not (self._low ^ self._high) & 0xFF000000:
            self._low = self._low << 8 & 0xFFFFFFFF
            self._high = self._high << 8 & 0xFFFFFFFF | 0xFF
            following = self._data[self._at] if self._at < len(self._data) else 0
            self._value = (self._value << 8 | following) & 0xFFFFFFFF
            self._at += 1
        return bit

    def check_done(self) -> None:
        """Checks that the data were not longer than what was read.

        Raises:
            ValueError: bytes are left.
        """
        if self._at < len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes are left")


@functools.cache
def stretch_tables() -> tuple[list[int], list[int]]:
    """ln(p / (1 - p)) in units: of p < 4096 by p, and of all p by p >> 4."""
    return [_stretch(2 * p + 1, 2 * CERTAIN) for p in range(4096)], [_stretch(2 * p + 1, 8192) for p in range(4096)]


def stretch(probability: int) -> int:
    """ln(p / (1 - p)), in 256ths."""
    small, all_of_them = stretch_tables()
    return small[probability] if probability < 4096 else all_of_them[probability >> 4]


@functools.cache
def squash_table() -> list[int]:
    """The inverse of `stretch`, for -2560, ..., 2560: probabilities in [4, 2^16 - 4]."""
    with decimal.localcontext(prec=30):
        exact = [int(CERTAIN / (1 + (decimal.Decimal(-x) / STRETCH_UNIT).exp())) for x in range(-_LIMIT, _LIMIT + 1)]
    return [min(max(p, 4), CERTAIN - 4) for p in exact]


def squash(x: int) -> int:
    """The probability whose logit is x / 256, as far as the table goes."""
    return squash_table()[min(max(x, -_LIMIT), _LIMIT) + _LIMIT]


def _stretch(numerator: int, denominator: int) -> int:
    # Decimal rounds correctly on every platform; the logarithm of a C library does not.
    with decimal.localcontext(prec=30):
        odds = decimal.Decimal(numerator) / (denominator - numerator)
        return int((odds.ln() * STRETCH_UNIT).to_integral_value())
