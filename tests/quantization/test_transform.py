"""The laws of `quantization_aware`, alone and behind a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import toy_mask

import jaxcompress as jc
from jaxcompress._src.types import Transform, TransformState
from jaxcompress.arrays import sparsify
from jaxcompress.quantization import QuantSpec, quantization_aware, quantize
from jaxcompress.tree import Unselected, by_path

KEY = jax.random.key(0)
SPECS = [QuantSpec(bits=4, group_size=2), QuantSpec(bits=3, symmetric=False), QuantSpec(bits=1)]


def params():
    rng = np.random.default_rng(0)
    return {
        "first": {"kernel": jnp.asarray(rng.normal(size=(16, 6)), jnp.float32), "bias": jnp.zeros(6)},
        "second": {"kernel": jnp.asarray(rng.normal(size=(6, 8)), jnp.bfloat16), "bias": jnp.zeros(8)},
    }


def pruning() -> Transform:
    """Half of the first kernel, stored under a bit mask in the end."""
    mask = jnp.asarray(np.random.default_rng(1).random((16, 6)) < 0.5)
    masks = jax.tree.map(lambda _: Unselected, params())
    masks["first"]["kernel"] = mask

    def finalize(params, state):
        del state
        kernel = jnp.where(mask, params["first"]["kernel"], 0)
        return params | {"first": params["first"] | {"kernel": sparsify(kernel, mask)}}

    return toy_mask(masks)._replace(finalize=finalize)


def equal_bits(first, second):
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("spec", SPECS)
def test_finalize_stores_what_apply_returns(spec):
    transform = quantization_aware(spec, select=by_path(".*kernel"))
    state = transform.init(params(), key=KEY)
    assert state == TransformState((), ())
    wanted = jax.jit(transform.apply)(params(), state)
    equal_bits(jax.jit(jc.materialize)(transform.finalize(params(), state)), wanted)


@pytest.mark.parametrize("spec", SPECS)
def test_finalize_stores_what_apply_returns_after_pruning(spec):
    transform = jc.chain(pruning(), quantization_aware(spec))
    state = transform.init(params(), key=KEY)
    wanted = jax.jit(transform.apply)(params(), state)
    stored = transform.finalize(params(), state)
    equal_bits(jax.jit(jc.materialize)(stored), wanted)
    mask = state.fixed[0]["masks"]["first"]["kernel"]
    assert (wanted["first"]["kernel"][~mask] == 0).all()
    assert type(stored["first"]["kernel"].data).__name__ == "BitmaskSparseArray"


def test_leaves_compressed_before_stay_as_they_are():
    tree, _ = quantize(params(), QuantSpec(bits=8), select=by_path("second/kernel"))
    transform = quantization_aware(QuantSpec(bits=4))
    state = transform.init(tree, key=KEY)
    for out in (transform.apply(tree, state), transform.finalize(tree, state)):
        assert out["second"]["kernel"] is tree["second"]["kernel"]
    equal_bits(jc.materialize(transform.finalize(tree, state)), jc.materialize(transform.apply(tree, state)))


def test_training_runs_with_one_trace():
    transform = quantization_aware(QuantSpec(bits=4), begin=2)
    optimizer = optax.sgd(0.1)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(32, 16)), jnp.float32)
    tree = {"kernel": params()["first"]["kernel"]}
    target, traces = x @ jnp.ones((16, 6)), []

    @jax.jit
    def step(tree, opt_state, state):
        traces.append(1)

        def loss(tree):
            return ((x @ transform.apply(tree, state)["kernel"] - target) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(tree)
        updates, opt_state = optimizer.update(grads, opt_state)
        tree = optax.apply_updates(tree, updates)
        state, _ = transform.update(grads, state, tree, key=KEY, loss=value)
        return tree, opt_state, state, value

    state, opt_state, losses = transform.init(tree, key=KEY), optimizer.init(tree), []
    for _ in range(40):
        tree, opt_state, state, value = step(tree, opt_state, state)
        losses.append(float(value))
    assert len(traces) == 1
    assert losses[-1] < 0.2 * losses[0]
    assert int(state.fixed) == 40
    equal_bits(transform.finalize(tree, state)["kernel"].materialize(), transform.apply(tree, state)["kernel"])


def test_rounding_begins_after_that_many_updates():
    transform = quantization_aware(QuantSpec(bits=3), begin=2)
    state, tree = transform.init(params(), key=KEY), params()
    assert (state.fixed.dtype, state.fixed.weak_type) == (jnp.int32, False)
    rounded = quantization_aware(QuantSpec(bits=3)).apply(tree, TransformState((), ()))
    for updates in range(4):
        equal_bits(jax.jit(transform.apply)(tree, state), tree if updates < 2 else rounded)
        grads = jax.grad(lambda p, s=state: sum(x.sum() for x in jax.tree.leaves(transform.apply(p, s))))(tree)
        assert all(bool((leaf == 1).all()) for leaf in jax.tree.leaves(grads))
        state, fresh = transform.update(None, state, tree, key=KEY, loss=0.0)
        assert fresh is None


def test_begin_with_leaves_that_are_compressed():
    tree = params()
    kernel = jnp.where(tree["first"]["kernel"] > 0, tree["first"]["kernel"], 0)
    tree["first"]["kernel"] = sparsify(kernel, kernel != 0)
    tree, _ = quantize(tree, QuantSpec(bits=8), select=by_path("second/kernel"))
    transform = quantization_aware(QuantSpec(bits=4), begin=1)
    state = transform.init(tree, key=KEY)
    equal_bits(transform.apply(tree, state)["first"]["kernel"], kernel)
    state, _ = transform.update(None, state, tree, key=KEY, loss=0.0)
    out = transform.apply(tree, state)
    assert out["second"]["kernel"] is tree["second"]["kernel"]
    equal_bits(out["first"]["kernel"], transform.finalize(tree, state)["first"]["kernel"].materialize())


def test_other_parts_do_nothing():
    transform = quantization_aware(QuantSpec(bits=4))
    state, tree = TransformState((), ()), params()
    assert float(transform.penalty(state, tree, loss=1.0)) == 0
    assert transform.project(tree, state) == (tree, state)
    assert transform.update(tree, state, tree, key=KEY, loss=1.0) == (state, None)


def test_negative_begin_is_an_error():
    with pytest.raises(ValueError, match="`begin` must not be negative, got -1"):
        quantization_aware(QuantSpec(bits=4), begin=-1)
