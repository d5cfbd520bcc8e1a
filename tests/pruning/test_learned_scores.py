"""Movement and soft movement, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcompress import pruning
from jaxcompress.distillation import make_train_step
from jaxcompress.schedules import constant

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32), "b": jnp.ones(6)}
GRADIENT = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)


def _late(step):
    return jnp.where(step >= 2, 0.5, 0.0)


def _trained(transform, steps, rate=0.1):
    init_state, step = make_train_step(
        toys.echo,
        None,
        optax.sgd(0.01),
        losses={"dot": toys.dot("w", jnp.asarray(GRADIENT))},
        transform=transform,
        transform_optimizer=optax.sgd(rate),
    )
    state = init_state(PARAMS, key=jax.random.key(0))
    for _ in range(steps):
        state, metrics = step(state, None, {})
    return state, metrics


def test_movement_accumulates_minus_w_g_and_ranks_by_it():
    state, _ = _trained(pruning.movement(schedule=_late), 4)
    w, score = np.asarray(PARAMS["w"], np.float64), np.zeros((4, 6))
    mask = np.ones((4, 6), bool)
    for step in range(4):
        # The gradient of the masked model by w' is the constant G; only kept weights move, all scores do.
        score -= 0.1 * GRADIENT * w
        w -= 0.01 * GRADIENT * mask
        # The update before step 2, for which the schedule asks for a half.
        if step >= 1:
            mask = np.ones(24, bool)
            mask[np.argsort(score.reshape(-1), kind="stable")[:12]] = False
            mask = mask.reshape(4, 6)
    np.testing.assert_allclose(state.transform_state.trainable["w"], score, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    np.testing.assert_array_equal(state.transform_state.fixed.masks["w"], mask)


def test_soft_movement_prunes_below_the_threshold_and_pulls_all_scores():
    transform = pruning.soft_movement(threshold=0.5, strength=lambda step: 3.0 * (step + 1))
    state, metrics = _trained(transform, 1)
    pull = 3.0 * 0.25 / 24  # λ σ'(0) / n
    score = -0.1 * (GRADIENT * np.asarray(PARAMS["w"]) + pull)
    np.testing.assert_allclose(state.transform_state.trainable["w"], score, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(state.transform_state.fixed.masks["w"], score > 0)
    np.testing.assert_allclose(metrics["penalty"][0], 3.0 * 0.5, rtol=1e-6)
    assert float(transform.penalty(state.transform_state, PARAMS, loss=0.0)) == pytest.approx(
        6.0 * float(jax.nn.sigmoid(jnp.asarray(score)).mean()), rel=1e-5
    )


def test_the_penalty_is_a_mean_of_means_over_leaves():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((10, 10))}
    transform = pruning.soft_movement(threshold=0.1, strength=1.0)
    state = transform.init(params, key=jax.random.key(0))
    state = state._replace(trainable={"a": jnp.full((2, 3), 50.0), "b": jnp.full((10, 10), -50.0)})
    assert float(transform.penalty(state, params, loss=0.0)) == pytest.approx(0.5, abs=1e-6)


def test_scores_of_bfloat16_weights_are_float32():
    params = {"w": PARAMS["w"].astype(jnp.bfloat16)}
    transform = pruning.movement(schedule=constant(0.5))
    state = transform.init(params, key=jax.random.key(0))
    assert state.trainable["w"].dtype == jnp.float32
    pull = jax.grad(
        lambda s, p: transform.apply(p, state._replace(trainable=s))["w"].sum().astype(jnp.float32), argnums=(0, 1)
    )
    of_scores, of_params = pull(state.trainable, params)
    np.testing.assert_array_equal(of_scores["w"], params["w"].astype(jnp.float32))
    assert of_params["w"].dtype == jnp.bfloat16


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"`threshold` must be in \[0, 1\), got 1"):
        pruning.soft_movement(threshold=1.0, strength=1.0)
    with pytest.raises(ValueError, match="`strength` must not be negative"):
        pruning.soft_movement(threshold=0.1, strength=-1.0)
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        pruning.movement(schedule=constant(0.5), every=0)
