"""State lies where the leaves lie that it belongs to, and a step is compiled once."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import gates, pruning
from jaxcompress._src.transforms import chain
from jaxcompress._src.units.penalty import lambda_penalty
from jaxcompress.distillation import make_train_step
from jaxcompress.schedules import constant
from jaxcompress.tree import by_path, leaves_with_paths

RNG = np.random.default_rng(0)
SIZES = {"first": (16, 24), "second": (24, 8), "bias": (8,)}
BATCH = {"x": jnp.asarray(RNG.normal(size=(16, 16)), jnp.float32)}


def _params():
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=size) / 4, jnp.float32) for name, size in SIZES.items()}


def _shardings(mesh):
    specs = {"first": P(None, "data"), "second": P("data"), "bias": P()}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def _gathered(leaf):
    """A sharded weight as a whole: what the compiler adds on Auto meshes, and a model says itself on Explicit ones."""
    explicit = AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types
    return jax.sharding.reshard(leaf, NamedSharding(jax.typeof(leaf).sharding.mesh, P())) if explicit else leaf


def _make():
    def apply(params, batch, *, key, train):
        w = {name: _gathered(leaf) for name, leaf in params.items()}
        return {"y": jnp.tanh(batch["x"] @ w["first"]) @ w["second"] + w["bias"][None]}

    def squared(student, teacher, batch):
        return jnp.square(student["y"] - 1.0).sum(), student["y"].size

    transform = chain(
        pruning.rigl(sparsity=0.5, until=10, every=2, select=by_path("first")),
        pruning.movement(schedule=constant(0.25)),
        gates.hard_concrete(penalty=lambda_penalty(0.1, examples=10), select=by_path("second")),
    )
    return make_train_step(
        apply,
        None,
        optax.adam(0.01),
        losses={"y": squared},
        transform=transform,
        transform_optimizer=optax.adam(0.01),
    )


@contextlib.contextmanager
def _compilations(name):
    """How often a function is compiled, by jax's own count."""
    found = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration" and details.get("fun_name") == name:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _trained(params, batch, steps=4):
    init_state, step = _make()
    state = init_state(params, key=jax.random.key(0))
    first = state
    placed = jax.tree.map(lambda leaf: leaf.sharding, first)
    with _compilations("jit(step)") as compilations:
        for _ in range(steps):
            state, metrics = step(state, None, batch)
    assert len(compilations) == 1
    assert metrics["skipped"][0] == 0
    return placed, state


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_state_of_sharded_parameters(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    shardings = _shardings(mesh)
    batch = {"x": jax.device_put(BATCH["x"], NamedSharding(mesh, P("data")))}
    placed, state = _trained(jax.device_put(_params(), shardings), batch)
    _, alone = _trained(_params(), BATCH)
    owned = 0
    for path, leaf in leaves_with_paths(state):
        owner = path.rsplit("/", 1)[-1]
        if owner in SIZES and leaf.shape == SIZES[owner]:
            owned += 1
            assert leaf.sharding.is_equivalent_to(shardings[owner], leaf.ndim), path
    # Parameters with two moments; masks of RigL; masks and scores; gates; moments of scores and gates.
    assert owned == 3 * 3 + 2 + 2 * 2 + 1 + 2 * 3
    for (path, leaf), (_, before) in zip(leaves_with_paths(state), leaves_with_paths(placed), strict=True):
        assert leaf.sharding.is_equivalent_to(before, leaf.ndim), path
    for one, other in zip(
        jax.tree.leaves((alone.params, alone.transform_state)),
        jax.tree.leaves((state.params, state.transform_state)),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(other, np.float32), np.asarray(one, np.float32), rtol=1e-3, atol=1e-4)


def test_the_state_can_be_made_abstract_and_inside_jit():
    init_state, _ = _make()
    key = jax.random.key(0)
    abstract = jax.eval_shape(lambda params, key: init_state(params, key=key), _params(), key)
    state = init_state(_params(), key=key)
    jitted = jax.jit(lambda params, key: init_state(params, key=key))(_params(), key)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for shape, leaf, other in zip(*map(jax.tree.leaves, (abstract, state, jitted)), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(leaf, other, rtol=1e-5)
