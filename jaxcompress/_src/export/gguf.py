"""GGUF files of compressed models: what llama.cpp runs."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import flax.linen as nn
import numpy as np

from jaxcompress._src.export.files import new_file
from jaxcompress._src.export.gguf_blocks import blocks_of
from jaxcompress._src.export.gguf_fields import (
    Field,
    architecture_of,
    check_described,
    model_fields,
    rope_divisors,
)
from jaxcompress._src.export.gguf_tokenizer import tokenizer_fields
from jaxcompress._src.export.info import (
    CannotHoldError,
    ExportedLeaf,
    ExportInfo,
    Unsupported,
    check_unsupported,
    largest_difference,
)
from jaxcompress._src.export.integers import integer_rows
from jaxcompress._src.models.families import config_of, family_of
from jaxcompress._src.models.hf.gguf import ARCHITECTURES, SLOWED, Architecture, gguf_package
from jaxcompress._src.models.hf.names import Parameter
from jaxcompress._src.models.leaves import check_parameters, flatten_params
from jaxcompress._src.types import Params, is_compressed, plain

DenseType: TypeAlias = Literal["float32", "float16", "bfloat16"]

_DENSE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7}
_KIND_OF_BLOCKS = 2  # of `general.quantization_version`: with scales in float16


class _Tensor(NamedTuple):
    """A tensor of a file, with the name of its type, and its largest rounding."""

    data: np.ndarray
    kind: str
    rounding: float


def save_gguf(
    path: str | os.PathLike[str],
    module: nn.Module,
    params: Params,
    *,
    dense: DenseType = "float16",
    source: str | os.PathLike[str] | None = None,
    name: str | None = None,
    unsupported: Unsupported = "error",
    overwrite: bool = False,
) -> ExportInfo:
    """Writes a language model as a GGUF file; `models.from_pretrained(path)` reads the same weights back.

    | leaf | in the file |
    |---|---|
    | integers of 1 to 4 bits, 5 bits, 6 to 8 bits | Q4_0, Q5_0, Q8_0 |
    | the same with zero points | Q4_1, Q5_1, an error |
    | plain matrices | `dense` |
    | norms, biases, positions | F32 |

    Groups are multiples of 32 inputs, or whole rows. Blocks of 32 have a scale in float16: float32 scales are rounded
    to it (and so is, of Q4_1 and Q5_1, scale x zero point), which `ExportedLeaf.rounding` reports; `round_scales`
    rounds them before, so that what is written is what was measured. A head tied to the embedding is not written twice.
    Queries and keys of a Llama are in llama.cpp's order of rotary pairs.

    Args:
        path: of the file, `.gguf`; takes its name when it is complete.
        module: a language model of type gpt2, llama, mistral, qwen2 or qwen3.
        params: its parameters, with compressed leaves.
        dense: the type of plain matrices.
        source: of the model: a GGUF file, or a directory with the `tokenizer.json` of a byte-level BPE, whose tokenizer
            the file gets. Without it, the file has none: `from_pretrained` reads it, llama.cpp generates from token ids
            alone.
        name: of the model; by default the file's.
        unsupported: what becomes of compressed leaves that the format cannot hold: "error", or "dense": plain matrices.
        overwrite: replace a file.

    Returns:
        The form, bytes and rounding of each leaf.

    Raises:
        FileExistsError: there is a file, without `overwrite`.
        FileNotFoundError: there is no such directory.
        ModuleNotFoundError: the package `gguf` is missing: the extra `jaxcompress[gguf]`.
        ValueError: a leaf cannot be held or does not fit the module, or the format does not say what the config does
            (sliding windows, biases of a Llama, other activations). The message names the leaf or the setting.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp
        >>> from jaxcompress.models import LlamaConfig, from_pretrained, make_module
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> from jaxcompress.tree import by_path
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        ... )
        >>> module = make_module(config)
        >>> params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
        >>> small, _ = quantize(params, QuantSpec(bits=4, group_size=32), select=by_path("model/layers/.*/kernel"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     info = save_gguf(f"{folder}/small.gguf", module, small)
        ...     from_pretrained(f"{folder}/small.gguf")[0].config == config
        True
        >>> leaf = info.leaves["model/layers/0/mlp/down_proj/kernel"]
        >>> leaf.form, leaf.nbytes, leaf.rounding < 1e-4
        ('Q4_0', 1152, True)

    References:
        The specification of GGUF and the block types in ggml.
    """
    if dense not in get_args(DenseType):
        raise ValueError(f"`dense` must be one of {get_args(DenseType)}, got {dense!r}.")
    path, config = Path(path), config_of(module)
    if path.suffix != ".gguf":
        raise ValueError(f"`path` must end in '.gguf', by which `from_pretrained` knows such files, got {str(path)!r}.")
    gguf_package()
    with new_file(path, overwrite=overwrite) as temporary:
        architecture = architecture_of(config)
        fields, divisors = model_fields(config, architecture), rope_divisors(config)
        check_described(config, architecture, fields, divisors)
        fields |= tokenizer_fields(None if source is None else Path(source), vocab_size=config.vocab_size)
        tensors, names = _tensors(config, params, ARCHITECTURES[architecture], dense, unsupported)
        fields |= _general_fields(name or path.stem, tensors)
        more = {} if divisors is None else {SLOWED: _Tensor(divisors, "F32", 0.0)}
        _write(temporary, architecture, fields, {names[leaf]: tensor for leaf, tensor in tensors.items()} | more)
    return ExportInfo(
        leaves={
            leaf: ExportedLeaf(form=tensor.kind, nbytes=tensor.data.nbytes, rounding=tensor.rounding)
            for leaf, tensor in tensors.items()
        }
    )


def _tensors(
    config: Any, params: Params, architecture: Architecture, dense: DenseType, unsupported: Unsupported
) -> tuple[dict[str, _Tensor], dict[str, str]]:
    """Tensors, and their names in the file, by path of the leaf."""
    family = family_of(config)
    parameters, leaves = family.parameters(config), flatten_params(params)
    shapes = {path: parameter.shape for path, parameter in parameters.items()}
    check_parameters(leaves, shapes, f"a {config.head!r} model of type {family.model_type!r}")
    if empty := [path for path, shape in shapes.items() if 0 in shape]:
        raise ValueError(f"Leaf {empty[0]!r} has shape {shapes[empty[0]]}; GGUF files hold no empty layers.")
    tensors: dict[str, _Tensor] = {}
    refusals: dict[str, str] = {}
    for path, leaf in leaves.items():
        order = _order(parameters[path], config, architecture)
        if is_compressed(leaf):
            try:
                tensors[path] = _quantized(path, leaf, order)
                continue
            except CannotHoldError as err:
                refusals[path] = str(err)
                if unsupported != "dense":
                    continue
        tensors[path] = _dense(path, leaf, order, dense)
    check_unsupported(refusals, unsupported, target="A GGUF file")
    return tensors, {path: _stored_name(parameters[path].tensor, architecture) for path in leaves}


def _quantized(path: str, leaf: Any, order: np.ndarray | None) -> _Tensor:
    rows = integer_rows(leaf, inputs=0 if path.endswith("/kernel") else 1)
    rows = rows if order is None else rows.take_rows(order)
    blocks = blocks_of(rows)
    return _Tensor(blocks.data, blocks.kind, largest_difference(blocks.values, rows.values()))


def _dense(path: str, leaf: Any, order: np.ndarray | None, dense: DenseType) -> _Tensor:
    from gguf import GGMLQuantizationType, quants

    array = np.asarray(plain(leaf)).astype(np.float32)
    array = array.T if path.endswith("/kernel") else array
    array = np.ascontiguousarray(array if order is None else array[order])
    # llama.cpp computes with vectors, and with tables of positions, in float32.
    kind = "F32" if array.ndim < 2 or path.endswith("wpe/embedding") else _DENSE[dense]
    if kind == "F32":
        return _Tensor(array, kind, 0.0)
    with np.errstate(over="ignore"):
        data = quants.quantize(array, GGMLQuantizationType[kind])
    values = quants.dequantize(data, GGMLQuantizationType[kind])
    if (np.isfinite(values) != np.isfinite(array)).any():
        size = np.abs(array[np.isfinite(array)]).max(initial=0)
        raise ValueError(
            f"Leaf {path!r} has values up to {size:.3g}, which {dense} does not hold: take another `dense`."
        )
    return _Tensor(data, kind, largest_difference(values, array))


def _order(parameter: Parameter, config: Any, architecture: Architecture) -> np.ndarray | None:
    """The order of the rows of queries and keys in the file: features i and i + d / 2 side by side."""
    match = re.search(r"\.(\d+)\.self_attn\.([qk])_proj\.", parameter.tensor)
    if not architecture.turned or match is None:
        return None
    heads = config.num_attention_heads if match[2] == "q" else config.num_key_value_heads
    rows = np.arange(heads[int(match[1])] * config.head_size)
    return rows.reshape(-1, 2, config.head_size // 2).swapaxes(1, 2).reshape(-1)


def _stored_name(tensor: str, architecture: Architecture) -> str:
    names = {theirs: stored for stored, theirs in architecture.names.items()}
    parent, _, leaf = tensor.rpartition(".")
    if match := re.fullmatch(rf"{re.escape(architecture.layer)}\.(\d+)\.(.*)", parent):
        return f"blk.{match[1]}.{names[match[2]]}.{leaf}"
    return f"{names[parent]}.{leaf}"


def _general_fields(name: str, tensors: Mapping[str, _Tensor]) -> dict[str, Field]:
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.kind] += tensor.data.nbytes if tensor.data.ndim > 1 else 0
    quantized = {kind: size for kind, size in sizes.items() if kind.startswith("Q")}
    main = max(quantized or sizes, key=lambda kind: sizes[kind])
    return {
        "general.type": Field("model"),
        "general.name": Field(name),
        "general.file_type": Field(_FILE_TYPES[main]),
        "general.quantization_version": Field(_KIND_OF_BLOCKS),
    }


def _write(path: Path, architecture: str, fields: Mapping[str, Field], tensors: Mapping[str, _Tensor]) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    try:
        for name, field in fields.items():
            if isinstance(field.value, list) and not field.value:
                continue  # the format has no type for nothing
            kind, *more = field.types or (_value_type(field.value, GGUFValueType),)
            writer.add_key_value(name, field.value, kind, sub_type=more[-1] if more else None)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.data, raw_dtype=GGMLQuantizationType[tensor.kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _value_type(value: Any, types: Any) -> Any:
    if isinstance(value, bool):  # before int, of which it is one
        return types.BOOL
    return {int: types.UINT32, float: types.FLOAT32, str: types.STRING, list: types.ARRAY}[type(value)]
