"""The transform: the laws of the contract, on units and on single weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import gates
from jaxcompress._src.solvers.hard_concrete import deterministic_gates, nonzero_probability
from jaxcompress._src.units.costs import expected_cost
from jaxcompress._src.units.lagrangian import smallest_with
from jaxcompress._src.units.penalty import lambda_penalty
from jaxcompress.distillation import make_train_step
from jaxcompress.quantization import QuantSpec, quantization_aware, quantize
from jaxcompress.structured import UnitGroup, UnitSlices, shrink
from jaxcompress.tree import by_path

KEY = jax.random.key(0)
SIZES = {"first": (12, 8), "second": (8, 6), "last": (6, 4)}


def make_params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=size), dtype),
            "bias": jnp.asarray(rng.normal(size=size[1]), dtype),
        }
        for name, size in SIZES.items()
    }


def model(params, x):
    x = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    x = jax.nn.relu(x @ params["second"]["kernel"] + params["second"]["bias"][None])
    return x @ params["last"]["kernel"] + params["last"]["bias"][None]


GROUPS = gates.layer_units(make_params(), [f"{name}/kernel" for name in SIZES])
LOCATIONS = {
    "inputs": jnp.asarray([-4.0, 4, 4, 0, 4, -4, 4, -3, 4, 4, 1, -1], jnp.float32),
    "first/kernel": jnp.asarray([4.0, -4, 4, 0.5, -3, 4, 4, 4], jnp.float32),
    "second/kernel": jnp.asarray([-2.0, 4, -4, 4, 4, 0], jnp.float32),
}
PENALTY = gates.lagrangian(sparsity=0.5)


def transform_of(**options):
    return gates.hard_concrete(GROUPS, **({"penalty": PENALTY} | options))


def located(transform, params, locations=LOCATIONS):
    state = transform.init(params, key=KEY)
    return state._replace(trainable=state.trainable | {"log_alpha": dict(locations)})


def assert_equal_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


@pytest.mark.parametrize("estimator", ["louizos", "topk"])
def test_units_are_multiplied_where_they_are_read(estimator):
    params, transform = make_params(), transform_of(estimator=estimator)
    state = located(transform, params)
    found = transform.apply(params, state)
    factors = [deterministic_gates(LOCATIONS[group.name], estimator=estimator)[:, None] for group in GROUPS]
    for name, factor in zip(SIZES, factors, strict=True):
        np.testing.assert_array_equal(found[name]["kernel"], params[name]["kernel"] * factor)
        np.testing.assert_array_equal(found[name]["bias"], params[name]["bias"])
    assert_equal_trees(transform.finalize(params, state), found)
    jitted = jax.jit(transform.apply)(params, state)
    for x, y in zip(jax.tree.leaves(jitted), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(x == 0, y == 0)
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["louizos", "topk"])
def test_what_is_closed_can_be_taken_out(estimator):
    params, transform = make_params(), transform_of(estimator=estimator)
    state = located(transform, params)
    masked = transform.finalize(params, state)
    keep = {name: np.asarray(z) > 0 for name, z in gates.gate_values(LOCATIONS, estimator=estimator).items()}
    small = shrink(masked, GROUPS, keep)
    left = [int(kept.sum()) for kept in keep.values()]
    assert [small[name]["kernel"].shape for name in SIZES] == list(zip(left, [*left[1:], 4], strict=True))
    assert all(0 < n < group.count for n, group in zip(left, GROUPS, strict=True))
    x = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)
    np.testing.assert_allclose(model(small, x[:, keep["inputs"]]), model(masked, x), atol=1e-5)


def test_one_sample_per_call_and_key():
    params, transform = make_params(), transform_of()
    state = transform.init(params, key=KEY)
    first = transform.apply(params, state, key=jax.random.key(1))
    assert_equal_trees(transform.apply(params, state, key=jax.random.key(1)), first)
    other = transform.apply(params, state, key=jax.random.key(2))
    assert (first["first"]["kernel"] != other["first"]["kernel"]).any()
    # The whole unit has one factor, and groups have noise of their own.
    factors = {name: np.asarray(first[name]["kernel"] / params[name]["kernel"]) for name in SIZES}
    for factor in factors.values():
        np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1], factor.shape), rtol=1e-4)
    assert len({round(float(factor[0, 0]), 5) for factor in factors.values()}) > 1


def test_every_option_of_the_start():
    transform = transform_of(drop_rate={"inputs": 0.2, "second/kernel": 0.9})
    log_alpha = transform.init(make_params(), key=KEY).trainable["log_alpha"]
    for name, rate in (("inputs", 0.2), ("first/kernel", 0.5), ("second/kernel", 0.9)):
        np.testing.assert_allclose(log_alpha[name], np.log((1 - rate) / rate), atol=0.06)
    by_kind = transform_of(drop_rate={"neurons": 0.8}).init(make_params(), key=KEY).trainable["log_alpha"]
    np.testing.assert_allclose(by_kind["first/kernel"], np.log(0.25), atol=0.06)


def test_locations_are_clamped_and_parameters_left_alone():
    params = make_params()
    for options, low, high in (({}, np.log(1e-2), np.log(1e2)), ({"clamp": (-9.0, 1.0)}, -9.0, 1.0)):
        transform = transform_of(**options)
        state = located(transform, params, {name: 100 * x for name, x in LOCATIONS.items()})
        same, projected = transform.project(params, state)
        assert same is params
        values = np.concatenate([np.asarray(x) for x in projected.trainable["log_alpha"].values()])
        np.testing.assert_allclose([values.min(), values.max()], [low, high], rtol=1e-6)


def test_single_weights_have_gates_of_their_own():
    params = make_params(dtype=jnp.bfloat16)
    transform = gates.hard_concrete(GROUPS[:1], penalty=PENALTY, select=by_path("last/.*"))
    state = transform.init(params, key=KEY)
    log_alpha = state.trainable["log_alpha"]
    assert {name: x.shape for name, x in log_alpha.items()} == {
        "inputs": (12,),
        "last/bias": (4,),
        "last/kernel": (6, 4),
    }
    assert all(x.dtype == jnp.float32 for x in log_alpha.values())
    mask = np.random.default_rng(0).random((6, 4)) < 0.5
    log_alpha["last/kernel"] = jnp.where(mask, 4.0, -4.0)
    found = transform.apply(params, state)
    np.testing.assert_array_equal(found["last"]["kernel"], jnp.where(mask, params["last"]["kernel"], 0))
    assert found["last"]["kernel"].dtype == jnp.bfloat16
    assert_equal_trees(found["second"], params["second"])
    sampled = transform.apply(params, state, key=KEY)["last"]["bias"] / params["last"]["bias"]
    assert len(np.unique(np.asarray(sampled, np.float32))) > 1
    p = {name: np.asarray(nonzero_probability(x), np.float64) for name, x in log_alpha.items()}
    total = p["inputs"].sum() * 8 + 8 + 48 + 6 + p["last/bias"].sum() + p["last/kernel"].sum()
    full = 12 * 8 + 8 + 48 + 6 + 24 + 4
    size = expected_cost(params, GROUPS[:1], p)
    np.testing.assert_allclose(size, total, rtol=1e-6)
    multipliers = {"linear": jnp.float32(3.0), "quadratic": jnp.float32(0.0)}
    state = state._replace(trainable=state.trainable | {"multipliers": multipliers})
    np.testing.assert_allclose(transform.penalty(state, params, loss=0.0), 3 * (1 - total / full - 0.5), rtol=1e-4)


# Narrow: with the full range the largest negative weight of a group is a tie, which jit and eager may round apart.
@pytest.mark.parametrize(
    "spec", [QuantSpec(bits=4, group_size=2, convention="narrow"), QuantSpec(bits=3, symmetric=False)]
)
def test_zeros_survive_the_quantizer(spec):
    params = make_params()
    transform = jc.chain(transform_of(), quantization_aware(spec, select=by_path(".*kernel")))
    state = transform.init(params, key=KEY)
    state = state._replace(trainable=({**state.trainable[0], "log_alpha": dict(LOCATIONS)}, ()))
    found = jax.jit(transform.apply)(params, state)
    keep = {name: np.asarray(z) > 0 for name, z in gates.gate_values(LOCATIONS).items()}
    for name, kept in zip(SIZES, keep.values(), strict=True):
        assert (found[name]["kernel"][~kept] == 0).all()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12)), jnp.float32)
    stored = transform.finalize(params, state)
    np.testing.assert_allclose(jc.execute(model)(stored, x), model(found, x), rtol=1e-5, atol=1e-5)


def test_leaves_that_were_compressed_before_are_materialized_where_a_gate_acts():
    params, transform = make_params(), transform_of()
    state = located(transform, params)
    stored, _ = quantize(params, QuantSpec(bits=8), select=by_path("(first|last)/kernel"))
    found = transform.finalize(stored, state)
    assert_equal_trees(found, transform.finalize(jc.materialize(stored), state))


def loss_fn(student, teacher, batch):
    del teacher
    return ((student["y"] - batch["y"]) ** 2).sum(), batch["y"].size


def run(place, batch_place, penalty, steps=4):
    traces = []

    def apply(params, batch, *, key, train):
        traces.append(1)
        return {"y": model(params, batch["x"])}

    init_state, step = make_train_step(
        apply,
        None,
        optax.adam(0.01),
        losses={"task": loss_fn},
        transform=jc.chain(transform_of(penalty=penalty), quantization_aware(QuantSpec(bits=8))),
        transform_optimizer=optax.adam(0.05),
    )
    rng = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(rng.normal(size=(16, 12)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32),
    }
    state, batch = init_state(place(make_params()), key=KEY), batch_place(batch)
    for _ in range(steps):
        state, _ = step(state, (), batch)
    assert len(traces) == 1
    return state


def test_training_traces_once_and_is_the_same_on_eight_devices_and_after_a_checkpoint(tmp_path):
    penalty = gates.lagrangian(sparsity=0.5, warm_up=optax.linear_schedule(0.0, 1.0, 10))
    alone = run(lambda tree: tree, lambda tree: tree, penalty)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = run(
        lambda tree: jax.device_put(tree, NamedSharding(mesh, P())),
        lambda tree: jax.device_put(tree, NamedSharding(mesh, P("data"))),
        penalty,
    )
    assert len(spread.params["first"]["kernel"].sharding.device_set) == 8
    for x, y in zip(jax.tree.leaves(alone.transform_state), jax.tree.leaves(spread.transform_state), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
        assert not x.weak_type
    assert int(alone.transform_state.fixed[0]) == 4
    jc.checkpoint.save(tmp_path / "state", alone.transform_state)
    restored, _ = jc.checkpoint.restore(tmp_path / "state", like=alone.transform_state)
    assert_equal_trees(restored, alone.transform_state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ()}, "Nothing has a gate"),
        ({"clamp": (1.0, 1.0)}, "`clamp` must be"),
        ({"drop_rate": {"heads": 0.5}}, "`drop_rate` names 'heads'; there are first/kernel, inputs, neurons"),
        ({"drop_rate": 0.0}, r"A drop rate must be in \(0, 1\), got 0"),
        ({"select": by_path("first/kernel")}, "'first/kernel' cannot have gates of single weights"),
        (
            {"groups": [UnitGroup(name="rows", count=12, slices=(UnitSlices(path="first/kernel", axis=0),))]},
            "'rows' has no gated slices",
        ),
        (
            {"groups": [UnitGroup(name="rows", count=2, slices=(UnitSlices(path="none", axis=0, gated=True),))]},
            "'rows' needs the leaf 'none'",
        ),
        ({"penalty": lambda_penalty({"heads": 1.0}, examples=1)}, "`strength` names 'heads'"),
        ({"penalty": gates.lagrangian(budget=1e6)}, "above the full cost, 186"),
        ({"penalty": gates.lagrangian(sparsity=1.0)}, "the least possible is 4 of 186"),
        ({"penalty": gates.lagrangian(sparsity=0.5, costs={})}, "counts nothing"),
        ({"penalty": smallest_with(loss_bound=1.0, costs={})}, "counts nothing"),
        ({"penalty": gates.lagrangian(shape={"heads": 2})}, "`shape` names 'heads'; there are inputs, neurons"),
        ({"penalty": gates.lagrangian(shape={"neurons": 7})}, "asks for 7 neurons; .*'second/kernel' has 6"),
    ],
)
def test_mistakes_are_named(options, message):
    options = {"groups": GROUPS, "penalty": PENALTY} | options
    with pytest.raises(ValueError, match=message):
        gates.hard_concrete(options.pop("groups"), **options).init(make_params(), key=KEY)


def test_integers_cannot_be_gated():
    params = make_params() | {"last": {"kernel": jnp.ones((6, 4), jnp.int32), "bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match="'last/kernel' has dtype int32: gates multiply floats"):
        transform_of().init(params, key=KEY)
