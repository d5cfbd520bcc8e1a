"""Normal intervals."""

import math
import statistics

import numpy as np


def quantile(confidence: float) -> float:
    """The z for which a normal variable is within ±z with a probability.

    Raises:
        ValueError: `confidence` not in (0, 1).

    Example:
        >>> round(quantile(0.95), 4)
        1.96
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
    return statistics.NormalDist().inv_cdf((1.0 + confidence) / 2.0)


def normal_interval(values: np.ndarray, confidence: float) -> tuple[float, float, float, float]:
    """Mean, its standard error std(ddof=1) / sqrt(n), and both ends of mean ± z standard errors.

    Args:
        values: float64, at least 2.
        confidence: in (0, 1).
    """
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half = quantile(confidence) * error
    return mean, error, mean - half, mean + half
