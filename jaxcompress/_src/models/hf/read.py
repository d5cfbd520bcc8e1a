"""From a Hugging Face directory to a module and its parameters."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxcompress._src.models.families import family_of, make_module
from jaxcompress._src.models.hf.config import config_from_huggingface, read_config
from jaxcompress._src.models.hf.gguf import is_gguf, read_gguf
from jaxcompress._src.models.hf.names import Parameter, StoredTensor, bare_path
from jaxcompress._src.models.hf.tensors import from_torch, read_tensors
from jaxcompress._src.models.leaves import listed
from jaxcompress._src.types import Params


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    head: str | None = None,
    num_labels: int | None = None,
    pooling: str | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> tuple[nn.Module, Params]:
    """A model from a Hugging Face directory, or from a GGUF file.

    Reads `config.json`, whose `model_type` must be that of a family (an error lists them), and, beside it,
    `model.safetensors`, its shards, or `flax_model.msgpack`. Names may have the family's prefix (`bert.`) or not.
    Weights of a head that is not asked for (of BERT a pooler, `cls.*`, `classifier.*`, `qa_outputs.*`) are ignored. A
    head that is asked for by `head`, `num_labels` or `pooling`, and that the files do not have at all, is initialised
    with `key`; so is the pooler that it needs.

    Of a GGUF file (architectures llama, qwen2, qwen3, gpt2; with the extra `jaxcompress[gguf]`) blocks of codes become
    float32. What was rounded there stays rounded: compare with this model, not with the one before.

    Hugging Face files hold no checksums: sizes, names, shapes and dtypes are compared with `config.json`, but a flipped
    bit in a weight cannot be seen. Compare the files with the checksums of where they came from, or keep models with
    `jaxcompress.checkpoint`, which has them.

    Args:
        directory: where the files are; or path of a file that ends in `.gguf`.
        head: of BERT and its variants "encoder", "sequence_classification" or "masked_lm", of decoders "decoder",
            "causal_lm" or "sequence_classification"; by default, what `config.json` says.
        num_labels: outputs of the classifier; by default, what `config.json` says.
        pooling: of BERT and its variants "cls" or "mean", see `BertConfig`; by default, what `config.json` says, or
            else "cls".
        key: for the weights of a new head.
        dtype: of the module's computation. Parameters keep the dtype they are stored in.

    Returns:
        The module and its params: `module.apply({"params": params}, input_ids, attention_mask)`.

    Raises:
        FileNotFoundError: no directory, no config, no weights, or pickled weights only.
        ValueError: an unsupported model, a damaged file, or weights that do not fit the config; the message names
            the file or the tensor, what was found and what was expected.

    Example:
        >>> import tempfile
        >>> from jaxcompress.models import BertConfig, save_pretrained
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        ... )
        >>> module = make_module(config)
        >>> params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_pretrained(directory, module, params)
        ...     classifier, params = from_pretrained(
        ...         directory, head="sequence_classification", num_labels=3, key=jax.random.key(1)
        ...     )
        >>> classifier.apply({"params": params}, jnp.zeros((1, 4), int))["logits"].shape
        (1, 3)
    """
    path, arrays = Path(directory), None
    if is_gguf(path):
        settings, arrays = read_gguf(path)
        config = config_from_huggingface(settings, head=head)
    elif path.is_dir():
        config = read_config(path, head=head)
    else:
        raise FileNotFoundError(f"There is no directory {str(path)!r}.")
    config = _with_choices(config, num_labels, pooling)
    family = family_of(config)
    parameters = family.parameters(config)
    if arrays is None:
        tensors = read_tensors(path, parameters, prefix=family.prefix)
    else:
        tensors = from_torch(arrays, parameters, prefix=family.prefix)
    may_be_new = any(choice is not None for choice in (head, num_labels, pooling))
    try:
        tensors = family.check_tensors(tensors, config)
        _check_names(tensors, parameters, config, may_be_new=may_be_new)
        leaves = _leaves(tensors, parameters, config, key)
    except ValueError as err:
        raise ValueError(f"The weights in {str(path)!r} do not fit: {err}") from err
    return make_module(config, dtype=dtype), traverse_util.unflatten_dict(leaves, sep="/")


def _with_choices(config: Any, num_labels: int | None, pooling: str | None) -> Any:
    changes: dict[str, Any] = {} if pooling is None else {"pooling": pooling}
    if num_labels is not None and num_labels != config.num_labels:
        changes |= {"num_labels": num_labels, "id2label": ()}
    if unknown := [name for name in changes if not hasattr(config, name)]:
        raise ValueError(f"`{unknown[0]}` is no option of a model of type {family_of(config).model_type!r}.")
    return dataclasses.replace(config, **changes)


def _check_names(
    tensors: Mapping[str, StoredTensor], parameters: Mapping[str, Parameter], config: Any, *, may_be_new: bool
) -> None:
    family = family_of(config)
    wanted = {bare_path(path, family.prefix): parameter.tensor for path, parameter in parameters.items()}

    def in_head(path: str) -> bool:
        return _component(path) in family.head_components

    if unknown := [tensor.name for path, tensor in tensors.items() if path not in wanted and not in_head(path)]:
        raise ValueError(f"unknown tensors: {listed(unknown)}.")
    present = {_component(path) for path in tensors if path in wanted}
    missing = [path for path in wanted if path not in tensors]
    if may_be_new:
        # A head that is there in part is damaged, not new.
        missing = [path for path in missing if not in_head(path) or _component(path) in present]
    if missing:
        pooling = ', or `pooling="mean"` to go without a pooler' if hasattr(config, "pooling") else ""
        hint = f" Give `head=` and `key=` for a new head{pooling}." if all(map(in_head, missing)) else ""
        raise ValueError(f"missing tensors: {listed([wanted[path] for path in missing])}.{hint}")


def _leaves(
    tensors: Mapping[str, StoredTensor], parameters: Mapping[str, Parameter], config: Any, key: jax.Array | None
) -> dict[str, jax.Array]:
    leaves, prefix = {}, family_of(config).prefix
    for index, (path, parameter) in enumerate(parameters.items()):
        if (tensor := tensors.get(bare_path(path, prefix))) is None:
            if key is None:
                raise ValueError(f"{parameter.tensor!r} is new; give `key=` to initialise it.")
            leaves[path] = _new_leaf(path, parameter.shape, config, jax.random.fold_in(key, index))
        else:
            _check_shape(tensor, parameter.shape)
            leaves[path] = jnp.asarray(tensor.parameter())
    return leaves


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    expected = shape[::-1] if tensor.transposed else shape
    if tensor.array.shape != expected:
        raise ValueError(f"tensor {tensor.name!r} has shape {tensor.array.shape}, expected {expected} by config.json.")


def _new_leaf(path: str, shape: tuple[int, ...], config: Any, key: jax.Array) -> jax.Array:
    if path.endswith("/kernel"):
        return config.initializer_range * jax.random.normal(key, shape)
    return jnp.ones(shape) if path.endswith("/scale") else jnp.zeros(shape)


def _component(path: str) -> str:
    return path.split("/", 1)[0]
