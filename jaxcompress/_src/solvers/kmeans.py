"""k-means on a line: exact by dynamic programming, or Lloyd's iteration from the exact answer on a coarser grid.

Shape letters: N values, K clusters.
"""

import numpy as np
from jaxtyping import Float64, Integer, Num, Shaped

_COARSE = 4096
_ITERATIONS = 300


def kmeans_line(
    values: Num[np.ndarray, "..."],
    count: int,
    *,
    weights: Num[np.ndarray, "..."] | None = None,
    exact_up_to: int = 2**13,
) -> Float64[np.ndarray, " K"]:
    """Centers c_1 <= ... <= c_K that minimise Σ_i h_i min_k (x_i - c_k)².

    On a line, clusters are intervals of the sorted values. Up to `exact_up_to` distinct values the optimum is found, by
    dynamic programming with monotone splits, O(K N log N). Beyond, the optimum on 4,096 cells of equal count is
    improved by Lloyd's iteration to its fixed point; with prefix sums an iteration costs O(K log N).

    Args:
        values: real numbers; the shape does not matter.
        count: K, at least 1.
        weights: h, at least 0, of the same shape; by default 1. Values of weight 0 count only if all weights are 0.
        exact_up_to: the largest number of distinct values that is solved exactly.

    Returns:
        The centers, ascending. With fewer than K distinct values, each is a center, and the last one fills the rest;
        without values all centers are 0.

    Raises:
        ValueError: `count` below 1; NaN or Inf; weights of another shape, negative or not finite.

    Example:
        >>> import numpy as np
        >>> kmeans_line(np.array([0.0, 0.1, 1.0, 1.1, 5.0]), 3)
        array([0.05, 1.05, 5.  ])

    References:
        Wang and Song 2011, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic programming";
        Wu 1991, "Optimal quantization by matrix searching".
    """
    x, h = _distinct(values, weights, count)
    if len(x) <= count:
        return np.pad(x, (0, count - len(x)), mode="edge") if len(x) else np.zeros(count)
    if len(x) <= exact_up_to:
        return _means(x, h, _exact_starts(x, h, count))
    cells = np.linspace(0, len(x), _COARSE + 1).astype(np.int64)[:-1]
    coarse = _means(x, h, cells)
    starts = _exact_starts(coarse, np.add.reduceat(h, cells), count)
    return _lloyd(x, h, _means(coarse, np.add.reduceat(h, cells), starts))


def nearest_center(values: Num[np.ndarray, "..."], centers: Num[np.ndarray, " K"]) -> Integer[np.ndarray, "..."]:
    """The number of the nearest center; of two equally near ones the lower.

    Args:
        values: real numbers.
        centers: ascending.

    Example:
        >>> import numpy as np
        >>> nearest_center(np.array([0.4, 0.5, 0.6]), np.array([0.0, 1.0, 1.0]))
        array([0, 0, 1])
    """
    centers = np.asarray(centers, np.float64)
    return np.searchsorted(_borders(centers), np.asarray(values, np.float64), side="left")


def _distinct(values: Shaped[np.ndarray, "..."], weights: Shaped[np.ndarray, "..."] | None, count: int):
    """Sorted distinct values and the sums of their weights."""
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    x = np.asarray(values, np.float64).ravel()
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).sum())} of {x.size} values are NaN or Inf.")
    h = np.ones_like(x) if weights is None else np.asarray(weights, np.float64).ravel()
    if h.shape != x.shape or not np.isfinite(h).all() or (h < 0).any():
        raise ValueError(f"Weights must be one finite number, not negative, for each of {x.size} values.")
    if h.any():
        x, h = x[h > 0], h[h > 0]
    else:
        h = np.ones_like(h)
    distinct, place = np.unique(x, return_inverse=True)
    return distinct, np.bincount(place, h, len(distinct))


def _means(x: Float64[np.ndarray, " N"], h: Float64[np.ndarray, " N"], starts: Integer[np.ndarray, " K"]):
    """Weighted means of consecutive, nonempty runs."""
    return np.add.reduceat(h * x, starts) / np.add.reduceat(h, starts)


class _Sums:
    """Prefix sums, and from them the squared error of any run [i, j) around its own mean."""

    def __init__(self, x: Float64[np.ndarray, " N"], h: Float64[np.ndarray, " N"]) -> None:
        # Around the mean, so that the difference of large sums keeps its digits.
        x = x - np.average(x, weights=h)
        self.h, self.hx, self.hxx = (np.concatenate([[0.0], np.cumsum(h * x**power)]) for power in range(3))

    def error(self, i: Integer[np.ndarray, " M"], j: Integer[np.ndarray, " M"]) -> Float64[np.ndarray, " M"]:
        mass, moment = self.h[j] - self.h[i], self.hx[j] - self.hx[i]
        return np.maximum(self.hxx[j] - self.hxx[i] - moment**2 / np.where(mass > 0, mass, 1.0), 0.0)


def _exact_starts(x: Float64[np.ndarray, " N"], h: Float64[np.ndarray, " N"], count: int) -> Integer[np.ndarray, " K"]:
    """Where the runs of the best partition into `count` begin."""
    sums, size = _Sums(x, h), len(x)
    ends = np.arange(size + 1)
    best = sums.error(np.zeros_like(ends), ends)
    splits = []
    for k in range(2, count + 1):
        best, split = _one_more_run(sums, best, k)
        splits.append(split)
    starts, end = [], size
    for split in reversed(splits):
        end = int(split[end])
        starts.append(end)
    return np.array([0, *reversed(starts)])


def _one_more_run(
    sums: _Sums, best: Float64[np.ndarray, " N1"], k: int
) -> tuple[Float64[np.ndarray, " N1"], Integer[np.ndarray, " N1"]]:
    """Min over i of best[i] + error(i, j), for all j >= k, and its argument (monotone in j: divide and conquer).

    All middles of one depth of the recursion are solved together, so that NumPy sees long vectors.
    """
    size = len(best) - 1
    new, split = np.full(size + 1, np.inf), np.zeros(size + 1, np.int64)
    low, high, first, last = (np.array([number]) for number in (k, size, k - 1, size - 1))
    while len(low):
        middle = (low + high) // 2
        stop = np.minimum(last, middle - 1)
        lengths = stop - first + 1
        begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        owner = np.repeat(np.arange(len(low)), lengths)
        i = np.arange(lengths.sum()) - begins[owner] + first[owner]
        costs = best[i] + sums.error(i, middle[owner])
        least = np.minimum.reduceat(costs, begins)
        hits = np.flatnonzero(costs == least[owner])
        border = i[hits[np.searchsorted(hits, begins)]]
        new[middle], split[middle] = least, border
        left, right = low < middle, middle < high
        low, high, first, last = (
            np.concatenate(pair)
            for pair in (
                (low[left], middle[right] + 1),
                (middle[left] - 1, high[right]),
                (first[left], border[right]),
                (border[left], last[right]),
            )
        )
    return new, split


def _lloyd(x: Float64[np.ndarray, " N"], h: Float64[np.ndarray, " N"], centers: Float64[np.ndarray, " K"]):
    mass, moment = (np.concatenate([[0.0], np.cumsum(part)]) for part in (h, h * x))
    for _ in range(_ITERATIONS):
        edges = np.concatenate([[0], np.searchsorted(x, _borders(centers), side="right"), [len(x)]])
        total = np.diff(mass[edges])
        moved = np.where(total > 0, np.diff(moment[edges]) / np.where(total > 0, total, 1.0), centers)
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers


def _borders(centers: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " K1"]:
    return (centers[1:] + centers[:-1]) / 2
