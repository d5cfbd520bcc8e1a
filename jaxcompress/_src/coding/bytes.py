"""Numbers in bytes."""

from collections.abc import Iterable


class Writer:
    r"""Collects bytes.

    Example:
        >>> writer = Writer()
        >>> writer.number(300)
        >>> writer.block(b"ab")
        >>> writer.done()
        b'\xac\x02\x02ab'
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def number(self, value: int) -> None:
        """A number that is not negative: seven bits to a byte, lowest first; the highest bit says that more follow."""
        encoded = bytearray()
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
        self._parts.append(bytes(encoded))

    def numbers(self, values: Iterable[int]) -> None:
        """Several numbers."""
        for value in values:
            self.number(value)

    def raw(self, data: bytes) -> None:
        """Bytes as they are; the reader knows how many."""
        self._parts.append(data)

    def block(self, data: bytes) -> None:
        """Bytes behind their number."""
        self.number(len(data))
        self.raw(data)

    def done(self) -> bytes:
        """All of it."""
        return b"".join(self._parts)


class Reader:
    r"""Takes bytes apart that a `Writer` put together.

    Example:
        >>> reader = Reader(b"\xac\x02\x02ab")
        >>> reader.number(), reader.block(), reader.rest()
        (300, b'ab', b'')
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self) -> int:
        """The next number.

        Raises:
            ValueError: the data end within it, or it has more than 63 bits.
        """
        value, shift = 0, 0
        while True:
            (byte,) = self.raw(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 56:
                raise ValueError("a number has more than 63 bits")

    def numbers(self, count: int) -> list[int]:
        """Several numbers."""
        return [self.number() for _ in range(count)]

    def raw(self, size: int) -> bytes:
        """The next bytes.

        Raises:
            ValueError: the data end before.
        """
        if self._at + size > len(self._data):
            raise ValueError(f"{size} bytes should follow, {len(self._data) - self._at} are left")
        self._at += size
        return self._data[self._at - size : self._at]

    def block(self) -> bytes:
        """Bytes that stand behind their number."""
        return self.raw(self.number())

    def rest(self) -> bytes:
        """All that is left."""
        return self.raw(len(self._data) - self._at)
