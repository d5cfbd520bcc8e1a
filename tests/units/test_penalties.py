"""What open gates cost: the formulas, the multipliers, and small problems that reach what was asked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress import gates
from jaxcompress._src.solvers.hard_concrete import nonzero_probability
from jaxcompress._src.types import TransformState
from jaxcompress._src.units.costs import expected_cost
from jaxcompress._src.units.lagrangian import smallest_with
from jaxcompress._src.units.penalty import Gated, lambda_penalty
from jaxcompress._src.units.slices import multiply_units
from jaxcompress.structured import UnitGroup, UnitSlices, flop_costs, parameter_costs
from jaxcompress.trace import layouts
from jaxcompress.tree import by_path

COLUMNS = UnitGroup(
    name="columns",
    kind="columns",
    count=3,
    slices=(UnitSlices(path="up", axis=1), UnitSlices(path="down", axis=0, gated=True)),
)
HEADS = UnitGroup(
    name="heads",
    kind="heads",
    count=2,
    slices=(UnitSlices(path="out", axis=0, width=2, gated=True),),
)
GROUPS = (COLUMNS, HEADS)
P = {"columns": np.array([0.9, 0.2, 0.4]), "heads": np.array([0.3, 0.8])}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    sizes = {"up": (5, 3), "down": (3, 7), "out": (4, 6), "bias": (7,)}
    return {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}


def gated(params, *, probabilities=P, step=0, loss=0.0):
    probabilities = {name: jnp.asarray(p, jnp.float32) for name, p in probabilities.items()}
    return Gated(params=params, groups=GROUPS, probabilities=probabilities, step=step, loss=jnp.float32(loss))


@pytest.mark.parametrize(
    ("strength", "prices"),
    [(0.3, {"columns": 0.3, "heads": 0.3}), ({"heads": 2.0}, {"columns": 0.0, "heads": 2.0})],
)
def test_lambda_as_louizos_weighs_it(params, strength, prices):
    penalty = lambda_penalty(strength, weight_decay=0.05, examples=50)
    w = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    total = 0.0
    for k in range(3):
        total += P["columns"][k] * (prices["columns"] * 7 + 0.5 * 0.05 * (w["down"][k] ** 2).sum())
    for k in range(2):
        total += P["heads"][k] * (prices["heads"] * 12 + 0.5 * 0.05 * (w["out"][2 * k : 2 * k + 2] ** 2).sum())
    assert penalty.init(gated(params)) == ()
    np.testing.assert_allclose(penalty.value(gated(params), ()), total / 50, rtol=1e-5)
    gradient = jax.grad(lambda p: penalty.value(gated(p), ()))(params)
    np.testing.assert_allclose(gradient["down"], P["columns"][:, None] * 0.05 * w["down"] / 50, rtol=1e-5)
    assert not gradient["up"].any()


def test_lambda_of_single_weights(params):
    probabilities = {"out": np.random.default_rng(1).random((4, 6)), "bias": np.full(7, 0.5)}
    given = gated(params, probabilities=probabilities)
    penalty = lambda_penalty({"out": 2.0}, weight_decay=0.1, examples=4)
    squares = {name: np.asarray(params[name], np.float64) ** 2 for name in probabilities}
    total = (probabilities["out"] * (2 + 0.05 * squares["out"])).sum() + 0.5 * 0.05 * squares["bias"].sum()
    np.testing.assert_allclose(penalty.value(given, penalty.init(given)), total / 4, rtol=1e-5)


def _sparsity(weights=None):
    """By hand, in float64."""
    c, h = P["columns"].sum(), P["heads"].sum()
    sizes = {"up": (5 * c, 15), "down": (7 * c, 21), "out": (12 * h, 24), "bias": (7, 7)}
    weights = dict.fromkeys(sizes, 1.0) if weights is None else weights
    left, full = (sum(weights.get(name, 0) * size[i] for name, size in sizes.items()) for i in (0, 1))
    return 1 - left / full, full


@pytest.mark.parametrize("measured", ["parameters", "all", "some", "flops"])
def test_the_lagrangian_by_hand(params, measured):
    def model(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None], x[:, :4] @ params["out"]

    costs, weights = {
        "parameters": (None, None),
        "all": (parameter_costs(params), None),
        "some": (parameter_costs(params, select=by_path("up|out")), {"up": 1.0, "out": 1.0}),
        "flops": (
            flop_costs(params, layouts=layouts(model, params, jnp.ones((10, 5)))),
            {"up": 20.0, "down": 20.0, "out": 20.0},
        ),
    }[measured]
    sparsity, full = _sparsity(weights)
    start = optax.linear_schedule(0.0, 1.0, 100)
    for options, target in (({"sparsity": 0.7}, 0.7), ({"budget": 0.5 * full}, 0.5)):
        penalty = gates.lagrangian(**options, costs=costs, warm_up=start, initial=(2.0, 30.0))
        for step, share in ((0, 0.0), (50, 0.5), (500, 1.0)):
            given = gated(params, step=step)
            distance = sparsity - share * target
            multipliers = penalty.init(given)
            value, gradient = jax.value_and_grad(lambda m, g=given, p=penalty: p.value(g, m))(multipliers)
            np.testing.assert_allclose(value, 2 * distance + 30 * distance**2, rtol=1e-4, atol=1e-6)
            # Reversed: a step of gradient descent raises what the Lagrangian says should rise.
            np.testing.assert_allclose(gradient["linear"], -distance, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(gradient["quadratic"], -(distance**2), rtol=1e-4, atol=1e-6)


def test_the_gradient_of_the_expected_size_is_that_of_its_formula(params):
    """Central differences in float64 of the product form."""

    def size(c, h):
        return (5 * c.sum() + 7 * c.sum() + 12 * h.sum() + 7) / 67

    gradient = jax.grad(lambda p: expected_cost(params, GROUPS, p) / 67)(
        {name: jnp.asarray(p, jnp.float32) for name, p in P.items()}
    )
    for k in range(3):
        step = np.eye(3)[k] * 1e-4
        expected = (size(P["columns"] + step, P["heads"]) - size(P["columns"] - step, P["heads"])) / 2e-4
        np.testing.assert_allclose(gradient["columns"][k], expected, rtol=1e-5)


def test_one_pair_of_multipliers_for_each_kind_of_a_shape(params):
    two = UnitGroup(name="more", kind="heads", count=4, slices=(UnitSlices(path="up", axis=0, gated=True),))
    probabilities = {**P, "more": np.array([0.5, 0.1, 0.9, 0.9])}
    given = Gated(
        params=params,
        groups=(*GROUPS, two),
        probabilities={name: jnp.asarray(p, jnp.float32) for name, p in probabilities.items()},
        step=0,
        loss=0.0,
    )
    penalty = gates.lagrangian(shape={"heads": 1, "columns": 2}, initial=(3.0, 5.0))
    multipliers = penalty.init(given)
    assert set(multipliers) == {"heads", "columns"}
    distances = {
        "heads": [(1 - 1.1 / 2) - 1 / 2, (1 - 2.4 / 4) - 3 / 4],
        "columns": [(1 - 1.5 / 3) - 1 / 3],
    }
    expected = sum(np.mean([3 * d + 5 * d**2 for d in ds]) for ds in distances.values())
    value, gradient = jax.value_and_grad(lambda m: penalty.value(given, m))(multipliers)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for kind, ds in distances.items():
        np.testing.assert_allclose(gradient[kind]["linear"], -np.mean(ds), rtol=1e-5)


def test_the_loss_bound_by_hand(params):
    penalty = smallest_with(loss_bound=0.3, initial=2.0)
    sparsity, _ = _sparsity()

    def total(multipliers, loss):
        return loss + penalty.value(gated(params, loss=loss), multipliers)

    multipliers = penalty.init(gated(params))
    value, (up, through) = jax.value_and_grad(total, argnums=(0, 1))(multipliers, jnp.float32(0.5))
    np.testing.assert_allclose(value, 1 - sparsity + 2 * 0.2, rtol=1e-5)
    np.testing.assert_allclose(up["loss"], -0.2, rtol=1e-5)
    # The loss counts λ times, not 1 + λ times.
    assert through == 2.0
    assert penalty.project({"loss": jnp.float32(-0.1)})["loss"] == 0


# A toy: y = X w for known w; a gate on every weight. Dropping feature i costs w_i² of the loss.
TRUE = np.array([3.0, 2.0, 1.5, 1.0, 0.6, 0.3, 0.1, 0.05], np.float32)
FEATURES = UnitGroup(name="features", kind="features", count=8, slices=(UnitSlices(path="w", axis=0, gated=True),))


def train_toy(penalty, steps=1500, rate=0.05):
    """Gates and weights of the toy, with its exact loss (features are independent, of variance one)."""
    transform = gates.hard_concrete([FEATURES], penalty=penalty, clamp=(-6.0, 6.0))
    params = {"w": jnp.asarray(TRUE)}
    state = transform.init(params, key=jax.random.key(0))
    optimizer = optax.adam(rate)

    def loss_of(params):
        return jnp.sum((params["w"] - TRUE) ** 2) / np.sum(TRUE**2)

    def objective(both, fixed, key):
        params, trainable = both
        state = TransformState(trainable, fixed)
        loss = loss_of(transform.apply(params, state, key=key))
        return loss + transform.penalty(state, params, loss=loss), loss

    def step(carry, key):
        params, state, moments = carry
        both = (params, state.trainable)
        gradient, loss = jax.grad(objective, has_aux=True)(both, state.fixed, key)
        updates, moments = optimizer.update(gradient, moments, both)
        params, trainable = optax.apply_updates(both, updates)
        state = TransformState(trainable, state.fixed)
        state, _ = transform.update(gradient, state, params, key=key, loss=loss)
        params, state = transform.project(params, state)
        return (params, state, moments), (loss, state.trainable["multipliers"])

    start = (params, state, optimizer.init((params, state.trainable)))
    (params, state, _), (losses, multipliers) = jax.jit(lambda c, k: jax.lax.scan(step, c, k))(
        start, jax.random.split(jax.random.key(1), steps)
    )
    kept = np.asarray(gates.gate_values(state.trainable["log_alpha"])["features"]) > 0
    return params, state, kept, losses, multipliers, loss_of


@pytest.mark.parametrize("left", [2, 4, 6])
def test_a_toy_reaches_its_target_with_the_right_features(left):
    _, state, kept, _, multipliers, _ = train_toy(gates.lagrangian(budget=left))
    expected = float(nonzero_probability(state.trainable["log_alpha"]["features"]).sum())
    assert abs(expected - left) < 0.25
    assert kept.tolist() == [True] * left + [False] * (8 - left)
    # Too large at first: λ1 falls; λ2 never does.
    assert multipliers["linear"][20] < 0
    assert (np.diff(multipliers["quadratic"]) >= -1e-6).all()


def test_a_toy_reaches_its_shape():
    _, _, kept, *_ = train_toy(gates.lagrangian(shape={"features": 3}, warm_up=optax.linear_schedule(0.0, 1.0, 500)))
    assert kept.tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize(("bound", "most"), [(0.25, 4), (0.12, 5)])
def test_a_toy_becomes_small_and_respects_its_bound(bound, most):
    params, state, kept, losses, multipliers, loss_of = train_toy(smallest_with(loss_bound=bound), steps=3000)
    assert float(losses[-1000:].mean()) < 1.1 * bound
    values = gates.gate_values(state.trainable["log_alpha"])
    assert float(loss_of(multiply_units(params, [FEATURES], values))) < bound
    assert 0 < kept.sum() <= most
    assert kept[0]
    assert (multipliers["loss"] >= 0).all()


def test_lambda_zero_opens_and_a_large_one_closes_everything():
    _, _, kept, *_ = train_toy(lambda_penalty(0.0, examples=1))
    assert kept[:6].all()
    _, _, kept, *_ = train_toy(lambda_penalty(10.0, examples=1))
    assert not kept.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gates.lagrangian(), "Give one of `sparsity`, `budget` and `shape`"),
        (lambda: gates.lagrangian(sparsity=0.5, budget=3.0), "Give one of `sparsity`, `budget` and `shape`"),
        (lambda: gates.lagrangian(sparsity=1.5), r"`sparsity` must be in \[0, 1\], got 1.5"),
        (lambda: gates.lagrangian(shape={}), "`shape` is empty"),
        (lambda: smallest_with(loss_bound=float("nan")), "`loss_bound` must be a finite number"),
        (lambda: smallest_with(loss_bound=1.0, initial=-1.0), "`initial` must not be negative"),
        (lambda: lambda_penalty(-1.0, examples=1), "must not be negative"),
        (lambda: lambda_penalty(1.0, examples=0), "`examples` must be at least 1"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_targets_of_zero_and_one(params):
    given = gated(params)
    assert set(gates.lagrangian(sparsity=0.0).init(given)) == {"linear", "quadratic"}
    with pytest.raises(ValueError, match=r"least possible is 7 of 67 \(sparsity 0.895522\)"):
        gates.lagrangian(sparsity=1.0).init(given)
    gates.lagrangian(sparsity=1.0, costs=parameter_costs(params, select=by_path("up|down"))).init(given)


def test_nan_is_no_price_and_no_target():
    with pytest.raises(ValueError, match="must not be negative, got nan"):
        lambda_penalty(float("nan"), examples=3)
    with pytest.raises(ValueError, match="`budget` must be at least 0, got nan"):
        gates.lagrangian(budget=float("nan"))
