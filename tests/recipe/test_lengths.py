"""Shares of a training become steps of it, however short it is."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress._src.recipe import options as _options
from jaxcompress._src.recipe.steps import read_step

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)}
LAYOUTS = jc.trace.layouts(lambda p, x: x @ p["w"], PARAMS, jnp.ones((2, 8)))


def test_pruning_ends_within_any_training(monkeypatch):
    found = []

    def record(initial, final, *, begin, end):
        found.append((begin, end))
        return jc.schedules.constant(final)

    monkeypatch.setattr(_options, "cubic", record)
    for begin, end in ((0.0, 0.5), (0.0, 1.0), (0.9, 1.0), (0.3, 0.31), (0.0, 0.001)):
        keywords = _options.read_options(jc.pruning.gradual, {"sparsity": 0.5, "begin": begin, "end": end})
        for steps in range(1, 60):
            _options.at_steps(keywords, steps)
            first, last = found.pop()
            assert 0 <= first < last <= steps


def test_weights_move_for_one_step_at_least_if_they_are_to_move():
    def until(steps, **given):
        step = read_step("cluster", {"select": "w", "values": 4, **given})
        return _options.at_steps(step.keywords, steps).get("until", 0)

    for share in (0.01, 0.5, 1.0):
        for steps in range(1, 60):
            assert 1 <= until(steps, until=share) <= steps
    assert [until(steps) for steps in (0, 1, 9)] == [0, 0, 0]


def test_nine_steps_with_the_options_of_the_recipe_prune_two_of_four():
    """By default weights are ranked every ten steps, and the end is half of the training."""
    step = read_step("prune", {"select": "w", "sparsity": 0.5, "pattern": "2:4"})
    transform = jc.pruning.gradual(layouts=LAYOUTS, **_options.at_steps(step.keywords, 9))
    state = transform.init(PARAMS, key=jax.random.key(0))
    update = jax.jit(lambda s: transform.update(PARAMS, s, PARAMS, key=jax.random.key(1), loss=0.0)[0])
    for _ in range(9):
        state = update(state)
    kept = np.asarray(transform.finalize(PARAMS, state)["w"].materialize()) != 0
    assert (kept.reshape(2, 4, 6).sum(1) == 2).all()
