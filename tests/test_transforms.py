import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
import transform_table

from jaxcompress._src.transforms import chain, identity, pullback
from jaxcompress._src.types import Transform, TransformState
from jaxcompress.arrays import QuantizedArray
from jaxcompress.distillation import make_train_step
from jaxcompress.tree import Unselected

W = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array([5.0])}
MASKS = {"w": jnp.array([True, False, True]), "b": Unselected}


def _assert_trees_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _fresh(mark) -> Transform:
    return identity()._replace(update=lambda grads, state, params, *, key, loss: (state, mark))


def _noise(params, key):
    return jax.tree.map(lambda w: w + jax.random.normal(key, w.shape), params)


def _noisy() -> Transform:
    return identity()._replace(apply=lambda params, state, *, key=None: params if key is None else _noise(params, key))


def test_identity_does_nothing():
    transform, key = identity(), jax.random.key(0)
    state = transform.init(W, key=key)
    assert jax.tree.leaves(state) == []
    assert transform.apply(W, state) is W
    assert transform.project(W, state) == (W, state)
    assert transform.finalize(W, state) is W
    assert transform.update(W, state, W, key=key, loss=1.0) == (state, None)
    assert float(transform.penalty(state, W, loss=3.0)) == 0.0


def test_chain_of_nothing_is_identity_and_nesting_is_flat():
    a, b, c = toys.toy_mask(MASKS), toys.toy_scale(), identity()
    assert chain() == identity()
    assert chain(chain(a, b), c).stages == (a, b, c) == chain(a, chain(b, chain(c))).stages
    assert chain(a).stages == (a,)
    key = jax.random.key(0)
    _assert_trees_equal(chain(chain(a, b), c).init(W, key=key), chain(a, b, c).init(W, key=key))


def test_chain_applies_in_order():
    add = identity()._replace(apply=lambda params, state, *, key=None: jax.tree.map(lambda w: w + 1, params))
    state = chain(add, toys.toy_scale(2.0)).init(W, key=jax.random.key(0))
    np.testing.assert_array_equal(chain(add, toys.toy_scale(2.0)).apply(W, state)["w"], 2 * (W["w"] + 1))
    state = chain(toys.toy_scale(2.0), add).init(W, key=jax.random.key(0))
    np.testing.assert_array_equal(chain(toys.toy_scale(2.0), add).apply(W, state)["w"], 2 * W["w"] + 1)


def test_chain_splits_its_key_once_per_stage():
    pair, state = chain(_noisy(), _noisy()), TransformState(((), ()), ((), ()))
    key = jax.random.key(3)
    first, second = jax.random.split(key)
    _assert_trees_equal(pair.apply(W, state, key=key), _noise(_noise(W, first), second))
    _assert_trees_equal(pair.apply(W, state), W)
    effective, _ = pullback(pair, W, state, key=key)
    _assert_trees_equal(effective, pair.apply(W, state, key=key))


def test_init_update_and_penalty_see_the_deterministic_input_of_their_stage():
    given = []

    def init(params, *, key, statistics=None):
        given.append((params, statistics))
        return TransformState((), ())

    def penalty(state, params, *, loss):
        return loss * params["b"].sum()

    reader = identity()._replace(init=init, penalty=penalty)
    transform = chain(_noisy(), toys.toy_scale(2.0, penalty=10.0), reader, toys.toy_scale(3.0))
    state = transform.init(W, key=jax.random.key(0), statistics="evidence")
    assert given[0][1] == "evidence"
    _assert_trees_equal(given[0][0], {"w": 2 * W["w"], "b": 2 * W["b"]})
    assert float(transform.penalty(state, W, loss=0.5)) == 10 * 2.0 + 0.5 * 2 * 5.0
    state, fresh = transform.update((W, W, W, W), state, W, key=jax.random.key(1), loss=0.5)
    assert fresh is None
    np.testing.assert_array_equal(state.fixed[1]["params"]["w"], W["w"])
    np.testing.assert_array_equal(state.fixed[3]["params"]["w"], 2 * W["w"])


def test_update_of_a_later_stage_sees_the_new_state_of_the_earlier_one():
    regrow = {"w": jnp.array([False, True, True]), "b": Unselected}
    transform = chain(toys.toy_mask(MASKS, regrow=regrow), toys.toy_scale())
    state = transform.init(W, key=jax.random.key(0))
    state, fresh = transform.update((W, W), state, W, key=jax.random.key(1), loss=0.0)
    np.testing.assert_array_equal(state.fixed[1]["params"]["w"], [0.0, -2.0, 3.0])
    np.testing.assert_array_equal(fresh["w"], [False, True, False])
    assert fresh["b"] is Unselected


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_fresh_is_the_union_of_the_stages(order):
    marks = [
        None,
        {"w": jnp.array([True, False, False]), "b": Unselected},
        {"w": jnp.array([False, False, True]), "b": jnp.array([True])},
    ]
    transform = chain(*(_fresh(marks[i]) for i in order))
    state = transform.init(W, key=jax.random.key(0))
    _, fresh = transform.update((W, W, W), state, W, key=jax.random.key(0), loss=0.0)
    _assert_trees_equal(fresh, {"w": jnp.array([True, False, True]), "b": jnp.array([True])})


def test_project_and_finalize_hand_the_parameters_on():
    double = identity()._replace(
        project=lambda params, state: (jax.tree.map(lambda w: 2 * w, params), state),
        finalize=lambda params, state: jax.tree.map(lambda w: 10 * w, params),
    )
    clip = identity()._replace(
        project=lambda params, state: (jax.tree.map(lambda w: jnp.minimum(w, 4.0), params), state),
        finalize=lambda params, state: jax.tree.map(lambda w: w + 1, params),
    )
    transform = chain(double, clip, toys.toy_scale(-1.0, low=0.25))
    params, state = transform.project(W, transform.init(W, key=jax.random.key(0)))
    np.testing.assert_array_equal(params["w"], [2.0, -4.0, 4.0])
    assert float(state.trainable[2]["scale"]) == 0.25
    np.testing.assert_array_equal(transform.finalize(W, state)["w"], 0.25 * (10 * W["w"] + 1))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"init": lambda params, *, key, statistics=None: ((), ())}, r"`init` returns a `TransformState`; .* tuple"),
        ({"update": lambda grads, state, params, *, key, loss: state}, r"`update` returns `\(state, fresh\)`"),
        (
            {"update": lambda grads, state, params, *, key, loss: (state._replace(fixed={"step": 1.0}), None)},
            r"`update` keeps .* TransformState: new leaves \[\".fixed\['step'\]\"\], missing leaves \[\]",
        ),
        ({"update": lambda grads, state, params, *, key, loss: (None, None)}, "`update` keeps .* returned NoneType"),
        ({"project": lambda params, state: params}, r"`project` returns `\(params, state\)`; .*<lambda> returned dict"),
        ({"project": lambda params, state: (params, ())}, "`project` keeps the structure .* returned tuple"),
    ],
)
@pytest.mark.parametrize("make", [lambda stage: stage, chain], ids=["alone", "chain"])
def test_what_breaks_the_contract_is_named(parts, message, make):
    """Also in a chain, and where a bare state would pass for a pair."""
    init_state, step = make_train_step(
        toys.echo,
        None,
        optax.sgd(0.1),
        losses={"dot": toys.dot("w", jnp.ones(3))},
        transform=make(identity()._replace(**parts)),
    )
    with pytest.raises(TypeError, match=message):
        step(init_state({"w": jnp.ones(3)}, key=jax.random.key(0)), None, {})


def test_every_transform_has_a_row_in_the_table_of_laws():
    absent = transform_table.not_called(transform_table.__file__)
    assert not absent, f"{absent} need rows in `tests/transform_table.py`."


def test_a_state_of_another_chain_is_refused():
    state = chain(identity()).init(W, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"A chain of 2 stages needs 2 states, got \(1, 1\)"):
        chain(identity(), identity()).apply(W, state)


def test_pullback_gives_each_stage_the_gradient_of_what_it_returned():
    transform = chain(toys.toy_mask(MASKS), toys.toy_scale(2.0))
    state = transform.init(W, key=jax.random.key(0))
    effective, pull = pullback(transform, W, state, key=None)
    np.testing.assert_array_equal(effective["w"], [2.0, 0.0, 6.0])
    grads = {"w": jnp.array([10.0, 20.0, 30.0]), "b": jnp.array([1.0])}
    (of_mask, of_scale), of_params, of_trainable = pull(grads)
    _assert_trees_equal(of_scale, grads)
    # The pruned weight has a gradient here, though not in `params`.
    np.testing.assert_array_equal(of_mask["w"], [20.0, 40.0, 60.0])
    np.testing.assert_array_equal(of_params["w"], [20.0, 0.0, 60.0])
    # s scales what the mask returned: 10 * 1 + 20 * 0 + 30 * 3, and the bias: 1 * 5.
    assert of_trainable[0] == ()
    assert float(of_trainable[1]["scale"]) == 105.0
    assert of_trainable[1]["none"] is Unselected


def test_pullback_of_a_single_transform_returns_plain_trees():
    transform = toys.toy_scale(2.0)
    state = transform.init(W, key=jax.random.key(0))
    _, pull = pullback(transform, W, state, key=None)
    of_stage, of_params, of_trainable = pull(W)
    _assert_trees_equal(of_stage, W)
    np.testing.assert_array_equal(of_params["w"], 2 * W["w"])
    assert float(of_trainable["scale"]) == 1 + 4 + 9 + 25


def test_pullback_equals_the_gradient_of_the_composition():
    transform = chain(toys.toy_scale(1.5), toys.toy_mask(MASKS, noise=0.3), toys.toy_scale(0.5))
    state, key = transform.init(W, key=jax.random.key(0)), jax.random.key(7)

    def loss(effective):
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(effective))

    def composed(params, scales):
        trainable = ({"scale": scales[0], "none": Unselected}, (), {"scale": scales[1], "none": Unselected})
        return loss(transform.apply(params, TransformState(trainable, state.fixed), key=key))

    expected = jax.grad(composed, argnums=(0, 1))(W, (jnp.float32(1.5), jnp.float32(0.5)))
    effective, pull = pullback(transform, W, state, key=key)
    _, of_params, of_trainable = pull(jax.grad(loss)(effective))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), of_params, expected[0])
    np.testing.assert_allclose([of_trainable[0]["scale"], of_trainable[2]["scale"]], expected[1], rtol=1e-6)


def test_pullback_passes_over_codes_and_differentiates_scales():
    """An 8-bit leaf with trained scale: no gradient, and no float0, for its codes."""
    codes = jnp.array([[1, -2], [3, 4]], jnp.int8)
    params = {"q": QuantizedArray(data=codes, scale=jnp.array([[0.5, 0.25]]), dtype=jnp.dtype("float32")), "n": codes}
    effective, pull = pullback(chain(identity(), identity()), params, TransformState(((), ()), ((), ())), key=None)
    np.testing.assert_array_equal(effective["q"].materialize(), params["q"].materialize())
    grads = {"q": QuantizedArray(data=Unselected, scale=jnp.ones((1, 2)), dtype=jnp.dtype("float32")), "n": Unselected}
    stage_grads, of_params, _ = pull(grads)
    _assert_trees_equal(of_params, grads)
    _assert_trees_equal(stage_grads, (grads, grads))


def test_pullback_through_an_apply_that_returns_compressed_leaves():
    """A learned step size on frozen codes: the gradient reaches the step through the scale of the quantized leaf."""
    codes = jnp.array([[1, -2], [3, 4]], jnp.int8)

    def apply(params, state, *, key=None):
        return {"w": QuantizedArray(data=codes, scale=state.trainable * 2.0, dtype=params["w"].dtype)}

    transform = identity()._replace(apply=apply)
    params, state = {"w": jnp.ones((2, 2))}, TransformState(jnp.full((1, 2), 0.5), ())
    effective, pull = pullback(transform, params, state, key=None)
    np.testing.assert_array_equal(effective["w"].materialize(), codes)
    grads = {"w": QuantizedArray(data=Unselected, scale=jnp.ones((1, 2)), dtype=jnp.dtype("float32"))}
    _, of_params, of_trainable = pull(grads)
    np.testing.assert_array_equal(of_trainable, [[2.0, 2.0]])
    np.testing.assert_array_equal(of_params["w"], jnp.zeros((2, 2)))
