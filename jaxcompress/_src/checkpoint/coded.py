"""Arrays in one file, entropy-coded: an alternative to Orbax for models that are to be as small as they can be."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.protocol import PartCoding, call
from jaxcompress._src.checkpoint.errors import CheckpointError
from jaxcompress._src.checkpoint.files import write_synced
from jaxcompress._src.checkpoint.leaves import decode_leaf
from jaxcompress._src.checkpoint.manifest import LeafRecord, StoredValue
from jaxcompress._src.checkpoint.processes import place
from jaxcompress._src.coding.bytes import Reader, Writer
from jaxcompress._src.coding.codes import decode_codes, encode_codes

_RAW, _PLANES, _CODES = 0, 1, 2


def write_coded(path: str, records: Iterable[LeafRecord], arrays: Mapping[str, Any]) -> None:
    """Writes arrays, in the order of the records; each becomes the shortest of what the coders give.

    Packed codes are coded as codes, and everything else byte by byte, the first bytes of all elements together.

    Args:
        path: of the file.
        records: describe the arrays.
        arrays: JAX or NumPy arrays by name, at least those that have elements; all of them in this process.
    """
    writer = Writer()
    for _, value, coding in _stored_arrays(records):
        writer.block(_encode(np.asarray(arrays[value.array or ""]), coding))
    write_synced(path, writer.done())


def read_coded(path: str, records: Iterable[LeafRecord], targets: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the arrays that `write_coded` wrote.

    Args:
        path: of the file.
        records: describe the arrays.
        targets: by name, a `jax.ShapeDtypeStruct` with a sharding, or a NumPy array for a NumPy result.

    Returns:
        The arrays, by name.

    Raises:
        CheckpointError: the file does not hold these arrays; names the leaf.
    """
    with open(path, "rb") as file:
        reader = Reader(file.read())
    arrays = {}
    for record, value, coding in _stored_arrays(records):
        name = value.array or ""
        try:
            array = _decode(reader.block(), tuple(value.shape or ()), jnp.dtype(value.dtype), coding)
        except (ValueError, MemoryError) as err:
            raise CheckpointError(
                f"Array {name!r} of leaf {record.name!r} in {path!r} cannot be decoded: {err}."
            ) from err
        target = targets[name]
        arrays[name] = array if isinstance(target, np.ndarray) else place(array, target.sharding)
    if rest := len(reader.rest()):
        raise CheckpointError(f"{path!r} has {rest} bytes behind the arrays of the manifest.")
    return arrays


def _stored_arrays(records: Iterable[LeafRecord]) -> Iterator[tuple[LeafRecord, StoredValue, PartCoding | None]]:
    """Every array with elements, and how it holds small integers, if it does."""

    def visit(value: StoredValue, coding: PartCoding | None) -> Iterator[tuple[StoredValue, PartCoding | None]]:
        if value.array is not None and 0 not in (value.shape or ()):
            yield value, coding
        leaf = decode_leaf(value, _abstract(value)) if value.parts else None
        for name, part in value.parts.items():
            yield from visit(part, None if leaf is None else call(leaf, "part_coding", name))

    for record in records:
        for value, coding in visit(record.value, None):
            yield record, value, coding


def _abstract(value: StoredValue) -> dict[str, Any]:
    return {part.array or "": jax.ShapeDtypeStruct(part.shape or (), jnp.dtype(part.dtype)) for part in value.arrays()}


def _encode(array: np.ndarray, coding: PartCoding | None) -> bytes:
    if coding is not None:
        codes = coding.unpack(array)
        # What lies in the padding of the last block is not part of the codes; only zeros come back.
        if np.array_equal(coding.pack(codes), array):
            return bytes([_CODES]) + encode_codes(codes, bits=coding.bits)
    raw = np.frombuffer(array.tobytes(), np.uint8)
    planes = Writer()
    for plane in raw.reshape(-1, array.dtype.itemsize).T:
        planes.block(encode_codes(plane.reshape(array.shape)))
    return min(bytes([_RAW]) + raw.tobytes(), bytes([_PLANES]) + planes.done(), key=len)


def _decode(data: bytes, shape: tuple[int, ...], dtype: Any, coding: PartCoding | None) -> np.ndarray:
    kind, data = data[:1], data[1:]
    if kind == bytes([_CODES]) and coding is not None:
        array = coding.pack(decode_codes(data, coding.shape, bits=coding.bits))
        if array.shape != shape:
            raise ValueError(f"its codes fill bytes of shape {array.shape}, the manifest says {shape}")
        return array
    if kind == bytes([_RAW]):
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it has {len(data)} bytes, {math.prod(shape) * dtype.itemsize} are needed")
        return np.frombuffer(data, np.uint8).copy().view(dtype).reshape(shape)
    if kind == bytes([_PLANES]):
        reader = Reader(data)
        planes = [decode_codes(reader.block(), shape).ravel() for _ in range(dtype.itemsize)]
        if len(reader.rest()):
            raise ValueError("bytes are left behind its planes")
        return np.ascontiguousarray(np.stack(planes, axis=1)).view(dtype).reshape(shape)
    raise ValueError(f"its kind {kind!r} is unknown")
