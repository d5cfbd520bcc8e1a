"""LiteRT (TensorFlow Lite) files without TensorFlow, with the codes of compressed leaves."""

import dataclasses
import importlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.arrays.low_rank import LowRankArray
from jaxcompress._src.arrays.protocol import describe_leaf
from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.execution.execute import execute
from jaxcompress._src.export.files import new_file
from jaxcompress._src.export.litert_file import filled
from jaxcompress._src.export.litert_program import straight_line, unsupported_equation
from jaxcompress._src.export.litert_weights import HostWeight, Sites
from jaxcompress._src.meshes import to_host
from jaxcompress._src.tree.maps import leaves_with_paths, map_with_path
from jaxcompress._src.tree.paths import path_string
from jaxcompress._src.types import Params, is_compressed, plain


class FloatLeafWarning(UserWarning):
    """Compressed leaves that a file holds as floats, at their full size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LitertInfo:
    """What `save_litert` wrote.

    Attributes:
        path: of the file.
        nbytes: of the file.
        leaves: by path, the forms in which each compressed leaf was written, such as `int8 per-channel, inputs rounded
            to 8 bits`, or `float32 (why)`.
        inputs: their names, in order, as `Interpreter.get_signature_runner()` takes them.
        outputs: their names, in order.
    """

    path: Path
    nbytes: int
    leaves: Mapping[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def save_litert(
    path: str | os.PathLike[str],
    apply: Callable[..., Any],
    params: Params,
    *inputs: Any,
    round_inputs: bool = True,
    overwrite: bool = False,
) -> LitertInfo:
    """Writes a model as a `.tflite` file, in which compressed leaves have their own codes.

    | leaf | in the file |
    |---|---|
    | 8 bits (or 5 to 7), scales by output | int8 with the same codes and scales |
    | 4 bits or fewer, scales by output | int4 with the same codes and scales; kernels of convolutions int8 |
    | the same, scales by groups of 32, 64, ... inputs | int4 with the same codes; scales as bfloat16; rounded inputs |
    | looked up (embeddings), any scales | the same codes of 8 or 4 bits, multiplied by their scales in float32 |
    | low rank | its factors |
    | other groups, formats, kinds; codes less zero points beyond 8 bits | float32, and a warning |

    Matmuls and convolutions of int8 and int4 leaves are *dynamic-range*: the runtime rounds their inputs to 8 bits, for
    each row, with a zero point. That is what `quantize_inputs` does up to the zero point, and for leaves without it a
    rounding more. Leaves whose inputs are to be rounded in another way (static, other bits) are written as floats,
    whose inputs are rounded as asked.

    Shapes are static. Scans are unrolled. What the runtime has for float32 and int32 alone is computed in these, and
    rounded to the dtype of the model after each operation. Random numbers whose keys depend on no input are constants.
    Sums and products beyond float32's largest number stop there, and sorting does not know of NaN. It needs
    `pip install 'jaxcompress[litert]'`, and no TensorFlow.

    Args:
        path: to write, whole or not at all.
        apply: `(params, *inputs) -> outputs`, pure; float32 on the way.
        params: with or without compressed leaves; constants of the file.
        *inputs: arrays or `jax.ShapeDtypeStruct`.
        round_inputs: False: leaves whose inputs are not to be quantized are multiplied in float32; the runtime makes
            floats of their codes when it loads the file.
        overwrite: whether a file that exists is replaced.

    Raises:
        FileExistsError: there is a file, and `overwrite` is not set.
        FileNotFoundError: there is no such directory.
        ModuleNotFoundError: the converter or the runtime is not installed.
        ValueError: a shape is symbolic, or LiteRT has no form for an operation; names it, its shapes and the line of
            `apply`.

    Example:
        >>> import tempfile
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> params, _ = quantize({"w": jnp.ones((64, 8))}, QuantSpec(bits=8))
        >>> path = Path(tempfile.mkdtemp()) / "model.tflite"
        >>> info = save_litert(path, lambda p, x: x @ p["w"], params, jnp.ones((1, 64)))
        >>> info.leaves
        {'w': 'int8 per-channel, inputs rounded to 8 bits'}
    """
    _import_converter()
    abstract_inputs = jax.tree_util.tree_map_with_path(_abstract_input, inputs)
    sites = Sites()
    with new_file(Path(path), overwrite=overwrite) as place:
        constants = map_with_path(lambda path, leaf: _on_host(path, leaf, sites, round_inputs), params)
        program = straight_line(apply, params, abstract_inputs, sites)

        def run(*inputs: Any) -> Any:
            return execute(program.run, kernels=())(constants, *inputs)

        lowered = jax.jit(run, keep_unused=True).trace(*abstract_inputs).lower(lowering_platforms=("cpu",))
        names, outputs = _names(abstract_inputs, "input"), _names(lowered.out_info, "output")
        try:
            content = filled(_converted(lowered.as_text()), sites.sites, names, outputs)
            _check_runs(content)
        except _RefusedError as err:
            raise _refusal(err, program.eqns) from err
        place.write_bytes(content)
    compressed = [path for path, leaf in leaves_with_paths(params) if is_compressed(leaf)]
    leaves = {path: "; ".join(sites.forms.get(path, ["not used"])) for path in compressed}
    if sites.floats:
        lines = "\n".join(f"  {path}: {leaves[path]}" for path in sorted(sites.floats))
        warnings.warn(f"Compressed leaves that {str(path)!r} holds as floats:\n{lines}", FloatLeafWarning, stacklevel=2)
    return LitertInfo(path=Path(path), nbytes=len(content), leaves=leaves, inputs=names, outputs=outputs)


def _abstract_input(keys: tuple[Any, ...], value: Any) -> jax.ShapeDtypeStruct:
    name = path_string(keys)
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"Input {name} is {value!r}, not an array; close over flags: `lambda p, x: ...`.")
    if not all(isinstance(size, int) for size in value.shape):
        raise ValueError(
            f"Input {name} has the symbolic shape {value.shape}; LiteRT files have fixed shapes: give sizes."
        )
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _on_host(path: str, leaf: Any, sites: Sites, round_inputs: bool) -> Any:
    """A leaf as a constant: NumPy arrays, or what stands in for integer codes."""
    if isinstance(leaf, LowRankArray):
        # Its factors may be quantized.
        sites.note(path, "factors")
        return jax.tree.map(
            lambda part: _factor(_on_host(path, part, sites, round_inputs)), leaf, is_leaf=_is_part(leaf)
        )
    inputs, weight = None, leaf
    if isinstance(leaf, InputQuantizedArray):
        inputs, weight = leaf.inputs, leaf.weight
        if not _is_dynamic_int8(leaf):
            sites.note_float(path, "LiteRT rounds inputs to 8 bits, with ranges of each row; they are rounded as asked")
            return dataclasses.replace(leaf, weight=_host(plain(weight)))
    if isinstance(weight, QuantizedArray) and (numbers := _integers(weight)) is not None:
        return HostWeight(
            path=path,
            codes=numbers[0],
            scale=numbers[1],
            dtype=jnp.dtype(leaf.dtype),
            bits=4 if weight.bits <= 4 and abs(2 * numbers[0].astype(np.int16) + 1).max(initial=0) < 16 else 8,
            inputs=inputs,
            rounded=round_inputs or inputs is not None,
            sites=sites,
        )
    if inputs is not None:
        sites.note_float(path, f"{describe_leaf(weight)} has no int8 codes; inputs are rounded as asked")
        return dataclasses.replace(leaf, weight=_host(plain(weight)))
    if is_compressed(leaf):
        sites.note_float(path, f"{describe_leaf(leaf)} has no form in LiteRT")
    return _host(plain(leaf))


def _is_part(whole: Any) -> Callable[[Any], bool]:
    return lambda node: node is not whole and is_compressed(node)


def _factor(part: Any) -> Any:
    """In float32, which the runtime multiplies; as an array of JAX, which traced rows may index."""
    if isinstance(part, HostWeight):
        return part.cast(jnp.float32)
    part = jnp.asarray(part)
    return part.astype(jnp.float32) if jnp.issubdtype(part.dtype, jnp.floating) else part


def _host(leaf: Any) -> Any:
    return to_host(leaf) if isinstance(leaf, jax.Array) else leaf


def _is_dynamic_int8(leaf: InputQuantizedArray) -> bool:
    spec: Any = getattr(leaf.inputs, "spec", None)
    found = [getattr(spec, name, None) for name in ("bits", "format", "group_size", "per_tensor", "range_rule")]
    return leaf.scale is None and found == [8, "int", None, False, "min-max"]


def _integers(leaf: QuantizedArray) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes less their zero points as int8, and their scales, one for each; None where they are no such integers."""
    # A sparse array with zero points stores zeros as no code at all.
    if leaf.levels is not None or (leaf.zero_point is not None and isinstance(leaf.data, SparseArray)):
        return None
    whole = leaf.with_whole_blocks()
    codes = np.asarray(whole.codes()).astype(np.int16)
    if leaf.zero_point is not None:
        zero = _repeated(np.asarray(whole.zero_points(), np.float32), codes.shape)
        if not (zero == np.round(zero)).all():
            return None
        codes = codes - zero.astype(np.int16)
    if codes.min(initial=0) < -128 or codes.max(initial=0) > 127:
        return None
    return codes.astype(np.int8), _repeated(np.asarray(whole.scale).astype(np.float32), codes.shape)


def _repeated(blocks: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    for axis, (count, size) in enumerate(zip(blocks.shape, shape, strict=True)):
        if 1 < count < size:
            blocks = np.repeat(blocks, size // count, axis=axis)
    return np.broadcast_to(blocks, shape)


def _names(tree: Any, default: str) -> tuple[str, ...]:
    keyed = jax.tree_util.tree_flatten_with_path(tree)[0]
    names: list[str] = []
    for number, (keys, _) in enumerate(keyed):
        name = path_string(keys)
        name = f"{default}_{number}" if name == "." or name.isdigit() else name
        # Different keys may read the same: {"a": {"b": ...}} and {"a/b": ...}.
        while name in names:
            name = f"{name}_"
        names.append(name)
    return tuple(names)


def _module(name: str) -> Any:
    return importlib.import_module(f"litert_converter.{name}")


def _import_converter() -> None:
    for name in ("litert_converter", "ai_edge_litert.interpreter"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as err:
            text = f"LiteRT files need {err.name}: pip install 'jaxcompress[litert]'"
            raise ModuleNotFoundError(text, name=err.name) from err


class _RefusedError(Exception):
    """What the converter or the runtime says of a program that it does not take."""


def _converted(program: str) -> bytes:
    """The file that the converter makes of StableHLO.

    Raises:
        _RefusedError: it has no rule for an operation.
    """
    # Compiled modules, of which type checkers see nothing.
    modules = ("converter_api_ext", "mlir.ir", "mlir.passmanager")
    converter, ir, passmanager = (_module(name) for name in modules)
    context = ir.Context()
    converter.prepare_mlir_context(context)
    context.allow_unregistered_dialects = True
    with context, ir.Location.unknown():
        try:
            module = ir.Module.parse(program)
            converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), converter.ConvertToTFLConfig())
            return converter.export_flatbuffer_to_bytes(module.operation)
        except Exception as err:
            raise _RefusedError(f"LiteRT's converter says: {_first_line(err)}") from err


def _check_runs(content: bytes) -> None:
    """Raises if the runtime does not take a file.

    Raises:
        _RefusedError: it has no such operation, or not of these types.
    """
    runtime = importlib.import_module("ai_edge_litert.interpreter")
    # Without delegates, which would copy the weights into another form.
    resolver = runtime.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        runtime.Interpreter(model_content=content, experimental_op_resolver_type=resolver).allocate_tensors()
    except (RuntimeError, ValueError) as err:
        raise _RefusedError(f"LiteRT says: {_first_line(err)}") from err


def _refusal(err: _RefusedError, eqns: Sequence[Any]) -> ValueError:
    """The error of a program that is refused, which names the operation of the model."""

    def accepts(program: str) -> bool:
        try:
            _check_runs(filled(_converted(program), (), (), ()))
        except _RefusedError:
            return False
        return True

    name = unsupported_equation(eqns, accepts) or "an operation of the model, though it has each of them alone"
    return ValueError(
        f"LiteRT has no form for {name}: compute it outside of the model, in float32 or int32, or write it with other "
        f"operations. {err}"
    )


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:300]
