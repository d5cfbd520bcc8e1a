"""What the benchmarks of one kernel share: the kernel, its inputs, the error of outputs, the clock."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def drawn_layer(depth: int, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A kernel (in, out), and XᵀX of correlated inputs."""
    rng = np.random.default_rng(0)
    rows = 4 * depth
    x = rng.normal(size=(rows, depth)) @ (rng.normal(size=(depth, depth)) / np.sqrt(depth) + 0.5 * np.eye(depth))
    return rng.normal(size=(depth, width)).astype(np.float32), (x.T @ x).astype(np.float32), rows


def output_error(found: np.ndarray, weights: np.ndarray, gram: np.ndarray) -> float:
    """Relative error of a kernel's outputs; `gram` is XᵀX."""
    lost = weights - found
    return float(np.sqrt(np.sum(lost * (gram @ lost)) / np.sum(weights * (gram @ weights))))


def seconds_of(fn: Callable[[], Any] | None) -> float:
    """By the clock; NaN for nothing."""
    if fn is None:
        return float("nan")
    begun = time.perf_counter()
    fn()
    return time.perf_counter() - begun
