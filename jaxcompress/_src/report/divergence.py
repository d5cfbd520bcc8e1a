"""How far the probabilities of one model are from those of another. NumPy, float64."""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.report.intervals import normal_interval


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


@on_auto_axes
def kl_divergence(p_logits: ArrayLike, q_logits: ArrayLike, *, confidence: float = 0.95) -> Divergence:
    """KL(p || q) = Σ_c p_c (log p_c - log q_c), with p and q the softmax of logits.

    Args:
        p_logits: of the reference (the dense model), (examples, classes). -inf is probability 0.
        q_logits: of the other model, of the same shape.
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
        mean, error, low, high = normal_interval(per_example, confidence)
    return Divergence(
        per_example=per_example,
        mean=mean,
        standard_error=error,
        low=max(low, 0.0),
        high=high,
        confidence=confidence,
    )


def _log_softmax(name: str, logits: ArrayLike) -> np.ndarray:
    values = np.asarray(logits, np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
        raise ValueError(f"`{name}` must be (examples, classes) with at least 2 examples, got shape {values.shape}.")
    top = values.max(axis=-1, keepdims=True)
    broken = np.flatnonzero(~np.isfinite(top[:, 0]))
    if len(broken):
        raise ValueError(f"`{name}` has no distribution at {len(broken)} examples, the first is {broken[0]}.")
    shifted = values - top
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
