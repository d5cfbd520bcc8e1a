import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress._src.transforms import chain
from jaxcompress.distillation import hidden_states, make_train_step, soft_targets

RNG = np.random.default_rng(0)
SIZES = {"first": (6, 16), "head": (16, 4)}
MASKS = {name: jnp.asarray(RNG.uniform(size=size) < 0.7) for name, size in SIZES.items()}
# Rows have different numbers of real positions, so that a mean of means would be wrong.
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(16, 3, 6)), jnp.float32),
    "attention_mask": jnp.asarray(np.arange(3)[None] <= np.arange(16)[:, None] % 3),
}


def _params(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in SIZES.items()}


def _run(place, batch_place, steps=3):
    traces = []

    def apply(params, batch, *, key, train):
        traces.append(train)
        hidden = jnp.tanh(batch["x"] @ params["first"])
        return {"logits": hidden @ params["head"], "hidden_states": [hidden]}

    regrow = {name: jnp.ones(size, bool) for name, size in SIZES.items()}
    init_state, step = make_train_step(
        apply,
        apply,
        optax.adam(0.01),
        losses={"soft": soft_targets(temperature=2.0), "hidden": (0.5, hidden_states(pairs=[(0, 0)]))},
        transform=chain(toys.toy_mask(MASKS, regrow=regrow, noise=0.01), toys.toy_scale(1.5, penalty=0.1)),
        transform_optimizer=optax.adam(0.01),
    )
    state, teacher, batch = init_state(place(_params(0)), key=jax.random.key(0)), place(_params(1)), batch_place(BATCH)
    for _ in range(steps):
        state, metrics = step(state, teacher, batch)
    assert traces == [False, True]
    return state, metrics


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_one_and_eight_devices_agree(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    alone = _run(lambda tree: tree, lambda tree: tree)
    spread = _run(
        lambda tree: jax.device_put(tree, NamedSharding(mesh, P())),
        lambda tree: jax.device_put(tree, NamedSharding(mesh, P("data"))),
    )
    assert len(spread[0].params["first"].sharding.device_set) == 8
    key_data = [jax.random.key_data(state.key) for state, _ in (alone, spread)]
    np.testing.assert_array_equal(*key_data)
    for one, other in zip(
        jax.tree.leaves((alone[0]._replace(key=()), alone[1])),
        jax.tree.leaves((spread[0]._replace(key=()), spread[1])),
        strict=True,
    ):
        np.testing.assert_allclose(other, one, rtol=2e-4, atol=2e-5)


def test_sharded_parameters_and_moments_stay_where_they_are():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shardings = {"first": NamedSharding(mesh, P(None, "model")), "head": NamedSharding(mesh, P("model"))}
    alone, _ = _run(lambda tree: tree, lambda tree: tree)
    state, _ = _run(
        lambda tree: jax.device_put(tree, shardings), lambda tree: jax.device_put(tree, NamedSharding(mesh, P("data")))
    )
    for name, sharding in shardings.items():
        assert state.params[name].sharding.is_equivalent_to(sharding, 2)
        assert state.optimizer_state[0].mu[name].sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(state.params[name], alone.params[name], rtol=2e-4, atol=2e-5)


def test_init_state_keeps_sharding_and_strips_weak_types():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    weak = jax.device_put(jnp.full((16,), 2.0), NamedSharding(mesh, P("data")))
    assert weak.weak_type
    init_state, _ = make_train_step(
        lambda params, batch, *, key, train: params, None, optax.adam(0.1), losses={"soft": soft_targets()}
    )
    state = init_state({"w": weak}, key=jax.random.key(0))
    assert state.params["w"].sharding == weak.sharding
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state._replace(key=())))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(state)} == {mesh}
