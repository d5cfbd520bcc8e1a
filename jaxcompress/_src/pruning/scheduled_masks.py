"""Masks that follow a schedule of sparsities, ranked anew every few updates."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress._src.pruning.ranked_leaves import RankedLeaves, ScoreFn
from jaxcompress._src.schedules import final_value, is_at, warn_unfinished
from jaxcompress._src.tree.checks import is_traced
from jaxcompress._src.types import Params, Schedule, exportable


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
        schedule: step -> sparsity; what it ends at is the goal.
        every: updates between rankings; they happen when step % every == 0, the first update being step 0, and at the
            last update before the schedule stands at its goal.
        freeze_at: the first update from which the masks stay as they are.
        rerank: also while the sparsity stays the same.
        goal: the sparsity at the end of the schedule.
    """

    leaves: RankedLeaves
    schedule: Schedule
    every: int
    freeze_at: int | None
    rerank: bool
    goal: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Checks the options, and finds the goal."""
        if self.every < 1:
            raise ValueError(f"`every` must be at least 1, got {self.every}.")
        goal = final_value(self.schedule)
        object.__setattr__(self, "goal", goal)
        if not 0 <= goal <= self.leaves.pattern.allowed + 1e-6:
            allowed = f"{self.leaves.pattern.allowed:g}"
            raise ValueError(f"`schedule` ends at a sparsity of {goal:g}; it must be in [0, {allowed}].")
        if self.freeze_at is not None and (self.freeze_at < 1 or not self._has_ended(self.freeze_at)):
            raise ValueError(
                f"`freeze_at` is {self.freeze_at}, where the schedule has reached {self._value(self.freeze_at):.4g} of "
                f"its {goal:.4g}: no ranking would reach what is asked for. Freeze at its end or later."
            )

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
        ends = self._has_ended(state.step + 1)
        # What step `end` is run with is made by the update before it: training for `end` steps reaches the goal.
        sparsity = jnp.where(ends, jnp.float32(self.goal), jnp.asarray(self.schedule(state.step), jnp.float32))
        due = state.step % self.every == 0
        if not self.rerank:
            due &= sparsity != state.sparsity
        due |= ends & (state.sparsity != jnp.float32(self.goal))
        if self.freeze_at is not None:
            due &= state.step < self.freeze_at

        def rank(leaves: Params) -> Params:
            return self.leaves.masks(leaves, params, sparsity, score=score)

        masks = jax.lax.cond(due, rank, lambda _: state.masks, leaves)
        return MaskState(masks, state.step + 1, jnp.where(due, sparsity, state.sparsity))

    def finish(self, state: MaskState, leaves: Params, params: Params, *, score: ScoreFn) -> Params:
        """The masks at the goal: those of the state, or new ones if training ended before the schedule did.

        Args:
            state: after the last update.
            leaves: as for `advance`.
            params: gives the layouts.
            score: of the leaves.
        """

        def rank(leaves: Params) -> Params:
            return self.leaves.masks(leaves, params, self.goal, score=score)

        if is_traced(state.sparsity):
            return jax.lax.cond(is_at(state.sparsity, self.goal), lambda _: state.masks, rank, leaves)
        if is_at(float(state.sparsity), self.goal):
            return state.masks
        steps = int(state.step)
        if not self._has_ended(steps):
            warn_unfinished(
                f"Training ended after {steps} updates, with masks of a sparsity of {float(state.sparsity):.4g}; the "
                f"schedule goes on to {self.goal:.4g}. `finalize` prunes to {self.goal:.4g} now, without training "
                "after it: train on, or let the schedule end earlier."
            )
        return rank(leaves)

    def _value(self, step: Any) -> float:
        return float(self.schedule(step))

    def _has_ended(self, step: Any) -> Any:
        return is_at(self.schedule(step), self.goal)
