"""From a module and its parameters to a Hugging Face directory."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from safetensors.numpy import save_file

from jaxcompress._src.models.families import config_of, family_of
from jaxcompress._src.models.hf.config import config_to_huggingface
from jaxcompress._src.models.hf.names import Parameter
from jaxcompress._src.models.hf.tensors import SAFETENSORS
from jaxcompress._src.models.leaves import check_parameters, flatten_params
from jaxcompress._src.types import Params


def save_pretrained(
    directory: str | os.PathLike[str], module: nn.Module, params: Params, *, uneven: bool = False
) -> None:
    """Writes `config.json` and `model.safetensors`, with the names and the orientation of PyTorch.

    transformers loads them as the class of the head. It knows one shape for all layers: as many heads as make up
    `hidden_size`, and one FFN width. Pooling by mean is for `from_pretrained` alone. Files are complete before they
    take the place of older ones. Tokenizer files are left to the caller.

    Args:
        directory: made if there is none; other files in it stay.
        module: of `make_module` or `from_pretrained`.
        params: its plain parameters. Their dtypes are kept: float32, float16, bfloat16.
        uneven: write shapes that transformers cannot load too; `from_pretrained` reads them back.

    Raises:
        ValueError: a leaf is compressed, or does not fit the module's config; the message names it. Or the layers have
            a shape that transformers cannot load, without `uneven`; the message names the layers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxcompress.models import BertConfig, from_pretrained, make_module
        >>> module = make_module(
        ...     BertConfig(
        ...         vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        ...     )
        ... )
        >>> params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_pretrained(directory, module, params)
        ...     sorted(os.listdir(directory)), from_pretrained(directory)[0] == module
        (['config.json', 'model.safetensors'], True)
    """
    config = config_of(module)
    family = family_of(config)
    parameters, leaves = family.parameters(config), flatten_params(params)
    for path, leaf in leaves.items():
        if hasattr(type(leaf), "materialize"):
            raise ValueError(
                f"Leaf {path!r} is a {type(leaf).__name__}: call `jaxcompress.materialize(params)` first, or save "
                "compressed parameters with `jaxcompress.checkpoint`."
            )
    shapes = {path: parameter.shape for path, parameter in parameters.items()}
    check_parameters(leaves, shapes, f"a {config.head!r} model of type {family.model_type!r}")
    if not uneven and (reason := family.unloadable(config)):
        raise ValueError(
            f"transformers cannot load this shape: {reason}. Save it with `uneven=True`, for "
            "`jaxcompress.models.from_pretrained` alone, or with `jaxcompress.checkpoint`."
        )
    tensors = {parameters[path].tensor: _stored(path, leaf, parameters[path]) for path, leaf in leaves.items()}
    settings = config_to_huggingface(config) | {"torch_dtype": _common_dtype(tensors)}
    _write(Path(directory), tensors, settings)


def _stored(path: str, leaf: Any, parameter: Parameter) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype.name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"Leaf {path!r} is {array.dtype.name}; only float32, float16 and bfloat16 can be saved.")
    # Contiguous: safetensors writes the memory of an array, whatever its strides say.
    return np.ascontiguousarray(array.T if parameter.transposed else array)


def _common_dtype(tensors: Mapping[str, np.ndarray]) -> str:
    names = {array.dtype.name for array in tensors.values()}
    return names.pop() if len(names) == 1 else "float32"


def _write(directory: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    # Inside the directory, because a rename is atomic within one file system only.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        weights, config = Path(temporary, SAFETENSORS), Path(temporary, "config.json")
        save_file(tensors, weights, metadata={"format": "pt"})
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        weights.chmod(config.stat().st_mode)  # safetensors makes files that nobody else can read
        for path in (weights, config):
            _sync(path)
        for path in (weights, config):
            os.replace(path, directory / path.name)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
