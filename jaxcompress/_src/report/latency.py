"""Wall-clock time of compiled functions."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one call, in seconds.

    Attributes:
        median: over the repeats.
        min: the fastest.
        max: the slowest.
        repeats: how many calls were timed.
    """

    median: float
    min: float
    max: float
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyComparison:
    """Times of several functions that ran in turns.

    Attributes:
        latencies: by name.
        baseline: the name that ratios are relative to.
        ratios: median divided by the median of the baseline, by name; below 1 is faster.
    """

    latencies: Mapping[str, Latency]
    baseline: str
    ratios: Mapping[str, float]


def latency(fn: Callable[..., Any], *args: Any, repeats: int = 20, warmup: int = 3) -> Latency:
    """Times `fn(*args)` until its result is ready.

    Args:
        fn: usually jitted. Give weights as arguments: weights that a jitted function closes over are folded into
            float32 constants, and what is timed is another program.
        *args: passed on at every call; the function must not donate them.
        repeats: timed calls.
        warmup: calls before those, at least one: the first compiles.

    Returns:
        Median, minimum and maximum.

    Raises:
        ValueError: `repeats` or `warmup` below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> time = latency(jax.jit(jnp.sin), jnp.ones(8), repeats=5)
        >>> 0 < time.min <= time.median <= time.max
        True
    """
    return compare_latency({"": fn}, *args, repeats=repeats, warmup=warmup).latencies[""]


def compare_latency(
    fns: Mapping[str, Callable[..., Any]],
    *args: Any,
    repeats: int = 20,
    warmup: int = 3,
    baseline: str | None = None,
) -> LatencyComparison:
    """Times several functions in turns, so that a slow moment of the machine meets all of them.

    Every round calls each function once, and starts with another one than the round before.

    Args:
        fns: by name; see `latency`. Bind what differs (weights) with `functools.partial`.
        *args: passed to all of them.
        repeats: timed rounds.
        warmup: rounds before those, at least one.
        baseline: name that ratios are relative to; by default the first.

    Returns:
        Times by name, and their ratios.

    Raises:
        ValueError: no function, an unknown `baseline`, or `repeats` or `warmup` below 1.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> dot = jax.jit(jnp.dot)
        >>> wide, narrow = jnp.ones((64, 64)), jnp.ones((64, 8))
        >>> fns = {"wide": functools.partial(dot, wide), "narrow": functools.partial(dot, narrow.T)}
        >>> compare_latency(fns, jnp.ones((64, 2)), repeats=3).ratios["wide"]
        1.0
    """
    if not fns or (baseline is not None and baseline not in fns):
        raise ValueError(f"`baseline` must be one of the functions {list(fns)}, got {baseline!r}.")
    for name, value in (("repeats", repeats), ("warmup", warmup)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    baseline = next(iter(fns)) if baseline is None else baseline
    times: dict[str, list[float]] = {name: [] for name in fns}
    names = list(fns)
    for turn in range(warmup + repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = _time(fns[name], args)
            if turn >= warmup:
                times[name].append(seconds)
    latencies = {name: _summary(seconds) for name, seconds in times.items()}
    ratios = {name: latency.median / latencies[baseline].median for name, latency in latencies.items()}
    return LatencyComparison(latencies=latencies, baseline=baseline, ratios=ratios)


def _time(fn: Callable[..., Any], args: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def _summary(seconds: list[float]) -> Latency:
    return Latency(median=statistics.median(seconds), min=min(seconds), max=max(seconds), repeats=len(seconds))
