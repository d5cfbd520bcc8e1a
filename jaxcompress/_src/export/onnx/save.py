"""Models as ONNX files."""

import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.execution.values import Weight
from jaxcompress._src.export.files import new_file
from jaxcompress._src.export.onnx.graph import Graph, Tensor
from jaxcompress._src.export.onnx.model_file import DATA, OPSET, Port, import_onnx, write_model
from jaxcompress._src.export.onnx.options import LeafOptions, OnnxLeaf
from jaxcompress._src.export.onnx.translate import Translator
from jaxcompress._src.export.onnx.types import onnx_type
from jaxcompress._src.trace.traced import traced
from jaxcompress._src.trace.walk import as_body
from jaxcompress._src.tree.paths import path_string
from jaxcompress._src.types import Params, is_compressed


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxInfo:
    """What `save_onnx` wrote.

    Attributes:
        inputs: names, in the order of the leaves of the inputs.
        outputs: names, in the order of the leaves of the outputs.
        leaves: each use of a compressed leaf, and the form that it took.
        operators: how often each is used.
        nbytes: of the file, and of the one beside it (`.data`) if there is one.
        opset: the version of ONNX's operators.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    leaves: tuple[OnnxLeaf, ...]
    operators: Mapping[str, int]
    nbytes: int
    opset: int


def save_onnx(
    path: str | os.PathLike[str],
    apply: Callable[..., Any],
    params: Params,
    *inputs: Any,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    input_ranges: Literal["row", "tensor"] = "row",
    weight_bits: Literal[7, 8] = 8,
    accuracy_level: int = 0,
    overwrite: bool = False,
) -> OnnxInfo:
    """Writes a model as an ONNX file, which ONNX Runtime runs without JAX.

    `apply` is traced once, and its jaxpr written operator by operator. Compressed leaves stay small: they travel as
    they are stored, as in `execute`. `MatMulNBits` of ONNX Runtime multiplies with quantized ones of up to 8 bits,
    `MatMulInteger` with those whose inputs are quantized, low-rank ones are two matmuls, rows that are looked up are
    unpacked alone; all others are unpacked in the graph, once when the file is loaded. `info.leaves` has them all.

    An option that concerns no leaf of the model is said in a warning.

    Equal to JAX up to the order of float sums: everything but the following. `input_ranges="tensor"` quantizes dynamic
    inputs with one range for a whole tensor, to unsigned codes, where JAX has one for each row: a BERT is a fifth
    faster, and its error twice as large. `weight_bits=7` rounds codes of 8 bits once more. `accuracy_level=4` quantizes
    the inputs of `MatMulNBits`. Sorting and `argmax` do not know of NaN. bfloat16 is computed in float32 and rounded
    after each operator.

    Args:
        path: of the file; `.onnx` by custom. It is written whole or not at all. Constants of more than 1.9 GB go to a
            second file beside it, `path` with `.data` behind.
        apply: `(params, *inputs) -> outputs`, pure.
        params: plain or compressed arrays, which are constants of the file.
        *inputs: trees of arrays or of `jax.ShapeDtypeStruct`; their shapes and dtypes are read only. Sizes may be
            symbols of one `jax.export.symbolic_shape`, whatever they are in a run. What is no array is static.
        input_names: of the leaves of the inputs; by default the names of the arguments, with paths in trees.
        output_names: of the leaves of the outputs; by default their paths, or `output`.
        input_ranges: of dynamically quantized inputs: "row" (as JAX has them) or "tensor" (one for all rows).
        weight_bits: of weights whose inputs are quantized. 7 for processors with AVX2 alone: there ONNX Runtime's sums
            of 8 bits saturate.
        accuracy_level: of `MatMulNBits`: 0 (float32 inputs) or 4 (int8 ones: faster, an error of about 1 %); 1 to 3 are
            float types that ONNX Runtime may choose.
        overwrite: whether a file that exists is replaced, and the one beside it.

    Returns:
        What the file holds.

    Raises:
        FileExistsError: there is a file, at `path` or beside it, and `overwrite` is not set.
        ModuleNotFoundError: `onnx` is not installed.
        NotImplementedError: a primitive or dtype that cannot be written; names it, its shapes and the line of `apply`.
        FileNotFoundError: there is no such directory.
        ValueError: names that are not one for each leaf, or not distinct; a leaf whose inputs are to be quantized and
            never would be.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp
        >>> (batch,) = jax.export.symbolic_shape("batch")
        >>> x = jax.ShapeDtypeStruct((batch, 2), jnp.float32)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     info = save_onnx(f"{directory}/m.onnx", lambda params, x: x @ params["w"], {"w": jnp.eye(2)}, x)
        >>> info.inputs, info.outputs, info.operators
        (('x',), ('output',), {'Identity': 1, 'MatMul': 1})
    """
    import_onnx()
    options = LeafOptions(input_ranges=input_ranges, weight_bits=weight_bits, accuracy_level=accuracy_level)
    names = _input_names(apply, inputs, input_names)
    with new_file(Path(path), overwrite=overwrite, companion=DATA) as place:
        model = traced(apply, params, inputs)
        outputs = _distinct("output_names", _output_names(model.outputs), output_names, taken=names)
        graph = Graph(taken=[*names, *outputs])
        translator = Translator(graph, options)
        ports = [_port(name, value) for name, value in zip(names, model.values, strict=True)]
        for port in ports:
            graph.dimensions.add_input(port.name, port.shape)
        leaves = [_known(path, leaf) for path, leaf in zip(model.paths, model.leaves, strict=True)]
        results = translator.run(as_body(model.closed), [*leaves, *(_carried(graph, port) for port in ports)])
        written = [
            _write_output(graph, name, translator.leaves.plain(value), var.aval)
            for name, value, var in zip(outputs, results, model.closed.jaxpr.outvars, strict=True)
        ]
        file = write_model(place, graph, ports, written)
    if unused := options.without_effect(tuple(translator.leaves.notes)):
        warnings.warn(f"Options without an effect on {os.fspath(path)!r}: {'; '.join(unused)}.", stacklevel=2)
    return OnnxInfo(
        inputs=tuple(names),
        outputs=tuple(outputs),
        leaves=tuple(translator.leaves.notes),
        operators=file.operators,
        nbytes=file.nbytes,
        opset=OPSET,
    )


def _known(path: str, leaf: Any) -> Any:
    if is_compressed(leaf):
        return Weight(leaf, path)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"Leaf {path!r} is abstract: the file holds its numbers.")
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else np.asarray(leaf)


def _port(name: str, value: Any) -> Port:
    try:
        onnx_type(value.dtype)
    except NotImplementedError as err:
        err.add_note(f"input {name!r}")
        raise
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    return Port(name, np.dtype(dtype), tuple(value.shape))


def _carried(graph: Graph, port: Port) -> Tensor:
    """An input as the graph computes with it."""
    name = port.name
    if port.dtype == jax.numpy.bfloat16:
        name = graph.op("Cast", name, to=onnx_type(np.float32))
    return Tensor(name, port.shape, port.shape, port.dtype)


def _write_output(graph: Graph, name: str, value: Any, aval: Any) -> Port:
    tensor = graph.full(value)
    dtype = np.dtype(aval.dtype)
    source = tensor.name
    if dtype == jax.numpy.bfloat16:
        source = graph.op("Cast", source, to=onnx_type(dtype))
    graph.named_identity(source, name)
    return Port(name, dtype, tuple(aval.shape))


def _input_names(apply: Callable[..., Any], inputs: Sequence[Any], given: Sequence[str] | None) -> list[str]:
    arguments = _argument_names(apply, len(inputs))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tuple(inputs), is_leaf=is_compressed)
    names = []
    for keys, leaf in leaves:
        name = "/".join([arguments[keys[0].idx], *([path_string(keys[1:])] if keys[1:] else [])])
        if is_compressed(leaf):
            raise ValueError(f"Input {name!r} is a compressed array: those are constants of the file, in `params`.")
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            names.append(name)
    return _distinct("input_names", names, given)


def _argument_names(apply: Callable[..., Any], count: int) -> list[str]:
    """Names of the arguments behind the parameters, where `apply` says them."""
    try:
        parameters = list(inspect.signature(apply).parameters.values())[1:]
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds][:count]
    return [*names, *(f"input_{number}" for number in range(len(names), count))]


def _output_names(structure: Any) -> list[str]:
    tree = jax.tree.unflatten(structure, range(structure.num_leaves))
    paths = [path_string(keys) if keys else "" for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [path if path and not path[0].isdigit() else f"output_{path}" if path else "output" for path in paths]


def _distinct(argument: str, names: list[str], given: Sequence[str] | None, taken: Sequence[str] = ()) -> list[str]:
    """The names, or those that are given; none twice, and none of another input or output."""
    if given is not None:
        if len(given) != len(names):
            raise ValueError(f"`{argument}` must be one for each of {names}, got {list(given)}.")
        if len({*given, *taken}) != len(given) + len(taken) or "" in given:
            others = f" and from {list(taken)}" if taken else ""
            raise ValueError(
                f"`{argument}` must be distinct from each other{others}, and not empty, got {list(given)}."
            )
        return list(given)
    result: list[str] = []
    for name in names:
        while name in result or name in taken:
            name = f"{name}_out" if taken else f"{name}_"
        result.append(name)
    return result
