"""More sequences from few: beginnings of some, continued by ends of others."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def spliced(sequences: Iterable[Any], copies: int, *, head: int = 1, tail: int = 1, seed: int) -> list[tuple[int, ...]]:
    """Sequences of tokens for methods that fit layers to a few calibration rows, and would overfit to them.

    Each sequence begins `copies` new ones: a_1 ... a_i b_j ... b_n, where b is any of the sequences and the cuts i, j
    are uniform. Around the cut tokens get neighbours that they did not have, so each layer sees inputs that are new
    but of its usual kind; only fits to the dense model's outputs have use for them, as there are no labels.

    Args:
        sequences: of token ids, not padded.
        copies: new sequences from each.
        head: tokens at the beginning that stay (such as [CLS]).
        tail: tokens at the end that stay (such as [SEP]); 0 for none.
        seed: of the choices.

    Returns:
        The new sequences alone, `copies * len(sequences)`, none longer than the longest of the given ones.

    Raises:
        ValueError: no sequences, one shorter than `head + tail` (names its place), or negative numbers.

    Example:
        >>> spliced([(101, 7, 8, 9, 102), (101, 5, 6, 102)], 1, seed=2)
        [(101, 7, 5, 6, 102), (101, 5, 102)]
    """
    if copies < 0 or head < 0 or tail < 0:
        raise ValueError(f"`copies`, `head` and `tail` must not be negative, got {copies}, {head} and {tail}.")
    rows = [tuple(map(int, sequence)) for sequence in sequences]
    if not rows:
        raise ValueError("`sequences` is empty: there is nothing to splice.")
    short = [i for i, row in enumerate(rows) if len(row) < head + tail]
    if short:
        count = len(rows[short[0]])
        raise ValueError(f"Sequence {short[0]} has {count} tokens, fewer than head + tail = {head + tail}.")
    rng, longest = np.random.default_rng(seed), max(map(len, rows))

    def cut(row: Sequence[int]) -> int:
        return int(rng.integers(head, len(row) - tail + 1))

    new: list[tuple[int, ...]] = []
    for _ in range(copies):
        for first in rows:
            second = rows[int(rng.integers(len(rows)))]
            end = cut(first)
            begin = max(cut(second), len(second) - (longest - end))
            new.append(first[:end] + second[begin:])
    return new
