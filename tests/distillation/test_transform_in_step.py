import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcompress._src.transforms import chain, identity
from jaxcompress._src.types import TransformState
from jaxcompress.distillation import make_train_step, soft_targets
from jaxcompress.tree import Unselected

RNG = np.random.default_rng(0)
SOFT = {"soft": soft_targets()}
BATCH = {"x": jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32)}


def _params(seed=0):
    return {"kernel": jnp.asarray(np.random.default_rng(seed).normal(size=(6, 4)), jnp.float32)}


def _apply(params, batch, *, key, train):
    return {"logits": batch["x"] @ params["kernel"]}


def _key():
    return jax.random.key(11)


def test_a_transform_may_remember_the_initial_weights():
    """The same buffer twice in a donated state would be refused."""
    remember = identity()._replace(init=lambda params, *, key, statistics=None: TransformState((), params))
    init_state, step = make_train_step(_apply, _apply, optax.sgd(0.1), losses=SOFT, transform=remember)
    state, _ = step(init_state(_params(), key=_key()), _params(1), BATCH)
    np.testing.assert_array_equal(state.transform_state.fixed["kernel"], _params()["kernel"])


def _run_toys(steps=1, **options):
    """Effective w = s * mask * w with loss c · w, worked out by hand in the tests."""
    options = {"penalty": 0.0, "bound": 0.0, "low": -jnp.inf, "regrow": None, "optimizer": optax.sgd(0.1)} | options
    masks = {"w": jnp.array([True, False, True])}
    init_state, step = make_train_step(
        toys.echo,
        None,
        options["optimizer"],
        losses={"dot": toys.dot("w", jnp.array([10.0, 20.0, 30.0]))},
        transform=chain(
            toys.toy_mask(masks, regrow=options["regrow"]),
            toys.toy_scale(2.0, penalty=options["penalty"], bound=options["bound"], low=options["low"]),
        ),
        transform_optimizer=optax.sgd(0.01),
    )
    state, metrics = init_state({"w": jnp.array([1.0, -2.0, 3.0])}, key=_key()), {}
    for _ in range(steps):
        state, metrics = step(state, None, {})
    return state, metrics


def test_transforms_inside_the_loss_by_hand():
    state, metrics = _run_toys()
    # loss = 10 * 2 * 1 + 30 * 2 * 3
    np.testing.assert_allclose(metrics["loss"][0], 200.0, rtol=1e-6)
    mask, scale = state.transform_state.fixed
    np.testing.assert_allclose(scale["seen"]["w"], [10.0, 20.0, 30.0], rtol=1e-6)
    np.testing.assert_allclose(mask["seen"]["w"], [20.0, 40.0, 60.0], rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], [1 - 0.1 * 20, -2.0, 3 - 0.1 * 60], rtol=1e-6)
    # ds = 10 * 1 + 30 * 3, with a learning rate of its own.
    np.testing.assert_allclose(state.transform_state.trainable[1]["scale"], 2 - 0.01 * 100, rtol=1e-6)
    # `update` reads what the optimizer has left: raw weights in the first stage, masked ones in the second.
    np.testing.assert_allclose(mask["params"]["w"], state.params["w"])
    np.testing.assert_allclose(scale["params"]["w"], [-1.0, 0.0, -3.0], rtol=1e-6)
    np.testing.assert_allclose(mask["loss"], 200.0, rtol=1e-6)


def test_the_penalty_acts_directly_and_through_the_loss():
    """loss + 7 s + 0.5 loss: every gradient of the loss grows by half, and ds has 7 more."""
    state, metrics = _run_toys(penalty=7.0, bound=0.5)
    np.testing.assert_allclose(metrics["penalty"], [7 * 2.0 + 100.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], [200.0 + 114.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(metrics["dot"], [200.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(state.transform_state.fixed[1]["seen"]["w"], [15.0, 30.0, 45.0], rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], [1 - 3.0, -2.0, 3 - 9.0], rtol=1e-6)
    np.testing.assert_allclose(state.transform_state.trainable[1]["scale"], 2 - 0.01 * (150 + 7), rtol=1e-6)
    np.testing.assert_allclose(state.transform_state.fixed[0]["loss"], 200.0, rtol=1e-6)


def test_project_comes_after_update():
    state, _ = _run_toys(low=1.5)
    assert float(state.transform_state.trainable[1]["scale"]) == 1.5
    np.testing.assert_allclose(state.transform_state.fixed[1]["seen"]["w"], [10.0, 20.0, 30.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "adam"),
    [
        (optax.adam(0.1), lambda state: state[0]),
        (optax.chain(optax.clip(1e3), optax.adamw(0.1)), lambda state: state[1][0]),
        (optax.adamw(0.1, mask=lambda params: jax.tree.map(lambda w: w.ndim > 1, params)), lambda state: state[0]),
        (optax.inject_hyperparams(optax.adam)(0.1), lambda state: state.inner_state[0]),
        (optax.MultiSteps(optax.adam(0.1), 1).gradient_transformation(), lambda state: state.inner_opt_state[0]),
        (optax.masked(optax.adam(0.1), {"w": True, "b": True}), lambda state: state.inner_state[0]),
    ],
)
def test_fresh_weights_lose_their_moments(optimizer, adam):
    """Only theirs, and only at the steps where they are fresh."""

    def update(grads, state, params, *, key, loss):
        first = state.fixed == 0
        return state._replace(fixed=state.fixed + 1), {"w": first & jnp.array([False, True, False]), "b": Unselected}

    once = identity()._replace(
        init=lambda params, *, key, statistics=None: TransformState((), jnp.zeros((), jnp.int32)), update=update
    )
    losses = {"w": toys.dot("w", jnp.array([10.0, 20.0, 30.0])), "b": toys.dot("b", 5.0)}
    init_state, step = make_train_step(toys.echo, None, optimizer, losses=losses, transform=once)
    state = init_state({"w": jnp.zeros(3), "b": jnp.zeros(2)}, key=_key())
    for mu, nu in (([1.0, 0.0, 3.0], [0.1, 0.0, 0.9]), ([1.9, 2.0, 5.7], [0.1999, 0.4, 1.7991])):
        state, _ = step(state, None, {})
        np.testing.assert_allclose(adam(state.optimizer_state).mu["w"], mu, rtol=1e-4)
        np.testing.assert_allclose(adam(state.optimizer_state).nu["w"], nu, rtol=1e-4)
    np.testing.assert_allclose(adam(state.optimizer_state).mu["b"], 0.95, rtol=1e-4)
    assert int(adam(state.optimizer_state).count) == 2


def _labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "adam" if path[0].key == "w" else "sgd", params)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.masked(optax.adam(0.1), {"w": True, "b": False}),
        optax.masked(optax.adam(0.1), lambda params: jax.tree.map(lambda leaf: leaf.ndim == 1, params)),
        optax.multi_transform({"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}, _labels),
    ],
)
def test_fresh_weights_of_optimizers_that_leave_leaves_out(optimizer):
    marks = {"w": jnp.array([False, True, False]), "b": jnp.ones((2, 1), bool)}
    fresh = identity()._replace(update=lambda grads, state, params, *, key, loss: (state, marks))
    losses = {"w": toys.dot("w", jnp.array([10.0, 20.0, 30.0])), "b": toys.dot("b", 5.0)}
    init_state, step = make_train_step(toys.echo, None, optimizer, losses=losses, transform=fresh)
    state, _ = step(init_state({"w": jnp.zeros(3), "b": jnp.zeros((2, 1))}, key=_key()), None, {})
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer_state) if leaf.shape == (3,)]
    np.testing.assert_allclose(moments[0], [1.0, 0.0, 3.0], rtol=1e-4)
    assert len(moments) == 2


def test_factored_moments_stay():
    """Adafactor's moments of large matrices have other shapes than the weights: those of fresh weights stay, too."""
    masks = {"w": jnp.zeros((256, 256), bool)}
    transform = toys.toy_mask(masks, regrow={"w": jnp.ones((256, 256), bool)})
    optimizer = optax.adafactor(0.1)
    init_state, step = make_train_step(
        toys.echo, None, optimizer, losses={"dot": toys.dot("w", 1.0)}, transform=transform
    )
    state = init_state({"w": jnp.ones((256, 256))}, key=_key())
    expected = optimizer.init(state.params)
    for gradient in (0.0, 1.0):
        _, expected = optimizer.update({"w": jnp.full((256, 256), gradient)}, expected, state.params)
        state, _ = step(state, None, {})
    assert any(leaf.shape == (256,) and bool((leaf > 0).all()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), state.optimizer_state, expected)


def test_keys_differ_between_uses_and_steps():
    drawn = []

    def apply(params, batch, *, key, train):
        return {"w": params["w"], "noise": jax.random.uniform(key)}

    noisy = identity()._replace(
        init=lambda params, *, key, statistics=None: TransformState((), {"init": jax.random.uniform(key), "now": 0.0}),
        apply=lambda params, state, *, key=None: {"w": params["w"] * 0 + jax.random.uniform(key)},
        update=lambda grads, state, params, *, key, loss: (
            state._replace(fixed=state.fixed | {"now": jax.random.uniform(key)}),
            None,
        ),
    )
    init_state, step = make_train_step(
        apply,
        None,
        optax.sgd(0.1),
        losses={"dot": toys.dot("w", 1.0)},
        transform=noisy,
        metrics={"noise": lambda s, t, b: (s["noise"], 1.0), "applied": lambda s, t, b: (s["w"], 1.0)},
    )
    state = init_state({"w": jnp.ones(())}, key=_key())
    drawn.append(float(state.transform_state.fixed["init"]))
    for _ in range(3):
        state, metrics = step(state, None, {})
        drawn += [float(metrics["noise"][0]), float(metrics["applied"][0]), float(state.transform_state.fixed["now"])]
    assert len(set(drawn)) == 10


def test_a_transform_that_changes_a_dtype_is_named():
    widen = identity()._replace(
        init=lambda params, *, key, statistics=None: TransformState((), {"count": jnp.zeros((), jnp.int32)}),
        update=lambda grads, state, params, *, key, loss: (TransformState((), {"count": jnp.zeros(2)}), None),
    )
    init_state, step = make_train_step(_apply, _apply, optax.sgd(0.1), losses=SOFT, transform=widen)
    with pytest.raises(ValueError, match=r"changed 'transform_state/fixed/count' from int32\[\] to float32\[2\]"):
        step(init_state(_params(), key=_key()), _params(1), BATCH)
