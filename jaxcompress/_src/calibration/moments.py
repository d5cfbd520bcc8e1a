"""Sums over the rows that go through a kernel, of a dense and of a pruned model.

Shape letters: N rows (tokens), D inputs of a kernel, O its outputs.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Num

from jaxcompress._src.calibration.site import Site
from jaxcompress._src.meshes import on_auto_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over rows of weight a, of inputs x, and of targets t that `x @ W + b` should be.

    Attributes:
        count: Σ a, the number of rows if each has weight 1.
        inputs: Σ a x.
        targets: Σ a t.
        gram: Σ a x xᵀ.
        cross: Σ a x tᵀ.
        square: Σ a |t|².
    """

    count: float
    inputs: Float64[np.ndarray, " D"]
    targets: Float64[np.ndarray, " O"]
    gram: Float64[np.ndarray, "D D"]
    cross: Float64[np.ndarray, "D O"]
    square: float


def moments(
    pairs: Iterable[tuple[Site, Site]],
    kernel: Float[Array, "D O"],
    bias: Float[Array, " O"],
    weights: Iterable[Float[np.ndarray, " N"] | None],
) -> Moments:
    """Sums of what the pruned model feeds into a kernel, and of what it should write there.

    The target of a row is what the dense model writes and adds it to, less what the pruned model adds it to.

    Args:
        pairs: the kernel in the dense and in the pruned model, for each batch.
        kernel: of the dense model.
        bias: of the dense model.
        weights: a of the rows of each batch, at least 0; None: all are 1.

    Raises:
        ValueError: no row counts, or something that goes into the kernel is NaN or Inf; there are more or fewer weights
            than rows. Names the kernel.
    """
    total: dict[str, np.ndarray] = {}
    path = ""
    for (dense, pruned), own in zip(pairs, weights, strict=True):
        path = dense.kernel.name
        if own is not None and len(own) != len(pruned.inputs):
            raise ValueError(
                f"`row_mask` gives {len(own)} entries; the input of {path!r} has {len(pruned.inputs)} rows."
            )
        found = _sums((dense.inputs, dense.residual), (pruned.inputs, pruned.residual), kernel, bias, own)
        total = {name: np.asarray(value, np.float64) + total.get(name, 0.0) for name, value in found.items()}
    if not all(np.isfinite(value).all() for value in total.values()):
        raise ValueError(f"What goes into {path!r}, or what is added to its output, holds NaN or Inf.")
    if not total["count"]:
        raise ValueError(f"`row_mask` leaves no row of the input of {path!r}.")
    count, square = float(total.pop("count")), float(total.pop("square"))
    return Moments(count=count, square=square, **total)


def flat_weights(
    row_mask: Callable[..., Any] | None, batches: Iterable[tuple[Any, ...]]
) -> list[Float[np.ndarray, " N"] | None]:
    """The weights of the rows of each batch, for `moments`.

    Example:
        >>> flat_weights(lambda ids, mask: mask, [(np.ones((1, 3)), np.array([[1, 1, 0]]))])
        [array([1., 1., 0.], dtype=float32)]
    """
    if row_mask is None:
        return [None for _ in batches]
    return [np.maximum(np.asarray(row_mask(*batch), np.float32).reshape(-1), 0.0) for batch in batches]


def relative_error(moments: Moments, kernel: np.ndarray, bias: np.ndarray, dense_bias: np.ndarray) -> float:
    """sqrt(Σ |x W' + b' - t|² / Σ |t - b|²), the relative output error of a kernel.

    With the bias b of the dense model and its inputs this is ||X W' - X W|| / ||X W||.

    Args:
        moments: the sums.
        kernel: W'.
        bias: b'.
        dense_bias: b.

    Example:
        >>> sums = Moments(
        ...     count=2.0, inputs=np.zeros(1), targets=np.zeros(1), gram=np.eye(1), cross=np.eye(1), square=1.0
        ... )
        >>> relative_error(sums, np.array([[0.5]]), np.zeros(1), np.zeros(1))
        0.5
    """
    w, b, m = np.asarray(kernel, np.float64), np.asarray(bias, np.float64), moments
    dense = np.asarray(dense_bias, np.float64)
    predicted = (w * (m.gram @ w)).sum() + 2 * (b @ (m.inputs @ w)) + m.count * (b @ b)
    error = predicted - 2 * ((w * m.cross).sum() + b @ m.targets) + m.square
    total = m.square - 2 * (dense @ m.targets) + m.count * (dense @ dense)
    # Both are differences of large sums: what is left of nothing is a rounding error.
    least = 1e-14 * m.square
    return float(np.sqrt(max(float(error), 0.0) / total)) if total > least else 0.0


@on_auto_axes
@jax.jit
def _sums(
    dense: tuple[Num[Array, "N D"], Float[Array, "N O"] | None],
    pruned: tuple[Num[Array, "N D"], Float[Array, "N O"] | None],
    kernel: Float[Array, "D O"],
    bias: Float[Array, " O"],
    weights: Float[Array, " N"] | None,
) -> dict[str, jax.Array]:
    inputs = pruned[0].astype(jnp.float32)
    target = _product(dense[0].astype(jnp.float32), kernel.astype(jnp.float32)) + bias.astype(jnp.float32)[None, :]
    if dense[1] is not None and pruned[1] is not None:
        target = target + dense[1].astype(jnp.float32) - pruned[1].astype(jnp.float32)
    if weights is None:
        weights = jnp.ones(len(inputs), jnp.float32)
    # Not a product alone: what does not count may be NaN.
    counts = weights[:, None] > 0
    inputs, target = jnp.where(counts, inputs, 0.0), jnp.where(counts, target, 0.0)
    weighted = inputs * weights[:, None]
    return {
        "count": weights.sum(),
        "inputs": weighted.sum(axis=0),
        "targets": _product(weights, target),
        "gram": _product(weighted.T, inputs),
        "cross": _product(weighted.T, target),
        "square": _product(weights, jnp.square(target).sum(axis=1)),
    }


def _product(left: Any, right: Any) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
