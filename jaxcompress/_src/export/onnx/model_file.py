"""The graph as a file."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxcompress._src.export.onnx.constants import Arrangement
from jaxcompress._src.export.onnx.dimensions import Shape, onnx_dim
from jaxcompress._src.export.onnx.graph import Body, Graph, Node
from jaxcompress._src.export.onnx.types import onnx_type

OPSET = 21
IR_VERSION = 10
_MOST_INSIDE = 1_900_000_000
"""Bytes of constants; a protobuf message holds 2 GiB, so that more go to a file beside it."""
_ALIGNMENT = 64
DATA = ".data"
"""What the name of that file ends in."""


class Port(NamedTuple):
    """An input or output of the model."""

    name: str
    dtype: np.dtype
    shape: Shape


class Written(NamedTuple):
    """What is in the file.

    Attributes:
        nbytes: of it, and of the one beside it if there is one.
        operators: how often each is used, in inner graphs, too.
    """

    nbytes: int
    operators: Mapping[str, int]


def import_onnx() -> Any:
    """The package `onnx`.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
    """
    try:
        import onnx
        import onnx.helper
    except ModuleNotFoundError as err:
        text = "ONNX files need the package `onnx`: pip install 'jaxcompress[onnx]'"
        raise ModuleNotFoundError(text, name=err.name) from err
    return onnx


def write_model(path: Path, graph: Graph, inputs: Sequence[Port], outputs: Sequence[Port]) -> Written:
    """Writes the file, and a second one, `path` with `DATA` behind, of constants that are too large for the first."""
    onnx = import_onnx()
    nodes = _live(graph.nodes, {port.name for port in outputs})
    used = {name for node in nodes for name in _reads(node)} | {port.name for port in outputs}
    stored, moved = graph.constants.stored(used)
    nodes = [*_arrangements(graph, moved), *nodes]
    beside = sum(array.nbytes for array in stored.values()) > _MOST_INSIDE
    with contextlib.ExitStack() as stack:
        place = None
        if beside:
            data = path.with_name(f"{path.name}{DATA}")
            place = _Beside(stack.enter_context(data.open("xb")), data.name)
        model = onnx.helper.make_model(
            onnx.helper.make_graph(
                [_node(onnx, node) for node in nodes],
                "jaxcompress",
                [_port(onnx, port) for port in inputs],
                [_port(onnx, port) for port in outputs],
                [_initializer(onnx, name, array, place) for name, array in stored.items()],
            ),
            opset_imports=_opsets(onnx, nodes),
            ir_version=IR_VERSION,
            producer_name="jaxcompress",
        )
    content = model.SerializeToString()
    path.write_bytes(content)
    nbytes = len(content) + (place.size if place is not None else 0)
    operators = Counter(node.op for node in _all_nodes(nodes))
    return Written(nbytes, dict(sorted(operators.items())))


class _Beside:
    """The file of constants beside a model."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name, self.size = file, name, 0

    def add(self, array: np.ndarray) -> list[tuple[str, str]]:
        """Writes an array; gives what the model says of where it is."""
        padding = -self.size % _ALIGNMENT
        self.file.write(b"\0" * padding)
        self.file.write(np.ascontiguousarray(array).data)
        offset = self.size + padding
        self.size = offset + array.nbytes
        return [("location", self.name), ("offset", str(offset)), ("length", str(array.nbytes))]


def _live(nodes: Sequence[Node], outputs: set[str]) -> list[Node]:
    """The nodes that something reads."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.isdisjoint(node.outputs):
            continue
        attributes = {
            key: dataclasses.replace(value, nodes=tuple(_live(value.nodes, {name for name, _, _ in value.outputs})))
            if isinstance(value, Body)
            else value
            for key, value in node.attributes.items()
        }
        live = Node(node.op, node.inputs, node.outputs, node.domain, attributes)
        kept.append(live)
        needed.update(_reads(live))
    return kept[::-1]


def _reads(node: Node) -> set[str]:
    """Names that a node reads, its inner graphs included."""
    names = set(node.inputs)
    for body in node.bodies:
        names.update(name for inner in body.nodes for name in _reads(inner))
        names.update(name for name, _, _ in body.outputs)
    return names


def _all_nodes(nodes: Sequence[Node]) -> Iterator[Node]:
    for node in nodes:
        yield node
        for body in node.bodies:
            yield from _all_nodes(body.nodes)


def _arrangements(graph: Graph, moved: Sequence[Arrangement]) -> Iterator[Node]:
    for name, stored, shape, permutation in moved:
        middle = name if permutation is None else graph.fresh()
        sizes = graph.fresh()
        yield Node("Constant", (), (sizes,), "", {"value_ints": list(shape)})
        yield Node("Reshape", (stored, sizes), (middle,), "", {})
        if permutation is not None:
            yield Node("Transpose", (middle,), (name,), "", {"perm": list(permutation)})


def _opsets(onnx: Any, nodes: Sequence[Node]) -> list[Any]:
    others = sorted({node.domain for node in _all_nodes(nodes)} - {""})
    return [onnx.helper.make_opsetid("", OPSET), *(onnx.helper.make_opsetid(domain, 1) for domain in others)]


def _node(onnx: Any, node: Node) -> Any:
    attributes = {
        key: _body(onnx, value) if isinstance(value, Body) else value for key, value in node.attributes.items()
    }
    return onnx.helper.make_node(node.op, node.inputs, node.outputs, domain=node.domain, **attributes)


def _body(onnx: Any, body: Body) -> Any:
    def typed(name: str, dtype: np.dtype, ndim: int) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx_type(dtype), [None] * ndim)

    return onnx.helper.make_graph(
        [_node(onnx, node) for node in body.nodes],
        "body",
        [typed(*value) for value in body.inputs],
        [typed(*value) for value in body.outputs],
    )


def _port(onnx: Any, port: Port) -> Any:
    return onnx.helper.make_tensor_value_info(port.name, onnx_type(port.dtype), [onnx_dim(dim) for dim in port.shape])


def _initializer(onnx: Any, name: str, array: np.ndarray, beside: _Beside | None) -> Any:
    tensor = onnx.TensorProto(name=name, data_type=onnx_type(array.dtype), dims=array.shape)
    if beside is None or array.nbytes < _ALIGNMENT:
        tensor.raw_data = np.ascontiguousarray(array).tobytes()
        return tensor
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in beside.add(array):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor
