"""Where to clip a histogram so that least information is lost."""

import numpy as np

_FIRST = 128
"""Bins that are kept at least."""


def entropy_clip(counts: np.ndarray, *, levels: int) -> int:
    """The number of bins of |x| to keep: that of least KL(clipped || rounded); the last of equal ones.

    The clipped distribution has the mass beyond the clip in its last bin. The rounded one merges the kept bins into
    `levels` runs, each spread evenly over the bins of the run that are not empty. The first bin, where zeros gather,
    takes the height of the second.

    Args:
        counts: (bins,), how often |x| fell into each.
        levels: of |x|: 2^(b-1) for signed codes of b bits, 2^b for unsigned ones.

    Returns:
        In [128, bins]; all of them if there are no more than 128, or if the histogram is empty.

    Example:
        >>> counts = np.round(1e6 * np.exp(-np.arange(2048) / 60))
        >>> entropy_clip(counts, levels=128)
        640

    References:
        Migacz, "8-bit inference with TensorRT", 2017.
    """
    heights = np.array(counts, np.float64)
    if len(heights) <= _FIRST or not heights.sum():
        return len(heights)
    heights[0] = heights[1]
    lengths = range(_FIRST, len(heights) + 1)
    divergences = np.array([_divergence(heights, count, levels) for count in lengths])
    return lengths[len(divergences) - 1 - int(np.argmin(divergences[::-1]))]


def _divergence(heights: np.ndarray, length: int, levels: int) -> float:
    inside = heights[:length]
    # As `numpy.digitize` has it on `linspace(0, kept, levels + 1)`.
    runs = np.searchsorted(np.linspace(0, length, levels + 1), np.arange(length), side="right") - 1
    filled = inside != 0
    mass = np.bincount(runs[filled], inside[filled], levels)
    bins = np.bincount(runs[filled], minlength=levels)
    spread = np.where(filled, (mass / np.maximum(bins, 1))[runs], 0.0)
    clipped = inside.copy()
    clipped[-1] += heights[length:].sum()
    if not spread.sum() or (clipped[~filled] > 0).any():
        return np.inf
    p, q = clipped[filled] / clipped.sum(), spread[filled] / spread.sum()
    return float(np.sum(p * np.log(p / q)))
