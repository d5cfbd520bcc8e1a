"""Arrays in one file, entropy-coded: an alternative to Orbax for models that are to be as small as they can be."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.packed import PackedArray, pack
from jaxcompress._src.checkpoint.errors import CheckpointError
from jaxcompress._src.checkpoint.files import write_synced
from jaxcompress._src.checkpoint.manifest import LeafRecord, StoredValue
from jaxcompress._src.checkpoint.processes import place
from jaxcompress._src.clustering.bytes import Reader, Writer
from jaxcompress._src.clustering.entropy import decode_codes, encode_codes

_RAW, _PLANES, _CODES = 0, 1, 2


class _Packing(NamedTuple):
    """How the bytes of an array hold codes."""

    bits: int
    axis: int
    width: int


def write_coded(path: str, records: Iterable[LeafRecord], arrays: Mapping[str, Any]) -> None:
    """Writes arrays, in the order of the records; each becomes the shortest of what the coders give.

    Packed codes are coded as codes, and everything else byte by byte, the first bytes of all elements together.

    Args:
        path: of the file.
        records: describe the arrays.
        arrays: JAX or NumPy arrays by name, at least those that have elements; all of them in this process.
    """
    writer = Writer()
    for _, value, packing in _stored_arrays(records):
        writer.block(_encode(np.asarray(arrays[value.array or ""]), packing))
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
    found = {}
    for record, value, packing in _stored_arrays(records):
        name = value.array or ""
        try:
            array = _decode(reader.block(), tuple(value.shape or ()), jnp.dtype(value.dtype), packing)
        except (ValueError, MemoryError) as err:
            raise CheckpointError(
                f"Array {name!r} of leaf {record.name!r} in {path!r} cannot be decoded: {err}."
            ) from err
        target = targets[name]
        found[name] = array if isinstance(target, np.ndarray) else place(array, target.sharding)
    if rest := len(reader.rest()):
        raise CheckpointError(f"{path!r} has {rest} bytes behind the arrays of the manifest.")
    return found


def _stored_arrays(records: Iterable[LeafRecord]) -> Iterable[tuple[LeafRecord, StoredValue, _Packing | None]]:
    """Every array with elements, and how it holds codes, if it is part of a `PackedArray`."""

    def visit(value: StoredValue, packing: _Packing | None) -> Iterable[tuple[StoredValue, _Packing | None]]:
        if value.array is not None and 0 not in (value.shape or ()):
            yield value, packing
        inner = None
        if value.kind == "PackedArray":
            inner = _Packing(*(value.static.get(name) for name in _Packing._fields))  # type: ignore[arg-type]
        for part in value.parts.values():
            yield from visit(part, inner)

    for record in records:
        for value, packing in visit(record.value, None):
            yield record, value, packing


def _encode(array: np.ndarray, packing: _Packing | None) -> bytes:
    if packing is not None:
        codes = np.asarray(_unpack(jnp.asarray(array), packing))
        # What lies in the padding of the last block is not part of the codes; only zeros come back.
        if np.array_equal(_pack(codes, packing), array):
            return bytes([_CODES]) + encode_codes(codes, bits=packing.bits)
    raw = np.frombuffer(array.tobytes(), np.uint8)
    planes = Writer()
    for plane in raw.reshape(-1, array.dtype.itemsize).T:
        planes.block(encode_codes(plane.reshape(array.shape)))
    return min(bytes([_RAW]) + raw.tobytes(), bytes([_PLANES]) + planes.done(), key=len)


def _decode(data: bytes, shape: tuple[int, ...], dtype: Any, packing: _Packing | None) -> np.ndarray:
    kind, data = data[:1], data[1:]
    if kind == bytes([_CODES]) and packing is not None:
        logical = list(shape)
        logical[packing.axis] = packing.width
        found = _pack(decode_codes(data, tuple(logical), bits=packing.bits), packing)
        if found.shape != shape:
            raise ValueError(f"its codes fill bytes of shape {found.shape}, the manifest says {shape}")
        return found
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


def _unpack(data: jax.Array, packing: _Packing) -> jax.Array:
    return PackedArray(data=data, signed=False, **packing._asdict()).materialize()


def _pack(codes: np.ndarray, packing: _Packing) -> np.ndarray:
    return np.asarray(pack(jnp.asarray(codes), bits=packing.bits, axis=packing.axis).data)  # type: ignore[union-attr]
