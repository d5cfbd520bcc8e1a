"""Which weights may be pruned independently: each one, N of every M, or tiles.

A pattern turns scores into *units* that are ranked, and a mask of units into a mask of weights.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num, Shaped

from jaxcompress._src.solvers.runs import keep_in_runs
from jaxcompress._src.trace.layout import LeafLayout


@runtime_checkable
class Pattern(Protocol):
    """What masks must look like. The shapes of units have the leaf's axes in the leaf's order."""

    def units(self, scores: Num[Array, "..."], layout: LeafLayout) -> Num[Array, "..."]:
        """The scores that are ranked; infinite for units that must stay."""
        ...

    def spread(self, units: Bool[Array, "..."], shape: tuple[int, ...], layout: LeafLayout) -> Bool[Array, "..."]:
        """The mask of weights that a mask of units means."""
        ...

    @property
    def allowed(self) -> float:
        """The largest sparsity that may be asked for."""
        ...

    def droppable(self, shape: tuple[int, ...], layout: LeafLayout) -> float:
        """The largest share of units of one leaf that can be dropped."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unstructured:
    """Every weight by itself."""

    def units(self, scores: Num[Array, "..."], layout: LeafLayout) -> Num[Array, "..."]:
        """The scores themselves."""
        del layout
        return scores

    def spread(self, units: Bool[Array, "..."], shape: tuple[int, ...], layout: LeafLayout) -> Bool[Array, "..."]:
        """The mask itself."""
        del shape, layout
        return units

    @property
    def allowed(self) -> float:
        """Everything."""
        return 1.0

    def droppable(self, shape: tuple[int, ...], layout: LeafLayout) -> float:
        """Everything."""
        del shape, layout
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class NOfM:
    """At least `n` of every `m` consecutive weights along the innermost input axis are kept.

    At sparsity 1 - n/m exactly `n` are. Below it, the weights to prune are chosen, by rank, among those that the full
    pattern would prune. A last run of r < m weights keeps min(n, r).
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if not 1 <= self.n <= self.m or self.m > 127:
            raise ValueError(f"`n_of_m` needs 1 <= n <= m <= 127, got n={self.n}, m={self.m}.")

    def units(self, scores: Num[Array, "..."], layout: LeafLayout) -> Num[Array, "..."]:
        """Scores, infinite where the pattern keeps the weight."""
        mask = keep_in_runs(scores, self.n, self.m, axis=innermost_input(layout))
        return jnp.where(mask, jnp.asarray(jnp.inf, scores.dtype), scores)

    def spread(self, units: Bool[Array, "..."], shape: tuple[int, ...], layout: LeafLayout) -> Bool[Array, "..."]:
        """The mask itself."""
        del shape, layout
        return units

    @property
    def allowed(self) -> float:
        """1 - n/m."""
        return 1 - self.n / self.m

    def droppable(self, shape: tuple[int, ...], layout: LeafLayout) -> float:
        """1 - n/m, less where the last run is short."""
        width = shape[innermost_input(layout)]
        remaining = width // self.m * self.n + min(self.n, width % self.m)
        return 1 - remaining / width if width else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Tiles of `rows` x `columns` over the innermost input axis and the last output axis; the last ones may be short.

    The score of a tile is the mean of its weights' scores, and sparsity counts tiles.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"`block` needs positive sizes, got rows={self.rows}, columns={self.columns}.")

    def units(self, scores: Num[Array, "..."], layout: LeafLayout) -> Float[Array, "..."]:
        """The mean score of every tile, in float32."""
        total = _tile_sums(scores.astype(jnp.float32), self._sizes(layout))
        return total / self.counts(scores.shape, layout)

    def counts(self, shape: tuple[int, ...], layout: LeafLayout) -> Float[Array, "..."]:
        """Weights of every tile: fewer at the borders."""
        return _tile_sums(jnp.ones(shape, jnp.float32), self._sizes(layout))

    def spread(self, units: Shaped[Array, "..."], shape: tuple[int, ...], layout: LeafLayout) -> Shaped[Array, "..."]:
        """Every weight shares the fate (or whatever else is given) of its tile."""
        for axis, size in self._sizes(layout).items():
            units = jnp.repeat(units, size, axis=axis)
        return jax.lax.slice(units, (0,) * len(shape), shape)

    @property
    def allowed(self) -> float:
        """Everything."""
        return 1.0

    def droppable(self, shape: tuple[int, ...], layout: LeafLayout) -> float:
        """Everything."""
        del shape, layout
        return 1.0

    def _sizes(self, layout: LeafLayout) -> dict[int, int]:
        if not layout.input_axes or not layout.output_axes:
            raise ValueError(f"`block` needs leaves with input and output axes, found {layout}.")
        return {innermost_input(layout): self.rows, layout.output_axes[-1]: self.columns}


def unstructured() -> Unstructured:
    """Every weight may be pruned by itself."""
    return Unstructured()


def n_of_m(n: int, m: int) -> NOfM:
    """`n` of every `m` consecutive weights along the innermost input axis are KEPT (2:4 keeps two of four)."""
    return NOfM(n=n, m=m)


def block(rows: int, columns: int) -> Block:
    """Whole tiles of `rows` inputs x `columns` outputs are pruned."""
    return Block(rows=rows, columns=columns)


def innermost_input(layout: LeafLayout) -> int:
    """The axis that runs lie along: the last input axis; of a leaf without one, its last axis."""
    axes = layout.input_axes or layout.output_axes
    if not axes:
        raise ValueError("A scalar has no axis for runs of weights; exclude it.")
    return axes[-1]


def _tile_sums(x: Float[Array, "..."], sizes: dict[int, int]) -> Float[Array, "..."]:
    padding = [(0, -n % sizes.get(axis, 1)) for axis, n in enumerate(x.shape)]
    x = jnp.pad(x, padding)
    split = [part for axis, n in enumerate(x.shape) for part in (n // sizes.get(axis, 1), sizes.get(axis, 1))]
    return x.reshape(split).sum(axis=tuple(range(1, 2 * x.ndim, 2))) if math.prod(x.shape) else x.reshape(split[::2])
