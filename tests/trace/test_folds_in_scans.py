"""Folds inside the bodies of scans: as in the same layers unrolled; what must not be folded is not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.trace import folds
from jaxcompress.tree import leaves_with_paths

LAYERS = 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 12)), jnp.float32)


class _Block(nn.Module):
    """A decoder layer: what a scan wants, `(carry, _) -> (carry, None)`."""

    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(num_heads=3, name="attention")
        x = x + attention(nn.LayerNorm(name="first")(x))
        y = nn.LayerNorm(name="second", use_bias=False)(x)
        gated = jax.jit(nn.silu)(nn.Dense(20, name="gate")(y)) * nn.Dense(20, name="up")(y)
        return x + nn.Dense(12, name="down")(gated), None


class _Group(nn.Module):
    """Some layers in a scan, for a scan around it."""

    @nn.compact
    def __call__(self, x, _):
        return _scan(_Block, axis=1)(name="inner")(x, None)


def _scan(layer, *, axis=0, length=LAYERS, **options):
    return nn.scan(layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=length, **options)


def _model(module):
    params = jax.jit(module.init)(jax.random.key(0), X, None)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    return (lambda params, x: module.apply({"params": params}, x, None)[0]), params


def _found(apply, params, *inputs):
    with jax.numpy_rank_promotion("allow"):
        return folds(apply, params, *inputs)


def _scaled(params, found, *, seed=2):
    """The leaves with every fold moved by factors that are powers of two, entry after entry, so that it is exact."""
    leaves = {path: np.array(leaf, np.float64) for path, leaf in leaves_with_paths(params)}
    rng = np.random.default_rng(seed)
    for fold in found:
        first = fold.consumers[0]
        shape = leaves[first.path].shape
        stack, width = ([shape[axis] for axis in axes] for axes in (first.stack_axes, first.axes))
        for entry in np.ndindex(*stack):
            factor = 2.0 ** rng.integers(-3, 4, size=width)
            for place, power in [(p, -1) for p in fold.producers] + [(p, 1) for p in fold.consumers]:
                own = np.moveaxis(leaves[place.path], (*place.stack_axes, *place.axes), range(len((*stack, *width))))
                inner = [own[entry].shape[i] for i in range(len(place.axes))]
                spread = factor.reshape(*inner, *(1,) * (own[entry].ndim - len(inner)))
                own[entry] *= spread**power  # a view: writes into the leaf
    flat = [jnp.asarray(leaves[path], jnp.float32) for path, _ in leaves_with_paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), flat)


def _with(params, path, change):
    flat = [change(leaf) if own == path else leaf for own, leaf in leaves_with_paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), flat)


def _by_leaf(found):
    return {
        frozenset(leaf.path for leaf in fold.consumers): {
            leaf.path: (leaf.axes, leaf.stack_axes) for leaf in (*fold.producers, *fold.consumers)
        }
        for fold in found
    }


MODULES = {
    "stacked on axis 0": lambda: _scan(_Block)(),
    "stacked on axis 1": lambda: _scan(_Block, axis=1)(),
    "reversed": lambda: _scan(_Block, reverse=True)(),
    "rematerialized": lambda: _scan(nn.remat(_Block, prevent_cse=False))(),
    "unrolled in twos": lambda: _scan(_Block, unroll=2)(),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_scanned_layer_has_the_folds_of_one_layer(name):
    apply, params = _model(MODULES[name]())
    one, layer = _model(_Block())
    found, wanted = _by_leaf(_found(apply, params, X)), _by_leaf(_found(one, layer, X))
    assert len(wanted) == 4
    stack = 1 if name == "stacked on axis 1" else 0
    shift = {
        consumers: {
            path: (tuple(axis + (axis >= stack) for axis in axes), (stack,)) for path, (axes, _) in leaves.items()
        }
        for consumers, leaves in wanted.items()
    }
    assert found == shift


@pytest.mark.parametrize("name", [*MODULES, "nested"])
def test_factors_move_entry_by_entry_without_a_change(name):
    apply, params = _model(_scan(_Group, length=2)() if name == "nested" else MODULES[name]())
    found = _found(apply, params, X)
    assert len(found) == 4
    moved = _scaled(params, found)
    with jax.numpy_rank_promotion("allow"):
        wanted = apply(params, X)
        np.testing.assert_allclose(apply(moved, X), wanted, rtol=1e-5, atol=1e-5)
        # Factors of other entries are other ones: the test can fail.
        leaf = found[0].producers[0]
        flipped = _with(moved, leaf.path, lambda own: jnp.flip(own, leaf.stack_axes))
        assert np.abs(apply(flipped, X) - wanted).max() > 0.1


def test_scans_in_scans_have_two_stack_axes():
    apply, params = _model(_scan(_Group, length=2)())
    assert params["inner"]["down"]["kernel"].shape == (2, 20, LAYERS, 12)
    found = _by_leaf(_found(apply, params, X))
    down = found[frozenset({"inner/down/kernel"})]
    assert down["inner/down/kernel"] == ((1,), (0, 2))
    assert down["inner/up/bias"] == ((1,), (0, 2))


def _layer(p, x):
    return x + jnp.tanh((jnp.sin(x) * p["scale"][None]) @ p["kernel"])


PARAMS = {
    "scale": jnp.asarray(np.random.default_rng(3).normal(size=(LAYERS, 4)), jnp.float32),
    "kernel": jnp.asarray(np.random.default_rng(4).normal(size=(LAYERS, 4, 4)), jnp.float32),
}
SHARED = {"scale": PARAMS["scale"][0], "kernel": PARAMS["kernel"][0]}
Y = jnp.asarray(np.random.default_rng(5).normal(size=(3, 4)), jnp.float32)


def _carried(p, x, *, name):
    """One of the leaves travels in the carry and comes back as it was: then JAX makes a constant of it."""

    def step(state, rest):
        x, kept = state
        return (_layer({**rest, name: kept}, x), kept), None

    rest = {key: leaf for key, leaf in p.items() if key != name}
    return jax.lax.scan(step, (x, p[name]), rest, length=LAYERS)[0][0]


def _changing(p, x):
    def step(state, _):
        x, own = state
        return (_layer(own, x), jax.tree.map(jnp.sin, own)), None

    return jax.lax.scan(step, (x, p), None, length=LAYERS)[0][0]


def _crossed(p, x):
    """The outer scan runs over the scale, the inner one over the kernel."""

    def group(x, scale):
        def step(x, kernel):
            return _layer({"scale": scale, "kernel": kernel}, x), None

        return jax.lax.scan(step, x, p["kernel"])[0], None

    return jax.lax.scan(group, x, p["scale"])[0]


def _shared(p, x, *, name):
    rest = {key: leaf for key, leaf in p.items() if key != name}
    return jax.lax.scan(lambda x, own: (_layer({**own, name: p[name]}, x), None), x, rest, length=LAYERS)[0]


def _twice(p, x):
    step = lambda x, own: (_layer(own, x), None)  # noqa: E731
    return jax.lax.scan(step, jax.lax.scan(step, x, p)[0], p)[0]


def _outside_too(p, x):
    return jax.lax.scan(lambda x, own: (_layer(own, x), None), x, p)[0] * p["scale"].sum()


def _emitted_leaf(p, x):
    return jax.lax.scan(lambda x, own: (_layer(own, x), own["scale"]), x, p)


def _emitted_value(p, x):
    def step(x, own):
        y = jnp.sin(x) * own["scale"][None]
        return x + jnp.tanh(y @ own["kernel"]), y

    return jax.lax.scan(step, x, p)


def _carried_value(p, x):
    def step(state, own):
        x, last = state
        y = jnp.sin(x) * own["scale"][None]
        return (x + jnp.tanh(y @ own["kernel"]) + last, y), None

    return jax.lax.scan(step, (x, x), p)[0][0]


def _in_part(p, x):
    part = {"scale": p["scale"][1:], "kernel": p["kernel"][1:]}
    return jax.lax.scan(lambda x, own: (_layer(own, x), None), x, part)[0]


def _backwards(p, x):
    own = {"scale": p["scale"], "kernel": jnp.flip(p["kernel"], 0)}
    return jax.lax.scan(lambda x, own: (_layer(own, x), None), x, own)[0]


def _as_a_constant_too(p, x):
    return jax.lax.scan(lambda x, own: (_layer(own, x) + p["scale"].sum(), None), x, p)[0]


def _in_a_while(p, x):
    index = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return jax.lax.while_loop(
        lambda state: state[0] < LAYERS,
        lambda state: (state[0] + 1, _layer({name: index(leaf, state[0]) for name, leaf in p.items()}, state[1])),
        (0, x),
    )[1]


REFUSED = {
    "a shared scale": (functools.partial(_shared, name="scale"), {**PARAMS, "scale": SHARED["scale"]}),
    "a shared kernel": (functools.partial(_shared, name="kernel"), {**PARAMS, "kernel": SHARED["kernel"]}),
    "a carried scale": (functools.partial(_carried, name="scale"), {**PARAMS, "scale": SHARED["scale"]}),
    "a carried kernel": (functools.partial(_carried, name="kernel"), {**PARAMS, "kernel": SHARED["kernel"]}),
    "leaves that change in the carry": (_changing, SHARED),
    "stacks of two scans, one in the other": (_crossed, PARAMS),
    "a stack in two scans": (_twice, PARAMS),
    "a leaf that is used outside too": (_outside_too, PARAMS),
    "a stack that is a constant too": (_as_a_constant_too, PARAMS),
    "a leaf that comes out": (_emitted_leaf, PARAMS),
    "scaled values that come out": (_emitted_value, PARAMS),
    "scaled values that are carried": (_carried_value, PARAMS),
    "a part of the stack": (_in_part, PARAMS),
    "a stack that is flipped": (_backwards, PARAMS),
    "a while loop": (_in_a_while, PARAMS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_function_is_left_alone(name):
    apply, params = REFUSED[name]
    assert folds(apply, params, Y) == []


def test_leaves_that_all_iterations_share_fold_with_one_another():
    def apply(p, x):
        return jax.lax.scan(lambda x, _: (_layer(p, x), None), x, None, length=LAYERS)[0]

    (fold,) = folds(apply, SHARED, Y)
    assert fold.producers == (("scale", (0,), ()),)
    assert fold.consumers == (("kernel", (0,), ()),)
    np.testing.assert_allclose(apply(_scaled(SHARED, [fold]), Y), apply(SHARED, Y), rtol=1e-5, atol=1e-5)


def test_shared_in_the_inner_scan_stacked_by_the_outer():
    def apply(p, x):
        def group(x, own):
            return jax.lax.scan(lambda x, _: (_layer(own, x), None), x, None, length=2)[0], None

        return jax.lax.scan(group, x, p)[0]

    (fold,) = folds(apply, PARAMS, Y)
    assert fold.producers == (("scale", (1,), (0,)),)
    assert fold.consumers == (("kernel", (1,), (0,)),)
    np.testing.assert_allclose(apply(_scaled(PARAMS, [fold]), Y), apply(PARAMS, Y), rtol=1e-5, atol=1e-5)


def test_folds_come_in_the_order_of_the_model():
    params = {"before": SHARED, "layers": PARAMS, "after": SHARED}

    def apply(p, x):
        x = _layer(p["before"], x)
        x = jax.lax.scan(lambda x, own: (_layer(own, x), None), x, p["layers"])[0]
        return _layer(p["after"], x)

    consumers = [leaf.path for fold in folds(apply, params, Y) for leaf in fold.consumers]
    assert consumers == ["before/kernel", "layers/kernel", "after/kernel"]


def _twofold(p, x, *, of):
    """What is scaled meets itself: a factor would go in twice."""
    scaled = x * p["scale"][None]
    return of(p, scaled) @ p["kernel"]


TWOFOLD = {
    "a square": lambda p, y: y * y,
    "a product with its own cast": lambda p, y: y * y.astype(jnp.bfloat16).astype(jnp.float32),
    "a quotient": lambda p, y: y / y,
    "a leaf squared": lambda p, y: (p["other"] * p["other"])[None] * jnp.sin(y),
    "its own matmul beside it": lambda p, y: y + y @ p["square"],
    "a cast to integers": lambda p, y: y.astype(jnp.int32).astype(jnp.float32),
}


@pytest.mark.parametrize("name", TWOFOLD)
def test_no_factor_goes_in_twice(name):
    params = {**SHARED, "square": jnp.eye(4), "other": jnp.ones(4)}
    found = folds(functools.partial(_twofold, of=TWOFOLD[name]), params, Y)
    assert "kernel" not in {leaf.path for fold in found for leaf in fold.consumers}


def test_a_kernel_that_is_an_output_stays():
    assert folds(lambda p, x: ((x * p["scale"][None]) @ p["kernel"], p["kernel"]), SHARED, Y) == []
