"""Exponential moving averages of what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.distillation import averaged, make_train_step
from jaxcompress.quantization import QuantSpec, lsq
from jaxcompress.tree import Unselected, by_path, exclude

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)


def _params(dtype=jnp.float32):
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)), dtype)
    return {"kernel": kernel, "frozen": jnp.ones(3), "stats": {"mean": jnp.zeros(())}}


def _apply(params, batch, *, key, train):
    y = batch["x"] @ params["kernel"] * params["frozen"][None]
    return {"y": y, "stats": {"mean": params["stats"]["mean"] + 1.0}}


def _squared(student, teacher, batch):
    return jnp.square(student["y"] - 1.0).sum(), student["y"].size


def _make(*, ema: float | None = 0.75, **options):
    return make_train_step(
        _apply,
        None,
        optax.sgd(0.3),
        losses={"y": _squared},
        trainable=exclude(by_path("frozen")),
        mutable=("stats",),
        ema=ema,
        **options,
    )


@pytest.mark.parametrize("decay", [0.0, 0.75, 0.9999])
def test_averages_against_float64_with_skipped_steps(decay):
    transform = lsq(QuantSpec(bits=4), select=by_path("kernel"))
    init_state, step = _make(ema=decay, transform=transform, transform_optimizer=optax.sgd(1e-2))
    state = init_state(_params(), key=jax.random.key(0))
    np.testing.assert_array_equal(averaged(state)[0]["kernel"], _params()["kernel"])
    history = []
    for x in (X, X, X.at[0, 0].set(jnp.nan), X):
        state, metrics = step(state, None, {"x": x})
        if not metrics["skipped"][0]:
            history.append([np.asarray(leaf, np.float64) for leaf in (state.params["kernel"], *_steps(state))])
    assert int(state.ema.count) == len(history) == 3
    weights = np.array([np.float64(decay) ** (2 - i) for i in range(3)])
    wanted = [
        sum(w * p for w, p in zip(weights / weights.sum(), values, strict=True))
        for values in zip(*history, strict=True)
    ]
    params, inner = averaged(state)
    for found, value in zip((params["kernel"], *jax.tree.leaves(inner.trainable)), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=2e-6, atol=1e-7)
    # What is not trained is that of the last step, and costs nothing.
    assert state.ema.params["frozen"] is Unselected
    assert state.ema.params["stats"]["mean"] is Unselected
    assert float(params["stats"]["mean"]) == 3.0
    small = transform.finalize(params, inner)
    effective = transform.apply(params, inner)
    np.testing.assert_allclose(jc.materialize(small)["kernel"], effective["kernel"], rtol=1e-6)


def _steps(state):
    return jax.tree.leaves(state.transform_state.trainable)


def test_averages_of_masters_are_wide():
    init_state, step = _make(ema=0.5, master_dtype="float32")
    state = init_state(_params(jnp.bfloat16), key=jax.random.key(0))
    masters = []
    for _ in range(2):
        state, _ = step(state, None, {"x": X})
        masters.append(np.asarray(state.masters["kernel"], np.float64))
    assert state.ema.params["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(state.ema.params["kernel"], (0.5 * masters[0] + masters[1]) / 1.5, rtol=1e-6)
    assert averaged(state)[0]["kernel"].dtype == jnp.bfloat16


def test_mistakes_are_named():
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"`ema` must be in \[0, 1\), got"):
            _make(ema=decay)
    init_state, _ = _make(ema=None)
    with pytest.raises(ValueError, match="give `ema` to `make_train_step`"):
        averaged(init_state(_params(), key=jax.random.key(0)))
