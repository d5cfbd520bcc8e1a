"""Models on disk: Hugging Face directories, and what `jaxcompress compress` writes."""

import dataclasses
import shutil
from pathlib import Path

from flax import linen as nn

from jaxcompress import checkpoint
from jaxcompress.models import config_from_huggingface, config_to_huggingface, from_pretrained, make_module
from jaxcompress.recipe import Recipe
from jaxcompress.types import Params

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model from disk.

    Attributes:
        module: the Flax module.
        params: with compressed leaves where there are any.
        tokenizer: directory of the tokenizer.
        weights: path of the weights, whose size counts.
    """

    module: nn.Module
    params: Params
    tokenizer: Path
    weights: Path


def load_model(directory: Path) -> Loaded:
    """A compressed model, or a Hugging Face directory."""
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no directory {str(directory)!r}.")
    if not (directory / "checkpoint").is_dir():
        module, params = from_pretrained(directory)
        weights = directory / "model.safetensors"
        return Loaded(
            module=module, params=params, tokenizer=directory, weights=weights if weights.is_file() else directory
        )
    path = directory / "checkpoint"
    params, info = checkpoint.restore(path)
    if not info.config:
        raise ValueError(f"{str(path)!r} holds no config: it was not written by `jaxcompress compress`.")
    module = make_module(config_from_huggingface(info.config))
    return Loaded(module=module, params=params, tokenizer=directory, weights=path)


def save_compressed(
    directory: Path, module: nn.Module, params: Params, *, tokenizer: Path, recipe: Recipe, overwrite: bool
) -> Path:
    """Writes `checkpoint/`, as the recipe says, and the tokenizer's files into `directory`; the checkpoint's path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "checkpoint"
    config = config_to_huggingface(module.config)  # pyright: ignore[reportAttributeAccessIssue]
    metadata = {"recipe": recipe.to_dict()}
    checkpoint.save(path, params, config=config, metadata=metadata, overwrite=overwrite, storage=recipe.save.storage)
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, directory / name)
    return path
