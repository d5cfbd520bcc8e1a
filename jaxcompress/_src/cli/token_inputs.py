"""Random tokens to run models on."""

import re

import numpy as np

from jaxcompress._src.models.families import config_of, max_tokens
from jaxcompress._src.recipe.directories import LoadedModel


def token_shape(text: str | None, models: list[LoadedModel], *, rows: int, length: int) -> tuple[int, int]:
    """Rows and tokens of each, as `--tokens` says them.

    Args:
        text: such as `8x64`, or None.
        models: that are to read them.
        rows: where `text` is None.
        length: where `text` is None; fewer where a model has fewer positions.

    Raises:
        ValueError: it is written otherwise, or a model has fewer positions.

    Example:
        >>> token_shape("8x64", [], rows=1, length=32)
        (8, 64)
    """
    limits = {str(model.directory): max_tokens(model.module) for model in models}
    if text is None:
        return rows, min([length, *limits.values()])
    written = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if written is None:
        raise ValueError(f"--tokens is rows x tokens, such as 8x64, got {text!r}.")
    asked = int(written[1]), int(written[2])
    for directory, limit in limits.items():
        if asked[1] > limit:
            raise ValueError(f"--tokens {text} has rows of {asked[1]} tokens; {directory!r} reads up to {limit}.")
    return asked


def random_tokens(models: list[LoadedModel], rows: int, length: int, *, padded: bool = False) -> list[np.ndarray]:
    """`input_ids` and `attention_mask`, (rows, length), int32: the same at every call.

    Args:
        models: that all have the tokens in their vocabulary.
        rows: of the batch.
        length: tokens of a row.
        padded: whether the last third of the last row is padding.
    """
    size = min(config_of(model.module).vocab_size for model in models)
    ids = np.random.default_rng(0).integers(0, size, (rows, length), dtype=np.int32)
    mask = np.ones_like(ids)
    if padded:
        mask[-1, length - length // 3 :] = 0
    return [ids, mask]
