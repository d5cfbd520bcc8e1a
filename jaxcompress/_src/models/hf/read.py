"""From a Hugging Face directory to a module and its parameters."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxcompress._src.models.bert.config import BertConfig
from jaxcompress._src.models.bert.heads import make_module
from jaxcompress._src.models.bert.parameters import listed, parameter_shapes
from jaxcompress._src.models.bert.settings import read_config
from jaxcompress._src.models.hf.names import HEAD_COMPONENTS, bare_path, torch_name
from jaxcompress._src.models.hf.tensors import StoredTensor, read_tensors
from jaxcompress._src.types import Params

_DECODER = "cls/predictions/decoder"
_WORDS = "embeddings/word_embeddings/embedding"


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    head: str | None = None,
    num_labels: int | None = None,
    pooling: str | None = None,
    key: jax.Array | None = None,
    dtype: Any = jnp.float32,
) -> tuple[nn.Module, Params]:
    """A BERT from a Hugging Face directory.

    Reads `config.json` and, beside it, `model.safetensors`, its shards, or `flax_model.msgpack`. Names may have the
    prefix `bert.` or not. Weights of a head that is not asked for (a pooler, `cls.*`, `classifier.*`, `qa_outputs.*`)
    are ignored. A head that is asked for by `head`, `num_labels` or `pooling`, and that the files do not have at all,
    is initialised with `key`; so is the pooler that it needs.

    Hugging Face files hold no checksums: sizes, names, shapes and dtypes are compared with `config.json`, but a flipped
    bit in a weight cannot be seen. Compare the files with the checksums of where they came from, or keep models with
    `jaxcompress.checkpoint`, which has them.

    Args:
        directory: where the files are.
        head: "encoder", "sequence_classification" or "masked_lm"; by default, what `config.json` says.
        num_labels: outputs of the classifier; by default, what `config.json` says.
        pooling: "cls" or "mean", see `BertConfig`; by default, what `config.json` says, or else "cls".
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
        >>> from jaxcompress.models import save_pretrained
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
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no directory {str(path)!r}.")
    config = _with_choices(read_config(path, head=head), num_labels, pooling)
    tensors = _without_tied_decoder(read_tensors(path), config)
    may_be_new = any(choice is not None for choice in (head, num_labels, pooling))
    try:
        _check_names(tensors, config, may_be_new=may_be_new)
        leaves = _leaves(tensors, config, key)
    except ValueError as err:
        raise ValueError(f"The weights in {str(path)!r} do not fit: {err}") from err
    return make_module(config, dtype=dtype), traverse_util.unflatten_dict(leaves, sep="/")


def _with_choices(config: BertConfig, num_labels: int | None, pooling: str | None) -> BertConfig:
    changes: dict[str, Any] = {} if pooling is None else {"pooling": pooling}
    if num_labels is not None and num_labels != config.num_labels:
        changes |= {"num_labels": num_labels, "id2label": ()}
    return dataclasses.replace(config, **changes)


def _without_tied_decoder(tensors: Mapping[str, StoredTensor], config: BertConfig) -> dict[str, StoredTensor]:
    """Drops the second copies of the word embedding and of the output bias that PyTorch files may have."""
    kept = dict(tensors)
    kernel, bias = kept.pop(f"{_DECODER}/kernel", None), kept.pop(f"{_DECODER}/bias", None)
    if bias is not None:
        kept.setdefault("cls/predictions/bias", bias)
    if config.head != "masked_lm" or kernel is None or _WORDS not in kept:
        return kept
    if not np.array_equal(kernel.array if kernel.transposed else kernel.array.T, kept[_WORDS].array):
        raise ValueError(
            f"Tensor {kernel.name!r} differs from {kept[_WORDS].name!r}; only a tied decoder is supported."
        )
    return kept


def _check_names(tensors: Mapping[str, StoredTensor], config: BertConfig, *, may_be_new: bool) -> None:
    _check_layers(tensors, config)
    wanted = [bare_path(path) for path in parameter_shapes(config)]
    unknown = [t.name for path, t in tensors.items() if path not in wanted and _component(path) not in HEAD_COMPONENTS]
    if unknown:
        raise ValueError(f"unknown tensors: {listed(unknown)}.")
    present = {_component(path) for path in tensors if path in wanted}
    missing = [path for path in wanted if path not in tensors]
    if may_be_new:
        # A head that is there in part is damaged, not new.
        missing = [p for p in missing if _component(p) not in HEAD_COMPONENTS or _component(p) in present]
    if missing:
        hint = ' Give `head=` and `key=` for a new head, or `pooling="mean"` to go without a pooler.'
        in_head = all(_component(path) in HEAD_COMPONENTS for path in missing)
        raise ValueError(f"missing tensors: {listed([torch_name(p) for p in missing])}.{hint if in_head else ''}")


def _check_layers(tensors: Mapping[str, StoredTensor], config: BertConfig) -> None:
    found = {}
    for path, tensor in tensors.items():
        if match := re.match(r"encoder/layer/(\d+)/", path):
            found.setdefault(int(match[1]), tensor.name)
    if found and max(found) + 1 != config.num_hidden_layers:
        raise ValueError(
            f"the last layer is that of tensor {found[max(found)]!r}, so there are {max(found) + 1} layers; "
            f"expected {config.num_hidden_layers}, by `num_hidden_layers` of config.json."
        )


def _leaves(tensors: Mapping[str, StoredTensor], config: BertConfig, key: jax.Array | None) -> dict[str, jax.Array]:
    leaves = {}
    for index, (path, shape) in enumerate(parameter_shapes(config).items()):
        if (tensor := tensors.get(bare_path(path))) is None:
            if key is None:
                raise ValueError(f"{torch_name(path)!r} is new; give `key=` to initialise it.")
            leaves[path] = _new_leaf(path, shape, config, jax.random.fold_in(key, index))
        else:
            _check_shape(tensor, shape)
            leaves[path] = jnp.asarray(tensor.parameter())
    return leaves


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    expected = shape[::-1] if tensor.transposed else shape
    if tensor.array.shape != expected:
        raise ValueError(f"tensor {tensor.name!r} has shape {tensor.array.shape}, expected {expected} by config.json.")


def _new_leaf(path: str, shape: tuple[int, ...], config: BertConfig, key: jax.Array) -> jax.Array:
    if path.endswith("/kernel"):
        return config.initializer_range * jax.random.normal(key, shape)
    return jnp.ones(shape) if path.endswith("/scale") else jnp.zeros(shape)


def _component(path: str) -> str:
    return path.split("/", 1)[0]
