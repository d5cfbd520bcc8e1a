"""Loss scaling: gradients that would underflow, and a scale that follows them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcompress._src.transforms import chain
from jaxcompress.distillation import DynamicLossScale, make_train_step
from jaxcompress.pruning import rigl
from jaxcompress.tree import by_path

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6))


def _apply(params, batch, *, key, train):
    return {"y": batch["x"] @ params["w"] + params["b"][None]}


def _tiny(student, teacher, batch):
    """Half the mean of squares, 1e-9 times, so that the gradient of each output is below what float16 can hold."""
    return 0.5e-9 * jnp.square(student["y"].astype(jnp.float32)).sum(), student["y"].shape[0]


def _half():
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float16), "b": jnp.zeros(4, jnp.float16)}


@pytest.mark.parametrize("scale", [2.0**18, DynamicLossScale(initial=2.0**18)])
@pytest.mark.parametrize("parts", [1, 4])
def test_small_gradients_survive(scale, parts):
    """Against float64, with a transform that ranks gradients: RigL grows the weights whose own are the largest."""
    transform = rigl(sparsity=0.5, until=10, every=1, fraction=1.0, select=by_path("w"))
    found = {}
    for setting in (scale, None):
        init_state, step = make_train_step(
            _apply,
            None,
            optax.sgd(1e6),
            losses={"y": _tiny},
            transform=transform,
            master_dtype="float32",
            loss_scale=setting,
            micro_batches=parts,
        )
        state = init_state(_half(), key=jax.random.key(0))
        masks = np.asarray(state.transform_state.fixed.masks["w"])
        state, metrics = step(state, None, {"x": jnp.asarray(X, jnp.float16)})
        assert float(metrics["skipped"][0]) == 0
        found[setting is None] = state, metrics
    state, metrics = found[False]
    assert float(metrics["loss_scale"][0]) == 2.0**18
    half = _half()
    x, w = (np.asarray(leaf, np.float64) for leaf in (jnp.asarray(X, jnp.float16), half["w"]))
    y = x @ (masks * w)
    gradient = 1e-9 / 8 * x.T @ y
    np.testing.assert_allclose(metrics["loss"][0], 0.5e-9 / 8 * (y**2).sum(), rtol=1e-2)
    kept = masks & np.asarray(state.transform_state.fixed.masks["w"])
    np.testing.assert_allclose(
        np.asarray(state.masters["w"])[kept],
        (w - 1e6 * gradient)[kept],
        rtol=0,
        atol=1e6 * 1e-2 * np.abs(gradient).max(),
    )
    np.testing.assert_allclose(state.masters["b"], -1e6 * 1e-9 / 8 * y.sum(axis=0), rtol=2e-2, atol=1e-5)
    grown = ~masks & np.asarray(state.transform_state.fixed.masks["w"])
    outside = np.where(masks, -1.0, np.abs(gradient))
    assert set(np.flatnonzero(grown)) <= set(np.argsort(outside.ravel())[-masks.sum() :])
    assert np.abs(gradient[grown]).min() >= np.sort(outside[~masks])[-grown.sum()] * 0.99
    # Without a scale they are 0.
    np.testing.assert_array_equal(found[True][0].masters["b"], 0.0)


def _toy_states(**options):
    """Transforms that remember the gradients that they see, with a penalty that looks at the loss."""
    masks = {"w": jnp.array([True, False, True])}
    init_state, step = make_train_step(
        toys.echo,
        None,
        optax.adam(0.1),
        losses={"dot": toys.dot("w", jnp.array([10.0, 20.0, 30.0]))},
        transform=chain(toys.toy_mask(masks), toys.toy_scale(2.0, penalty=7.0, bound=0.5)),
        transform_optimizer=optax.sgd(0.01),
        **options,
    )
    state, metrics = init_state({"w": jnp.array([1.0, -2.0, 3.0])}, key=jax.random.key(1)), {}
    for _ in range(3):
        state, metrics = step(state, None, {})
    return state._replace(key=(), loss_scale=()), metrics


def test_nobody_sees_the_scale():
    """A power of two changes no bit of what transforms, optimizers and metrics get."""
    (plain, figures), (scaled, others) = _toy_states(), _toy_states(loss_scale=1024)
    assert set(others) == {*figures, "loss_scale"}
    for x, y in zip(*map(jax.tree.leaves, ((plain, figures), (scaled, {n: others[n] for n in figures}))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_scale_follows_the_gradients():
    setting = DynamicLossScale(initial=8.0, interval=2, minimum=2.0, maximum=16.0)
    init_state, step = make_train_step(_apply, None, optax.sgd(0.1), losses={"y": _tiny}, loss_scale=setting)
    state = init_state(_half(), key=jax.random.key(0))
    good, scales, skipped = jnp.asarray(X, jnp.float16), [], 0.0
    for batch in [good] * 5 + [good.at[0, 0].set(jnp.inf)] * 4 + [good] * 3:
        state, metrics = step(state, None, {"x": batch})
        scales.append(float(metrics["loss_scale"][0]))
        skipped += float(metrics["skipped"][0])
    # Two good steps double it, up to 16; each bad one halves it, down to 2.
    assert scales == [8, 8, 16, 16, 16, 16, 8, 4, 2, 2, 2, 4]
    assert skipped == 4
    assert (float(state.loss_scale.scale), int(state.loss_scale.good_steps)) == (4.0, 1)


def test_an_overflow_is_skipped_until_the_scale_fits():
    """2^24 times a gradient of about 1e-3 is above what float16 can hold."""
    setting = DynamicLossScale(initial=2.0**24, factor=4.0)

    def loss(student, teacher, batch):
        return 1e-3 * student["y"].astype(jnp.float32).sum(), jnp.float32(1)

    init_state, step = make_train_step(_apply, None, optax.sgd(1.0), losses={"y": loss}, loss_scale=setting)
    state, skipped = init_state(_half(), key=jax.random.key(0)), []
    for _ in range(8):
        before = np.asarray(state.params["w"])
        state, metrics = step(state, None, {"x": jnp.ones((8, 6), jnp.float16)})
        skipped.append(bool(metrics["skipped"][0]))
        assert np.array_equal(before, state.params["w"]) == skipped[-1]
    assert skipped == [True] + [False] * 7
    np.testing.assert_allclose(state.params["b"], -7 * 8e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 0.5}, "needs 0 < `minimum` <= `initial` <= `maximum`, got 1.0, 0.5"),
        ({"interval": 0}, "`interval` must be at least 1, got 0"),
        ({"factor": 1.0}, "`factor` must be above 1, got 1.0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicLossScale(**options)
    with pytest.raises(ValueError, match="`loss_scale` must be positive, got 0"):
        make_train_step(_apply, None, optax.sgd(0.1), losses={"y": _tiny}, loss_scale=0)
