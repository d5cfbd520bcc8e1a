"""Factors and rank gates in training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress._src.lowrank.gates import expected_ranks
from jaxcompress.arrays import LowRankArray
from jaxcompress.calibration import InputStatistics
from jaxcompress.distillation import make_train_step, soft_targets
from jaxcompress.lowrank import rank_gates, svd
from jaxcompress.models import from_pretrained
from jaxcompress.trace import LeafLayout


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_the_factors_of_a_bert_learn_to_do_what_it_did(bert_directory, tmp_path):
    """Distilled from the dense model by a plain train step; the factors are what is trained, saved and restored."""
    module, dense = from_pretrained(bert_directory)
    kernels = jc.tree.by_path("bert/encoder/.*/kernel")
    dense = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, dense)
    student, _ = svd(dense, rank=4, select=kernels)
    rng = np.random.default_rng(0)
    batch = {"ids": jnp.asarray(rng.integers(5, 17, (16, 8)), jnp.int32)}

    def apply(params, batch, *, key, train):
        return {"logits": module.apply({"params": params}, batch["ids"], jnp.ones_like(batch["ids"]))["logits"]}

    init_state, step = make_train_step(
        apply, apply, optax.adam(5e-3), losses={"soft": soft_targets()}, trainable=kernels
    )
    state = init_state(student, key=jax.random.key(0))
    losses = []
    for _ in range(40):
        state, figures = step(state, dense, batch)
        losses.append(float(figures["soft"][0] / figures["soft"][1]))
    logits = apply(dense, batch, key=None, train=False)["logits"]
    floor = -float(jnp.mean(jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)))
    assert losses[-1] - floor < 0.2 * (losses[0] - floor)
    jc.checkpoint.save(tmp_path / "student", state.params)
    restored, _ = jc.checkpoint.restore(tmp_path / "student")
    factored = 0
    trees = map(jc.tree.leaves_with_paths, (student, state.params, restored))
    for (path, old), (_, new), (_, again) in zip(*trees, strict=True):
        assert type(again) is type(new), path
        jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=path), again, new)
        if isinstance(old, LowRankArray):
            factored += 1
            assert isinstance(new, LowRankArray), path
            assert not np.array_equal(old.left, new.left), path
            assert not np.array_equal(old.right, new.right), path
        else:
            np.testing.assert_array_equal(old, new, err_msg=path)
    assert factored == 2 * 6


def problem():
    """Targets that a kernel of rank 3 makes: seven of its ten directions are noise that the loss punishes."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 10))
    x = rng.normal(size=(64, 12))
    noisy = true + 0.3 * rng.normal(size=true.shape)
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(x @ true, jnp.float32)}
    return {"w": jnp.asarray(noisy, jnp.float32)}, batch


def trained(transform, steps=300):
    params, batch = problem()

    def apply(params, batch, *, key, train):
        return {"y": batch["x"] @ params["w"]}

    def squared(student, teacher, batch):
        return jnp.square(student["y"] - batch["y"]).sum(), jnp.float32(batch["y"].size)

    init_state, step = make_train_step(
        apply, None, optax.adam(1e-2), losses={"y": squared}, transform=transform, transform_optimizer=optax.adam(5e-2)
    )
    state = init_state(params, key=jax.random.key(0))
    for _ in range(steps):
        state, _ = step(state, None, batch)
    return state, batch


def test_gates_find_the_rank_that_the_budget_allows():
    """3 (12 + 10) of 120 parameters is a share of 0.55."""
    transform = rank_gates(share=0.55)
    state, batch = trained(transform)
    ranks = expected_ranks(state.transform_state)
    assert ranks["w"] == pytest.approx(3, abs=0.4)
    small = transform.finalize(state.params, state.transform_state)
    assert small["w"].rank == 3
    # The dominant directions stay, not any three.
    gates = state.transform_state.trainable["log_alpha"]["w"]
    assert set(np.argsort(-gates)[:3].tolist()) == {0, 1, 2}
    error = jnp.mean(jnp.square(jc.execute(lambda p, x: x @ p["w"])(small, batch["x"]) - batch["y"]))
    assert error < 0.05 * jnp.mean(jnp.square(batch["y"]))
    effective = transform.apply(state.params, state.transform_state)
    np.testing.assert_allclose(small["w"].materialize(), effective["w"], rtol=1e-4, atol=1e-5)


def test_a_price_closes_gates_and_none_leaves_them_open():
    dear, free = (trained(rank_gates(strength=strength), steps=150)[0] for strength in (0.5, 0.0))
    closed, open_ = (expected_ranks(state.transform_state)["w"] for state in (dear, free))
    assert closed < 8.5 < open_


def test_open_gates_change_nothing_and_a_leaf_that_is_no_smaller_stays_plain():
    params = {"w": normal(6, 9), "v": normal(9, 6)}
    transform = rank_gates(strength=0.0)
    state = transform.init(params, key=jax.random.key(0))
    for path in params:
        state.trainable["log_alpha"][path] = jnp.full(6, 4.0)
    for found in (transform.apply(params, state), transform.finalize(params, state)):
        for path, leaf in params.items():
            np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=1e-5)


def test_statistics_turn_the_directions():
    """The best projection of rank one on inputs that are large along one axis is that of its outputs."""
    params = {"w": jnp.array([[0.0, 0.1], [3.0, 0.0], [0.0, 0.0]])}
    found = {"w": InputStatistics(count=jnp.float32(3), gram=jnp.diag(jnp.array([1e4, 1.0, 1.0])))}
    transform = rank_gates(strength=1.0)
    plain, aware = (transform.init(params, key=jax.random.key(0), statistics=s) for s in (None, found))
    first = [np.abs(state.fixed["directions"]["w"][0, :, 0]).round(4).tolist() for state in (plain, aware)]
    assert first == [[1.0, 0.0], [0.0, 1.0]]


def test_stacks_share_gates_and_layouts_are_obeyed():
    layouts = {"w": LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(2,), output_axes=(1,))}
    params = {"w": normal(3, 8, 7)}
    transform = rank_gates(strength=1.0, layouts=layouts)
    state = transform.init(params, key=jax.random.key(0))
    state.trainable["log_alpha"]["w"] = jnp.array([4.0, 4.0, -4.0, -4.0, -4.0, -4.0, -4.0])
    small = transform.finalize(params, state)["w"]
    assert (small.shape, small.rank, small.left.shape, small.right.shape) == ((3, 8, 7), 2, (3, 1, 7, 2), (3, 8, 1, 2))
    wanted = svd(params, rank=2, layouts=layouts)[0]["w"].materialize()
    np.testing.assert_allclose(small.materialize(), wanted, atol=1e-4)
    assert float(transform.penalty(state, params, loss=jnp.zeros(()))) == pytest.approx(
        sum(expected_ranks(state).values()) * 3 * 15 / (3 * 56), rel=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of `share` and `strength`"),
        ({"share": 0.5, "strength": 1.0}, "one of `share` and `strength`"),
        ({"share": 0.0}, r"`share` must be in \(0, 1\]"),
        ({"strength": -1.0}, "`strength`"),
        ({"share": 0.5, "drop_rate": 1.0}, "`drop_rate`"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        rank_gates(**options)
