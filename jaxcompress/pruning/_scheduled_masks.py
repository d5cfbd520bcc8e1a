"""Masks that follow a schedule of sparsities, ranked anew every few updates."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.pruning._ranked_leaves import RankedLeaves, ScoreFn
from jaxcompress.types import Params, Schedule, exportable


@exportable
class MaskState(NamedTuple):
    """Fixed state of transforms whose masks follow a schedule.

    Attributes:
        masks: partial tree of bool, True = kept.
        step: int32, number of updates so far.
        sparsity: float32, the value of the schedule that the masks were made for.
    """

    masks: Params
    step: jax.Array
    sparsity: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScheduledMasks:
    """Settings.

    Attributes:
        leaves: which, and how they are ranked.
        schedule: step -> sparsity.
        every: updates between rankings; they happen when step % every == 0, the first update being step 0.
        freeze_at: the first update from which the masks stay as they are.
        rerank: also while the sparsity stays the same.
    """

    leaves: RankedLeaves
    schedule: Schedule
    every: int
    freeze_at: int | None
    rerank: bool

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1, got {self.every}.")

    def start(self, params: Params) -> MaskState:
        """Nothing is pruned."""
        return MaskState(self.leaves.whole(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def advance(self, state: MaskState, leaves: Params, params: Params, *, score: ScoreFn) -> MaskState:
        """One update: new masks by rank of `score(leaf)` when they are due. Rankings run in the branch of a `cond`.

        Args:
            state: before.
            leaves: a partial tree of what is ranked.
            params: gives the layouts.
            score: of the leaves.
        """
        sparsity = jnp.asarray(self.schedule(state.step), jnp.float32)
        due = state.step % self.every == 0
        if self.freeze_at is not None:
            due &= state.step < self.freeze_at
        if not self.rerank:
            due &= sparsity != state.sparsity

        def rank(leaves: Params) -> Params:
            return self.leaves.masks(leaves, params, sparsity, score=score)

        masks = jax.lax.cond(due, rank, lambda _: state.masks, leaves)
        return MaskState(masks, state.step + 1, jnp.where(due, sparsity, state.sparsity))
