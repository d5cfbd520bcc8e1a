"""The perplexity of a language model on texts of any length."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxcompress._src.execution.execute import execute
from jaxcompress._src.report.intervals import quantile
from jaxcompress._src.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How surprised a language model is.

    Attributes:
        perplexity: exp of the mean.
        low: lower end of its interval; 0 of a single window.
        high: upper end; infinite of a single window.
        mean: -log probability of a token, in nats.
        standard_error: of the mean, over windows; NaN of a single one.
        count: tokens that were predicted.
        confidence: of the interval.
    """

    perplexity: float
    low: float
    high: float
    mean: float
    standard_error: float
    count: int
    confidence: float


class _Window(NamedTuple):
    """Tokens, and which of them are predicted, given those before them in the window; both of length L."""

    ids: np.ndarray
    counted: np.ndarray


def perplexity(
    apply: Callable[..., Any],
    params: Params,
    texts: Sequence[ArrayLike],
    *,
    window: int,
    stride: int | None = None,
    masks: Sequence[ArrayLike] | None = None,
    batch_size: int = 4,
    confidence: float = 0.95,
) -> Perplexity:
    """Exp of the mean of -log p(token | tokens before it), over windows that overlap.

    A text is read in windows of `window` tokens that begin `stride` tokens after one another. The first predicts all
    its tokens but the first; a later one those that the window before did not reach, which thus see at least
    `window - stride` tokens before them. The standard error is that of a ratio, over windows w with sums s_w and
    counts n_w: sqrt(k / (k - 1) Σ (s_w - m n_w)²) / Σ n_w, with m the mean and k the number of windows; windows that
    overlap count as independent, for each predicts other tokens.

    Args:
        apply: `(params, input_ids, attention_mask) -> logits`, (rows, tokens) to (rows, tokens, vocabulary).
        params: may hold compressed leaves.
        texts: token ids of each, one-dimensional; no text sees another.
        window: tokens that are read at once, at least 2.
        stride: from window to window, at most `window` - 1; half of it by default. The smaller, the more tokens each
            prediction sees, and the longer it takes.
        masks: of each text, bool or 0 / 1: which tokens count; by default all. (A prompt that is given does not.)
        batch_size: windows that are read together: memory for so many times `window` x vocabulary logits.
        confidence: of the interval, in (0, 1).

    Returns:
        Perplexity and mean, and how sure they are.

    Raises:
        ValueError: nothing to predict; options out of range; ids that are not one-dimensional integers, or masks of
            other lengths; or logits with NaN, and the text where.

    Example:
        >>> def uniform(params, ids, mask):
        ...     return jnp.zeros((*ids.shape, 8))
        >>> result = perplexity(uniform, {}, [np.arange(7), np.arange(3)], window=4)
        >>> round(result.perplexity, 4), result.count
        (8.0, 8)
    """
    stride = max(1, window // 2) if stride is None else stride
    if window < 2:
        raise ValueError(f"`window` must be at least 2, got {window}.")
    if not 1 <= stride < window:
        raise ValueError(f"`stride` must be between 1 and {window - 1}, one less than `window`, got {stride}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    z = quantile(confidence)
    windows = list(_windows(_checked(texts, masks), window, stride))
    if not windows:
        raise ValueError("There is nothing to predict: every text has fewer than 2 tokens, or none that counts.")
    sums = _sums(apply, params, [each for _, each in windows], window, batch_size)
    counts = np.array([each.counted.sum() for _, each in windows], np.float64)
    if len(broken := np.flatnonzero(np.isnan(sums))):
        raise ValueError(f"The logits are NaN in text {windows[broken[0]][0]}.")
    mean = float(sums.sum() / counts.sum())
    error, low, high = math.nan, 0.0, math.inf
    if len(windows) > 1 and math.isfinite(mean):
        spread = np.square(sums - mean * counts).sum() * len(sums) / (len(sums) - 1)
        error = float(np.sqrt(spread) / counts.sum())
        low, high = _exp(mean - z * error), _exp(mean + z * error)
    return Perplexity(
        perplexity=_exp(mean),
        low=low,
        high=high,
        mean=mean,
        standard_error=error,
        count=int(counts.sum()),
        confidence=confidence,
    )


def _checked(texts: Sequence[ArrayLike], masks: Sequence[ArrayLike] | None) -> list[tuple[np.ndarray, np.ndarray]]:
    if masks is not None and len(masks) != len(texts):
        raise ValueError(f"There are {len(texts)} texts and {len(masks)} `masks`.")
    checked = []
    for number, text in enumerate(texts):
        ids = np.asarray(text)
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or not ids.size):
            raise ValueError(f"Text {number} must be one-dimensional integers, got {ids.dtype}{list(ids.shape)}.")
        mask = np.ones(len(ids), bool) if masks is None else np.asarray(masks[number]).astype(bool)
        if mask.shape != ids.shape:
            raise ValueError(f"Text {number} has {len(ids)} tokens, its mask is {list(mask.shape)}.")
        checked.append((ids.astype(np.int32), mask))
    return checked


def _windows(texts: list[tuple[np.ndarray, np.ndarray]], size: int, stride: int) -> Iterator[tuple[int, _Window]]:
    """Those that predict something, with the number of their text."""
    for number, (ids, mask) in enumerate(texts):
        reached = 1
        for start in range(0, len(ids), stride):
            end = min(start + size, len(ids))
            if end <= reached:
                break
            counted = mask[start:end].copy()
            counted[: reached - start] = False
            reached = end
            if counted.any():
                yield number, _Window(ids[start:end], counted)


def _sums(apply: Callable[..., Any], params: Params, windows: list[_Window], size: int, batch_size: int) -> np.ndarray:
    """The sum of -log p of each window, float64; in the order of lengths, so that short texts are padded little."""

    @jax.jit
    @execute
    def of_batch(params: Params, ids: jax.Array, mask: jax.Array, counted: jax.Array) -> jax.Array:
        logits = apply(params, ids, mask)[:, :-1].astype(jnp.float32)
        picked = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.where(counted[:, 1:] > 0, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0).sum(axis=-1)

    sums = np.zeros(len(windows))
    order = sorted(range(len(windows)), key=lambda place: len(windows[place].ids))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        width = _width(max(len(windows[place].ids) for place in places), size)
        arrays = np.zeros((3, batch_size, width), np.int32)
        for row, place in enumerate(places):
            ids, counted = windows[place]
            arrays[:, row, : len(ids)] = ids, np.ones(len(ids)), counted
        # A row without a token would have no softmax.
        arrays[1, len(places) :, 0] = 1
        sums[places] = np.asarray(of_batch(params, *arrays), np.float64)[: len(places)]
    return sums


def _width(length: int, most: int) -> int:
    """Few widths, each of which is one compilation."""
    width = 16
    while width < length:
        width *= 2
    return min(width, most)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
