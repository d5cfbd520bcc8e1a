"""The loop of a training run."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from jaxcompress._src.checkpoint.processes import is_first
from jaxcompress._src.training.batches import Batches
from jaxcompress._src.training.checkpoints import Checkpoints
from jaxcompress._src.training.sinks import Sink
from jaxcompress._src.training.stopping import StopRequests
from jaxcompress._src.training.totals import Interval, NonFinite, Totals

State = TypeVar("State")
Step = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]
"""`(state, batch) -> (state, metrics)`: metrics as name -> (sum, count), with a "loss" among them."""
Evaluate = Callable[[Any], Mapping[str, float]]
"""`state -> figures by name`; called in all processes, which must get the same figures."""


def fit(
    state: State,
    step: Step,
    batches: Iterable[Any],
    *,
    steps: int,
    checkpoints: Checkpoints | None = None,
    save_every: int = 1000,
    log_every: int = 100,
    sinks: Sequence[Sink] = (),
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    non_finite: NonFinite = "raise",
) -> tuple[State, dict[str, float]]:
    """Runs a step over batches, and goes on where a run that was killed left off.

    Metrics are added up on the devices, Σ sum / Σ count over `log_every` steps, and fetched when the next step is under
    way: no step waits for the host.

    With checkpoints, a run begins from the last one, if there is one: with the state that it has, at its place in the
    data, in the middle of an interval of metrics if need be. The end is then the same, to the bit, as that of a run
    that nothing interrupted, if `step` and `batches` are deterministic. SIGTERM, as a machine that is taken away gets
    it, and SIGINT (once) save a checkpoint after the step under way, in all processes the same, and end the program:
    SIGTERM with exit status 143, SIGINT by `KeyboardInterrupt`.

    With several JAX processes, all of them call it alike, each with its batches.

    Args:
        state: where a run begins, such as a `TrainState`. It is given away: a step may donate it, and a run that goes
            on from a checkpoint deletes its arrays, so that there is memory for one state only.
        step: such as that of `distillation.make_train_step`, with the teacher bound:
            `lambda state, batch: step(state, teacher, batch)`.
        batches: one for each step, from the beginning of the run on. When a run goes on, they are skipped, or set with
            `set_state`, if their iterator has it (Grain's have).
        steps: number of steps of the whole run, those before a checkpoint included.
        checkpoints: where to save and to go on from; by default nowhere.
        save_every: steps between checkpoints; the end of the run is always saved.
        log_every: steps between figures.
        sinks: where figures go, such as `console()`, `jsonl(path)`, `tensorboard(directory)`, or a function of step and
            figures; called in the first process.
        evaluate: figures of a state, such as those of held-out data; their names must be none of the metrics.
        evaluate_every: steps between evaluations, of which there is one at the end, too; needed with `evaluate`.
        non_finite: "raise": a loss or gradient that is NaN or Inf is an error, when the interval is over. "skip": such
            steps, which `make_train_step` undoes, are left out of all figures but "skipped".

    Returns:
        `(state, figures)`: the last state, and the figures of the last step (none if no step was left to do).

    Raises:
        ValueError: an interval below 1; best checkpoints of a metric that isn't known when one is saved; metrics that
            are no (sum, count) or change from step to step; too few batches; a checkpoint after `steps`.
        FloatingPointError: the loss or a gradient became NaN or Inf; names the step. No checkpoint is saved after it.
        CheckpointError: the last checkpoint is of another config or state; before the first step.
        OSError: a checkpoint cannot be written.

    Example:
        >>> import itertools, tempfile, jax, jax.numpy as jnp
        >>> from jaxcompress.training import Checkpoints, fit
        >>> @jax.jit
        ... def step(weight, batch):
        ...     return weight - 0.5 * (weight - batch), {"loss": ((weight - batch) ** 2, 1.0)}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     for steps in (4, 8):  # the second run begins after four steps
        ...         with Checkpoints(directory) as checkpoints:
        ...             weight, figures = fit(
        ...                 jnp.zeros(()), step, itertools.repeat(1.0), steps=steps, checkpoints=checkpoints
        ...             )
        ...         print(weight, figures)
        0.9375 {'loss': 0.33203125}
        0.99609375 {'loss': 0.001296997...}
    """
    _check_intervals(steps, save_every, log_every, evaluate, evaluate_every, checkpoints)
    if non_finite not in get_args(NonFinite):
        raise ValueError(f"`non_finite` must be one of {get_args(NonFinite)}, got {non_finite!r}.")
    data, totals, log = Batches(batches), Totals(non_finite=non_finite), _Log(sinks)
    done = 0
    if checkpoints is not None and checkpoints.steps():
        done = _check_done(checkpoints, steps)
        state, info = checkpoints.restore(state, donate=True)
        data.go_to(info.progress["data"])
        totals.from_json(info.progress["totals"])
    with StopRequests() if checkpoints is not None else contextlib.nullcontext() as requests:
        while done < steps:
            state, metrics = step(state, _next(data, done, steps))
            done += 1
            totals.add(done, metrics)
            log.flush()
            last = done == steps
            interval = totals.take() if last or done % log_every == 0 else None
            evaluated = evaluate(state) if evaluate is not None and (last or _due(done, evaluate_every)) else {}
            log.add(done, interval, evaluated)
            if checkpoints is None or requests is None:
                continue
            stop = requests.agreed(metrics)
            if last or stop or done % save_every == 0:
                figures = log.flush()
                if not stop:
                    _check_metric(checkpoints, done, figures)
                progress = {"data": data.position(), "totals": totals.to_json()}
                checkpoints.save(done, state, figures=figures, progress=progress)
            if stop:
                checkpoints.wait()
                requests.obey(stop)
        figures = log.flush()
        if checkpoints is not None:
            checkpoints.wait()
    return state, figures


class _Log:
    """Figures on their way to the sinks: those of a step are fetched when the next one is under way."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self._pending: tuple[int, Interval | None, Mapping[str, float]] | None = None
        self._figures: dict[str, float] = {}

    def add(self, step: int, interval: Interval | None, evaluated: Mapping[str, float]) -> None:
        """Takes the figures of a step, the one before having been flushed."""
        self._pending, self._figures = (step, interval, evaluated), {}

    def flush(self) -> dict[str, float]:
        """Fetches and writes what was added last, if that has not been done; returns it."""
        if self._pending is not None:
            step, interval, evaluated = self._pending
            self._pending, self._figures = None, {} if interval is None else interval.figures()
            if both := self._figures.keys() & evaluated.keys():
                raise ValueError(f"`evaluate` and `step` both have figures of the names {sorted(both)}.")
            self._figures |= {name: float(value) for name, value in evaluated.items()}
            if self._figures and is_first():
                for sink in self._sinks:
                    sink(step, self._figures)
        return self._figures


def _next(data: Batches, done: int, steps: int) -> Any:
    try:
        return data.next()
    except StopIteration:
        raise ValueError(f"`batches` ended after {done} of {steps} steps; repeat them, or lower `steps`.") from None


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _check_intervals(
    steps: int,
    save_every: int,
    log_every: int,
    evaluate: Evaluate | None,
    evaluate_every: int | None,
    checkpoints: Checkpoints | None,
) -> None:
    intervals = {"steps": steps, "save_every": save_every, "log_every": log_every, "evaluate_every": evaluate_every}
    for name, every in intervals.items():
        if every is not None and every < 1:
            raise ValueError(f"`{name}` must be at least 1, got {every}.")
    if (evaluate is None) != (evaluate_every is None):
        raise ValueError("`evaluate` and `evaluate_every` go together; give both or none.")
    known = _due(save_every, log_every) or _due(save_every, evaluate_every)
    if checkpoints is not None and checkpoints.keep_best and not known:
        raise ValueError(
            f"To keep the best checkpoints, figures must be known when one is saved: `save_every` ({save_every}) "
            f"must be a multiple of `log_every` ({log_every}) or `evaluate_every` ({evaluate_every})."
        )


def _check_done(checkpoints: Checkpoints, steps: int) -> int:
    done = checkpoints.steps()[-1]
    if done > steps:
        raise ValueError(f"The last checkpoint in {checkpoints.path!r} is of step {done}; `steps` is {steps}.")
    return done


def _check_metric(checkpoints: Checkpoints, step: int, figures: Mapping[str, float]) -> None:
    if checkpoints.keep_best and checkpoints.metric not in figures:
        raise ValueError(
            f"The best checkpoints are those by {checkpoints.metric!r}, and the figures of step {step} are "
            f"{sorted(figures)}: `save_every` must be a multiple of the interval at which it is known."
        )
