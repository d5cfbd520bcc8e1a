import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from jaxcompress._src.transforms import chain, identity
from jaxcompress.distillation import hard_labels, hidden_states, make_train_step, soft_targets
from jaxcompress.pruning import movement, rigl
from jaxcompress.schedules import constant
from jaxcompress.tree import Unselected, by_path

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32)
KEY = 11


def _params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    sizes = {"first": (6, 8), "head": (8, 4)}
    return {name: {"kernel": jnp.asarray(rng.normal(size=size), dtype)} for name, size in sizes.items()}


def _apply(params, batch, *, key, train):
    assert (key is not None) == train
    hidden = jnp.tanh(batch["x"].astype(params["first"]["kernel"].dtype) @ params["first"]["kernel"])
    return {"logits": hidden @ params["head"]["kernel"], "hidden_states": [hidden]}


def _key():
    return jax.random.key(KEY)


def _assert_trees_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_student_that_starts_as_its_teacher_leaves_the_teacher_alone():
    teacher, kept = _params(), jax.tree.map(np.asarray, _params())
    init_state, step = make_train_step(_apply, _apply, optax.adam(0.1), losses={"hard": hard_labels()})
    state = init_state(teacher, key=_key())
    batch = {"x": X, "labels": jnp.arange(16) % 4}
    for _ in range(3):
        state, metrics = step(state, teacher, batch)
    _assert_trees_equal(teacher, kept)
    assert not np.array_equal(state.params["head"]["kernel"], kept["head"]["kernel"])
    assert int(state.step) == 3
    assert float(metrics["hard"][1]) == 16.0


def test_one_step_of_sgd_against_float64():
    """d/ds T² KL = T (softmax(s/T) - softmax(t/T)) / n, through one linear layer."""
    temperature, rate = 2.0, 0.7
    x, s, t = RNG.normal(size=(5, 3)), RNG.normal(size=(3, 4)), RNG.normal(size=(3, 4))

    def apply(params, batch, *, key, train):
        return {"logits": batch["x"] @ params["w"]}

    def softmax(logits):
        e = np.exp(logits / temperature)
        return e / e.sum(-1, keepdims=True)

    losses = {"soft": (0.5, soft_targets(temperature=temperature))}
    init_state, step = make_train_step(apply, apply, optax.sgd(rate), losses=losses)
    state = init_state({"w": jnp.asarray(s, jnp.float32)}, key=_key())
    state, metrics = step(state, {"w": jnp.asarray(t, jnp.float32)}, {"x": jnp.asarray(x, jnp.float32)})
    p, q = softmax(x @ t), softmax(x @ s)
    np.testing.assert_allclose(state.params["w"], s - rate * 0.5 * temperature / 5 * x.T @ (q - p), rtol=1e-5)
    total = temperature**2 * (p * np.log(p / q)).sum()
    np.testing.assert_allclose(metrics["soft"], [total, 5.0], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], [0.5 * total / 5, 1.0], rtol=1e-5)
    np.testing.assert_array_equal(metrics["agreement"], [((x @ s).argmax(-1) == (x @ t).argmax(-1)).sum(), 5.0])
    np.testing.assert_array_equal(metrics["penalty"], [0.0, 1.0])


def test_training_reduces_the_loss_and_raises_agreement():
    losses = {"soft": soft_targets(), "hidden": (0.1, hidden_states(pairs=[(0, 0)]))}
    init_state, step = make_train_step(_apply, _apply, optax.adam(0.05), losses=losses)
    state, history = init_state(_params(), key=_key()), []
    for _ in range(60):
        state, metrics = step(state, _params(1), {"x": X})
        history.append({name: float(total / count) for name, (total, count) in metrics.items()})
    assert history[-1]["loss"] < 0.1 * history[0]["loss"]
    assert history[-1]["agreement"] > max(0.9, history[0]["agreement"])


@pytest.mark.parametrize("weak", [False, True])
def test_one_trace_over_many_steps(weak):
    traces = []

    def apply(params, batch, *, key, train):
        traces.append(train)
        return toys.echo(params, batch, key=key, train=train)

    masks = {"w": jnp.array([True, False])}
    transform = chain(toys.toy_mask(masks, noise=0.1), toys.toy_scale(2.0, penalty=0.5))
    init_state, step = make_train_step(
        apply,
        None,
        optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.0, 10)),
        losses={"dot": (optax.cosine_decay_schedule(1.0, 10), toys.dot("w", jnp.array([1.0, 2.0])))},
        transform=transform,
        transform_optimizer=optax.sgd(0.1),
    )
    state = init_state({"w": jnp.full(2, 2.0) if weak else jnp.full(2, 2.0, jnp.float32)}, key=_key())
    for _ in range(4):
        state, _ = step(state, None, {})
    assert traces == [True]


def test_frozen_leaves_keep_their_bits_and_have_no_moments():
    def make(select):
        return make_train_step(
            _apply, _apply, optax.adamw(0.1), losses={"soft": soft_targets()}, trainable=select, transform=identity()
        )

    init_state, step = make(by_path("head/.*"))
    state = init_state(_params(), key=_key())
    assert state.optimizer_state[0].mu["first"]["kernel"] is Unselected
    flops = step.lower(state, _params(1), {"x": X}).compile().cost_analysis()["flops"]
    for _ in range(3):
        state, _ = step(state, _params(1), {"x": X})
    np.testing.assert_array_equal(state.params["first"]["kernel"], _params()["first"]["kernel"])
    assert not np.array_equal(state.params["head"]["kernel"], _params()["head"]["kernel"])
    init_state, step = make(None)
    all_flops = step.lower(init_state(_params(), key=_key()), _params(1), {"x": X}).compile().cost_analysis()["flops"]
    # The gradient of the first kernel takes two matmuls: one for it, one for its output.
    assert flops < all_flops - 2 * 16 * 6 * 8 - 2 * 16 * 8 * 4 + 1


def test_metrics_count_what_the_mask_leaves():
    def apply(params, batch, *, key, train):
        return {"logits": batch["x"] @ params["w"]}

    x = jnp.asarray(RNG.normal(size=(2, 5, 3)), jnp.float32)
    s, t = (jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    mask = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    init_state, step = make_train_step(apply, apply, optax.sgd(0.1), losses={"soft": soft_targets()})
    _, metrics = step(init_state({"w": s}, key=_key()), {"w": t}, {"x": x, "attention_mask": mask})
    same = ((x @ s).argmax(-1) == (x @ t).argmax(-1)) & (mask == 1)
    np.testing.assert_array_equal(metrics["agreement"], [same.sum(), 8.0])
    assert float(metrics["soft"][1]) == 8.0
    state, metrics = step(init_state({"w": s}, key=_key()), {"w": t}, {"x": x, "attention_mask": 0 * mask})
    assert [float(v) for v in metrics["loss"]] == [0.0, 1.0]
    np.testing.assert_array_equal(state.params["w"], s)


def test_metrics_of_ones_own():
    def widths(student, teacher, batch):
        return jnp.float32(student["logits"].shape[-1]), jnp.float32(1)

    losses = {"soft": soft_targets()}
    init_state, step = make_train_step(_apply, _apply, optax.sgd(0.1), losses=losses, metrics={"width": widths})
    _, metrics = step(init_state(_params(), key=_key()), _params(1), {"x": X})
    assert sorted(metrics) == ["loss", "penalty", "skipped", "soft", "width"]
    assert float(metrics["width"][0]) == 4.0


def test_teacher_outputs_may_be_computed_earlier():
    losses = {"soft": soft_targets(temperature=2.0), "hidden": hidden_states(pairs=[(0, 0)])}
    results = []
    outputs = _apply(_params(1), {"x": X}, key=None, train=False)
    for teacher_apply, teacher_params, extra in ((_apply, _params(1), {}), (None, None, {"teacher": outputs})):
        init_state, step = make_train_step(_apply, teacher_apply, optax.sgd(0.1), losses=losses)
        results.append(step(init_state(_params(), key=_key()), teacher_params, {"x": X} | extra))
    for one, other in zip(jax.tree.leaves(results[0][0].params), jax.tree.leaves(results[1][0].params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert sorted(results[0][1]) == sorted(results[1][1])
    init_state, step = make_train_step(_apply, None, optax.sgd(0.1), losses=losses)
    with pytest.raises(ValueError, match="The teacher has no 'logits'; it has: nothing"):
        step(init_state(_params(), key=_key()), None, {"x": X})


def test_the_callers_key_survives():
    key = _key()
    init_state, step = make_train_step(_apply, _apply, optax.sgd(0.1), losses={"soft": soft_targets()})
    step(init_state(_params(), key=key), _params(1), {"x": X})
    assert jax.random.uniform(key) < 1.0


def test_bfloat16_parameters_stay_bfloat16():
    losses = {"soft": soft_targets(), "hidden": hidden_states(pairs=[(0, 0)])}
    init_state, step = make_train_step(
        _apply,
        _apply,
        optax.adamw(0.05, mu_dtype=jnp.float32),
        losses=losses,
        transform=toys.toy_scale(1.0),
        transform_optimizer=optax.adam(1e-3),
    )
    state, first = step(init_state(_params(dtype=jnp.bfloat16), key=_key()), _params(1), {"x": X})
    for _ in range(20):
        state, last = step(state, _params(1), {"x": X})
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert last["loss"][0].dtype == jnp.float32
    assert float(last["loss"][0]) < 0.5 * float(first["loss"][0])


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    """By the loss, or by a gradient alone. RigL would rewire on NaN, BatchNorm would average it."""

    def apply(params, batch, *, key, train):
        logits = batch["x"] @ params["w"] + jnp.sqrt(0.0 * params["b"] + 1.0 - batch["s"])
        return {"logits": logits, "stats": {"mean": 0.5 * params["stats"]["mean"] + batch["x"].mean()}}

    init_state, step = make_train_step(
        apply,
        apply,
        optax.adam(0.1),
        losses={"soft": soft_targets()},
        transform=chain(rigl(sparsity=0.5, until=10, every=1, fraction=1.0), movement(schedule=constant(0.25))),
        transform_optimizer=optax.adam(0.1),
        mutable=("stats",),
    )
    params = {
        "w": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32),
        "b": jnp.zeros(()),
        "stats": {"mean": jnp.ones(())},
    }
    state = init_state(params, key=_key())
    teacher = jax.tree.map(lambda leaf: leaf + 1.0, params)
    good = {"x": X, "s": jnp.float32(0.0)}
    skipped = []

    def on_host(state):
        return jax.tree.map(np.array, state._replace(key=jax.random.key_data(state.key)))

    # The square root at 0 has no derivative, and a finite value.
    batches = (good, good | {"x": X.at[3, 0].set(jnp.nan)}, good | {"s": jnp.float32(1.0)}, good)
    for done, batch in enumerate(batches, start=1):
        before = on_host(state)
        state, metrics = step(state, teacher, batch)
        after = on_host(state)
        assert int(after.step) == done
        assert not np.array_equal(after.key, before.key)
        skipped.append(float(metrics["skipped"][0]))
        changed = [
            any(not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, pair), strict=True))
            for pair in zip(before[:4], after[:4], strict=True)
        ]
        assert changed == [not skipped[-1]] * 4
        assert np.isfinite(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(after[:4])])).all()
    assert skipped == [0.0, 1.0, 1.0, 0.0]
    assert float(metrics["skipped"][1]) == 1.0


def test_a_frozen_leaf_without_a_derivative_skips_nothing():
    def apply(params, batch, *, key, train):
        return {"logits": batch["x"] @ params["w"] + jnp.sqrt(params["b"])}

    losses = {"soft": soft_targets()}
    init_state, step = make_train_step(apply, apply, optax.sgd(0.1), losses=losses, trainable=by_path("w"))
    state = init_state({"w": jnp.ones((6, 4)), "b": jnp.zeros(())}, key=_key())
    teacher = {"w": jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32), "b": jnp.zeros(())}
    state, metrics = step(state, teacher, {"x": X})
    assert float(metrics["skipped"][0]) == 0.0
    assert bool((state.params["w"] != 1).any())


def test_optimizers_that_want_the_loss_get_it():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    init_state, step = make_train_step(_apply, _apply, optimizer, losses={"soft": soft_targets()})
    state, metrics = step(init_state(_params(), key=_key()), _params(1), {"x": X})
    np.testing.assert_allclose(state.optimizer_state[1].best_value, metrics["loss"][0], rtol=1e-6)


def test_errors_where_the_user_is():
    losses = {"soft": soft_targets()}
    init_state, _ = make_train_step(_apply, _apply, optax.sgd(0.1), losses=losses, transform=toys.toy_scale())
    with pytest.raises(ValueError, match="`transform_optimizer` is needed"):
        init_state(_params(), key=_key())
    init_state, _ = make_train_step(_apply, _apply, optax.sgd(0.1), losses=losses)
    with pytest.raises(ValueError, match="`key` must be typed"):
        init_state(_params(), key=jax.random.PRNGKey(0))
    with pytest.raises(TypeError) as caught:
        init_state({"layer": {"activation": jnp.tanh}}, key=_key())
    assert "layer/activation" in "".join(caught.value.__notes__)
    with pytest.raises(ValueError, match="`losses` is empty"):
        make_train_step(_apply, _apply, optax.sgd(0.1), losses={})
    for names in ({"loss": soft_targets()}, {"agreement": soft_targets()}):
        with pytest.raises(ValueError, match="need names of their own"):
            make_train_step(_apply, _apply, optax.sgd(0.1), losses=names, metrics={"agreement": soft_targets()})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1"])
def test_a_weight_that_is_no_finite_number_is_named(weight):
    """It would skip every step."""
    with pytest.raises(ValueError, match="The weight of loss 'soft' must be a finite number or a schedule, got "):
        make_train_step(_apply, _apply, optax.sgd(0.1), losses={"soft": (weight, soft_targets())})


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (jnp.zeros(()), r"\(\)"),
        ((jnp.zeros((2, 3)), 1.0), r"\[\(2, 3\), \(\)\]"),
        ((1.0, 2.0, 3.0), r"\[\(\), \(\), \(\)\]"),
    ],
)
@pytest.mark.parametrize("kind", ["losses", "metrics"])
def test_what_is_no_sum_and_count_is_named(kind, result, found):
    options = {"losses": {"soft": soft_targets()}, "metrics": None} | {kind: {"own": lambda *_: result}}
    init_state, step = make_train_step(_apply, _apply, optax.sgd(0.1), **options)
    with pytest.raises(ValueError, match=rf"'own' must return two scalars, \(sum, count\), got shapes {found}\."):
        step(init_state(_params(), key=_key()), _params(1), {"x": X})


def _sgd_steps():
    teacher = _params(1)
    init_state, step = make_train_step(_apply, _apply, optax.sgd(0.1), losses={"soft": soft_targets()})
    return init_state(_params(), key=_key()), step, teacher


def test_steps_within_a_scan_are_those_of_a_loop():
    state, step, teacher = _sgd_steps()
    scanned, metrics = jax.jit(
        lambda state, xs: jax.lax.scan(lambda state, x: step(state, teacher, {"x": x}), state, xs)
    )(state, jnp.stack([X, 2 * X]))
    for x in (X, 2 * X):
        state, last = step(state, teacher, {"x": x})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scanned.params, state.params)
    np.testing.assert_allclose(metrics["soft"][0][-1], last["soft"][0], rtol=1e-5)


def test_a_step_of_known_arrays_within_a_trace():
    state, step, teacher = _sgd_steps()
    traced, _ = jax.eval_shape(lambda: step(state, teacher, {"x": X}))
    assert jax.tree.map(jnp.shape, traced.params) == jax.tree.map(jnp.shape, state.params)


def test_a_step_transfers_nothing():
    state, step, teacher = _sgd_steps()
    batch = {"x": X}
    state, _ = step(state, teacher, batch)
    with jax.transfer_guard("disallow"):
        state, _ = step(state, teacher, batch)
    assert int(state.step) == 2


def test_the_derivative_of_a_step_by_its_batch():
    init_state, step = make_train_step(_apply, None, optax.sgd(0.1), losses={"hard": hard_labels()})

    def loss(scale):
        batch = {"x": scale * X, "labels": jnp.arange(16) % 4}
        return step(init_state(_params(), key=_key()), None, batch)[1]["hard"][0]

    _, derivative = jax.jvp(loss, (jnp.float32(1),), (jnp.float32(1),))
    difference = loss(jnp.float32(1.01)) - loss(jnp.float32(0.99))
    np.testing.assert_allclose(derivative, difference / 0.02, rtol=1e-3)
