"""Event files of TensorBoard: records with checksums, each a protocol buffer of scalars."""

import os
import socket
import struct
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxcompress._src.training.sinks import Sink


def tensorboard(directory: str | os.PathLike[str]) -> Sink:
    """Writes event files, which `tensorboard --logdir` shows; TensorBoard itself is not needed.

    A run that goes on from a checkpoint writes a new file, and says in it that what older files have from its first
    step on no longer counts.

    Args:
        directory: of the run; made if there is none.

    Example:
        >>> import os, tempfile
        >>> from jaxcompress.training import tensorboard
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     tensorboard(directory)(100, {"loss": 0.25})
        ...     [name.split(".")[:3] for name in os.listdir(directory)]
        [['events', 'out', 'tfevents']]

    References:
        TFRecord: https://www.tensorflow.org/tutorials/load_data/tfrecord; `event.proto` and `summary.proto` of
        https://github.com/tensorflow/tensorflow/tree/master/tensorflow/core
    """
    directory = Path(directory)
    file: Path | None = None

    def write(step: int, figures: Mapping[str, float]) -> None:
        nonlocal file
        now = time.time()
        events = [_event(now, step, _SUMMARY, b"".join(_value(*figure) for figure in figures.items()))]
        if file is None:
            directory.mkdir(parents=True, exist_ok=True)
            # The names sort by time; two writers in one second differ in what follows.
            file = directory / f"events.out.tfevents.{int(now):010}.{socket.gethostname()}.{uuid.uuid4().hex[:12]}"
            # From version 2 on, a session that starts at a step does away with what came from there on before.
            events[:0] = [_event(now, 0, _VERSION, b"brain.Event:2"), _event(now, step, _SESSION, _START)]
        with file.open("ab") as stream:
            stream.write(b"".join(map(_record, events)))

    return write


# Fields of `Event`, and the `SessionLog` whose `status` is START.
_VERSION, _SUMMARY, _SESSION = 3, 5, 7
_START = b"\x08\x01"


def _event(seconds: float, step: int, field: int, content: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", seconds) + b"\x10" + _varint(step) + _bytes(field, content)


def _value(name: str, value: float) -> bytes:
    """A `Summary.Value` with its tag and `simple_value`, as an entry of a `Summary`."""
    with np.errstate(over="ignore"):
        single = np.float32(value).astype("<f4").tobytes()
    return _bytes(1, _bytes(1, name.encode()) + b"\x15" + single)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    head = bytearray()
    while number > 127:
        head.append(number & 127 | 128)
        number >>= 7
    return bytes([*head, number])


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", _masked(length)) + content + struct.pack("<I", _masked(content))


def _masked(content: bytes) -> int:
    """The CRC-32C of a record, turned and moved, so that records may hold records."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _entry(number: int) -> int:
    for _ in range(8):
        number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
    return number


_TABLE = [_entry(number) for number in range(256)]
