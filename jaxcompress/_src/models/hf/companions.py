"""The files beside a model's weights: its tokenizer, and what generation and sentence-transformers read."""

import json
import os
import shutil
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias

from jaxcompress._src.models.hf.gguf import is_gguf
from jaxcompress._src.models.hf.gguf_tokenizer import TOKENIZER_FILES, write_tokenizer

SentencePooling: TypeAlias = Literal["mean", "first"]
"""How an encoder's hidden states become one vector: their mean over the mask, or the state of the first token."""

_MODULES = "modules.json"
_COMPANIONS = (  # what a tokenizer, generation and sentence-transformers read beside the weights
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "generation_config.json",
    _MODULES,
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


def sentence_pooling(directory: str | os.PathLike[str]) -> SentencePooling:
    """How the hidden states of an encoder become a sentence vector, by the files of sentence-transformers beside it.

    Args:
        directory: of the model. Without modules.json the answer is "mean".

    Raises:
        ValueError: another pooling than the mean or the first token, or damaged files; names the file.
    """
    directory = Path(directory)
    folders = [
        folder for folder, kind in _sentence_modules(directory) if kind.endswith(".Pooling") and folder is not None
    ]
    if not folders:
        return "mean"
    path = directory / folders[0] / "config.json"
    settings = _read_json(path)
    modes = {name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True}
    if isinstance(mode := settings.get("pooling_mode"), str):
        modes = {{"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}.get(mode, mode)}
    if modes == {"pooling_mode_cls_token"}:
        return "first"
    if modes == {"pooling_mode_mean_tokens"}:
        return "mean"
    raise ValueError(f"{str(path)!r}: sentence vectors by mean or first token are supported, found {sorted(modes)}.")


def companion_files(directory: str | os.PathLike[str]) -> tuple[PurePath, ...]:
    """Tokenizer, generation and pooling files beside a model, relative to its directory.

    Raises:
        ValueError: modules.json is damaged, or names a folder outside of the directory.
    """
    directory = Path(directory)
    files = [PurePath(name) for name in _COMPANIONS if (directory / name).is_file()]
    for folder, _ in _sentence_modules(directory):
        if folder is not None and (directory / folder).is_dir():
            files += [PurePath(folder, file.name) for file in sorted((directory / folder).iterdir()) if file.is_file()]
    return tuple(files)


def copy_companions(source: Path, directory: Path) -> None:
    """Copies the companion files of a model, and removes those that another model left behind.

    Of a GGUF file, its tokenizer is written as files.
    """
    files = companion_files(source)
    if is_gguf(source):
        write_tokenizer(source, directory)
        files = tuple(PurePath(name) for name in TOKENIZER_FILES)
    for stale in set(companion_files(directory)) - set(files):
        (directory / stale).unlink()
        if stale.parent != PurePath() and not any((directory / stale.parent).iterdir()):
            (directory / stale.parent).rmdir()
    for file in () if is_gguf(source) else files:
        (directory / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / file, directory / file)


def _sentence_modules(directory: Path) -> list[tuple[str | None, str]]:
    """Folder (None: the directory itself) and class of each step of a sentence-transformers model."""
    path = directory / _MODULES
    if not path.is_file():
        return []
    modules = _read_json(path, list)
    for module in modules:
        names = [module.get(name) for name in ("path", "type")] if isinstance(module, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{str(path)!r} must list modules with a `path` and a `type`, found {module!r:.80}.")
        # A name from outside must not lead outside of the directory.
        if names[0] and PurePath(names[0]).name != names[0]:
            raise ValueError(f"{str(path)!r} names the folder {names[0]!r:.80}, which is not a plain name.")
    return [(module["path"] or None, module["type"]) for module in modules]


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{str(path)!r} is not JSON: {err}.") from err
    if not isinstance(content, kind):
        raise ValueError(f"{str(path)!r} must hold a JSON {'list' if kind is list else 'object'}.")
    return content
