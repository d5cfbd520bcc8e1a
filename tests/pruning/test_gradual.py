"""The gradual transform: the laws that every transform keeps, and its own schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import pruning, tree
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress.arrays import BitmaskSparseArray, NMSparseArray, QuantizedArray
from jaxcompress.quantization import QuantSpec, quantization_aware, quantize
from jaxcompress.schedules import constant, cubic
from jaxcompress.trace import LeafLayout

PATTERNS = {
    "unstructured": pruning.unstructured(),
    "2:4": pruning.n_of_m(2, 4),
    "blocks": pruning.block(8, 4),
}


def _params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(64, 20)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=20), jnp.float32),
    }


def _run(transform, params, steps, *, drift=0.0):
    """Updates as a train step does, with weights that move; one compilation."""
    traces = []

    @jax.jit
    def update(params, state, step):
        traces.append(1)
        params = jax.tree.map(lambda x: x + drift * jnp.sin(step + x), params)
        state, fresh = transform.update(params, state, params, key=jax.random.key(1), loss=0.0)
        assert fresh is None
        return transform.project(params, state)

    state = transform.init(params, key=jax.random.key(0))
    shares = []
    for step in range(steps):
        params, state = update(params, state, jnp.int32(step))
        shares.append(float((transform.apply(params, state)["w"] == 0).mean()))
    assert len(traces) == 1
    return params, state, shares


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("scope", ["leaf", "global", "row"])
def test_sparsity_follows_the_schedule_exactly(name, scope):
    schedule = cubic(0.0, 0.5, begin=2, end=12)
    transform = pruning.gradual(schedule=schedule, every=2, scope=scope, pattern=PATTERNS[name])
    _, _, shares = _run(transform, _params(), 16, drift=0.01)
    units = 1280 if name != "blocks" else 40
    group = units // 20 if scope == "row" and name != "blocks" else units // 5 if scope == "row" else units
    for step, share in enumerate(shares):
        # The update before step 12, where the schedule ends, ranks out of turn.
        expected = round((0.5 if step >= 11 else float(schedule(step - step % 2))) * group) / group
        assert share == pytest.approx(expected, abs=1e-6), step


@pytest.mark.parametrize("name", PATTERNS)
def test_laws(name):
    transform = pruning.gradual(schedule=constant(0.5), every=1, pattern=PATTERNS[name])
    params, state, _ = _run(transform, _params(), 3, drift=0.1)
    eager, jitted = transform.apply(params, state), jax.jit(transform.apply)(params, state)
    final = transform.finalize(params, state)
    validate_array(final["w"])
    assert isinstance(final["w"], NMSparseArray if name == "2:4" else BitmaskSparseArray)
    for tree_ in (jitted, jc.materialize(final)):
        for x, y in zip(jax.tree.leaves(tree_), jax.tree.leaves(eager), strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
    dense = pruning.gradual(schedule=constant(0.5), every=1, pattern=PATTERNS[name], store="dense")
    np.testing.assert_array_equal(dense.finalize(params, state)["w"], eager["w"])
    assert (np.asarray(params["w"]) != 0).all()
    assert transform.penalty(state, params, loss=1.0) == 0
    assert all(not leaf.weak_type for leaf in jax.tree.leaves(state))


def test_pruned_weights_get_no_gradient_and_may_come_back_until_frozen():
    transform = pruning.gradual(schedule=constant(0.5), every=1, freeze_at=2, rerank=True)
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    state = transform.init(params, key=jax.random.key(0))
    update = jax.jit(lambda p, s: transform.update(p, s, p, key=jax.random.key(0), loss=0.0)[0])
    state = update(params, state)
    gradient = jax.grad(lambda p: transform.apply(p, state)["w"].sum())(params)["w"]
    assert gradient.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    turned = {"w": params["w"][:, ::-1]}
    state = update(turned, state)
    assert state.fixed.masks["w"].tolist() == [[True, True, False, False]]
    state = update(params, state)
    assert state.fixed.masks["w"].tolist() == [[True, True, False, False]]


def test_no_ranking_while_the_schedule_stands_still():
    transform = pruning.gradual(schedule=cubic(0.0, 0.5, begin=0, end=2), every=1)
    params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    state = transform.init(params, key=jax.random.key(0))
    update = jax.jit(lambda p, s: transform.update(p, s, p, key=jax.random.key(0), loss=0.0)[0])
    for _ in range(3):
        state = update(params, state)
    assert float(state.fixed.sparsity) == 0.5
    state = update({"w": params["w"][:, ::-1]}, state)
    assert state.fixed.masks["w"].tolist() == [[False, False, True, True]]


def test_a_sparsity_per_leaf_follows_the_schedule():
    params = {"a": jnp.arange(1.0, 11.0).reshape(2, 5), "b": jnp.arange(1.0, 11.0).reshape(5, 2)}
    transform = pruning.gradual(
        schedule=cubic(0.0, 1.0, begin=0, end=3), every=1, sparsities={"a": 0.8, "b": 0.6}, store="dense"
    )
    state = transform.init(params, key=jax.random.key(0))
    update = jax.jit(lambda s: transform.update(params, s, params, key=jax.random.key(0), loss=0.0)[0])
    found = []
    for _ in range(3):
        state = update(state)
        found.append([int((~mask).sum()) for mask in jax.tree.leaves(state.fixed.masks)])
    # The cubic is at 0, 19/27 and, for step 3, at 1.
    assert found == [[0, 0], [6, 4], [8, 6]]
    mistaken = pruning.gradual(schedule=constant(1.0), every=1, sparsities={"a": 0.8, "b": tree.Unselected})
    with pytest.raises(ValueError, match="has no entry"):
        mistaken.update(params, state, params, key=jax.random.key(0), loss=0.0)


def test_stacked_leaves_are_stored_layer_by_layer():
    layout = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 5)), jnp.float32)}
    transform = pruning.gradual(schedule=constant(0.4), every=1, layouts={"w": layout})
    params, state, _ = _run(transform, params, 1)
    stored = transform.finalize(params, state)["w"]
    validate_array(stored)
    for layer in range(3):
        sliced = jax.tree.map(lambda part, i=layer: part[i], stored)
        np.testing.assert_array_equal(sliced.materialize(), transform.apply(params, state)["w"][layer])


@pytest.mark.parametrize("name", ["unstructured", "2:4"])
@pytest.mark.parametrize(
    "spec", [QuantSpec(bits=4, group_size=32), QuantSpec(bits=4, symmetric=False), QuantSpec(bits=1)]
)
def test_pruning_then_quantizing_is_what_was_trained(name, spec):
    transform = jc.chain(
        pruning.gradual(schedule=constant(0.5), every=1, pattern=PATTERNS[name]), quantization_aware(spec)
    )
    params = _params()
    state = transform.init(params, key=jax.random.key(0))
    state, _ = transform.update((params, params), state, params, key=jax.random.key(1), loss=0.0)
    effective = transform.apply(params, state)
    final = transform.finalize(params, state)
    assert isinstance(final["w"], QuantizedArray)
    validate_array(final["w"])
    np.testing.assert_array_equal(final["w"].materialize(), effective["w"])
    assert float((effective["w"] == 0).mean()) >= 0.5
    assert final["b"] is params["b"]


@pytest.mark.parametrize("name", PATTERNS)
def test_finalize_accepts_leaves_that_were_quantized_before(name):
    params = _params()
    transform = pruning.gradual(schedule=constant(0.5), every=1, pattern=PATTERNS[name])
    _, state, _ = _run(transform, params, 1)
    quantized, _ = quantize(params, QuantSpec(bits=4, group_size=32))
    stored = transform.finalize(quantized, state)["w"]
    validate_array(stored)
    assert stored.bits == 4
    expected = pruning.apply_masks(jc.materialize(quantized), state.fixed.masks)
    np.testing.assert_array_equal(stored.materialize(), expected["w"])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        pruning.gradual(schedule=constant(0.5), every=0)
    transform = pruning.gradual(schedule=constant(0.5), select=tree.by_path("absent"))
    with pytest.raises(ValueError, match="matches no leaf"):
        transform.init(_params(), key=jax.random.key(0))
    with pytest.raises(ValueError, match="Leaf 'w' holds 1 NaN"):
        pruning.gradual(schedule=constant(0.5)).init({"w": jnp.array([[jnp.nan]])}, key=jax.random.key(0))
