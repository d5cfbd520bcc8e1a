"""Scales that lose less than those of the extreme values.

Shape letters: D inputs, R outputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxcompress._src.arrays.quantized import split_blocks
from jaxcompress._src.quantization.blocks import reduced_axes, scale_shape
from jaxcompress._src.quantization.rounding import rounded
from jaxcompress._src.quantization.scales import block_scales, scales_of_shares
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.solvers.outputs import unit_of
from jaxcompress._src.trace.layout import LeafLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """A grid of ranges for every block; the one of least Σ m |w - q(w)|^norm is taken, the widest among equal ones.

    Attributes:
        grid_size: number of shares p = 1, 1 - shrink/grid_size, ... that the extreme values are multiplied by.
        shrink: the range is cut by less than this.
        norm: 2 for squares; GPTQ's code uses 2.4.
        weighted: m is the mean square of the weight's input (where statistics are at hand), else 1.
        two_sided: both ends of the range have shares of their own: grid_size² ranges. Symmetric codes, whose range has
            one end only, get a grid of twice the size instead.

    Raises:
        ValueError: an attribute is out of range.

    Example:
        >>> w = jnp.array([[1.0]] + [[0.3]] * 30)
        >>> layout = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
        >>> scale, _ = searched_scales(w, QuantSpec(bits=2), layout, RangeSearch(norm=2.0))
        >>> round(scale.item(), 2)  # nearer to the many than to the largest
        0.32
    """

    grid_size: int = 80
    shrink: float = 0.8
    norm: float = 2.4
    weighted: bool = False
    two_sided: bool = False

    def __post_init__(self) -> None:
        if self.grid_size < 1 or not 0 < self.shrink <= 1 or not self.norm > 0:
            raise ValueError(
                f"`grid_size` must be at least 1, `shrink` in (0, 1] and `norm` positive, got {self.grid_size}, "
                f"{self.shrink} and {self.norm}."
            )


BEST_RANGES = RangeSearch(grid_size=8, shrink=0.64, norm=2.0, weighted=True, two_sided=True)
"""Both ends of every range, weighted by the inputs."""


def searched_scales(
    w: Float[Array, "D R"],
    spec: QuantSpec,
    layout: LeafLayout,
    search: RangeSearch | None,
    importance: Float[Array, "d r"] | None = None,
    *,
    bits: Any = None,
) -> tuple[Float[Array, "..."], Num[Array, "..."] | None]:
    """`block_scales`, or the best of a grid of them.

    Args:
        w: the weights.
        spec: of the codes.
        layout: gives the axes.
        search: the grid; None, and a format whose scale is no range: `block_scales`.
        importance: m, in a shape that broadcasts against `w`.
        bits: of integers, where they are traced.

    Returns:
        As `block_scales`.
    """
    if search is None or not spec.number_format.has_range_search:
        return block_scales(w, spec, layout, bits=bits)
    both = search.two_sided and not spec.symmetric
    steps = search.grid_size * (2 if search.two_sided and not both else 1)
    shares = 1 - search.shrink * jnp.arange(steps) / steps
    pairs = jnp.stack([shares, shares], axis=1)
    if both:
        pairs = jnp.stack(jnp.meshgrid(shares, shares, indexing="ij"), axis=-1).reshape(-1, 2)

    unit, shape = unit_of(w), scale_shape(w.shape, spec, layout)
    axes = reduced_axes(w.shape, shape)
    scales = scales_of_shares(w, spec, layout, bits=bits)

    def attempt(pair: Any) -> Any:
        scale, zero_point = scales(pair[0], pair[1])
        lost = (jnp.abs(rounded(w, scale, zero_point, spec, bits=bits) - w) / unit) ** search.norm
        if search.weighted and importance is not None:
            lost = lost * importance
        return _sums(split_blocks(lost, shape), axes).reshape(shape), scale, zero_point

    def better(best: Any, numbered: Any) -> Any:
        attempted = attempt(numbered[1])
        # The first one stands whatever it loses: it may be Inf.
        wins = (attempted[0] < best[0]) | (numbered[0] == 0)
        return jax.tree.map(lambda old, new: jnp.where(wins, new, old), best, attempted), None

    nothing = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(attempt, pairs[0]))
    (_, scale, zero_point), _ = jax.lax.scan(better, nothing, (jnp.arange(len(pairs)), pairs))
    return scale, zero_point


def _sums(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Sums over some axes, as a product with ones: what XLA fuses into a sum on the CPU is not vectorized."""
    outer = [axis for axis in range(x.ndim) if axis not in axes]
    ones = jnp.ones([x.shape[axis] for axis in axes], x.dtype)
    return jnp.einsum(x, list(range(x.ndim)), ones, list(axes), outer, precision=jax.lax.Precision.HIGHEST)
