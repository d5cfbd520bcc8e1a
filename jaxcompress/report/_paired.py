"""Two models on the same examples: differences, agreement, divergence. NumPy, float64."""

import dataclasses
import math
import statistics
from typing import Any

import numpy as np
from jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Difference of two accuracies on the same examples.

    Attributes:
        difference: mean of a minus mean of b.
        standard_error: of the difference, paired.
        low: lower end of the interval.
        high: upper end.
        p_value: of McNemar's exact test: how probable so uneven a split is if both models are equally good.
        only_a: examples that only a gets right.
        only_b: examples that only b gets right.
        count: all examples.
        confidence: of the interval.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float
    only_a: int
    only_b: int
    count: int
    confidence: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often two models say the same.

    Attributes:
        rate: share of examples.
        low: lower end of the Wilson interval.
        high: upper end.
        matches: examples on which they agree.
        count: all examples.
        confidence: of the interval.
    """

    rate: float
    low: float
    high: float
    matches: int
    count: int
    confidence: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Divergence:
    """Kullback-Leibler divergence of two models, in nats.

    Attributes:
        per_example: float64, one for each example.
        mean: over the examples.
        standard_error: of the mean.
        low: lower end of the normal interval of the mean, not below 0.
        high: upper end.
        confidence: of the interval.
    """

    per_example: np.ndarray
    mean: float
    standard_error: float
    low: float
    high: float
    confidence: float


def paired_difference(correct_a: ArrayLike, correct_b: ArrayLike, *, confidence: float = 0.95) -> PairedDifference:
    """Compares two models by the examples on which they differ.

    With d_i = a_i - b_i: difference = mean(d), standard error = std(d, ddof=1) / sqrt(n), interval = difference ± z
    standard errors. Far tighter than the interval of two separate accuracies, because what both get right or wrong
    cancels. If no example differs, the interval has no width: it says nothing about examples that were not seen.

    The p-value is two-sided: 2 P(X <= min(only_a, only_b)) with X ~ Binomial(only_a + only_b, 1/2), at most 1.

    Args:
        correct_a: bool or 0 / 1, one for each example: whether a is right.
        correct_b: likewise for b, on the same examples in the same order.
        confidence: of the interval, in (0, 1).

    Returns:
        The comparison; a positive difference favours a.

    Raises:
        ValueError: not two one-dimensional arrays of equal length (at least 2) of zeros and ones.

    Example:
        >>> result = paired_difference([1, 1, 1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 0, 1, 0, 0])
        >>> result.difference, result.only_a, result.only_b, result.p_value
        (0.5, 4, 0, 0.125)

    References:
        McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages".
    """
    a, b = _examples("correct_a", correct_a), _examples("correct_b", correct_b)
    for name, values in (("correct_a", a), ("correct_b", b)):
        if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
            raise ValueError(f"`{name}` must hold 0 and 1 (or False and True) only.")
    _check_pairs(a, b, least=2)
    difference = a.astype(np.float64) - b.astype(np.float64)
    mean, error, low, high = _normal_interval(difference, confidence)
    only_a, only_b = int((difference > 0).sum()), int((difference < 0).sum())
    return PairedDifference(
        difference=mean,
        standard_error=error,
        low=low,
        high=high,
        p_value=_mcnemar(only_a, only_b),
        only_a=only_a,
        only_b=only_b,
        count=len(a),
        confidence=confidence,
    )


def agreement(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95) -> Agreement:
    """Share of examples on which two predictions are equal, with Wilson's interval.

    Centre (k + z²/2) / (n + z²), half width z / (n + z²) sqrt(k (n - k) / n + z²/4), for k matches of n: never outside
    [0, 1], and of positive width even if all agree.

    Args:
        a: predictions, such as class numbers, one for each example. NaN agrees with nothing.
        b: likewise.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: not two one-dimensional arrays of equal length (at least 1).

    Example:
        >>> result = agreement([1, 2, 3, 4], [1, 2, 3, 0])
        >>> result.rate, round(result.low, 4), round(result.high, 4)
        (0.75, 0.3006, 0.9544)

    References:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    a, b = _examples("a", a), _examples("b", b)
    _check_pairs(a, b, least=1)
    matches, count, z = int((a == b).sum()), len(a), _quantile(confidence)
    centre = (matches + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(matches * (count - matches) / count + z**2 / 4)
    # At the ends the formula is exact, its rounding is not.
    low = 0.0 if matches == 0 else centre - half
    high = 1.0 if matches == count else centre + half
    return Agreement(rate=matches / count, low=low, high=high, matches=matches, count=count, confidence=confidence)


def kl_divergence(p_logits: ArrayLike, q_logits: ArrayLike, *, confidence: float = 0.95) -> Divergence:
    """KL(p || q) = Σ_c p_c (log p_c - log q_c), with p and q the softmax of logits.

    Args:
        p_logits: of the reference (the dense model), (examples, classes). -inf is probability 0.
        q_logits: of the other model, likewise.
        confidence: of the interval of the mean, in (0, 1).

    Returns:
        The divergence of every example in nats, and its mean with a normal interval: mean ± z std(ddof=1) / sqrt(n).
        Infinite where q excludes what p does not.

    Raises:
        ValueError: shapes differ or are not (examples, classes) with at least 2 examples and 1 class, or a row is no
            distribution (NaN, +inf, or -inf throughout).

    Example:
        >>> import numpy as np
        >>> result = kl_divergence(np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]]))
        >>> result.per_example.round(4).tolist(), round(result.mean, 4)
        ([0.1438, 0.0], 0.0719)
    """
    p, q = _log_softmax("p_logits", p_logits), _log_softmax("q_logits", q_logits)
    if p.shape != q.shape:
        raise ValueError(f"`p_logits` and `q_logits` must have the same shape, got {p.shape} and {q.shape}.")
    present = p > -np.inf
    gap = np.subtract(p, q, out=np.zeros_like(p), where=present)
    # Rounding can make the divergence of equal distributions negative by an ulp.
    per_example = np.maximum((np.exp(p) * gap).sum(axis=-1), 0.0)
    if np.isinf(per_example).any():
        mean, error, low, high = math.inf, math.inf, 0.0, math.inf
    else:
        mean, error, low, high = _normal_interval(per_example, confidence)
    return Divergence(
        per_example=per_example,
        mean=mean,
        standard_error=error,
        low=max(low, 0.0),
        high=high,
        confidence=confidence,
    )


def _examples(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"`{name}` must have one entry for each example, got shape {array.shape}.")
    return array


def _check_pairs(a: np.ndarray, b: np.ndarray, *, least: int) -> None:
    if len(a) != len(b) or len(a) < least:
        raise ValueError(f"Both models need results on the same {least} or more examples, got {len(a)} and {len(b)}.")


def _log_softmax(name: str, logits: Any) -> np.ndarray:
    values = np.asarray(logits, np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
        raise ValueError(f"`{name}` must be (examples, classes) with at least 2 examples, got shape {values.shape}.")
    top = values.max(axis=-1, keepdims=True)
    broken = np.flatnonzero(~np.isfinite(top[:, 0]))
    if len(broken):
        raise ValueError(f"`{name}` has no distribution at {len(broken)} examples, the first is {broken[0]}.")
    shifted = values - top
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _quantile(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
    return statistics.NormalDist().inv_cdf((1.0 + confidence) / 2.0)


def _normal_interval(values: np.ndarray, confidence: float) -> tuple[float, float, float, float]:
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half = _quantile(confidence) * error
    return mean, error, mean - half, mean + half


def _mcnemar(only_a: int, only_b: int) -> float:
    count, fewer = only_a + only_b, min(only_a, only_b)
    term, tail = 1, 1
    for at in range(fewer):
        term = term * (count - at) // (at + 1)
        tail += term
    # Integers to the end: the quotient is rounded once, and nothing underflows on the way.
    return min(2 * tail / 2**count, 1.0)
