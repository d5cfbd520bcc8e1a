"""From a module and its parameters to a Hugging Face directory."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxcompress._src.models.families import config_of, family_of
from jaxcompress._src.models.hf.config import config_to_huggingface
from jaxcompress._src.models.hf.names import Parameter
from jaxcompress._src.models.hf.shards import INDEX, SAFETENSORS, files_of_tensors, is_shard, size_in_bytes
from jaxcompress._src.models.leaves import check_parameters, flatten_params
from jaxcompress._src.types import Params, plain


def save_pretrained(
    directory: str | os.PathLike[str],
    module: nn.Module,
    params: Params,
    *,
    uneven: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes `config.json` and `model.safetensors`, with the names and the orientation of PyTorch.

    Larger models are written as shards, `model-00001-of-00003.safetensors` and so on, with an index of which holds
    what, `model.safetensors.index.json`. Weights of an older model in the same directory, in one file or in shards, are
    removed.

    transformers loads them as the class of the head. It knows one shape for all layers: as many heads as make up
    `hidden_size`, and one FFN width. Pooling by mean is for `from_pretrained` alone. Files are complete before they
    take the place of older ones; where shards take that of shards, there is no index until all are there, so that those
    of two models are never read together. Tokenizer files are left to the caller.

    Args:
        directory: made if there is none; other files in it stay.
        module: of `make_module` or `from_pretrained`.
        params: its plain parameters. Their dtypes are kept: float32, float16, bfloat16.
        uneven: write shapes that transformers cannot load too; `from_pretrained` reads them back.
        max_shard_size: bytes of the tensors in one file, as a number or with a unit, "5GB", "500MB" (powers of 1,000).
            A tensor that is larger has a file of its own.

    Raises:
        ValueError: a leaf is compressed, or does not fit the module's config; the message names it. Or the layers have
            a shape that transformers cannot load, without `uneven`; the message names the layers. `max_shard_size` is
            no size.

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
    for path, leaf in flatten_params(params).items():
        if hasattr(type(leaf), "materialize"):
            raise ValueError(
                f"Leaf {path!r} is a {type(leaf).__name__}: call `jaxcompress.materialize(params)` first, save it with "
                "`jaxcompress.export.save_huggingface`, or save compressed parameters with `jaxcompress.checkpoint`."
            )
    parameters, leaves = model_leaves(module, params, uneven=uneven)
    tensors = {parameters[path].tensor: dense_tensor(leaf, parameters[path]) for path, leaf in leaves.items()}
    settings = config_to_huggingface(config) | {"torch_dtype": common_dtype(leaves)}
    write_directory(Path(directory), tensors, settings, limit=size_in_bytes(max_shard_size))


class TensorToWrite(NamedTuple):
    """A tensor of a file, made when its file is written.

    Attributes:
        nbytes: of the tensor.
        array: makes it, in the orientation of the file.
    """

    nbytes: int
    array: Callable[[], np.ndarray]


def model_leaves(
    module: nn.Module, params: Params, *, uneven: bool = False
) -> tuple[Mapping[str, Parameter], dict[str, Any]]:
    """The parameters of a module and the leaves of `params`, by path, checked to fit.

    Args:
        module: of a family.
        params: its parameters; leaves may be compressed.
        uneven: whether shapes that transformers cannot load may pass.

    Raises:
        ValueError: a leaf is missing, unknown, of another shape, or of a dtype that files do not hold; or transformers
            cannot load the shape.
    """
    config = config_of(module)
    family = family_of(config)
    parameters, leaves = family.parameters(config), flatten_params(params)
    shapes = {path: parameter.shape for path, parameter in parameters.items()}
    check_parameters(leaves, shapes, f"a {config.head!r} model of type {family.model_type!r}")
    if not uneven and (reason := family.unloadable(config)):
        raise ValueError(
            f"transformers cannot load this shape: {reason}. Save it with `uneven=True` of `models.save_pretrained`, "
            "for `jaxcompress.models.from_pretrained` alone, or with `jaxcompress.checkpoint`."
        )
    for path, leaf in leaves.items():
        if jnp.dtype(leaf.dtype).name not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"Leaf {path!r} is {leaf.dtype}; only float32, float16 and bfloat16 can be saved.")
    return parameters, leaves


def dense_tensor(leaf: Any, parameter: Parameter) -> TensorToWrite:
    """A leaf as a plain tensor of its dtype; a compressed one is materialized when the tensor is made."""

    def array() -> np.ndarray:
        values = np.asarray(plain(leaf))
        # Contiguous: safetensors writes the memory of an array, whatever its strides say.
        return np.ascontiguousarray(values.T if parameter.transposed else values)

    return TensorToWrite(leaf.size * jnp.dtype(leaf.dtype).itemsize, array)


def common_dtype(leaves: Mapping[str, Any]) -> str:
    """The name of the dtype that all leaves have; float32 if they have several."""
    names = {jnp.dtype(leaf.dtype).name for leaf in leaves.values()}
    return names.pop() if len(names) == 1 else "float32"


def write_directory(
    directory: Path,
    tensors: Mapping[str, TensorToWrite],
    settings: Mapping[str, Any],
    *,
    limit: int,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes `config.json` and the tensors, in one file or in shards.

    Args:
        directory: made if there is none; weights that are there are replaced, other files stay.
        tensors: by their name.
        settings: what `config.json` holds.
        limit: of the tensors in one file, in bytes.
        more: files of JSON beside `config.json`: name -> content.
    """
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    files = files_of_tensors(sizes, limit)
    texts: dict[str, Any] = {"config.json": settings, **(more or {})}
    if SAFETENSORS not in files:
        places = {name: file for file, names in files.items() for name in names}
        texts = {INDEX: {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}, **texts}
    _write(directory, files, lambda name: tensors[name].array(), texts)


def _write(
    directory: Path,
    files: Mapping[str, Sequence[str]],
    tensor: Callable[[str], np.ndarray],
    texts: Mapping[str, dict[str, Any]],
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    # Inside the directory, because a rename is atomic within one file system only.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        for file, text in texts.items():
            Path(temporary, file).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        for file, names in files.items():
            # One file at a time: the copies of its tensors are let go before the next.
            save_file({name: tensor(name) for name in names}, Path(temporary, file), metadata={"format": "pt"})
            # safetensors makes files that nobody else can read.
            Path(temporary, file).chmod(Path(temporary, "config.json").stat().st_mode)
        for file in (*files, *texts):
            _sync(Path(temporary, file))
        older = {path.name for path in directory.iterdir() if is_shard(path.name) or path.name in (INDEX, SAFETENSORS)}
        if INDEX in texts:
            (directory / INDEX).unlink(missing_ok=True)
        for file in (*files, *texts):
            if file == "config.json" and INDEX in texts:
                # One file is read before an index: an older one goes before it would have the config of this model.
                (directory / SAFETENSORS).unlink(missing_ok=True)
            os.replace(Path(temporary, file), directory / file)
    for file in older - {*files, *texts}:
        (directory / file).unlink(missing_ok=True)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
