"""What is timed, and in which order; with a clock of our own, so that nothing depends on the machine."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.report import latency as _latency
from jaxcompress._src.report.latency import RatioSpread
from jaxcompress.report import compare_latency, latency


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when a function moves it."""
    now = [0.0]
    monkeypatch.setattr(_latency.time, "perf_counter", lambda: now[0])
    return now


def _taking(clock, seconds, log=None, name=""):
    durations = iter(seconds)

    def fn(*_):
        clock[0] += next(durations)
        if log is not None:
            log.append(name)

    return fn


def test_warm_up_is_not_timed(clock):
    found = latency(_taking(clock, [100.0, 50.0, 3.0, 1.0, 2.0, 10.0]), repeats=4, warmup=2)
    assert (found.median, found.min, found.max, found.repeats) == (2.5, 1.0, 10.0, 4)


def test_functions_take_turns_and_none_is_always_first(clock):
    log = []
    fns = {
        name: _taking(clock, itertools.repeat(cost), log, name) for name, cost in (("a", 4.0), ("b", 1.0), ("c", 8.0))
    }
    found = compare_latency(fns, repeats=3, warmup=1)
    assert log == [*"abc", *"bca", *"cab", *"abc"]
    assert found.baseline == "a"
    assert found.ratios == {"a": 1.0, "b": 0.25, "c": 2.0}
    assert compare_latency(fns, repeats=1, baseline="b").ratios == {"a": 4.0, "b": 1.0, "c": 8.0}


def test_the_result_is_waited_for_and_arguments_are_passed(monkeypatch):
    waited = []
    block = jax.block_until_ready
    monkeypatch.setattr(_latency.jax, "block_until_ready", lambda tree: waited.append(tree) or block(tree))
    found = latency(lambda x, y: {"sum": x + y}, jnp.ones(2), jnp.ones(2), repeats=2, warmup=1)
    assert len(waited) == 3
    assert waited[0]["sum"].tolist() == [2.0, 2.0]
    assert 0 < found.min <= found.median <= found.max


@pytest.mark.parametrize("name", ["repeats", "warmup"])
def test_at_least_one_call(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        latency(lambda: None, **{name: 0})


def test_unknown_baselines():
    with pytest.raises(ValueError, match=r"`baseline` must be one of the functions \['a'\], got 'b'"):
        compare_latency({"a": lambda: None}, baseline="b")
    with pytest.raises(ValueError, match=r"\[\]"):
        compare_latency({})


def test_ratios_are_taken_round_by_round_with_their_spread(clock):
    """A machine that slows down for both changes neither ratio."""
    slow = [1.0, 1.0, 10.0, 1.0, 1.0]
    fns = {
        "a": _taking(clock, [2.0 * each for each in slow]),
        "b": _taking(clock, [factor * each for factor, each in zip([9.0, 1.0, 2.0, 3.0, 4.0], slow, strict=True)]),
    }
    found = compare_latency(fns, repeats=4, warmup=1)
    assert found.wall["a"] == RatioSpread(median=1.0, low=1.0, high=1.0)
    assert found.wall["b"].median == 1.25
    assert (found.wall["b"].low, found.wall["b"].high) == (pytest.approx(0.65), pytest.approx(1.85))


def test_cpu_time_is_that_of_the_process(monkeypatch, clock):
    used = [0.0]
    monkeypatch.setattr(_latency.time, "process_time", lambda: used[0])

    def fn():
        clock[0] += 1.0
        used[0] += 2.0

    idle = _taking(clock, itertools.repeat(1.0))
    found = compare_latency({"a": fn, "idle": idle}, repeats=2, warmup=1)
    assert (found.latencies["a"].cpu, found.latencies["idle"].cpu, found.cpu["idle"].median) == (2.0, 0.0, 0.0)
    # No time at all is no ratio.
    assert np.isnan(compare_latency({"idle": idle}, repeats=2, warmup=1).cpu["idle"].median)


def test_a_function_settles_before_it_is_timed(clock):
    log = []
    fns = {name: _taking(clock, itertools.cycle([5.0, 1.0]), log, name) for name in "ab"}
    found = compare_latency(fns, repeats=1, warmup=1, settle=1)
    assert log == [*"aabb", *"bbaa"]
    assert found.latencies["a"].median == 1.0
    with pytest.raises(ValueError, match="`settle` must be at least 0, got -1"):
        compare_latency(fns, settle=-1)
