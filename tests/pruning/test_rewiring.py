"""RigL and SET: counts, what starts anew, and what the optimizer remembers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcompress import pruning
from jaxcompress._src.pruning.rewiring import rewire
from jaxcompress.distillation import make_train_step

PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(12, 10)), jnp.float32),
    "v": jnp.asarray(np.random.default_rng(1).normal(size=(10, 5)), jnp.float32),
    "b": jnp.ones(5),
}


def _reference(mask, weights, candidates, moved):
    """Drop and grow by stable sorts."""
    mask, weights, candidates = (np.asarray(array).reshape(-1) for array in (mask, weights, candidates))
    drop = np.where(mask, np.abs(weights), -1.0)
    kept = np.zeros(mask.size, bool)
    kept[np.argsort(-drop, kind="stable")[: mask.sum() - moved]] = True
    grow = np.where(kept, -1.0, np.abs(candidates))
    new = kept.copy()
    new[np.argsort(-grow, kind="stable")[:moved]] = True
    return new


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_rewire_against_sorts(ties, fraction):
    rng = np.random.default_rng(2)
    draw = (
        (lambda *s: rng.integers(-2, 3, s).astype(np.float32))
        if ties
        else (lambda *s: rng.normal(size=s).astype(np.float32))
    )
    shapes = [(13, 7), (6, 4)]
    masks = [rng.random(shape) < 0.4 for shape in shapes]
    weights, candidates = [draw(*shape) for shape in shapes], [draw(*shape) for shape in shapes]
    found = rewire(
        *[[jnp.asarray(x) for x in column] for column in (masks, weights, candidates)], jnp.float32(fraction)
    )
    for new, mask, w, g in zip(found, masks, weights, candidates, strict=True):
        wanted = _reference(mask, w, g, int(mask.sum() * np.float32(fraction)))
        np.testing.assert_array_equal(np.asarray(new).reshape(-1), wanted)


@pytest.mark.parametrize("make", [pruning.rigl, pruning.sparse_evolution])
def test_inside_a_train_step_with_adam(make):
    transform = make(sparsity=0.6, until=6, every=2, fraction=0.5)
    weights = {
        name: jnp.asarray(np.random.default_rng(3).normal(size=leaf.shape), jnp.float32)
        for name, leaf in PARAMS.items()
    }

    def loss(student, teacher, batch):
        return sum(jnp.sum(weights[name] * student[name]) for name in weights), jnp.ones(())

    init_state, step = make_train_step(
        toys.echo, None, optax.adamw(0.01, weight_decay=0.1), losses={"dot": loss}, transform=transform
    )
    state = init_state(PARAMS, key=jax.random.key(0))
    counts = [int(state.transform_state.fixed.masks[name].sum()) for name in ("w", "v")]
    assert sum(counts) == 68
    changed = []
    for _ in range(8):
        before = state.transform_state.fixed.masks
        before = {name: np.asarray(before[name]) for name in ("w", "v")}
        state, _ = step(state, None, {})
        fixed, adam = state.transform_state.fixed, state.optimizer_state[0]
        changed.append(False)
        for name, count in zip(("w", "v"), counts, strict=True):
            mask, raw = np.asarray(fixed.masks[name]), np.asarray(state.params[name])
            assert mask.sum() == count
            grown, dropped = mask & ~before[name], before[name] & ~mask
            assert grown.sum() == dropped.sum()
            changed[-1] |= bool(grown.any())
            # Underneath, pruned and newly grown weights are exactly zero, and remember nothing.
            assert (raw[~mask | grown] == 0).all()
            assert (raw[mask & ~grown] != 0).all()
            for moments in (adam.mu[name], adam.nu[name]):
                assert (np.asarray(moments)[grown | dropped] == 0).all()
                assert (np.asarray(moments)[mask & ~grown] != 0).all()
    # Due at the second and fourth update; the gradient is always the same here, so RigL may find nothing to change.
    assert changed[1]
    assert not any(changed[place] for place in (0, 2, 4, 5, 6, 7))
    effective = transform.apply(state.params, state.transform_state)
    assert float((effective["w"] == 0).sum() + (effective["v"] == 0).sum()) == 102


def test_rigl_grows_where_the_gradient_of_the_masked_model_is_large():
    transform = pruning.rigl(sparsity={"w": 0.5}, until=10, every=1, fraction=0.8)
    params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
    state = transform.init(params, key=jax.random.key(0))
    state = state._replace(fixed=state.fixed._replace(masks={"w": jnp.array([[True] * 4, [False] * 4])}))
    grads = {"w": jnp.array([[0.0, 0.0, 0.0, 9.0], [0.0, -5.0, 1.0, 0.0]])}
    state, fresh = transform.update(grads, state, params, key=jax.random.key(0), loss=0.0)
    # f = 0.4 (1 + cos(π / 10)) = 0.78: three of four go (1, 2, 3); the three largest gradients are kept or grown.
    assert state.fixed.masks["w"].tolist() == [[True, False, False, True], [False, True, True, False]]
    assert fresh["w"].tolist() == [[False, True, True, False], [False, True, True, False]]


def test_sparse_evolution_grows_at_random():
    transform = pruning.sparse_evolution(sparsity=0.5, until=10, every=1)
    state = transform.init(PARAMS, key=jax.random.key(0))
    update = jax.jit(lambda key: transform.update(PARAMS, state, PARAMS, key=key, loss=0.0)[0].fixed.masks["w"])
    first, second = update(jax.random.key(1)), update(jax.random.key(2))
    assert bool((first != second).any())
    kept = np.asarray(state.fixed.masks["w"])
    smallest = np.sort(np.abs(np.asarray(PARAMS["w"]))[kept])[int(0.3 * kept.sum()) :]
    stayed = np.asarray(first & second) & kept
    assert set(smallest) <= set(np.abs(np.asarray(PARAMS["w"]))[stayed])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"`fraction` must be in \[0, 1\], got 1.5"):
        pruning.rigl(sparsity=0.5, until=10, fraction=1.5)
    with pytest.raises(ValueError, match="`every` and `until` must be at least 1, got 0 and 10"):
        pruning.sparse_evolution(sparsity=0.5, until=10, every=0)
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\]"):
        pruning.rigl(sparsity=-0.5, until=10)
