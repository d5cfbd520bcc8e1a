"""The file of a manifest: JSON to read, or the same in a few hundred bytes."""

import json
import os
import zlib
from typing import Any

from jaxcompress.checkpoint._directory import write_synced
from jaxcompress.checkpoint._manifest import Manifest
from jaxcompress.checkpoint._manifest_json import manifest_to_json

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


def write_manifest(directory: str, manifest: Manifest) -> None:
    """Writes a manifest: as JSON beside Orbax, in short beside coded arrays."""
    content = manifest_to_json(manifest)
    if manifest.storage == "orbax":
        text = json.dumps(content, indent=1, allow_nan=False)
        write_synced(os.path.join(directory, MANIFEST_NAME), text.encode())
        return
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=_DICTIONARY)
    packed = packer.compress(text.encode()) + packer.flush()
    write_synced(os.path.join(directory, SHORT_NAME), zlib.crc32(packed).to_bytes(4, "little") + packed)


def has_manifest(directory: str) -> bool:
    """Whether a directory has a manifest of either kind."""
    return any(os.path.isfile(os.path.join(directory, name)) for name in (MANIFEST_NAME, SHORT_NAME))


def read_content(directory: str) -> Any:
    """The JSON values of a manifest.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not valid; says why.
    """
    short = os.path.join(directory, SHORT_NAME)
    if os.path.isfile(short) and not os.path.lexists(os.path.join(directory, MANIFEST_NAME)):
        return _read_short(short)
    with open(os.path.join(directory, MANIFEST_NAME), encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as err:
            raise ValueError(f"{MANIFEST_NAME} is not valid JSON ({err})") from err


def _read_short(path: str) -> Any:
    with open(path, "rb") as file:
        data = file.read()
    if zlib.crc32(data[4:]).to_bytes(4, "little") != data[:4]:
        raise ValueError(f"{SHORT_NAME} does not have the CRC-32 that it begins with")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS, zdict=_DICTIONARY)
    try:
        return json.loads(unpacker.decompress(data[4:]))
    except (zlib.error, ValueError) as err:
        raise ValueError(f"{SHORT_NAME} cannot be decoded ({err})") from err
