"""Two models on the same examples: which is right more often, and how often they agree. NumPy, float64."""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.report.intervals import normal_interval, quantile


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


def paired_difference(correct_a: ArrayLike, correct_b: ArrayLike, *, confidence: float = 0.95) -> PairedDifference:
    """Compares two models by the examples on which they differ.

    With d_i = a_i - b_i: difference = mean(d), standard error = std(d, ddof=1) / sqrt(n), interval = difference ± z
    standard errors. Far tighter than the interval of two separate accuracies, because what both get right or wrong
    cancels. If no example differs, the interval has no width: it says nothing about examples that were not seen.

    The p-value is two-sided: 2 P(X <= min(only_a, only_b)) with X ~ Binomial(only_a + only_b, 1/2), at most 1.

    Args:
        correct_a: bool or 0 / 1, one for each example: whether a is right.
        correct_b: bool or 0 / 1: whether b is right, on the same examples in the same order.
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
    mean, error, low, high = normal_interval(difference, confidence)
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


@on_auto_axes
def agreement(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95) -> Agreement:
    """Share of examples on which two predictions are equal, with Wilson's interval.

    Centre (k + z²/2) / (n + z²), half width z / (n + z²) sqrt(k (n - k) / n + z²/4), for k matches of n: never outside
    [0, 1], and of positive width even if all agree.

    Args:
        a: predictions, such as class numbers, one for each example. NaN agrees with nothing.
        b: predictions of the other model for the same examples.
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
    matches, count, z = int((a == b).sum()), len(a), quantile(confidence)
    centre = (matches + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(matches * (count - matches) / count + z**2 / 4)
    # At the ends the formula is exact, its rounding is not.
    low = 0.0 if matches == 0 else centre - half
    high = 1.0 if matches == count else centre + half
    return Agreement(rate=matches / count, low=low, high=high, matches=matches, count=count, confidence=confidence)


def _examples(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"`{name}` must have one entry for each example, got shape {array.shape}.")
    return array


def _check_pairs(a: np.ndarray, b: np.ndarray, *, least: int) -> None:
    if len(a) != len(b) or len(a) < least:
        raise ValueError(f"Both models need results on the same {least} or more examples, got {len(a)} and {len(b)}.")


def _mcnemar(only_a: int, only_b: int) -> float:
    count, fewer = only_a + only_b, min(only_a, only_b)
    term, tail = 1, 1
    for at in range(fewer):
        term = term * (count - at) // (at + 1)
        tail += term
    # Integers to the end: the quotient is rounded once, and nothing underflows on the way.
    return min(2 * tail / 2**count, 1.0)
