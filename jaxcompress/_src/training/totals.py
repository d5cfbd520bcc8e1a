"""Sums and counts of metrics over an interval of steps, on the devices."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.meshes import to_host

NonFinite = Literal["raise", "skip"]
"""What a step whose loss or gradients are NaN or Inf is: an error, or left out of all figures but "skipped"."""


class _Sums(NamedTuple):
    """Sums over some steps.

    Attributes:
        metrics: (sum, count) by name.
        steps: the first steps with a NaN or Inf among them, 0 if there is none: in the loss, in the gradients.
    """

    metrics: dict[str, tuple[jax.Array, jax.Array]]
    steps: tuple[jax.Array, jax.Array]


class Totals:
    """Adds up metrics, without waiting for them.

    Args:
        non_finite: what NaN and Inf lead to.
    """

    def __init__(self, *, non_finite: NonFinite = "raise") -> None:
        self._skip = non_finite == "skip"
        self._sums: _Sums | None = None

    def add(self, step: int, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds the metrics of a step: (sum, count) by name, "loss" among them.

        Raises:
            ValueError: they are not, or are others than those before.
        """
        _check(metrics, self._sums)
        self._sums = _added(self._sums, dict(metrics), np.int32(step), skip=self._skip)

    def take(self) -> "Interval | None":
        """What was added up since the last time, and begins anew; None without a step."""
        sums, self._sums = self._sums, None
        return None if sums is None else Interval(sums, raises=not self._skip)

    def to_json(self) -> dict[str, Any] | None:
        """What was added up so far, exactly.

        Raises:
            FloatingPointError: as `Interval.figures`.
        """
        if self._sums is None:
            return None
        Interval(self._sums, raises=not self._skip).figures()
        # As text, because JSON has no NaN; repr is exact.
        metrics, steps = jax.tree.map(lambda x: repr(to_host(x).item()), tuple(self._sums))
        return {"metrics": metrics, "steps": steps}

    def from_json(self, content: Mapping[str, Any] | None) -> None:
        """Goes on from what `to_json` told."""
        if content is not None:
            metrics: Any = {name: tuple(map(np.float32, pair)) for name, pair in content["metrics"].items()}
            steps: Any = tuple(map(np.int32, content["steps"]))
            self._sums = _Sums(metrics, steps)


class Interval:
    """The sums of an interval that is over."""

    def __init__(self, sums: _Sums, *, raises: bool) -> None:
        self._sums, self._raises = sums, raises

    def figures(self) -> dict[str, float]:
        """The means of the metrics over the interval; waits for its last step.

        Raises:
            FloatingPointError: a loss or a gradient was NaN or Inf; names the first such step.
        """
        metrics, (loss, gradient) = jax.tree.map(to_host, tuple(self._sums))
        if self._raises and (loss or gradient):
            # Gradients of a loss that is NaN are NaN, too.
            only_gradient = gradient and not 0 < loss <= gradient
            what, step = ("a gradient", gradient) if only_gradient else ("the loss", loss)
            raise FloatingPointError(f"{what} became NaN or Inf at step {int(step)}")
        return {name: float(total) / float(count) if count else np.nan for name, (total, count) in metrics.items()}


@jax.jit(static_argnames="skip")
def _added(sums: _Sums | None, metrics: dict[str, tuple[Any, Any]], step: jax.Array, *, skip: bool) -> _Sums:
    metrics = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)
    bad_loss = ~jnp.isfinite(metrics["loss"][0])
    skipped = metrics["skipped"][0] > 0 if "skipped" in metrics else jnp.zeros((), bool)
    if skip:
        bad = bad_loss | skipped
        metrics = {
            name: pair if name == "skipped" else jax.tree.map(lambda x: jnp.where(bad, 0.0, x), pair)
            for name, pair in metrics.items()
        }
    steps = jnp.where(bad_loss, step, 0), jnp.where(skipped, step, 0)
    if sums is None:
        return _Sums(metrics, steps)
    return _Sums(
        jax.tree.map(jnp.add, sums.metrics, metrics),
        jax.tree.map(lambda before, now: jnp.where(before > 0, before, now), sums.steps, steps),
    )


def _check(metrics: Mapping[str, Any], before: _Sums | None) -> None:
    if "loss" not in metrics or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in metrics.values()):
        raise ValueError(
            f"`step` returns (state, metrics), the metrics as name -> (sum, count) with a 'loss' among them; got "
            f"{ {name: type(pair).__name__ for name, pair in metrics.items()} }."
        )
    if before is not None and set(before.metrics) != set(metrics):
        raise ValueError(f"The metrics of a step are {sorted(metrics)}; before, they were {sorted(before.metrics)}.")
