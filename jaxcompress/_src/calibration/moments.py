"""Sums over the rows that go through a kernel, of a dense model and of one that is being compressed, on the device.

Shape letters: N rows (tokens), D inputs of a kernel, O its outputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

from jaxcompress._src.calibration.layer_by_layer import Rows
from jaxcompress._src.meshes import on_auto_axes, shared_mesh

# Rows of several batches are summed at once: the shapes of batches, and which of their rows count, then ask for few
# compilations.
_ROWS = 8192


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "inputs", "gaps", "gram", "cross", "square", "energy"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over rows of weight a, of inputs x in the compressed model, and of gaps z.

    With W and b of the dense model, y its inputs, s what its output is added to, r the same of the compressed model:
    the target is t = y W + b + s - r, and z = t - (x W + b) what is missing before the kernel is touched. In z, errors
    are not differences of large sums: float32 is enough for them.

    Attributes:
        count: Σ a, the number of rows if each has weight 1.
        inputs: Σ a x.
        gaps: Σ a z.
        gram: Σ a x xᵀ.
        cross: Σ a x zᵀ.
        square: Σ a |z|².
        energy: Σ a |t - b|².
    """

    count: Float32[Array, ""]
    inputs: Float32[Array, " D"]
    gaps: Float32[Array, " O"]
    gram: Float32[Array, "D D"]
    cross: Float32[Array, "D O"]
    square: Float32[Array, ""]
    energy: Float32[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """The same sums of inputs x and of targets t, in float64 on the host.

    Attributes:
        count: Σ a.
        inputs: Σ a x.
        targets: Σ a t.
        gram: Σ a x xᵀ.
        cross: Σ a x tᵀ.
    """

    count: float
    inputs: Float64[np.ndarray, " D"]
    targets: Float64[np.ndarray, " O"]
    gram: Float64[np.ndarray, "D D"]
    cross: Float64[np.ndarray, "D O"]


def moments(
    path: str,
    pairs: Iterable[tuple[Rows, Rows]],
    kernel: Float[Array, "D O"],
    bias: Float[Array, " O"],
    weights: Iterable[Float[np.ndarray, " N"] | None],
) -> Moments:
    """Sums of what the compressed model feeds into a kernel, and of what is missing to what it should write there.

    Args:
        path: of the kernel, for errors.
        pairs: the kernel in the dense and in the compressed model, for each batch.
        kernel: of the dense model.
        bias: of the dense model.
        weights: a of the rows of each batch, at least 0; None: all are 1.

    Raises:
        ValueError: no row counts, or something that goes into the kernel is NaN or Inf; there are more or fewer weights
            than rows. Names the kernel.
    """
    total, lost = None, None
    for group, counted in _groups(path, pairs, weights):
        places, counts = _counting(counted, apart=shared_mesh(group) is not None)
        more = _sums(group, places, counts, kernel, bias)
        # What rounding loses of a sum over many groups is added to the next one.
        total, lost = (more, None) if total is None else _added(total, lost, more)
    if total is None:
        raise ValueError(f"`row_mask` leaves no row of the input of {path!r}.")
    if not np.isfinite(np.asarray(_squares(total.gram, total.square, total.energy))).all():
        raise ValueError(f"What goes into {path!r}, or what is added to its output, holds NaN or Inf.")
    return total


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


def relative_error(
    moments: Moments, change: Float[Array, "D O"], bias_change: Float[Array, " O"]
) -> Float32[Array, ""]:
    """sqrt(Σ |x W' + b' - t|² / Σ |t - b|²), the relative output error of a kernel.

    With the bias b of the dense model and its inputs this is ||X W' - X W|| / ||X W||.

    Args:
        moments: the sums.
        change: W' - W.
        bias_change: b' - b.

    Example:
        >>> one = jnp.ones(())
        >>> sums = Moments(
        ...     count=2 * one,
        ...     inputs=jnp.zeros(1),
        ...     gaps=jnp.zeros(1),
        ...     gram=jnp.eye(1),
        ...     cross=jnp.zeros((1, 1)),
        ...     square=0 * one,
        ...     energy=one,
        ... )
        >>> relative_error(sums, jnp.array([[-0.5]]), jnp.zeros(1)).item()
        0.5
    """
    w, b, m = change.astype(jnp.float32), bias_change.astype(jnp.float32), moments
    of_kernel = jnp.sum(w * (_product(m.gram, w) - 2 * m.cross))
    of_bias = jnp.sum(b * (2 * _product(m.inputs, w) - 2 * m.gaps + m.count * b))
    error = jnp.maximum(of_kernel + of_bias + m.square, 0.0)
    return jnp.where(m.energy > 0, jnp.sqrt(error / jnp.where(m.energy > 0, m.energy, 1.0)), 0.0)


def targets(moments: Moments, kernel: Any, bias: Any) -> Targets:
    """The sums of the targets themselves; `kernel` and `bias` are those of the dense model."""
    m = {field.name: np.asarray(getattr(moments, field.name), np.float64) for field in dataclasses.fields(moments)}
    w, b = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
    return Targets(
        count=float(m["count"]),
        inputs=m["inputs"],
        gram=m["gram"],
        targets=m["gaps"] + m["inputs"] @ w + m["count"] * b,
        cross=m["cross"] + m["gram"] @ w + np.outer(m["inputs"], b),
    )


def pooled(parts: Iterable[Moments]) -> Moments:
    """The sums over the rows of several uses of a kernel."""
    return functools.reduce(lambda left, right: jax.tree.map(jnp.add, left, right), parts)


_Group = list[tuple[Rows, Rows]]


def _groups(
    path: str, pairs: Iterable[tuple[Rows, Rows]], weights: Iterable[Float[np.ndarray, " N"] | None]
) -> Iterator[tuple[_Group, list[Any]]]:
    """Neighbouring batches, up to a number of rows, with the weights of their rows; some of which count."""
    group: _Group = []
    counted: list[Any] = []
    for pair, weight in zip(pairs, weights, strict=True):
        rows = len(pair[1].inputs)
        if weight is not None and len(weight) != rows:
            raise ValueError(f"`row_mask` gives {len(weight)} entries; the input of {path!r} has {rows} rows.")
        if weight is not None and not (weight != 0).any():
            continue
        # Rows that several devices hold are not put behind one another: they would have to change places.
        apart = shared_mesh(pair) is not None
        if group and (apart or sum(len(other.inputs) for _, other in group) + rows > _ROWS):
            yield group, counted
            group, counted = [], []
        group.append(pair)
        counted.append((weight, rows))
    if group:
        yield group, counted


def _counting(
    counted: list[Any], *, apart: bool
) -> tuple[Int[np.ndarray, " n"] | None, Float[np.ndarray, " n"] | None]:
    """Which rows count, and what; None where all are looked at, and where all count alike.

    Args:
        counted: the weights of the rows of each batch, and their number.
        apart: the rows lie on several devices, and stay there.
    """
    if all(weight is None for weight, _ in counted):
        return None, None
    weights = np.concatenate([np.ones(rows, np.float32) if weight is None else weight for weight, rows in counted])
    if apart:
        return None, weights
    places = np.flatnonzero(weights != 0)
    # One of few numbers, so that groups of the same shapes share a compilation.
    step = -(-len(weights) // 16)
    padded = np.zeros(-(-len(places) // step) * step, np.int32)
    padded[: len(places)] = places
    return padded, np.where(np.arange(len(padded)) < len(places), weights[padded], np.float32(0))


@on_auto_axes
@jax.jit
def _sums(
    group: list[tuple[Rows, Rows]],
    places: Int[Array | np.ndarray, " n"] | None,
    weights: Float[Array | np.ndarray, " n"] | None,
    kernel: Float[Array, "D O"],
    bias: Float[Array, " O"],
) -> Moments:
    def together(parts: list[Any]) -> Any:
        if any(part is None for part in parts):
            return jnp.float32(0)
        whole = jnp.concatenate(parts).astype(jnp.float32)
        if weights is None:
            return whole
        # Not a product with the weights alone: what does not count may be NaN.
        return jnp.where((counts > 0)[:, None], whole if places is None else whole[places], 0.0)

    rows = sum(len(other.inputs) for _, other in group)
    counts = jnp.ones(rows, jnp.float32) if weights is None else jnp.asarray(weights)
    x, y = (together([pair[k].inputs for pair in group]) for k in (1, 0))
    r, s = (together([pair[k].residual for pair in group]) for k in (1, 0))
    written = together([dense.written for dense, _ in group])
    kernel, bias = kernel.astype(jnp.float32), bias.astype(jnp.float32)
    gaps = _product(y - x, kernel) + (s - r)
    outputs = jnp.where((counts > 0)[:, None], written - r - bias[None], 0.0)
    weighted = x * counts[:, None]
    # As one product: each sum over a vector of its own would be several small kernels.
    per_row = [jnp.ones_like(counts), jnp.square(gaps).sum(axis=1), jnp.square(outputs).sum(axis=1)]
    count, square, energy = _product(jnp.stack(per_row), counts)
    return Moments(
        count=count,
        inputs=weighted.sum(axis=0),
        gaps=_product(counts, gaps),
        gram=_gram(weighted, x),
        cross=_product(weighted.T, gaps),
        square=square,
        energy=energy,
    )


def _gram(weighted: Float32[Array, "N D"], x: Float32[Array, "N D"]) -> Float32[Array, "D D"]:
    """Σ a x xᵀ: of a wide one, the blocks from the diagonal on, and those mirrored."""
    depth = x.shape[1]
    if depth <= 1024:
        return _product(weighted.T, x)
    step = -(-depth // 8)
    rows = [(at, _product(weighted[:, at : at + step].T, x[:, at:])) for at in range(0, depth, step)]
    upper = jnp.triu(jnp.concatenate([jnp.pad(block, ((0, 0), (at, 0))) for at, block in rows]))
    return upper + jnp.triu(upper, 1).T


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _added(total: Moments, lost: Moments | None, more: Moments) -> tuple[Moments, Moments]:
    """Kahan's sum: the new total, and what it lacks."""
    if lost is not None:
        more = jax.tree.map(jnp.add, more, lost)
    sums = jax.tree.map(jnp.add, total, more)
    return sums, jax.tree.map(lambda whole, old, new: new - (whole - old), sums, total, more)


@jax.jit
def _squares(
    gram: Float32[Array, "D D"], square: Float32[Array, ""], energy: Float32[Array, ""]
) -> Float32[Array, "3"]:
    """Sums of squares: where they are finite, all moments are, by the inequality of Cauchy and Schwarz."""
    return jnp.stack([jnp.trace(gram), square, energy])


def _product(left: Any, right: Any) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
