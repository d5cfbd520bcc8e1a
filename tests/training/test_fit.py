"""The loop: means of metrics, exact resumption, signals, and what is refused."""

import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.training import Checkpoints, fit, jsonl


@pytest.fixture(autouse=True)
def interruptible():
    """A shell starts jobs in the background with SIGINT ignored, and the tests with them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@jax.jit
def step(state, batch):
    """Momentum on a least-squares problem, with noise from a key."""
    key, draw = jax.random.split(state["key"])
    error = batch["x"] @ state["weight"] - batch["y"] + 0.01 * jax.random.normal(draw, batch["y"].shape)
    momentum = 0.9 * state["momentum"] + batch["x"].T @ error / 4
    state = {"weight": state["weight"] - 0.1 * momentum, "momentum": momentum, "key": key}
    rows = batch["rows"]
    return state, {"loss": ((error**2).sum() * rows, rows), "rows": (rows, 1)}


def begin():
    return {"weight": jnp.zeros(3), "momentum": jnp.zeros(3), "key": jax.random.key(0)}


def batches(count=1000):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "x": rng.normal(size=(4, 3)).astype(np.float32),
            "y": rng.normal(size=4).astype(np.float32),
            "rows": np.float32(rng.integers(1, 9)),
        }


def bits(state):
    return [
        np.asarray(jax.random.key_data(x) if "key" in str(x.dtype) else x).tobytes() for x in jax.tree.leaves(state)
    ]


class StoppedError(Exception):
    pass


def stopping(batches, at, act):
    """Batches that do something when one is asked for after `at` of them."""
    for number, batch in enumerate(batches):
        if number == at:
            act()
        yield batch


def fail():
    raise StoppedError


def test_figures_are_means_over_the_interval():
    lines, singles, state = [], [], begin()
    for batch in batches(7):
        state, metrics = step(state, batch)
        singles.append({name: np.float64(pair) for name, pair in metrics.items()})
    result, figures = fit(begin(), step, batches(), steps=7, log_every=3, sinks=[lambda *line: lines.append(line)])
    assert bits(result) == bits(state)
    assert [line[0] for line in lines] == [3, 6, 7]
    for (_, found), part in zip(lines, (singles[:3], singles[3:6], singles[6:]), strict=True):
        for name in ("loss", "rows"):
            expected = sum(m[name][0] for m in part) / sum(m[name][1] for m in part)
            np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    assert figures == lines[-1][1]


def test_no_step_waits_for_its_figures():
    """They are written when the next step is under way, and before a checkpoint or the end."""
    order = []

    def noted(state, batch):
        order.append("step")
        return step(state, batch)

    fit(begin(), noted, batches(), steps=3, log_every=1, sinks=[lambda step, _: order.append(step)])
    assert order == ["step", "step", 1, "step", 2, 3]


def evaluate(state):
    return {"norm": float(jnp.abs(state["weight"]).sum())}


@pytest.mark.parametrize("stops", [(), (1, 4, 9, 10), (5, 5, 16)])
def test_a_resumed_run_is_that_of_one_without_a_stop(tmp_path, stops):
    """State and log, bit for bit, whatever the stops; the metrics of an interval go on in its middle."""
    whole, whole_figures = fit(
        begin(), step, batches(), steps=17, log_every=4, sinks=[jsonl(tmp_path / "whole")],
        evaluate=evaluate, evaluate_every=5,
    )  # fmt: skip

    def run(batches):
        with Checkpoints(tmp_path / "run", config={"rate": 0.1}) as checkpoints:
            return fit(
                begin(), step, batches, steps=17, checkpoints=checkpoints, save_every=3, log_every=4,
                sinks=[jsonl(tmp_path / "log")], evaluate=evaluate, evaluate_every=5,
            )  # fmt: skip

    for at in stops:
        with pytest.raises(StoppedError):
            run(stopping(batches(), at, fail))
    state, figures = run(batches())
    assert bits(state) == bits(whole)
    assert figures == whole_figures
    assert (tmp_path / "log").read_text() == (tmp_path / "whole").read_text()
    assert [json.loads(line)["step"] for line in (tmp_path / "log").read_text().splitlines()] == [
        4,
        5,
        8,
        10,
        12,
        15,
        16,
        17,
    ]
    # A run that is over is not run again.
    again, figures = run(stopping(batches(), 17, fail))
    assert bits(again) == bits(whole)
    assert figures == {}


class Iterator:
    """As those of Grain: its state says where it is."""

    def __init__(self, encode):
        self.at, self.encode, self.set = 0, encode, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return next(itertools.islice(batches(), self.at - 1, None))

    def get_state(self):
        return self.encode({"at": self.at})

    def set_state(self, state):
        self.at, self.set = (json.loads(state) if isinstance(state, bytes) else state)["at"], self.set + 1


@pytest.mark.parametrize("encode", [dict, lambda state: json.dumps(state).encode()])
def test_iterators_with_a_state_are_set_to_it(tmp_path, encode):
    whole, _ = fit(begin(), step, batches(), steps=6)
    data = Iterator(encode)
    for steps in (4, 6):
        with Checkpoints(tmp_path) as checkpoints:
            data = Iterator(encode)
            state, _ = fit(begin(), step, data, steps=steps, checkpoints=checkpoints)
    assert (data.at, data.set) == (6, 1)
    assert bits(state) == bits(whole)


def test_a_state_of_an_iterator_that_json_changes_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match="which JSON does not give back"):
        fit(begin(), step, Iterator(lambda state: (1, 2)), steps=1, checkpoints=checkpoints)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(tmp_path, number):
    before = signal.getsignal(number)
    whole, _ = fit(begin(), step, batches(), steps=8)
    data = stopping(batches(), 4, lambda: signal.raise_signal(number))
    ending = SystemExit if number == signal.SIGTERM else KeyboardInterrupt
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ending) as error:
        fit(begin(), step, data, steps=8, checkpoints=checkpoints)
    if number == signal.SIGTERM:
        assert error.value.code == 143
    assert signal.getsignal(number) is before
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [5]
        state, _ = fit(begin(), step, batches(), steps=8, checkpoints=checkpoints)
    assert bits(state) == bits(whole)


def test_the_second_signal_does_what_it_always_did(tmp_path):
    def act():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(KeyboardInterrupt):
            fit(begin(), step, stopping(batches(), 4, act), steps=8, checkpoints=checkpoints)
        assert checkpoints.steps() == []


def test_without_checkpoints_signals_are_left_alone():
    with pytest.raises(KeyboardInterrupt):
        fit(begin(), step, stopping(batches(), 1, lambda: signal.raise_signal(signal.SIGINT)), steps=8)


def poisoned(at, where):
    """`step`, whose loss, or the gradient that it found to be NaN, is bad at some steps."""
    steps = itertools.count(1)

    def run(state, batch):
        bad = next(steps) in at
        state, metrics = step(state, batch)
        if where == "loss" and bad:
            metrics["loss"] = (jnp.float32(np.nan), metrics["loss"][1])
        return state, metrics | {"skipped": (jnp.float32(bad), jnp.float32(1))}

    return run


@pytest.mark.parametrize(("where", "name"), [("loss", "the loss"), ("gradient", "a gradient")])
@pytest.mark.parametrize(("log_every", "saved"), [(1, [2, 4]), (4, [2, 4]), (100, [2, 4])])
def test_nan_is_an_error_that_names_the_step(tmp_path, where, name, log_every, saved):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FloatingPointError, match=f"{name} became NaN or Inf at step 5"):
            fit(
                begin(), poisoned({5, 7}, where), batches(), steps=9, checkpoints=checkpoints, save_every=2,
                log_every=log_every,
            )  # fmt: skip
        assert checkpoints.steps() == saved


def test_skipped_steps_are_left_out_of_the_figures():
    lines = []

    def sink(step, figures):
        lines.append(figures)

    fit(begin(), poisoned({2, 4, 5, 6}, "loss"), batches(), steps=6, log_every=3, sinks=[sink], non_finite="skip")
    state, losses = begin(), []
    for batch in batches(3):
        state, metrics = step(state, batch)
        losses.append(np.float64(metrics["loss"]))
    expected = (losses[0] + losses[2])[0] / (losses[0] + losses[2])[1]
    np.testing.assert_allclose(lines[0]["loss"], expected, rtol=1e-6)
    np.testing.assert_allclose([line["skipped"] for line in lines], [1 / 3, 1])
    assert np.isnan(lines[1]["loss"])


def test_the_best_are_kept_by_a_figure_of_the_evaluation(tmp_path):
    values = iter([3.0, 1.0, 2.0, 4.0])
    with Checkpoints(tmp_path, keep_last=1, keep_best=1, metric="error") as checkpoints:
        _, figures = fit(
            begin(), step, batches(), steps=8, checkpoints=checkpoints, save_every=2, evaluate_every=2,
            evaluate=lambda state: {"error": next(values)},
        )  # fmt: skip
        assert checkpoints.steps() == [4, 8]
        assert checkpoints.best_step() == 4
        assert checkpoints.restore(begin(), step=4)[1].figures == {"error": 1.0}
    assert figures["error"] == 4
    assert "loss" in figures


def test_one_trace_and_nothing_piles_up(tmp_path):
    traces, counts = [], []

    @jax.jit(donate_argnums=0)
    def counted(state, batch):
        traces.append(batch)
        return step(state, batch)

    def sink(number, figures):
        counts.append((len(jax.live_arrays()), len(os.listdir("/proc/self/fd"))))

    with Checkpoints(tmp_path) as checkpoints:
        fit(
            begin(), counted, itertools.cycle(batches(3)), steps=400, checkpoints=checkpoints, save_every=40,
            log_every=10, sinks=[sink],
        )  # fmt: skip
    assert len(traces) == 1
    arrays, files = zip(*counts[5:], strict=True)
    # A checkpoint that is being written, and the one before, hold up to two states of six arrays.
    assert max(arrays) - min(arrays) <= 20
    assert max(files) - min(files) <= 30


def test_mistakes(tmp_path):
    def run(**keywords):
        return fit(begin(), step, batches(5), **{"steps": 3} | keywords)

    for name in ("steps", "save_every", "log_every"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            run(**{name: 0})
    with pytest.raises(ValueError, match="`evaluate` and `evaluate_every` go together"):
        run(evaluate=evaluate)
    with pytest.raises(ValueError, match=r"`non_finite` must be one of .*, got 'ignore'"):
        run(non_finite="ignore")
    with pytest.raises(ValueError, match="`batches` ended after 5 of 9 steps"):
        run(steps=9)
    with pytest.raises(ValueError, match=r"figures of the names \['loss'\]"):
        run(evaluate=lambda state: {"loss": 1.0}, evaluate_every=1)
    with pytest.raises(ValueError, match=r"with a 'loss' among them; got {'error': 'tuple'}"):
        fit(begin(), lambda state, batch: (state, {"error": (1, 1)}), batches(), steps=1)
    with pytest.raises(ValueError, match=r"got {'loss': 'float'}"):
        fit(begin(), lambda state, batch: (state, {"loss": 1.0}), batches(), steps=1)
    with Checkpoints(tmp_path, keep_best=1, metric="error") as checkpoints:
        with pytest.raises(ValueError, match=r"`save_every` \(3\) must be a multiple of `log_every` \(2\)"):
            run(checkpoints=checkpoints, save_every=3, log_every=2)
        with pytest.raises(ValueError, match=r"by 'error', and the figures of step 3 are \['loss', 'rows'\]"):
            run(checkpoints=checkpoints, save_every=3, log_every=3)


def test_mistakes_of_a_resumed_run(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        fit(begin(), step, batches(), steps=4, checkpoints=checkpoints)
        with pytest.raises(ValueError, match=r"The last checkpoint in .* is of step 4; `steps` is 3"):
            fit(begin(), step, batches(), steps=3, checkpoints=checkpoints)
        with pytest.raises(ValueError, match="was written after 4 batches, and there are only 2"):
            fit(begin(), step, batches(2), steps=5, checkpoints=checkpoints)
        with pytest.raises(ValueError, match="'momentum' is only there"):
            fit({"weight": jnp.zeros(3)}, step, batches(), steps=5, checkpoints=checkpoints)
