"""Where figures go: lines, JSON, event files that TensorBoard's own messages read."""

import io
import json
import math
import struct

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from jaxcompress.training import console, jsonl, tensorboard


def test_console_tells_the_rate_between_lines():
    stream = io.StringIO()
    write = console(stream=stream)
    write(10, {"loss": 1 / 3, "count": 12345678.0})
    write(20, {"loss": float("nan")})
    first, second = stream.getvalue().splitlines()
    assert first == "step 10  loss 0.33333  count 1.2346e+07"
    assert second.startswith("step 20  loss nan  ")
    assert second.endswith(" steps/s")


def test_jsonl_has_every_step_once(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    write = jsonl(path)
    for step in (10, 20, 30):
        write(step, {"loss": step / 7, "worst": float("inf")})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed
    write = jsonl(path)
    write(20, {"loss": 0.5, "worst": float("nan")})
    write(30, {"loss": 0.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10, "loss": 10 / 7, "worst": None},
        {"step": 20, "loss": 0.5, "worst": None},
        {"step": 30, "loss": 0.25},
    ]
    assert [path.name for path in path.parent.iterdir()] == ["run.jsonl"]


def test_jsonl_cuts_no_other_file(tmp_path):
    path = tmp_path / "other"
    for content in ("hello\n", "[1]\n", '{"loss": 1}\n'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"Line 1 of .*other' is no figures of a run"):
            jsonl(path)(1, {"loss": 1.0})
        assert path.read_text() == content


def event_class():
    """`tensorflow.Event`, the part of `event.proto` and `summary.proto` with scalars."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="tensorflow", syntax="proto3")
    messages = {
        "Value": [("tag", 1, field.TYPE_STRING, None), ("simple_value", 2, field.TYPE_FLOAT, None)],
        "Summary": [("value", 1, field.TYPE_MESSAGE, "Value")],
        "SessionLog": [("status", 1, field.TYPE_INT32, None)],
        "Event": [
            ("wall_time", 1, field.TYPE_DOUBLE, None),
            ("step", 2, field.TYPE_INT64, None),
            ("file_version", 3, field.TYPE_STRING, None),
            ("summary", 5, field.TYPE_MESSAGE, "Summary"),
            ("session_log", 7, field.TYPE_MESSAGE, "SessionLog"),
        ],
    }
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for label, number, kind, of in fields:
            repeated = label == "value"
            entry = message.field.add(name=label, number=number, type=kind)
            entry.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if of:
                entry.type_name = f".tensorflow.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Event"))


def crc32c(data):
    """Bit by bit, from the polynomial 0x1EDC6F41 of RFC 3720."""
    bits = [(byte >> i) & 1 for byte in data for i in range(8)] + [0] * 32
    for i in range(32):
        bits[i] ^= 1
    polynomial = [(0x11EDC6F41 >> (32 - i)) & 1 for i in range(33)]
    for at in range(len(bits) - 32):
        if bits[at]:
            for i in range(33):
                bits[at + i] ^= polynomial[i]
    return sum((bit ^ 1) << i for i, bit in enumerate(bits[-32:]))


def records(data):
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        head, content, tail = data[8:12], data[12 : 12 + length], data[12 + length : 16 + length]
        for part, checksum in ((data[:8], head), (content, tail)):
            crc = crc32c(part)
            masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
            assert checksum == struct.pack("<I", masked)
        yield content
        data = data[16 + length :]


def test_event_files_are_those_of_tensorboard(tmp_path):
    assert crc32c(b"123456789") == 0xE3069283  # of RFC 3720
    event = event_class()
    write = tensorboard(tmp_path / "run")
    figures = {"loss": 1 / 3, "größe/x": -1e300, "nan": math.nan}
    write(7, figures)
    write(300_000_000_000, {"loss": 2.0})
    tensorboard(tmp_path / "run")(5, {"loss": 1.0})
    first, second = sorted((tmp_path / "run").iterdir(), key=lambda path: -path.stat().st_size)
    assert first.name.startswith("events.out.tfevents.")
    version, start, one, two = (event.FromString(record) for record in records(first.read_bytes()))
    assert (version.file_version, version.step) == ("brain.Event:2", 0)
    assert (start.session_log.status, start.step) == (1, 7)
    assert (one.step, two.step) == (7, 300_000_000_000)
    assert one.wall_time > 1.7e9
    found = {value.tag: value.simple_value for value in one.summary.value}
    np.testing.assert_array_equal([found[name] for name in figures], [np.float32(1 / 3), -np.inf, np.nan])
    assert [(value.tag, value.simple_value) for value in two.summary.value] == [("loss", 2.0)]
    # A resumed run: what is written from its first step on takes the place of what was.
    again = [event.FromString(record) for record in records(second.read_bytes())]
    assert [(entry.step, entry.session_log.status) for entry in again] == [(0, 0), (5, 1), (5, 0)]
