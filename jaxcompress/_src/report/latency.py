"""Wall and CPU time of compiled functions."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one call, in seconds.

    Attributes:
        median: over the repeats.
        min: the fastest.
        max: the slowest.
        repeats: how many calls were timed.
        cpu: median CPU time of the process, all of its threads together.
    """

    median: float
    min: float
    max: float
    repeats: int
    cpu: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatioSpread:
    """A time divided by that of the baseline in the same round; below 1 is faster.

    Attributes:
        median: over the rounds; NaN where the clock saw no time.
        low: 10 % of the rounds are below.
        high: 10 % of the rounds are above.
    """

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatencyComparison:
    """Times of several functions that ran in turns.

    Attributes:
        latencies: by name.
        baseline: the name that ratios are relative to.
        ratios: median divided by the median of the baseline, by name; below 1 is faster.
        wall: ratios of the wall times of each round, by name.
        cpu: ratios of the CPU times of each round, by name.
    """

    latencies: Mapping[str, Latency]
    baseline: str
    ratios: Mapping[str, float]
    wall: Mapping[str, RatioSpread]
    cpu: Mapping[str, RatioSpread]


def latency(fn: Callable[..., Any], *args: Any, repeats: int = 20, warmup: int = 3) -> Latency:
    """Times `fn(*args)` until its result is ready.

    Args:
        fn: usually jitted. Give weights as arguments: weights that a jitted function closes over are folded into
            float32 constants, and what is timed is another program.
        *args: passed on at every call; the function must not donate them.
        repeats: timed calls.
        warmup: calls before those, at least one: the first compiles.

    Returns:
        Median, minimum, maximum and CPU time.

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
    settle: int = 0,
) -> LatencyComparison:
    """Times several functions in turns, so that a slow moment of the machine meets all of them.

    Every round times each function once, and starts with another one than the round before.

    Args:
        fns: by name; see `latency`. Bind what differs (weights) with `functools.partial`.
        *args: passed to all of them.
        repeats: timed rounds.
        warmup: rounds before those, at least one.
        baseline: name that ratios are relative to; by default the first.
        settle: calls of a function right before each timed one, which are not timed: caches then hold its own weights,
            and threads of another runtime no longer wait for work.

    Returns:
        Times by name, and their ratios.

    Raises:
        ValueError: no function, an unknown `baseline`, `repeats` or `warmup` below 1, or `settle` below 0.

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
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 1), ("settle", settle, 0)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    baseline = next(iter(fns)) if baseline is None else baseline
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in fns}
    names = list(fns)
    for turn in range(warmup + repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for _ in range(settle):
                jax.block_until_ready(fns[name](*args))
            seconds = _time(fns[name], args)
            if turn >= warmup:
                times[name].append(seconds)
    walls, cpus = ({name: [pair[at] for pair in pairs] for name, pairs in times.items()} for at in (0, 1))
    latencies = {name: _summary(walls[name], cpus[name]) for name in fns}
    return LatencyComparison(
        latencies=latencies,
        baseline=baseline,
        ratios={name: latency.median / latencies[baseline].median for name, latency in latencies.items()},
        wall={name: _spread(seconds, walls[baseline]) for name, seconds in walls.items()},
        cpu={name: _spread(seconds, cpus[baseline]) for name, seconds in cpus.items()},
    )


def _time(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    cpu, start = time.process_time(), time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start, time.process_time() - cpu


def _summary(seconds: list[float], cpu: list[float]) -> Latency:
    return Latency(
        median=statistics.median(seconds),
        min=min(seconds),
        max=max(seconds),
        repeats=len(seconds),
        cpu=statistics.median(cpu),
    )


def _spread(seconds: list[float], baseline: list[float]) -> RatioSpread:
    ratios = [mine / other if other else math.nan for mine, other in zip(seconds, baseline, strict=True)]
    low, median, high = np.quantile(ratios, [0.1, 0.5, 0.9])
    return RatioSpread(median=float(median), low=float(low), high=float(high))
