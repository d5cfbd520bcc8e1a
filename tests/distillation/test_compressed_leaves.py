import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.transforms import chain, identity
from jaxcompress._src.types import TransformState
from jaxcompress.arrays import QuantizedArray
from jaxcompress.distillation import make_train_step, soft_targets
from jaxcompress.tree import by_path

RNG = np.random.default_rng(0)
CODES = jnp.asarray(RNG.integers(-7, 8, (10, 6)), jnp.int8)
SCALE = jnp.asarray(RNG.uniform(0.1, 0.2, (10, 1)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
BATCH = {"ids": jnp.asarray(RNG.integers(0, 10, 32))}
SOFT = {"soft": soft_targets(temperature=2.0)}


def _apply(params, batch, *, key, train):
    return {"logits": jnp.tanh(params["embedding"][batch["ids"]]) @ params["kernel"]}


def _quantized():
    embedding = QuantizedArray(data=pack(CODES, bits=4), scale=SCALE, dtype=jnp.dtype("float32"))
    return {"embedding": embedding, "kernel": KERNEL}


def _teacher():
    rng = np.random.default_rng(1)
    return {"embedding": jnp.asarray(rng.normal(size=(10, 6))), "kernel": jnp.asarray(rng.normal(size=(6, 4)))}


def _step(make, params, teacher, steps=1):
    init_state, step = make
    state = init_state(params, key=jax.random.key(0))
    for _ in range(steps):
        state, metrics = step(state, teacher, BATCH)
    return state, metrics


def _reference_gradient():
    def loss(scale, kernel):
        params = {"embedding": CODES * scale, "kernel": kernel}
        total, count = SOFT["soft"](*(_apply(p, BATCH, key=None, train=True) for p in (params, _teacher())), BATCH)
        return total / count

    return jax.grad(loss, argnums=(0, 1))(SCALE, KERNEL)


def test_scales_and_kernels_are_trained_and_codes_are_not():
    state, _ = _step(make_train_step(_apply, _apply, optax.sgd(0.5), losses=SOFT), _quantized(), _teacher())
    of_scale, of_kernel = _reference_gradient()
    np.testing.assert_array_equal(state.params["embedding"].codes(), CODES)
    np.testing.assert_allclose(state.params["embedding"].scale, SCALE - 0.5 * of_scale, rtol=1e-5)
    np.testing.assert_allclose(state.params["kernel"], KERNEL - 0.5 * of_kernel, rtol=1e-5, atol=1e-6)


def test_a_frozen_quantized_leaf_keeps_its_scale():
    optimizer = optax.adamw(0.1)
    make = make_train_step(_apply, _apply, optimizer, losses=SOFT, trainable=by_path("kernel"))
    state, _ = _step(make, _quantized(), _teacher(), steps=3)
    np.testing.assert_array_equal(state.params["embedding"].scale, SCALE)
    assert [leaf.shape for leaf in jax.tree.leaves(state.optimizer_state[0].mu)] == [(6, 4)]


def test_a_quantized_teacher():
    """Equal student and teacher agree everywhere and have nothing to learn."""
    state, metrics = _step(make_train_step(_apply, _apply, optax.sgd(0.5), losses=SOFT), _quantized(), _quantized())
    np.testing.assert_allclose(metrics["soft"][0], 0.0, atol=1e-5)
    np.testing.assert_array_equal(metrics["agreement"], [32.0, 32.0])
    np.testing.assert_allclose(state.params["kernel"], KERNEL, atol=1e-6)


def test_fresh_marks_do_not_touch_the_moments_of_a_scale():
    marks = {"embedding": jnp.ones((10, 6), bool), "kernel": jnp.zeros((6, 4), bool).at[2].set(True)}
    fresh = identity()._replace(update=lambda grads, state, params, *, key, loss: (state, marks))
    make = make_train_step(_apply, _apply, optax.adam(0.1), losses=SOFT, transform=chain(fresh, fresh))
    mu = _step(make, _quantized(), _teacher())[0].optimizer_state[0].mu
    of_scale, of_kernel = _reference_gradient()
    np.testing.assert_allclose(mu["embedding"].scale, 0.1 * of_scale, rtol=1e-4)
    np.testing.assert_allclose(mu["kernel"], 0.1 * of_kernel.at[2].set(0.0), rtol=1e-4, atol=1e-7)


def test_a_transform_that_returns_compressed_leaves():
    """Learned step sizes on fixed codes: the gradient reaches `state.trainable` through the quantized leaf."""

    def apply(params, state, *, key=None):
        leaf = QuantizedArray(data=pack(CODES, bits=4), scale=state.trainable["step"], dtype=params["embedding"].dtype)
        return params | {"embedding": leaf}

    learned = identity()._replace(
        init=lambda params, *, key, statistics=None: TransformState({"step": SCALE}, ()), apply=apply
    )
    make = make_train_step(
        _apply, _apply, optax.sgd(0.5), losses=SOFT, transform=learned, transform_optimizer=optax.sgd(0.25)
    )
    state, _ = _step(make, _teacher() | {"kernel": KERNEL}, _teacher())
    of_scale, of_kernel = _reference_gradient()
    np.testing.assert_allclose(state.transform_state.trainable["step"], SCALE - 0.25 * of_scale, rtol=1e-5)
    np.testing.assert_allclose(state.params["kernel"], KERNEL - 0.5 * of_kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.params["embedding"], _teacher()["embedding"])
