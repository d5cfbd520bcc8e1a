"""SR-STE, group lasso, straight-through magnitude and sparse updates, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcompress import pruning
from jaxcompress._src.transforms import chain
from jaxcompress.distillation import make_train_step
from jaxcompress.schedules import constant
from jaxcompress.trace import LeafLayout
from jaxcompress.tree import Unselected

RNG = np.random.default_rng(0)
W = RNG.normal(size=(8, 6)).astype(np.float32)
GRADIENT = RNG.normal(size=(8, 6)).astype(np.float32)


def _trained(transform, steps, optimizer, params=None):
    init_state, step = make_train_step(
        toys.echo, None, optimizer, losses={"dot": toys.dot("w", jnp.asarray(GRADIENT))}, transform=transform
    )
    state = init_state({"w": jnp.asarray(W), "b": jnp.ones(6)} if params is None else params, key=jax.random.key(0))
    for _ in range(steps):
        state, _ = step(state, None, {})
    return state


def _two_of_four(w):
    runs = np.abs(w).reshape(2, 4, 6)
    return (np.argsort(np.argsort(-runs, axis=1, kind="stable"), axis=1) < 2).reshape(8, 6)


@pytest.mark.parametrize("behind", [False, True])
def test_sr_ste_adds_its_term_to_the_gradient_of_pruned_weights(behind):
    """Behind a stage that doubles the weights, the chain rule doubles both terms."""
    transform = pruning.sr_ste(2, 4, strength=0.3)
    factor = 2.0 if behind else 1.0
    if behind:
        transform = chain(toys.toy_scale(2.0), transform)
    init_state, step = make_train_step(
        toys.echo,
        None,
        optax.sgd(0.1),
        losses={"dot": toys.dot("w", jnp.asarray(GRADIENT))},
        transform=transform,
        transform_optimizer=optax.set_to_zero(),
    )
    state, w = init_state({"w": jnp.asarray(W)}, key=jax.random.key(0)), W.astype(np.float64)
    for _ in range(3):
        state, _ = step(state, None, {})
        mask = _two_of_four(w)
        w = w - 0.1 * factor * (GRADIENT + 0.3 * np.where(mask, 0, factor * w))
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-4, atol=1e-6)
    effective = transform.apply(state.params, state.transform_state)
    np.testing.assert_array_equal(np.asarray(effective["w"]) != 0, _two_of_four(np.asarray(state.params["w"])))


def test_straight_through_moves_pruned_weights_and_frozen_masks_stay():
    state = _trained(pruning.straight_through_magnitude(schedule=constant(0.5), freeze_at=2), 4, optax.sgd(0.1))
    np.testing.assert_allclose(state.params["w"], W - 0.4 * GRADIENT, rtol=1e-5, atol=1e-6)
    moved = np.abs(W - 0.2 * GRADIENT).reshape(-1)
    wanted = np.ones(48, bool)
    wanted[np.argsort(moved, kind="stable")[:24]] = False
    np.testing.assert_array_equal(state.transform_state.fixed.masks["w"].reshape(-1), wanted)


STACKED = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
GROUPS = {
    "outputs": ("outputs", [(slice(None), slice(j, j + 1)) for j in range(6)]),
    "inputs": ("inputs", [(slice(i, i + 1), slice(None)) for i in range(8)]),
    "blocks": (
        pruning.block(3, 4),
        [(slice(i, min(i + 3, 8)), slice(j, min(j + 4, 6))) for i in (0, 3, 6) for j in (0, 4)],
    ),
}


def _shrunk(w, groups, strength):
    w = w.astype(np.float64)
    for group in groups:
        norm, size = np.sqrt((w[group] ** 2).sum()), w[group].size
        w[group] *= max(0.0, 1 - strength * np.sqrt(size) / norm) if norm else 0.0
    return w


@pytest.mark.parametrize("name", GROUPS)
def test_group_lasso_is_the_proximal_step(name):
    groups, slices = GROUPS[name]
    strength = float(np.median([np.sqrt((W[group] ** 2).mean()) for group in slices]))
    transform = pruning.group_lasso(strength=strength, grouping=groups)
    state = transform.init({"w": jnp.asarray(W)}, key=jax.random.key(0))
    found = np.asarray(jax.jit(transform.project)({"w": jnp.asarray(W)}, state)[0]["w"])
    wanted = _shrunk(W.copy(), slices, strength)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    dead = [not found[group].any() for group in slices]
    assert 0 < sum(dead) < len(dead)


def test_group_lasso_of_a_stack_has_groups_of_its_own_in_every_layer():
    w = jnp.stack([jnp.asarray(W), 0.01 * jnp.asarray(W)])
    transform = pruning.group_lasso(strength=0.05, layouts={"w": STACKED})
    projected, _ = transform.project({"w": w}, transform.init({"w": w}, key=jax.random.key(0)))
    assert bool((projected["w"][0] != 0).all())
    assert bool((projected["w"][1] == 0).all())


def test_group_lasso_keeps_zero_groups_once_frozen():
    """Momentum and weight decay would move them; the others are no longer shrunk."""
    params = {"w": jnp.asarray(W) * jnp.where(jnp.arange(6) < 3, 1.0, 0.05)[None]}
    transform = pruning.group_lasso(strength=lambda step: jnp.where(step == 1, 0.2, 0.0), freeze_at=1)
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01, momentum=0.9))
    state = _trained(transform, 5, optimizer, params)
    dead = np.asarray((state.params["w"] == 0).all(0))
    assert dead.tolist() == [False] * 3 + [True] * 3
    assert state.transform_state.fixed.alive["w"].reshape(-1).tolist() == [True] * 3 + [False] * 3
    thawed = _trained(pruning.group_lasso(strength=lambda step: jnp.where(step == 1, 0.2, 0.0)), 5, optimizer, params)
    assert bool((thawed.params["w"] != 0).all())


MASK = RNG.random((8, 6)) < 0.4
SPARSE = {"w": jnp.asarray(np.where(MASK, W, 0.0)), "b": jnp.ones(6)}
MASKS = {"w": jnp.asarray(MASK), "b": Unselected}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(0.1, weight_decay=0.1),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.01)),
    ],
)
def test_sparse_updates_keep_exact_zeros(optimizer):
    state = _trained(chain(), 4, optax.chain(optimizer, pruning.sparse_updates(MASKS)), SPARSE)
    plain = _trained(chain(), 4, optimizer, SPARSE)
    np.testing.assert_array_equal(np.asarray(state.params["w"]) != 0, MASK)
    assert bool((plain.params["w"] != 0).all())
    np.testing.assert_allclose(state.params["w"][MASK], plain.params["w"][MASK], rtol=1e-5)
    np.testing.assert_array_equal(state.params["b"], plain.params["b"])


def test_sparse_updates_pass_over_what_an_optimizer_leaves_out():
    masked = optax.chain(optax.masked(optax.sgd(1.0), {"w": True, "b": False}), pruning.sparse_updates(MASKS))
    updates, _ = masked.update({"w": jnp.ones((8, 6)), "b": Unselected}, masked.init(SPARSE), SPARSE)
    np.testing.assert_array_equal(updates["w"], np.where(MASK, -1.0, 0.0))
    assert updates["b"] is Unselected


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="`strength` must not be negative, got -1"):
        pruning.sr_ste(2, 4, strength=-1.0)
    with pytest.raises(ValueError, match="`strength` must not be negative"):
        pruning.group_lasso(strength=-0.1)
    with pytest.raises(ValueError, match=r"mask has shape \(8, 6\), the update \(6, 8\)") as caught:
        pruning.sparse_updates(MASKS).update({"w": jnp.ones((6, 8)), "b": jnp.ones(6)}, optax.EmptyState())
    assert "at leaf 'w'" in caught.value.__notes__
    with pytest.raises(ValueError, match="differ in structure"):
        pruning.sparse_updates(MASKS).update({"other": jnp.ones(3)}, optax.EmptyState())
