"""Texts as tokens: tokenizing up to the model's limit, batches of few shapes."""

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress._src.models.families import max_tokens
from jaxcompress._src.models.family import Config
from jaxcompress._src.models.hf.config import read_config
from jaxcompress._src.models.hf.gguf import is_gguf
from jaxcompress._src.models.hf.gguf_tokenizer import write_tokenizer
from jaxcompress._src.recipe.text import Texts

_TOKENIZERS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))  # files of which one set is enough


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenized rows.

    Attributes:
        ids: one list of token ids for each row, not padded.
        labels: int32, one for each row.
        pad_id: what rows are padded with.
        max_length: limit that the rows were cut to; None: they were not.
        cut: number of rows that were longer than the limit and lost their end.
    """

    ids: tuple[tuple[int, ...], ...]
    labels: np.ndarray
    pad_id: int
    max_length: int = sys.maxsize
    cut: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(directory: Path, texts: Texts, *, max_length: int | None = None, config: Config | None = None) -> Tokens:
    """Tokenizes with the tokenizer that lies in a Hugging Face directory.

    Args:
        directory: with tokenizer.json, vocab.txt, or vocab.json and merges.txt.
        texts: the rows.
        max_length: longer rows are cut to so many tokens, the special ones included. By default the model's own limit:
            the positions that its config has for tokens or `model_max_length` of the tokenizer, the smaller one.
        config: of the model; by default that of the directory's config.json.

    Returns:
        The rows; `cut` counts those that were longer than the limit.

    Raises:
        FileNotFoundError: the directory has no tokenizer, or no config.json.
        ValueError: the tokenizer's files are damaged, `max_length` leaves no room for a text or is above the model's
            limit, or a token is not in the model's vocabulary.
    """
    tokenizer = _tokenizer(directory)
    model: Config = read_config(directory) if config is None else config
    most = min(max_tokens(model), tokenizer.model_max_length)
    least = tokenizer.num_special_tokens_to_add() + 1
    limit = most if max_length is None else max_length
    if not least <= limit <= most:
        raise ValueError(
            f"`max_length` must be between {least} and {most}, the limit of {str(directory)!r}, got {limit}."
        )
    ids = _ids(directory, tokenizer, texts.texts)
    long = [at for at, row in enumerate(ids) if len(row) > limit]
    if long:
        shortened = _ids(directory, tokenizer, [texts.texts[at] for at in long], truncation=True, max_length=limit)
        for at, row in zip(long, shortened, strict=True):
            ids[at] = row
    _check_vocabulary(ids, model, directory)
    return Tokens(
        ids=tuple(map(tuple, ids)),
        labels=texts.labels,
        pad_id=tokenizer.pad_token_id or 0,
        max_length=limit,
        cut=len(long),
    )


def whole_rows(directory: Path, texts: Texts, *, config: Config) -> Tokens:
    """As `tokenize`, with rows of any length: for what reads them window by window.

    Raises:
        FileNotFoundError: the directory has no tokenizer.
        ValueError: the tokenizer's files are damaged, or a token is not in the model's vocabulary.
    """
    tokenizer = _tokenizer(directory)
    ids = _ids(directory, tokenizer, texts.texts)
    _check_vocabulary(ids, config, directory)
    return Tokens(ids=tuple(map(tuple, ids)), labels=texts.labels, pad_id=tokenizer.pad_token_id or 0)


def decode(directory: Path, ids: Sequence[int]) -> str:
    """Token ids as text, without special tokens.

    Raises:
        FileNotFoundError: the directory has no tokenizer.
        ValueError: the tokenizer's files are damaged.
    """
    return _tokenizer(directory).decode(list(ids), skip_special_tokens=True)


def in_windows(tokens: Tokens, size: int) -> Tokens:
    """Every row cut into pieces of `size` tokens, the last of which may be shorter; pieces have no labels.

    Example:
        >>> rows = Tokens(ids=((1, 2, 3), (4,)), labels=np.zeros(2, np.int32), pad_id=0)
        >>> in_windows(rows, 2).ids
        ((1, 2), (3,), (4,))
    """
    ids = tuple(row[start : start + size] for row in tokens.ids for start in range(0, len(row), size))
    return dataclasses.replace(tokens, ids=ids, labels=np.full(len(ids), -100, np.int32), max_length=size)


def has_tokenizer(directory: Path) -> bool:
    """Whether there are files that `tokenize` can read, or a GGUF file, which holds a tokenizer."""
    if is_gguf(directory):
        return directory.is_file()
    return any(all((directory / name).is_file() for name in names) for names in _TOKENIZERS)


def row_widths(tokens: Tokens, *, most: int | None = None) -> tuple[int, ...]:
    """Few widths to pad rows to: 24, 32, 48, 64, 128, 256, ..., as far as the longest row.

    Args:
        tokens: the rows.
        most: positions of the model.

    Example:
        >>> row_widths(Tokens(ids=((1,) * 9, (1,) * 50), labels=np.zeros(2, np.int32), pad_id=0), most=60)
        (24, 32, 48, 60)
    """
    longest = max((len(row) for row in tokens.ids), default=1)
    widths = [24, 32, 48, 64]
    while widths[-1] < longest:
        widths.append(2 * widths[-1])
    last = next(width for width in widths if width >= longest)
    if most is not None:
        # Not below the longest row: the model then says what it cannot hold, where cutting would be silent.
        last = max(longest, min(last, most))
    return (*(width for width in widths if width < longest), last)


def training_batches(
    tokens: Tokens, *, batch_size: int, widths: Sequence[int], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """One pass over the rows in random order, in batches of one size and of few widths.

    Each row joins the narrowest width that holds it; what is left over in a width joins the next one. The very last
    rows, fewer than a batch, wait for another pass.

    Args:
        tokens: the rows.
        batch_size: rows in a batch.
        widths: ascending; longer rows are cut to the last one. Each width is one compilation.
        rng: shuffles.

    Yields:
        As `batch` gives them, in random order of widths.
    """
    planned, _ = _planned(tokens, rng.permutation(len(tokens)), batch_size, widths)
    for i in rng.permutation(len(planned)):
        width, rows = planned[i]
        yield batch(tokens, rows, width=width)


def example_batches(tokens: Tokens, *, batch_size: int, widths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """All rows once, none of them repeated; as `training_batches`, in order, and then the rows that wait.

    Args:
        tokens: the rows.
        batch_size: rows in a batch; in the very last one there may be fewer.
        widths: ascending; longer rows are cut to the last one. Each width is one compilation.

    Yields:
        As `batch` gives them.
    """
    planned, waiting = _planned(tokens, np.arange(len(tokens)), batch_size, widths)
    for width, rows in [*planned, (widths[-1], waiting)]:
        if len(rows):
            yield batch(tokens, rows, width=width)


def _planned(
    tokens: Tokens, order: np.ndarray, batch_size: int, widths: Sequence[int]
) -> tuple[list[tuple[int, np.ndarray]], np.ndarray]:
    """Whole batches and their widths; what is left over in a width joins the next one. And the rows that are left."""
    lengths = np.array([len(row) for row in tokens.ids])[order]
    planned: list[tuple[int, np.ndarray]] = []
    waiting = order[:0]
    for i, width in enumerate(widths):
        low = widths[i - 1] if i else -1
        fits = (lengths > low) & ((lengths <= width) | (i == len(widths) - 1))
        waiting = np.concatenate([waiting, order[fits]])
        full = len(waiting) // batch_size * batch_size
        planned += [(width, rows) for rows in waiting[:full].reshape(-1, batch_size)]
        waiting = waiting[full:]
    return planned, waiting


def evaluation_batches(
    tokens: Tokens, *, batch_size: int, widths: Sequence[int], most_tokens: int | None = None
) -> Iterator[dict[str, Any]]:
    """All rows once, by length; the last batch of a width is filled up with repeats, whose `row` is -1.

    Args:
        tokens: the rows.
        batch_size: rows in a batch.
        widths: ascending; longer rows are cut to the last one.
        most_tokens: in a batch, padding included: wide batches then hold fewer rows, one at least.

    Yields:
        As `batch` gives them.
    """
    lengths = np.minimum([len(row) for row in tokens.ids], widths[-1])
    for i, width in enumerate(widths):
        size = batch_size if most_tokens is None else max(1, min(batch_size, most_tokens // width))
        rows_of_width = np.flatnonzero((lengths <= width) & (lengths > (widths[i - 1] if i else -1)))
        for start in range(0, len(rows_of_width), size):
            rows = rows_of_width[start : start + size]
            missing = size - len(rows)
            made = batch(tokens, np.concatenate([rows, np.repeat(rows[:1], missing)]), width=width)
            made["row"][len(rows) :] = -1
            yield made


def batch(tokens: Tokens, rows: np.ndarray, *, width: int) -> dict[str, Any]:
    """`input_ids` and `attention_mask` (B, width), `labels` and `row` (B,), all int32."""
    ids = np.full((len(rows), width), tokens.pad_id, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids_of_row = tokens.ids[row][:width]
        ids[i, : len(ids_of_row)] = ids_of_row
        mask[i, : len(ids_of_row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": tokens.labels[rows], "row": rows.astype(np.int32)}


def _check_vocabulary(ids: Sequence[Sequence[int]], model: Config, directory: Path) -> None:
    largest = max((token for row in ids for token in row), default=0)
    if largest >= model.vocab_size:
        raise ValueError(
            f"The tokenizer in {str(directory)!r} gives the token {largest}, and the model has only "
            f"{model.vocab_size} (`vocab_size`): they do not belong together."
        )


@functools.lru_cache(maxsize=1)
def _gguf_tokenizer(file: Path, changed: int) -> Any:
    """Kept, because reading the metadata of a file takes seconds."""
    del changed
    with tempfile.TemporaryDirectory() as temporary:
        write_tokenizer(file, Path(temporary))
        return _tokenizer(Path(temporary))


def _tokenizer(directory: Path) -> Any:
    if not has_tokenizer(directory):
        raise FileNotFoundError(
            f"{str(directory)!r} has neither tokenizer.json nor vocab.txt nor vocab.json and merges.txt."
        )
    if is_gguf(directory):
        return _gguf_tokenizer(directory, directory.stat().st_mtime_ns)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as err:  # damaged files surface as errors of many types, bare `Exception` among them
        raise ValueError(f"The tokenizer in {str(directory)!r} cannot be read: {err}") from err


def _ids(directory: Path, tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    try:
        return list(tokenizer(list(texts), verbose=False, **options)["input_ids"])
    except Exception as err:  # the tokenizers library raises bare exceptions
        raise ValueError(f"The tokenizer in {str(directory)!r} fails: {err}") from err
