"""Hugging Face directories of compressed models, in the forms that other libraries load."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import flax.linen as nn
import jax.numpy as jnp

from jaxcompress._src.export.compressed_tensors import compressed_tensors
from jaxcompress._src.export.encoding import EncodedLeaves
from jaxcompress._src.export.files import new_directory
from jaxcompress._src.export.gptq_layout import gptq_layout
from jaxcompress._src.export.info import ExportedLeaf, ExportInfo, Unsupported, check_unsupported
from jaxcompress._src.models.families import config_of
from jaxcompress._src.models.hf.companions import copy_companions
from jaxcompress._src.models.hf.config import config_to_huggingface
from jaxcompress._src.models.hf.gguf import is_gguf
from jaxcompress._src.models.hf.names import Parameter
from jaxcompress._src.models.hf.shards import size_in_bytes
from jaxcompress._src.models.hf.write import (
    common_dtype,
    dense_tensor,
    model_leaves,
    write_directory,
)
from jaxcompress._src.types import Params, is_compressed

Format: TypeAlias = Literal["dense", "compressed-tensors", "gptq"]


class _Encoding(NamedTuple):
    """One format.

    Attributes:
        title: in words.
        encode: `(compressed leaves, parameters, config) -> EncodedLeaves`; None: there are none.
        settings_file: a second file with the quantization's settings, by its name.
    """

    title: str
    encode: Callable[[Mapping[str, Any], Mapping[str, Parameter], Any], EncodedLeaves] | None = None
    settings_file: str | None = None


_FORMATS: Mapping[str, _Encoding] = {
    "dense": _Encoding("a dense file"),
    "compressed-tensors": _Encoding("The format 'compressed-tensors'", compressed_tensors),
    "gptq": _Encoding("The format 'gptq'", gptq_layout, "quantize_config.json"),
}


def save_huggingface(
    directory: str | os.PathLike[str],
    module: nn.Module,
    params: Params,
    *,
    format: Format = "dense",
    source: str | os.PathLike[str] | None = None,
    unsupported: Unsupported = "error",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> ExportInfo:
    """Writes a compressed model as a Hugging Face directory.

    | `format` | quantized kernels are written as | who loads it |
    |---|---|---|
    | "dense" | plain arrays, like everything else | transformers, `models.from_pretrained` |
    | "compressed-tensors" | `pack-quantized`: 4 or 8 bits, symmetric or not, groups or rows | transformers, vLLM |
    | "gptq" | GPTQ's v1 layout: 2, 3, 4 or 8 bits, float16 scales | libraries for GPTQ, vLLM |

    Embeddings, norms, biases and kernels that are plain arrays stay plain. Codes of fewer bits take the next larger
    size of the format, and larger groups may be written as several with the same scale: the weights are the same. What
    the formats cannot hold:

    - tables of values (NF4, floats), codebooks, low rank, partial groups, quantized inputs;
    - compressed embeddings, since only linear layers are quantized there;
    - "compressed-tensors": kernels of a GPT-2, which transformers keeps in layers of another class (`Conv1D`);
    - "gptq": outputs that do not fill whole words, zero points of 0. One number of bits and one size of groups holds
      for the whole file: the most bits and the largest size that divides all. Scales are rounded to float16, which
      `ExportedLeaf.rounding` reports and `round_scales` does before.

    Args:
        directory: to write; takes its name when it is complete.
        module: of `models.make_module` or `models.from_pretrained`.
        params: its parameters, with compressed leaves.
        format: a row of the table.
        source: of the model: a directory or a GGUF file, whose tokenizer, generation and pooling files come along.
        unsupported: what becomes of compressed leaves that the format cannot hold: "error", or "dense": plain arrays.
        max_shard_size: bytes of the tensors in one file, as in `models.save_pretrained`.
        overwrite: replace a saved model, with all that is in its directory.

    Returns:
        The form, bytes and rounding of each leaf.

    Raises:
        FileExistsError: `directory` is not empty, without `overwrite`.
        FileNotFoundError: `source` is neither a directory nor a GGUF file.
        ValueError: a leaf cannot be held, or does not fit the module; transformers cannot load the shape; nothing is
            quantized. The message names the leaf, what it is, and what would be right.

    Example:
        >>> import tempfile
        >>> import jax
        >>> from jaxcompress.models import LlamaConfig, make_module
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> from jaxcompress.tree import by_path
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        ... )
        >>> module = make_module(config)
        >>> params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
        >>> small, _ = quantize(params, QuantSpec(bits=4, group_size=32), select=by_path("model/layers/.*/kernel"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     info = save_huggingface(f"{folder}/out", module, small, format="compressed-tensors")
        ...     sorted(os.listdir(f"{folder}/out"))
        ['config.json', 'model.safetensors']
        >>> info.leaves["model/layers/0/mlp/down_proj/kernel"]
        ExportedLeaf(form='int4 g32', nbytes=1296, rounding=0.0)

    References:
        The packages compressed-tensors (`PackedQuantizationCompressor`) and AutoGPTQ (`QuantLinear.pack`).
    """
    if format not in get_args(Format):
        raise ValueError(f"`format` must be one of {get_args(Format)}, got {format!r}.")
    encoding, config = _FORMATS[format], config_of(module)
    parameters, leaves = model_leaves(module, params)
    check_unsupported({}, unsupported, target=encoding.title)
    limit = size_in_bytes(max_shard_size)
    if source is not None and not (Path(source).is_dir() or is_gguf(Path(source))):
        raise FileNotFoundError(f"`source` must be a directory or a GGUF file, got {os.fspath(source)!r}.")
    with new_directory(Path(directory), overwrite=overwrite) as temporary:
        encoded = _encoded(encoding, leaves, parameters, config, unsupported)
        tensors, exported = dict(encoded.tensors), dict(encoded.leaves)
        for path, leaf in leaves.items():
            if path not in exported:
                tensors[parameters[path].tensor] = dense = dense_tensor(leaf, parameters[path])
                exported[path] = ExportedLeaf(form=jnp.dtype(leaf.dtype).name, nbytes=dense.nbytes)
        settings = config_to_huggingface(config) | {"torch_dtype": common_dtype(leaves)}
        if encoded.settings:
            settings["quantization_config"] = encoded.settings
        more = {} if encoding.settings_file is None else {encoding.settings_file: encoded.settings}
        write_directory(temporary, tensors, settings, limit=limit, more=more)
        if source is not None:
            copy_companions(Path(source), temporary)
    return ExportInfo(leaves={path: exported[path] for path in leaves})


def _encoded(
    encoding: _Encoding,
    leaves: Mapping[str, Any],
    parameters: Mapping[str, Parameter],
    config: Any,
    unsupported: Unsupported,
) -> EncodedLeaves:
    if encoding.encode is None:
        return EncodedLeaves({}, {}, {}, {})
    compressed = {path: leaf for path, leaf in leaves.items() if is_compressed(leaf)}
    encoded = encoding.encode(compressed, parameters, config)
    check_unsupported(encoded.refusals, unsupported, target=encoding.title)
    if not encoded.leaves:
        raise ValueError(f"{encoding.title} has nothing to hold: no kernel is quantized. Take `format='dense'`.")
    return encoded
