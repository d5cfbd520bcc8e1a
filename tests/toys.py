"""Tiny transforms whose every number can be worked out by hand. They keep what `update` was given, for tests."""

import jax
import jax.numpy as jnp

from jaxcompress._src.tree.unselected import is_unselected, map_selected
from jaxcompress._src.types import Transform, TransformState
from jaxcompress.tree import Unselected


def toy_mask(masks, *, regrow=None, noise=0.0) -> Transform:
    """Zeroes weights where `masks` (a partial tree) is not set; `regrow`: masks from the first update on."""
    regrow = masks if regrow is None else regrow

    def init(params, *, key, statistics=None):
        del key, statistics
        return TransformState(
            (), {"masks": masks, "seen": _blank(params), "loss": jnp.zeros(()), "params": _blank(params)}
        )

    def apply(params, state, *, key=None):
        add = 0.0 if key is None else noise * jax.random.uniform(key)
        return _on_masked(lambda mask, w: jnp.where(mask, w + add, 0.0).astype(w.dtype), state.fixed["masks"], params)

    def update(grads, state, params, *, key, loss):
        del key
        fresh = map_selected(lambda _, new, old: new & ~old, regrow, state.fixed["masks"])
        return TransformState((), {"masks": regrow, "seen": grads, "loss": loss, "params": params}), fresh

    def project(params, state):
        return params, state

    def finalize(params, state):
        return apply(params, state)

    return Transform(init, apply, lambda state, params, *, loss: 0.0, update, project, finalize)


def toy_scale(start=2.0, *, penalty=0.0, bound=0.0, low=-jnp.inf) -> Transform:
    """Multiplies every float leaf by one trained number s; adds `penalty * s + bound * loss` to the loss; s >= low."""

    def init(params, *, key, statistics=None):
        del key, statistics
        return TransformState(
            {"scale": jnp.float32(start), "none": Unselected}, {"seen": _blank(params), "params": _blank(params)}
        )

    def apply(params, state, *, key=None):
        del key
        return jax.tree.map(lambda w: w * state.trainable["scale"].astype(w.dtype) if _is_float(w) else w, params)

    def add(state, params, *, loss):
        del params
        return penalty * state.trainable["scale"] + bound * loss

    def update(grads, state, params, *, key, loss):
        del key, loss
        return TransformState(state.trainable, {"seen": grads, "params": params}), None

    def project(params, state):
        return params, state._replace(trainable=state.trainable | {"scale": jnp.maximum(state.trainable["scale"], low)})

    def finalize(params, state):
        return apply(params, state)

    return Transform(init, apply, add, update, project, finalize)


def echo(params, batch, *, key, train):
    """A model whose outputs are its parameters, so that the gradient of `dot(c)` is c."""
    return dict(params)


def dot(name, weights):
    return lambda student, teacher, batch: (jnp.sum(weights * student[name]), jnp.ones(()))


def _on_masked(fn, masks, params):
    return jax.tree.map(lambda mask, w: w if is_unselected(mask) else fn(mask, w), masks, params, is_leaf=is_unselected)


def _blank(params):
    return jax.tree.map(lambda w: jnp.zeros_like(w) if _is_float(w) else Unselected, params)


def _is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)
