"""Inputs that calibration never saw: an expert that no row reached, a feature that is always 0.

The output error says nothing about their weights, so methods treat them as if they knew no data.

Shape letters: S stack entries, G groups of one of them, D inputs.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxcompress._src.calibration.statistics import InputStatistics

Unseen = Literal["keep", "zero"]
"""What becomes of the weights of inputs that are 0 in every row.

"keep": they are rounded to nearest, or ranked by magnitude among the others. "zero": they become 0, as in the public
implementations of GPTQ and SparseGPT, which call them dead columns.
"""


def check_unseen(unseen: str) -> None:
    """Raises when the rule is none."""
    if unseen not in get_args(Unseen):
        raise ValueError(f"`unseen` must be one of {get_args(Unseen)}, got {unseen!r}.")


def unseen_inputs(statistics: InputStatistics) -> Bool[Array, "*stack D"]:
    """Which inputs are 0 in every row.

    Raises:
        ValueError: there is no statistic of single inputs.

    Example:
        >>> unseen_inputs(InputStatistics(count=jnp.float32(2), squared_sum=jnp.array([3.0, 0.0]))).tolist()
        [False, True]
    """
    if statistics.gram is not None:
        return _unseen_in(statistics.gram)
    for name in ("squared_sum", "absolute_sum", "absolute_max"):
        if (sums := getattr(statistics, name)) is not None:
            return sums <= 0
    raise ValueError("The statistics know nothing of single inputs; gather 'gram' or 'squared_sum'.")


@jax.jit
def _unseen_in(gram: Float[Array, "*stack D D"]) -> Bool[Array, "*stack D"]:
    return jnp.diagonal(gram, axis1=-2, axis2=-1) <= 0


@jax.jit
def fill_unseen(values: Float[Array, "S D"], unseen: Bool[Array, "S D"]) -> Float32[Array, "S D"]:
    """Positive values of inputs, with a guess where an input was never seen.

    The guess is the mean over the inputs of the same stack entry that were seen; in an entry without any, the mean over
    the other entries; without those, 1.

    Example:
        >>> fill_unseen(jnp.array([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]), jnp.array([[0, 0, 1], [1, 1, 1]], bool)).tolist()
        [[1.0, 3.0, 2.0], [2.0, 2.0, 2.0]]
    """
    values = jnp.where(unseen, 0.0, values.astype(jnp.float32))
    seen = (~unseen).sum(axis=1, keepdims=True)
    means = values.sum(axis=1, keepdims=True) / jnp.maximum(seen, 1)
    entries = (seen > 0).sum()
    elsewhere = jnp.where(entries > 0, means.sum() / jnp.maximum(entries, 1), 1.0)
    return jnp.where(unseen, jnp.where(seen > 0, means, elsewhere), values)


def unseen_counts(unseen: Bool[Array | np.ndarray, "G D"]) -> dict[str, int]:
    """The figures in the info of a stack entry: how many inputs were never seen, and 1 if that is all of them."""
    return {"unseen_inputs": int(np.asarray(unseen).sum()), "unseen_entries": int(nothing_seen(unseen))}


def nothing_seen(unseen: Bool[Array | np.ndarray, "*G D"]) -> bool:
    """Whether no input of a stack entry was seen, so that no output error can be measured."""
    marks = np.asarray(unseen)
    return bool(marks.size and marks.all())


def warn_unseen(unseen: Mapping[str, Any], fallback: str, *, stacklevel: int = 4) -> None:
    """One warning that names every leaf, and its stack entries, that calibration never reached.

    Args:
        unseen: bool (S, D) by path.
        fallback: what happened to their weights.
        stacklevel: of the warning; 4 is the caller of a function on `on_auto_axes` that calls this one.
    """
    parts = []
    for path, marks in unseen.items():
        whole = [i for i, entry in enumerate(np.asarray(marks)) if nothing_seen(entry)]
        if whole:
            parts.append(f"{path!r}" + (f" (stack entries {whole})" if len(marks) > 1 else ""))
    if parts:
        warnings.warn(
            f"No row of the calibration data reached {', '.join(parts)}: their weights were {fallback}. Give batches "
            "that reach them, or leave them out.",
            UserWarning,
            stacklevel=stacklevel,
        )
