"""Fitting what is left of a kernel to what the whole one wrote. NumPy, float64.

Shape letters: D inputs of a kernel, O its outputs, U units.
"""

import numpy as np
from jaxtyping import Float, Float64, Int

from jaxcompress._src.calibration.moments import Targets


def fit_rows(
    sums: Targets,
    start: Float[np.ndarray, "D O"],
    bias: Float[np.ndarray, " O"],
    inputs: Int[np.ndarray, " K"],
    *,
    ridge: float,
    free_bias: bool,
) -> tuple[Float64[np.ndarray, "D O"], Float64[np.ndarray, " O"]]:
    """Argmin over the kept rows of W, and b: Σ |x W + b - t|² + ridge · mean(diag Σ x xᵀ) · |W - start|².

    Args:
        sums: the sums.
        start: where the ridge holds the solution; rows that are not kept are 0 in the solution.
        bias: b, if it is not free.
        inputs: indices of rows.
        ridge: relative to the mean of the diagonal over the kept rows.
        free_bias: fit b too.

    Returns:
        W and b.

    Example:
        >>> sums = Targets(
        ...     count=2.0, inputs=np.zeros(1), targets=np.zeros(1), gram=np.eye(1), cross=3 * np.eye(1)
        ... )
        >>> fit_rows(sums, np.ones((1, 1)), np.zeros(1), np.array([0]), ridge=1.0, free_bias=False)[0]
        array([[2.]])
    """
    gram, cross = _about(sums, bias, free_bias)
    solved = np.zeros(cross.shape)
    if len(inputs):
        normal, hold = gram[np.ix_(inputs, inputs)], ridge * _scale(sums.gram, inputs)
        normal = normal + hold * np.eye(len(inputs))
        solved[inputs] = _solve(normal, cross[inputs] + hold * np.asarray(start, np.float64)[inputs], start[inputs])
    return solved, _bias(sums, solved, bias, free_bias)


def fit_gates(
    sums: Targets,
    kernel: Float[np.ndarray, "D O"],
    bias: Float[np.ndarray, " O"],
    inputs: Int[np.ndarray, " K"],
    units: Int[np.ndarray, " D"],
    *,
    ridge: float,
    free_bias: bool,
    limit: float,
) -> tuple[Float64[np.ndarray, "D O"], Float64[np.ndarray, " O"]]:
    """One number z for each unit: argmin Σ |x diag(z) W + b - t|² + ridge · Σ_u c_u (z_u - 1)².

    c_u = mean(diag Σ x xᵀ) · |W_u|², so that the ridge is that of `fit_rows`, of kernels with such gates.

    Args:
        sums: the sums.
        kernel: W, whole.
        bias: b, if it is not free.
        inputs: indices of rows.
        units: the unit of each row.
        ridge: relative, as in `fit_rows`.
        free_bias: fit b too.
        limit: gates outside [-limit, limit] are clipped.

    Returns:
        diag(z) W, with rows of 0 that are not kept, and b.
    """
    gram, cross = _about(sums, bias, free_bias)
    whole, solved = np.asarray(kernel, np.float64), np.zeros(cross.shape)
    if len(inputs):
        owners, places = np.unique(units[inputs], return_inverse=True)
        member = np.zeros((len(inputs), len(owners)))
        member[np.arange(len(inputs)), places] = 1.0
        rows = whole[inputs]
        normal = member.T @ (gram[np.ix_(inputs, inputs)] * (rows @ rows.T)) @ member
        hold = ridge * _scale(sums.gram, inputs) * (member.T @ np.square(rows).sum(axis=1))
        right = member.T @ (rows * cross[inputs]).sum(axis=1)
        gates = np.clip(_solve(normal + np.diag(hold), right + hold, np.ones(len(right))), -limit, limit)
        solved[inputs] = rows * (member @ gates)[:, None]
    return solved, _bias(sums, solved, bias, free_bias)


def _about(sums: Targets, bias: np.ndarray, free_bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Gram and cross moments: about the means if the bias is free, which takes them up; otherwise of t - b."""
    m = sums
    if free_bias:
        count = max(m.count, 1.0)
        return m.gram - np.outer(m.inputs, m.inputs) / count, m.cross - np.outer(m.inputs, m.targets) / count
    return m.gram, m.cross - np.outer(m.inputs, np.asarray(bias, np.float64))


def _bias(sums: Targets, solved: np.ndarray, bias: np.ndarray, free_bias: bool) -> np.ndarray:
    if not free_bias:
        return np.asarray(bias, np.float64)
    return (sums.targets - sums.inputs @ solved) / max(sums.count, 1.0)


def _scale(gram: np.ndarray, inputs: np.ndarray) -> float:
    return float(np.diag(gram)[inputs].mean())


def _solve(normal: np.ndarray, right: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The least squares nearest to `start`: inputs that are 0 everywhere (and no ridge) leave it where it is."""
    try:
        solution = np.linalg.solve(normal, right)
    except np.linalg.LinAlgError:
        solution = np.full_like(right, np.nan)
    residual = np.abs(normal @ solution - right).max()
    if np.isfinite(residual) and residual <= 1e-8 * max(np.abs(right).max(), 1e-300):
        return solution
    start = np.asarray(start, np.float64)
    return start + np.linalg.lstsq(normal, right - normal @ start, rcond=None)[0]
