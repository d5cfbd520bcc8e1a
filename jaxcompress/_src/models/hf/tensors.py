"""The tensors in a Hugging Face directory. Never a pickle: loading one runs whatever code is in it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization, traverse_util
from safetensors import SafetensorError, safe_open

from jaxcompress._src.models.hf.names import Parameter, StoredTensor, bare_name, bare_path
from jaxcompress._src.models.hf.shards import INDEX, SAFETENSORS

_MSGPACK = "flax_model.msgpack"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5")
_FLOATS = ("float32", "float16", "bfloat16")


def read_tensors(directory: Path, parameters: Mapping[str, Parameter], *, prefix: str) -> dict[str, StoredTensor]:
    """The tensors of `model.safetensors`, of its shards, or of `flax_model.msgpack`: the first of these that exists.

    Args:
        directory: a saved model.
        parameters: that the model has, by path.
        prefix: of the family; files spell it or not.

    Returns:
        Tensors by the path of their parameter without the prefix, and those of no parameter by their name with
        slashes; without `position_ids`, which are no weights.

    Raises:
        FileNotFoundError: there are no weights, only pickled ones, or a shard is missing.
        ValueError: a file is damaged, a tensor is not a float, or two stand for one parameter; the message names them.
    """
    if (directory / SAFETENSORS).is_file():
        return from_torch(_read_safetensors(directory / SAFETENSORS), parameters, prefix=prefix)
    if (directory / INDEX).is_file():
        return from_torch(_read_shards(directory), parameters, prefix=prefix)
    if (directory / _MSGPACK).is_file():
        turned = {bare_path(path, prefix) for path, parameter in parameters.items() if parameter.flax_transposed}
        arrays = {(bare_path(name, prefix), name): array for name, array in _read_msgpack(directory / _MSGPACK).items()}
        return _by_path([(path, StoredTensor(name, array, path in turned)) for (path, name), array in arrays.items()])
    raise FileNotFoundError(_no_weights(directory))


def from_torch(
    arrays: Mapping[str, np.ndarray], parameters: Mapping[str, Parameter], *, prefix: str
) -> dict[str, StoredTensor]:
    """Tensors with the names and the orientation of PyTorch, as `read_tensors` gives them."""
    known = {
        bare_name(parameter.tensor, prefix): (bare_path(path, prefix), parameter.transposed)
        for path, parameter in parameters.items()
    }
    tensors = []
    for name, array in arrays.items():
        if not name.endswith("position_ids"):
            bare = bare_name(name, prefix)
            path, transposed = known.get(bare, (bare.replace(".", "/"), False))
            tensors.append((path, StoredTensor(name, array, transposed)))
    return _by_path(tensors)


def _by_path(tensors: Sequence[tuple[str, StoredTensor]]) -> dict[str, StoredTensor]:
    by_path: dict[str, StoredTensor] = {}
    for path, tensor in tensors:
        if tensor.array.dtype.name not in _FLOATS:
            found = tensor.array.dtype.name
            raise ValueError(f"Tensor {tensor.name!r} is {found}; supported: {', '.join(_FLOATS)}.")
        if path in by_path:
            raise ValueError(f"Tensors {by_path[path].name!r} and {tensor.name!r} stand for the same parameter.")
        by_path[path] = tensor
    return by_path


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # the file is no mapping
    except SafetensorError as err:
        raise ValueError(f"{str(path)!r} is damaged or not a safetensors file: {err}.") from err


def _read_shards(directory: Path) -> dict[str, np.ndarray]:
    files = _weight_map(directory / INDEX)
    arrays: dict[str, np.ndarray] = {}
    for file in sorted(set(files.values())):
        if not (directory / file).is_file():
            raise FileNotFoundError(f"Shard {file!r}, named in {INDEX}, is not in {str(directory)!r}.")
        arrays |= _read_safetensors(directory / file)
    for name, file in files.items():
        if name not in arrays:
            raise ValueError(f"Tensor {name!r} is not in shard {file!r} of {str(directory)!r}, where {INDEX} puts it.")
    return arrays


def _weight_map(path: Path) -> dict[str, str]:
    try:
        files = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise ValueError(f"{str(path)!r} is not an index of shards with a `weight_map`.") from err
    for file in files.values():
        # A name from outside must not lead outside the directory.
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{str(path)!r} names the shard {file!r}, which is not a plain file name.")
    return files


def _read_msgpack(path: Path) -> dict[str, Any]:
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        arrays = traverse_util.flatten_dict(tree, sep="/")
    except Exception as err:  # damaged bytes surface as errors of many types, from struct to NumPy
        raise ValueError(f"{str(path)!r} is damaged or not a Flax msgpack file: {err}.") from err
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name!r} in {str(path)!r} is {type(array).__name__}, expected an array.")
    return arrays


def _no_weights(directory: Path) -> str:
    wanted = f"{SAFETENSORS}, {INDEX} or {_MSGPACK}"
    for name in _PICKLES:
        if (directory / name).is_file():
            return (
                f"{str(directory)!r} has {name}, but none of {wanted}. Pickled weights are never loaded, because they "
                "may run code: convert them with transformers, `model.save_pretrained(directory)`, to safetensors."
            )
    if (directory / "checkpoint").is_dir():
        return f"{str(directory)!r} holds a compressed model: open it with `jaxcompress.recipe.load_model`."
    return f"There are no weights in {str(directory)!r}: expected {wanted}."
