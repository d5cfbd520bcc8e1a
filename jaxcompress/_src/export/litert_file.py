"""The flatbuffer of a LiteRT model: custom calls become the runtime's operations, with the codes of their sites."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcompress._src.export.litert_weights import PREFIX, Site, nibbles

# With the lowest versions that have int8 or int4 weights, with a scale for each output, beside float inputs.
_OPERATIONS = {
    "fully_connected": ("FULLY_CONNECTED", 12),
    "conv": ("CONV_2D", 5),
    "depthwise": ("DEPTHWISE_CONV_2D", 6),
    "gelu": ("GELU", 1),
}
_COMBINES = ("ADD", "MUL", "MAXIMUM", "MINIMUM")
_STABLEHLO = ("STABLEHLO_ADD", "STABLEHLO_MULTIPLY", "STABLEHLO_MAXIMUM", "STABLEHLO_MINIMUM")
"""What the runtime knows of those where a scatter combines with them; the converter writes the others."""
_ALIGNMENT = 16


def filled(content: bytes, sites: Sequence[Site], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """The file with the weights in the places of the custom calls.

    Args:
        content: what the converter wrote.
        sites: by number.
        inputs: names of the model's inputs, in order.
        outputs: names of its outputs, in order; where there are none of both, the file has no signature.
    """
    schema: Any = importlib.import_module("litert_converter.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    editor = _Editor(schema, model)
    for graph in model.subgraphs:
        graph.operators = [new for old in graph.operators for new in editor.replaced(graph, old, sites)]
        _fuse_biases(schema, model, graph)
        editor.add_biases(graph)
    editor.combine_by_stablehlo()
    _drop_unused_codes(model)
    if inputs or outputs:
        _name(schema, model, inputs, outputs)
    _share_buffers(model)
    builder = _aligned_builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@dataclasses.dataclass(frozen=True)
class _Editor:
    schema: Any
    model: Any

    def replaced(self, graph: Any, operation: Any, sites: Sequence[Site]) -> list[Any]:
        """The operations that stand for one."""
        options = operation.builtinOptions2
        name = getattr(options, "callTargetName", None)
        name = name.decode() if isinstance(name, bytes) else name
        if not name or not name.startswith(PREFIX):
            return [operation]
        site = sites[int(name.removeprefix(PREFIX))]
        operation.opcodeIndex = self.opcode(*_OPERATIONS[site.kind])
        operation.builtinOptions2Type, operation.builtinOptions2 = 0, None
        operation.builtinOptionsType, operation.builtinOptions = self.options(site)
        if site.kind == "gelu":
            return [operation]
        weight = self.weight(graph, site, name)
        before: list[Any] = []
        if not site.rounded:
            before, weight = [self.dequantized(graph, weight, name)], len(graph.tensors)
            graph.tensors.append(self.tensor(f"{name}_float", site.codes.shape, self.schema.TensorType.FLOAT32, 0))
            before[0].outputs = np.array([weight], np.int32)
        operation.inputs = np.array([operation.inputs[0], weight, -1], np.int32)
        return [*before, operation]

    def combine_by_stablehlo(self) -> None:
        """Gives the bodies of scatters the operations that the runtime looks for there."""
        operators = self.schema.BuiltinOperator
        names = {getattr(operators, old): new for old, new in zip(_COMBINES, _STABLEHLO, strict=True)}
        kind = self.schema.BuiltinOptions2.StablehloScatterOptions
        scatters = [each for graph in self.model.subgraphs for each in graph.operators]
        for scatter in [each for each in scatters if each.builtinOptions2Type == kind]:
            for operation in self.model.subgraphs[scatter.builtinOptions2.updateComputationSubgraphIndex].operators:
                if (code := self.model.operatorCodes[operation.opcodeIndex].builtinCode) in names:
                    operation.opcodeIndex = self.opcode(names[code], 1)
                    operation.builtinOptionsType, operation.builtinOptions = 0, None

    def options(self, site: Site) -> tuple[int, Any]:
        """Those of the operation of a site, with their type."""
        schema = self.schema
        if site.kind == "gelu":
            return schema.BuiltinOptions.GeluOptions, schema.GeluOptionsT()
        if site.kind == "fully_connected":
            options = schema.FullyConnectedOptionsT()
            options.keepNumDims, options.asymmetricQuantizeInputs = True, site.rounded
            return schema.BuiltinOptions.FullyConnectedOptions, options
        if site.kind == "conv":
            options, kind = schema.Conv2DOptionsT(), schema.BuiltinOptions.Conv2DOptions
        else:
            options, kind = schema.DepthwiseConv2DOptionsT(), schema.BuiltinOptions.DepthwiseConv2DOptions
            options.depthMultiplier = site.multiplier
        options.padding = schema.Padding.SAME if site.same else schema.Padding.VALID
        options.strideH, options.strideW = site.strides
        options.dilationHFactor, options.dilationWFactor = site.dilation
        return kind, options

    def weight(self, graph: Any, site: Site, name: str) -> int:
        """The tensor of the codes."""
        types = self.schema.TensorType
        codes = np.ascontiguousarray(site.codes)
        content, kind = (nibbles(codes), types.INT4) if site.bits == 4 else (codes, types.INT8)
        tensor = self.tensor(name, codes.shape, kind, self.buffer(content))
        tensor.quantization = quantization = self.schema.QuantizationParametersT()
        # Of a depthwise kernel the outputs are last.
        quantization.quantizedDimension = 3 if site.kind == "depthwise" else 0
        if site.scale.ndim == 1:
            quantization.scale, quantization.zeroPoint = site.scale, np.zeros(site.scale.shape, np.int64)
        else:
            steps = self.tensor(f"{name}_scale", site.scale.shape, types.FLOAT16, self.buffer(site.scale.astype("<f2")))
            graph.tensors.append(steps)
            quantization.detailsType = self.schema.QuantizationDetails.BlockwiseQuantization
            quantization.details = details = self.schema.BlockwiseQuantizationT()
            details.scales, details.zeroPoints = len(graph.tensors) - 1, -1
            details.blockSize = codes.shape[1] // site.scale.shape[1]
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def dequantized(self, graph: Any, weight: int, name: str) -> Any:
        """The operation that makes floats of the codes, once."""
        operation = self.schema.OperatorT()
        operation.opcodeIndex = self.opcode("DEQUANTIZE", 5)
        operation.inputs = np.array([weight], np.int32)
        operation.builtinOptionsType = self.schema.BuiltinOptions.DequantizeOptions
        operation.builtinOptions = self.schema.DequantizeOptionsT()
        return operation

    def add_biases(self, graph: Any) -> None:
        """Convolutions must have one."""
        convolutions = {self.schema.BuiltinOperator.CONV_2D, self.schema.BuiltinOperator.DEPTHWISE_CONV_2D}
        for operation in graph.operators:
            code = self.model.operatorCodes[operation.opcodeIndex].builtinCode
            if code in convolutions and operation.inputs[-1] == -1:
                count = graph.tensors[operation.outputs[0]].shape[-1]
                zeros = self.buffer(np.zeros(count, np.float32))
                operation.inputs[-1] = len(graph.tensors)
                graph.tensors.append(self.tensor("no_bias", (count,), self.schema.TensorType.FLOAT32, zeros))

    def opcode(self, name: str, version: int) -> int:
        """The number of an operation code, which is added where there is none."""
        wanted = getattr(self.schema.BuiltinOperator, name)
        codes = self.model.operatorCodes
        for number, code in enumerate(codes):
            if code.builtinCode == wanted and code.version == version:
                return number
        code = self.schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = wanted, min(wanted, 127), version
        codes.append(code)
        return len(codes) - 1

    def tensor(self, name: str, shape: Sequence[int], kind: int, buffer: int) -> Any:
        """A new tensor, which is in no graph yet."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, np.array(shape, np.int32), kind, buffer
        tensor.hasRank = True
        return tensor

    def buffer(self, content: np.ndarray) -> int:
        """A new buffer."""
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(content.tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1


def _fuse_biases(schema: Any, model: Any, graph: Any) -> None:
    """The addition of one number to each output becomes the operation's bias: a pass over the outputs less."""
    operators = schema.BuiltinOperator
    weighted = {operators.FULLY_CONNECTED, operators.CONV_2D, operators.DEPTHWISE_CONV_2D}

    def code(operation: Any) -> int:
        return model.operatorCodes[operation.opcodeIndex].builtinCode

    readers: dict[int, list[Any]] = {}
    for operation in graph.operators:
        for number in set(operation.inputs.tolist()):
            readers.setdefault(number, []).append(operation)
    fused: set[int] = set()
    for operation in graph.operators:
        if code(operation) not in weighted or len(operation.inputs) < 3 or operation.inputs[2] != -1:
            continue
        (result,) = operation.outputs.tolist()
        adds = readers.get(result, [])
        if len(adds) != 1 or result in graph.outputs or code(adds[0]) != operators.ADD:
            continue
        (add,), shape = adds, graph.tensors[result].shape
        others = [number for number in add.inputs.tolist() if number != result]
        bias = graph.tensors[others[0]] if len(others) == 1 else None
        same = list(graph.tensors[add.outputs[0]].shape) == list(shape)
        if bias is None or not same or bias.type != schema.TensorType.FLOAT32:
            continue
        content = model.buffers[bias.buffer].data
        if (
            content is None
            or len(content) != 4 * shape[-1]
            or int(np.prod(bias.shape)) != shape[-1]
            or bias.shape[-1] != shape[-1]
        ):
            continue
        flat = schema.TensorT()
        flat.name, flat.shape, flat.type, flat.buffer, flat.hasRank = (
            bias.name,
            shape[-1:],
            bias.type,
            bias.buffer,
            True,
        )
        graph.tensors.append(flat)
        operation.inputs[2], operation.outputs = len(graph.tensors) - 1, add.outputs
        operation.builtinOptions.fusedActivationFunction = add.builtinOptions.fusedActivationFunction
        fused.add(id(add))
    graph.operators = [operation for operation in graph.operators if id(operation) not in fused]


def _drop_unused_codes(model: Any) -> None:
    """The runtime refuses a file that lists an operation that it does not have, used or not."""
    operations = [operation for graph in model.subgraphs for operation in graph.operators]
    used = sorted({operation.opcodeIndex for operation in operations})
    for operation in operations:
        operation.opcodeIndex = used.index(operation.opcodeIndex)
    model.operatorCodes = [model.operatorCodes[number] for number in used]


def _name(schema: Any, model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names of inputs and outputs: `Interpreter.get_signature_runner()` takes and returns them."""
    graph = model.subgraphs[0]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    for attribute, names, numbers in (("inputs", inputs, graph.inputs), ("outputs", outputs, graph.outputs)):
        pairs = []
        for name, number in zip(names, numbers, strict=True):
            pair = schema.TensorMapT()
            pair.name, pair.tensorIndex = name, int(number)
            pairs.append(pair)
        setattr(signature, attribute, pairs)
    for name, number in zip(inputs, graph.inputs, strict=True):
        graph.tensors[number].name = name
    model.signatureDefs = [signature]


def _share_buffers(model: Any) -> None:
    """One buffer for equal contents: a table that is looked up and multiplied is stored once."""
    first: dict[bytes, int] = {}
    for number, buffer in enumerate(model.buffers):
        if buffer.data is not None and len(buffer.data):
            first.setdefault(bytes(buffer.data), number)
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            content = model.buffers[tensor.buffer].data
            if content is not None and len(content):
                tensor.buffer = first[bytes(content)]
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    used |= {entry.buffer for entry in model.metadata or []}
    for number, buffer in enumerate(model.buffers):
        if number not in used:
            buffer.data = None


def _aligned_builder() -> Any:
    import flatbuffers

    class Builder(flatbuffers.Builder):
        # The Python builder aligns vectors of bytes to bytes; the runtime reads floats from them.
        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802
            return super().StartVector(elemSize, numElems, _ALIGNMENT if elemSize == 1 else alignment)

    return Builder(1 << 20)
