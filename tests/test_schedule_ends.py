"""What is asked for is what `finalize` gives: every transform with a schedule, after trainings of any length."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transform_table import not_called

import jaxcompress as jc
from jaxcompress import gates, lowrank, pruning
from jaxcompress._src.schedules import final_value
from jaxcompress._src.types import Transform
from jaxcompress.clustering import CodebookSpec, trained_codebooks
from jaxcompress.quantization import QuantSpec, quantization_aware
from jaxcompress.schedules import UnfinishedScheduleWarning, cubic
from jaxcompress.structured import UnitGroup, UnitSlices

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)}
ROWS = UnitGroup(name="rows", count=8, slices=(UnitSlices(path="w", axis=0, gated=True),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A transform whose schedule ends at a given step, and how what it stores is checked.

    Attributes:
        make: of the last step.
        holds: of the stored leaf.
        early: pattern of the warning when training ends too early.
        same: `finalize` gives what `apply` does even then.
    """

    make: Callable[[int], Transform]
    holds: Callable[[Any], bool]
    early: str
    same: bool = False


def _half(leaf: Any) -> bool:
    return int((leaf.materialize() == 0).sum()) == 24


def _two_of_four(leaf: Any) -> bool:
    return bool(((np.asarray(leaf.materialize()).reshape(2, 4, 6) != 0).sum(1) == 2).all())


def _schedule(end: int) -> Any:
    return cubic(0.0, 0.5, begin=0, end=end)


def _values(leaf: Any) -> bool:
    """Every weight is at the nearest of the stored values."""
    return len(np.unique(leaf.materialize())) <= 4


TABLE = {
    "gradual": Row(
        make=lambda end: pruning.gradual(schedule=_schedule(end), every=10), holds=_half, early=r"goes on to 0\.5"
    ),
    "gradual, 2:4": Row(
        make=lambda end: pruning.gradual(schedule=_schedule(end), every=10, pattern=pruning.n_of_m(2, 4)),
        holds=_two_of_four,
        early=r"goes on to 0\.5",
    ),
    "gradual, frozen at the end": Row(
        make=lambda end: pruning.gradual(schedule=_schedule(end), every=10, freeze_at=end),
        holds=_half,
        early=r"goes on to 0\.5",
    ),
    "straight-through": Row(
        make=lambda end: pruning.straight_through_magnitude(schedule=_schedule(end), every=10),
        holds=_half,
        early=r"goes on to 0\.5",
    ),
    "movement": Row(
        make=lambda end: pruning.movement(schedule=_schedule(end), every=10), holds=_half, early=r"goes on to 0\.5"
    ),
    "soft movement": Row(
        make=lambda end: pruning.soft_movement(
            threshold=optax.linear_schedule(0.0, 0.55, transition_steps=end), strength=0.0
        ),
        holds=lambda leaf: int((leaf.materialize() != 0).sum()) == 20,
        early=r"goes on to 0\.55",
    ),
    "RigL": Row(
        make=lambda end: pruning.rigl(sparsity=0.5, until=max(end, 2), every=max(end - 1, 1)),
        holds=_half,
        early="drawn at random",
        same=True,
    ),
    "SET": Row(
        make=lambda end: pruning.sparse_evolution(sparsity=0.5, until=max(end, 2), every=max(end - 1, 1)),
        holds=_half,
        early="drawn at random",
        same=True,
    ),
    "SR-STE": Row(make=lambda end: pruning.sr_ste(2, 4), holds=_two_of_four, early="", same=True),
    "group lasso": Row(
        make=lambda end: pruning.group_lasso(strength=0.3, freeze_at=end),
        holds=lambda leaf: bool((leaf.materialize() == 0).any()),
        early="before the groups were frozen",
        same=True,
    ),
    "codebooks": Row(
        make=lambda end: trained_codebooks(CodebookSpec(values=4, zero=False), every=10, until=end),
        holds=_values,
        early="not in their codes",
        same=True,
    ),
    "rounding that begins later": Row(
        make=lambda end: quantization_aware(QuantSpec(bits=4), begin=end),
        holds=lambda leaf: leaf.bits == 4,
        early="rounding begins after",
    ),
    "fewer and fewer bits": Row(
        make=lambda end: quantization_aware(QuantSpec(bits=2), bits=lambda step: jnp.where(step < end, 3, 2)),
        holds=lambda leaf: leaf.bits == 2,
        early="at 3 bits",
    ),
    "gates": Row(
        make=lambda end: gates.hard_concrete(
            [ROWS], penalty=gates.lagrangian(sparsity=0.5, warm_up=optax.linear_schedule(0.0, 1.0, end))
        ),
        holds=lambda leaf: int((np.asarray(leaf) == 0).all(1).sum()) == 4,
        early="`warm_up` is",
        same=True,
    ),
    "gates of a shape": Row(
        make=lambda end: gates.hard_concrete(
            [dataclasses.replace(ROWS, kind="rows")],
            penalty=gates.lagrangian(shape={"rows": 4}, warm_up=optax.linear_schedule(0.0, 1.0, end)),
        ),
        holds=lambda leaf: int((np.asarray(leaf) == 0).all(1).sum()) == 4,
        early="`warm_up` is",
        same=True,
    ),
    "rank gates": Row(
        make=lambda end: lowrank.rank_gates(share=0.6, warm_up=optax.linear_schedule(0.0, 1.0, end)),
        holds=lambda leaf: leaf.rank == 2,
        early="`warm_up` is",
        same=True,
    ),
}


SCHEDULING = {"schedule", "threshold", "warm_up", "begin", "until", "freeze_at", "every"}
"""Keywords that say when something happens."""


def test_every_transform_with_a_schedule_has_a_row():
    absent = not_called(__file__, keywords=SCHEDULING)
    assert not absent, f"{absent} need rows in the table of this file."


def _located(name, state):
    """Scores and gates as training would leave them, with as many open as asked for."""
    if "movement" in name:
        # A sigmoid above .55 is a logit above .2: 20 of 48.
        scores = 0.2 + 0.01 * (np.arange(48) - 27.5)
        return state._replace(trainable={"w": jnp.asarray(RNG.permutation(scores).reshape(8, 6), jnp.float32)})
    if name.startswith("gates") or name == "rank gates":
        path, count = ("w", 6) if name == "rank gates" else ("rows", 8)
        kept = 2 if name == "rank gates" else 4
        location = jnp.where(jnp.arange(count) < kept, 4.0, -4.0)
        return state._replace(trainable=state.trainable | {"log_alpha": {path: location}})
    return state


def _updates(name, end):
    """`(transform, run)`: `run(steps)` goes on with weights that move, as a train step does, to `(params, state)`."""
    transform = TABLE[name].make(end)
    now = [PARAMS, _located(name, transform.init(PARAMS, key=jax.random.key(0))), 0]

    @jax.jit
    def update(params, state, step):
        params = {"w": params["w"] + 0.02 * jnp.sin(step + 7 * params["w"])}
        state, _ = transform.update(params, state, params, key=jax.random.key(1), loss=jnp.float32(0.5))
        return transform.project(params, state)

    def run(steps):
        for _ in range(steps):
            now[:2] = update(*now[:2], jnp.int32(now[2]))
            now[2] += 1
        return now[:2]

    return transform, run


def _plain(leaf):
    return np.asarray(jc.materialize(leaf))


def _assert_same(transform, params, state, same=True):
    final, effective = transform.finalize(params, state)["w"], transform.apply(params, state)["w"]
    assert np.allclose(_plain(final), _plain(effective), atol=1e-5) == same
    return final


@pytest.mark.parametrize("name", TABLE)
def test_what_is_asked_for_is_stored(name):
    """Of nine steps, with a ranking (or an assignment) every ten, and of six only. Warnings are errors."""
    row, (transform, run) = TABLE[name], _updates(name, 9)
    params, state = run(6)
    if row.early:
        with pytest.warns(UnfinishedScheduleWarning, match=f"after 6 updates.*{row.early}"):
            final = _assert_same(transform, params, state, row.same)
        assert row.holds(final)
    assert row.holds(_assert_same(transform, *run(3)))


@pytest.mark.parametrize("end", [1, 10, 25])
def test_gradual_pruning_of_any_length(end):
    transform, run = _updates("gradual, 2:4", end)
    params, state = run(end)
    final = _assert_same(transform, params, state)
    magnitude = np.abs(np.asarray(params["w"], np.float64)).reshape(2, 4, 6)
    largest = np.argsort(np.argsort(-magnitude, axis=1), axis=1) < 2
    np.testing.assert_array_equal(_plain(final) != 0, largest.reshape(8, 6))


def test_gates_that_miss_the_target_say_so():
    for name, message in (
        ("gates", r"leave 0\.75 of the size, and 0\.5 are asked for"),
        ("gates of a shape", "'rows' keeps 6 units, and 4 are asked for"),
    ):
        transform, run = _updates(name, 1)
        params, state = run(1)
        location = jnp.where(jnp.arange(8) < 6, 4.0, -4.0)
        state = state._replace(trainable=state.trainable | {"log_alpha": {"rows": location}})
        with pytest.warns(UnfinishedScheduleWarning, match=message):
            transform.finalize(params, state)
    transform, run = _updates("rank gates", 1)
    params, state = run(1)
    state = state._replace(trainable=state.trainable | {"log_alpha": {"w": jnp.full(6, 4.0)}})
    with pytest.warns(UnfinishedScheduleWarning, match=r"a share of 1\.75, and 0\.6 is asked for"):
        transform.finalize(params, state)


def test_codes_are_those_of_the_weights_at_the_end():
    """Without an assignment at the last update, nine steps of training would be lost."""
    transform, run = _updates("codebooks", 9)
    params, state = run(9)
    table = np.asarray(state.trainable["w"], np.float64).reshape(-1)
    table = np.asarray(jnp.asarray(table, CodebookSpec(values=4).dtype), np.float64)
    w = np.asarray(params["w"], np.float64)
    nearest = table[np.abs(w[..., None] - table).argmin(-1)]
    np.testing.assert_allclose(_plain(transform.finalize(params, state)["w"]), nearest, rtol=1e-6)


def test_without_any_update_the_weights_are_pruned_in_one_shot():
    transform = pruning.gradual(schedule=jc.schedules.constant(0.5), every=10)
    state = transform.init(PARAMS, key=jax.random.key(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        final = transform.finalize(PARAMS, state)["w"]
    assert _half(final)
    dense = pruning.gradual(schedule=jc.schedules.constant(0.5), store="dense")
    np.testing.assert_array_equal(jax.jit(dense.finalize)(PARAMS, state)["w"], final.materialize())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pruning.gradual(schedule=lambda step: step % 2 / 2), "`schedule` must stand still in the end"),
        (lambda: pruning.gradual(schedule=lambda step: step / 10), "`schedule` must stand still in the end"),
        (
            lambda: pruning.gradual(schedule=_schedule(10), freeze_at=9),
            r"`freeze_at` is 9, .* reached 0\.4995 of its 0",
        ),
        (lambda: pruning.movement(schedule=_schedule(10), freeze_at=0), "`freeze_at` is 0"),
        (
            lambda: pruning.gradual(schedule=jc.schedules.constant(0.75), pattern=pruning.n_of_m(2, 4)),
            r"ends at a sparsity of 0\.75; it must be in \[0, 0\.5\]",
        ),
        (lambda: pruning.soft_movement(threshold=lambda step: step / 10, strength=1.0), "`threshold` must stand still"),
        (lambda: pruning.rigl(sparsity=0.5, until=10), "`every` is 100 and `until` 10"),
        (
            lambda: quantization_aware(QuantSpec(bits=4), bits=lambda step: jnp.maximum(8 - step, 3)),
            "`bits` must end at the 4 bits of the spec, .* ends at 3",
        ),
        (lambda: gates.lagrangian(sparsity=0.5, warm_up=lambda step: step / 10), "`warm_up` must stand still"),
        (lambda: lowrank.rank_gates(share=0.5, warm_up=lambda step: step / 10), "`warm_up` must stand still"),
    ],
)
def test_what_cannot_be_is_an_error_before_training(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_end_of_a_schedule_is_found_inside_jit_too():
    assert jax.jit(lambda: jnp.float32(final_value(_schedule(7))))() == 0.5
