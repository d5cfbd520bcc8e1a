"""The mean of figures of examples. NumPy, float64."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from jaxcompress._src.report.intervals import normal_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleMean:
    """A mean over examples.

    Attributes:
        mean: over the examples.
        standard_error: of the mean.
        low: lower end of the normal interval of the mean.
        high: upper end.
        confidence: of the interval.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    confidence: float


def sample_mean(values: ArrayLike, *, confidence: float = 0.95) -> SampleMean:
    """Mean of one figure for each example, with the normal interval mean ± z std(ddof=1) / sqrt(n).

    Args:
        values: one for each example.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: not one-dimensional, fewer than 2 examples, or NaN or Inf among them.

    Example:
        >>> sample = sample_mean([1.0, 2.0, 3.0])
        >>> sample.mean, round(sample.low, 3), round(sample.high, 3)
        (2.0, 0.868, 3.132)
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"`values` must have one entry for each of 2 or more examples, got shape {array.shape}.")
    broken = np.flatnonzero(~np.isfinite(array))
    if len(broken):
        raise ValueError(f"`values` are not finite at {len(broken)} examples, the first is {broken[0]}.")
    mean, error, low, high = normal_interval(array, confidence)
    return SampleMean(mean=mean, standard_error=error, low=low, high=high, confidence=confidence)
