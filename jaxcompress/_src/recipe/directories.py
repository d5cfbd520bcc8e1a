"""Models on disk: Hugging Face directories, GGUF files, and what `jaxcompress compress` writes."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flax import linen as nn

from jaxcompress._src.checkpoint.restore import restore
from jaxcompress._src.checkpoint.save import save
from jaxcompress._src.models.families import config_of, make_module
from jaxcompress._src.models.hf.companions import copy_companions
from jaxcompress._src.models.hf.config import config_from_huggingface, config_to_huggingface
from jaxcompress._src.models.hf.gguf import is_gguf
from jaxcompress._src.models.hf.read import from_pretrained
from jaxcompress._src.recipe.recipe import Recipe
from jaxcompress._src.types import Params

_CHECKPOINT = "checkpoint"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model from disk.

    Attributes:
        module: the Flax module.
        params: with compressed leaves where there are any.
        directory: where it lies, its tokenizer beside it.
        weights: path of the weights, whose size counts.
        compressed: whether `jaxcompress compress` wrote it.
    """

    module: nn.Module
    params: Params
    directory: Path
    weights: Path
    compressed: bool


def load_model(directory: str | os.PathLike[str]) -> LoadedModel:
    """Opens what `jaxcompress compress` wrote, a Hugging Face directory, or a GGUF file.

    Args:
        directory: the one given to `compress --out`, one with config.json and weights, or path of a file that ends in
            `.gguf`.

    Returns:
        Module and parameters: `jaxcompress.execute(apply)` runs the module on compressed leaves, with
        `apply = lambda params, *inputs: module.apply({"params": params}, *inputs)`. `jaxcompress.export` writes both
        for other libraries, with `source=loaded.directory` for the tokenizer.

    Raises:
        OSError: there is no such directory, or a file cannot be read.
        ValueError: a file is damaged, or does not describe a supported model; the message names the file.

    Example:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp
        >>> from jaxcompress.models import BertConfig, save_pretrained
        >>> config = BertConfig(
        ...     vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        ... )
        >>> module = make_module(config)
        >>> params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_pretrained(directory, module, params)
        ...     loaded = load_model(directory)
        >>> loaded.compressed, loaded.module == module
        (False, True)
    """
    path = Path(directory)
    if not path.is_dir() and not is_gguf(path):
        raise FileNotFoundError(f"There is no directory {str(path)!r}.")
    if not holds_compressed(path):
        module, params = from_pretrained(path)
        weights = path / "model.safetensors"
        return LoadedModel(
            module=module,
            params=params,
            directory=path,
            weights=weights if weights.is_file() else path,
            compressed=False,
        )
    weights = path / _CHECKPOINT
    params, info = restore(weights)
    if not info.config:
        raise ValueError(f"{str(weights)!r} holds no config: it was not written by `jaxcompress compress`.")
    try:
        module = make_module(config_from_huggingface(info.config))
    except ValueError as err:
        raise ValueError(f"The config in {str(weights)!r}: {err}") from err
    return LoadedModel(module=module, params=params, directory=path, weights=weights, compressed=True)


def holds_compressed(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory is one that `jaxcompress compress` wrote: `checkpoint/`, and no weights of another kind."""
    path = Path(directory)
    return (path / _CHECKPOINT).is_dir() and not any((path / name).exists() for name in _WEIGHTS)


def save_compressed(
    directory: str | os.PathLike[str],
    module: nn.Module,
    params: Params,
    *,
    source: str | os.PathLike[str],
    recipe: Recipe,
    overwrite: bool = False,
) -> Path:
    """Writes a compressed model, which `load_model` opens: `checkpoint/`, config.json, tokenizer and pooling files.

    Args:
        directory: made if there is none; removed again if writing fails.
        module: of the model.
        params: with compressed leaves.
        source: directory of the original model, whose tokenizer and pooling files are copied.
        recipe: what was done; its `save` says how.
        overwrite: replace an older one.

    Returns:
        Path of the checkpoint.

    Raises:
        OSError: it cannot be written, or there is one and `overwrite` is not set.
        ValueError: sentence-transformers' files in `source` are damaged.
    """
    directory, source = Path(directory), Path(source)
    config = config_to_huggingface(config_of(module))
    with _made(directory):
        save(
            directory / _CHECKPOINT,
            params,
            config=config,
            metadata={"recipe": recipe.to_dict()},
            overwrite=overwrite,
            storage=recipe.save.storage,
        )
        # Without it transformers could not tell of which class the tokenizer is.
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(source, directory)
    return directory / _CHECKPOINT


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Makes a directory with its parents, and removes what it made if what follows fails."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if missing:
            shutil.rmtree(missing[-1], ignore_errors=True)
        raise
