"""The file of a manifest: JSON to read, or the same in a few hundred bytes."""

import json
import os
import zlib
from typing import Any, NamedTuple

from jaxcompress._src.checkpoint.files import NotAFileError, digest, read_regular, write_synced
from jaxcompress._src.checkpoint.manifest import Manifest
from jaxcompress._src.checkpoint.manifest_json import manifest_to_json

MANIFEST_NAME = "manifest.json"

SHORT_NAME = "manifest.z"

# What manifests hold, the most frequent last; a part of the format: it can never change.
_DICTIONARY = (
    b'"OrderedDict""FrozenDict""nnx.State""nnx.Param""TransformState""NMSparseArray""pattern":["BitmaskSparseArray"'
    b'"row_shape":["starts":"levels":null"zero_point":{"kind":"None"}"QuantizedArray""scale":{"bfloat16""int8""int32"'
    b'"SequenceKey","GetAttrKey","opaque":true,"tuple""list","values":"index":{"signed":true'
    b'{"format_version":2,"versions":{"jaxcompress":"0.1.0","jax":"0.10.2"},"config":{},"metadata":{},"structure":'
    b'{"kind":"dict","children":[["DictKey","params",{"kind":"dict","children":[["DictKey","bias",{"leaf":0}],'
    b'["DictKey","kernel",{"leaf":1}]]}],["DictKey","embedding",["DictKey","weight",["DictKey","layer_'
    b'"leaves":[{"path":[["DictKey","layer_0"],["DictKey","kernel"]],"value":{"kind":"jax.Array","shape":[1,1,7],'
    b'"dtype":"float32","array":"leaf_00000"}},{"path":[["DictKey","layer_0"],["DictKey","bias"]],"value":{"kind":'
    b'"CodebookArray","shape":[784,300],"dtype":"float32","static":{"dtype":"float32","zero":true},"parts":{"data":'
    b'{"kind":"PackedArray","shape":[784,300],"dtype":"uint8","static":{"bits":4,"signed":false,"axis":-2,"width":784},'
    b'"parts":{"data":{"kind":"jax.Array","shape":[392,300],"dtype":"uint8","array":"leaf_00001.data.data"}}},'
    b'"table":{"kind":"jax.Array","shape":[1,1,15],"dtype":"float32","array":"leaf_00001.table"}}}}],'
    b'"files":{"arrays.bin":{"size":10000,"crc32":"'
)


_LIMIT = 1 << 30
"""No manifest has more bytes, packed or not."""


class RawManifest(NamedTuple):
    """The file of a manifest, as read at one moment."""

    name: str
    data: bytes


def write_manifest(directory: str, manifest: Manifest) -> None:
    """Writes a manifest, with its checksum: as JSON beside Orbax, in short beside coded arrays."""
    content = manifest_to_json(manifest)
    content |= {"checksum": checksum(content)}
    if manifest.storage == "orbax":
        text = json.dumps(content, indent=1, allow_nan=False)
        write_synced(os.path.join(directory, MANIFEST_NAME), text.encode())
        return
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=_DICTIONARY)
    packed = packer.compress(text.encode()) + packer.flush()
    write_synced(os.path.join(directory, SHORT_NAME), zlib.crc32(packed).to_bytes(4, "little") + packed)


def checksum(content: Any) -> str:
    """Of the JSON values of a manifest without the checksum itself, in whatever order and layout they were written.

    Raises:
        ValueError: a number that JSON does not have.
    """
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return digest(json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def has_manifest(directory: str) -> bool:
    """Whether a directory has a manifest of either kind."""
    return any(os.path.isfile(os.path.join(directory, name)) for name in (MANIFEST_NAME, SHORT_NAME))


def read_raw(directory: str) -> RawManifest:
    """The manifest that counts: `manifest.json`, or `manifest.z` where there is none.

    Raises:
        FileNotFoundError: there is none.
        NotAFileError: what has its name is not a file.
        OSError: it cannot be read.
    """
    # The first one again: it may have taken the place of the second in between.
    for name in (MANIFEST_NAME, SHORT_NAME):
        try:
            return RawManifest(name, read_regular(os.path.join(directory, name), _LIMIT))
        except FileNotFoundError:
            if os.path.islink(os.path.join(directory, name)):
                raise NotAFileError(f"{name!r} is a link to nothing") from None
    return RawManifest(MANIFEST_NAME, read_regular(os.path.join(directory, MANIFEST_NAME), _LIMIT))


def decode_raw(raw: RawManifest) -> Any:
    """The JSON values of a manifest.

    Raises:
        ValueError: it is not valid; says why.
    """
    if raw.name == SHORT_NAME:
        return _decode_short(raw.data)
    try:
        return json.loads(raw.data.decode())
    except ValueError as err:
        raise ValueError(f"{MANIFEST_NAME} is not valid JSON ({err})") from err


def arrays_name(directory: str, name: str | None = None) -> str | None:
    """The name of the arrays that the manifest of a checkpoint names; None if that cannot be told.

    Args:
        directory: the checkpoint.
        name: of the manifest; None: the one that counts.
    """
    try:
        path = os.path.join(directory, name or "")
        raw = RawManifest(name, read_regular(path, _LIMIT)) if name else read_raw(directory)
        content = decode_raw(raw)
        return str(content.get("arrays", "arrays" if raw.name == MANIFEST_NAME else "arrays.bin"))
    except (OSError, ValueError, RecursionError, AttributeError):
        return None


def _decode_short(data: bytes) -> Any:
    if zlib.crc32(data[4:]).to_bytes(4, "little") != data[:4]:
        raise ValueError(f"{SHORT_NAME} does not have the CRC-32 that it begins with")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS, zdict=_DICTIONARY)
    try:
        text = unpacker.decompress(data[4:], _LIMIT)
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise ValueError("it does not end where it should")
        return json.loads(text)
    except (zlib.error, ValueError) as err:
        raise ValueError(f"{SHORT_NAME} cannot be decoded ({err})") from err
