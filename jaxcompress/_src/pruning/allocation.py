"""How a global budget is spread over leaves. All return a partial tree of sparsities that `masks_from_scores` takes.

Counts are exact: the round(s n) of all leaves add up to round(sparsity N), N being the weights of all chosen leaves.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.pruning.masks import masks_from_scores
from jaxcompress._src.pruning.ranking import check_sparsity
from jaxcompress._src.pruning.sparsity import leaf_sparsities
from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress._src.types import Params, Selector
from jaxcompress._src.weights.selection import selected_layouts

Allocation: TypeAlias = Callable[..., Params]
"""`(params, *, sparsity, select=None, layouts=None) -> partial tree of sparsities`, such as `erdos_renyi`."""


def uniform(
    params: Params, *, sparsity: float, select: Selector | None = None, layouts: Params | None = None
) -> Params:
    """The same sparsity everywhere, up to the rounding that makes the total exact.

    Args:
        params: gives shapes only.
        sparsity: of all chosen leaves together, in [0, 1].
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`.

    Returns:
        A partial tree of floats.

    Raises:
        ValueError: nothing is selected, or a sparsity outside [0, 1].

    Example:
        >>> uniform({"a": np.ones((4, 5)), "b": np.ones((2, 5))}, sparsity=0.5)
        {'a': 0.5, 'b': 0.5}
    """
    return _allocate(lambda shape, layout: 1.0, params, sparsity, select, layouts)


def erdos_renyi(
    params: Params, *, sparsity: float, select: Selector | None = None, layouts: Params | None = None
) -> Params:
    """Density in proportion to (n_in + n_out) / (n_in n_out): small layers stay denser; axes of a kernel do not count.

    Leaves whose density would exceed one become dense, and the others share what is left.

    Args:
        params: gives shapes only.
        sparsity: of all chosen leaves together, in [0, 1].
        select: which leaves; by default every weight.
        layouts: from `trace.layouts`; layers of a stack are layers of their own, the axes of attention heads are
            multiplied out. Without it every leaf is taken as a (spatial..., in, out) kernel.

    Returns:
        A partial tree of floats.

    Raises:
        ValueError: nothing is selected, or a sparsity outside [0, 1].

    Example:
        >>> shares = erdos_renyi({"a": np.ones((10, 100)), "b": np.ones((100, 100))}, sparsity=0.8)
        >>> [round(share, 4) for share in shares.values()]  # densities as 0.11 : 0.02
        [0.219, 0.8581]

    References:
        Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
        by network science", equation 1; Evci et al. 2020, "Rigging the lottery", section 3 (1).
    """
    return _allocate(lambda shape, layout: _erdos_renyi(shape[-2:]), params, sparsity, select, layouts)


def erdos_renyi_kernel(
    params: Params, *, sparsity: float, select: Selector | None = None, layouts: Params | None = None
) -> Params:
    """Density in proportion to (Σ axes) / (Π axes): as `erdos_renyi`, the axes of a convolution kernel included.

    Args:
        params: gives shapes only.
        sparsity: of all chosen leaves together, in [0, 1].
        select: which leaves; by default every weight.
        layouts: as `erdos_renyi`.

    Returns:
        A partial tree of floats.

    Raises:
        ValueError: nothing is selected, or a sparsity outside [0, 1].

    Example:
        >>> params = {"conv": np.ones((3, 3, 8, 16)), "dense": np.ones((128, 256))}
        >>> [round(share, 3) for share in erdos_renyi_kernel(params, sparsity=0.9).values()]
        [0.786, 0.904]

    References:
        Evci et al. 2020, "Rigging the lottery: making all tickets winners", section 3 (1).
    """
    return _allocate(lambda shape, layout: _erdos_renyi(shape), params, sparsity, select, layouts)


@on_auto_axes
def global_rank(scores: Params, *, sparsity: float) -> Params:
    """The sparsities that `masks_from_scores(scores, scope="global")` gives every leaf.

    With `normalized_scores` this is layer-normalised global ranking.

    Args:
        scores: a partial tree.
        sparsity: of all leaves together.

    Returns:
        A partial tree of floats.

    Example:
        >>> import jax.numpy as jnp
        >>> global_rank({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}, sparsity=0.25)
        {'a': 0.5, 'b': 0.0}
    """
    return leaf_sparsities(masks_from_scores(scores, sparsity=sparsity, scope="global"))


def exact_counts(wanted: list[float], sizes: list[int], total: int) -> list[int]:
    """Integers near `wanted` that add up to `total`, each from 0 to its size: what is left over goes by remainder."""
    counts = [min(math.floor(want), size) for want, size in zip(wanted, sizes, strict=True)]
    left = total - sum(counts)
    by_remainder = sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i])
    while left:
        step = 1 if left > 0 else -1
        movable = [i for i in by_remainder if 0 <= counts[i] + step <= sizes[i]]
        for i in movable[: abs(left)]:
            counts[i] += step
            left -= step
    return counts


def _allocate(
    weight: Callable[[tuple[int, ...], LeafLayout], float],
    params: Params,
    sparsity: float,
    select: Selector | None,
    layouts: Params | None,
) -> Params:
    check_sparsity(sparsity)
    selected = selected_layouts(params, select=select, layouts=layouts)
    pairs: list[tuple[tuple[int, ...], LeafLayout]] = []
    map_selected(lambda _, layout, leaf: pairs.append((tuple(leaf.shape), layout)), selected, params)
    sizes = [math.prod(shape) for shape, _ in pairs]
    weights = [
        weight(_dimensions(shape, layout, known=layouts is not None), layout) if size else 0.0
        for (shape, layout), size in zip(pairs, sizes, strict=True)
    ]
    total = sum(sizes) - round(float(sparsity) * sum(sizes))
    densities = _fill(weights, sizes, total)
    counts = exact_counts([d * n for d, n in zip(densities, sizes, strict=True)], sizes, total)
    shares = iter([1 - count / size if size else 0.0 for count, size in zip(counts, sizes, strict=True)])
    return map_selected(lambda *_: next(shares), selected)


def _dimensions(shape: tuple[int, ...], layout: LeafLayout, *, known: bool) -> tuple[int, ...]:
    """(spatial..., in, out) of one layer of the leaf."""
    if not known or layout.kind == "conv" or not layout.is_weight:
        return tuple(n for axis, n in enumerate(shape) if axis not in layout.stack_axes)
    return tuple(math.prod(shape[axis] for axis in axes) for axes in (layout.input_axes, layout.output_axes))


def _erdos_renyi(shape: tuple[int, ...]) -> float:
    return sum(shape) / math.prod(shape)


def _fill(weights: list[float], sizes: list[int], total: int) -> list[float]:
    """Densities in proportion to `weights`, at most one, that keep `total` weights."""
    dense = np.zeros(len(sizes), bool)
    size, weight = np.array(sizes, np.float64), np.array(weights, np.float64)
    while True:
        left = total - size[dense].sum()
        spread = (weight * size)[~dense].sum()
        densities = np.where(dense, 1.0, weight * (left / spread if spread else 0.0))
        over = ~dense & (densities > 1)
        if not over.any():
            return densities.tolist()
        dense |= over
