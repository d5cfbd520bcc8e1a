"""Between configs and the `config.json` of a Hugging Face directory, for all families."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcompress._src.models.families import family_named, family_of


def config_from_huggingface(settings: Mapping[str, Any], *, head: str | None = None) -> Any:
    """The config that the settings of a Hugging Face `config.json` describe.

    Args:
        settings: the parsed `config.json`.
        head: a head of the family; by default, what `architectures` says.

    Raises:
        ValueError: an unknown `model_type`, or whatever its family finds.
    """
    return family_named(settings.get("model_type")).config_from_settings(settings, head)


def config_to_huggingface(config: Any) -> dict[str, Any]:
    """The settings of a Hugging Face `config.json`, from which `config_from_huggingface` makes the same config."""
    return family_of(config).settings_from_config(config)


def read_config(directory: str | os.PathLike[str], *, head: str | None = None) -> Any:
    """The config that `config.json` in a Hugging Face directory describes.

    Args:
        directory: where the file is.
        head: a head of the family; by default, what `architectures` says.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not JSON, or as `config_from_huggingface`; the message names the file.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no config.json in {str(directory)!r}: it is not a saved model.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{str(path)!r} is not JSON: {err}.") from err
    if not isinstance(settings, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, found {type(settings).__name__}.")
    try:
        return config_from_huggingface(settings, head=head)
    except ValueError as err:
        raise ValueError(f"In {str(path)!r}: {err}") from err
