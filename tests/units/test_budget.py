"""Which units stay under a budget, and the units of layers in a row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import gates, trace
from jaxcompress._src.units.costs import expected_cost
from jaxcompress._src.units.group import check_groups
from jaxcompress.structured import UnitGroup, UnitSlices, flop_costs, parameter_costs, select_units, shrink
from jaxcompress.tree import by_path

NAMES = ["first", "second", "last"]


def make_params(widths=(9, 7, 5, 3)):
    rng = np.random.default_rng(0)
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=size), jnp.float32), "bias": jnp.ones(size[1])}
        for name, size in zip(NAMES, itertools.pairwise(widths), strict=True)
    }


PARAMS = make_params()
GROUPS = gates.layer_units(PARAMS, [f"{name}/kernel" for name in NAMES])
FULL = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))


def scores(seed=0, groups=GROUPS):
    rng = np.random.default_rng(seed)
    return {group.name: rng.normal(size=group.count).astype(np.float32) for group in groups}


def select(*args, **options):
    """The units that `select_units` keeps by rank; the run-time types of the tests would refuse some mistakes first."""
    options = {"rule": "rank"} | options
    return select_units(*args, **options).keep


def left_over(keep, params=PARAMS, groups=GROUPS):
    return sum(leaf.size for leaf in jax.tree.leaves(shrink(params, groups, keep)))


def _reference(values, groups, params, budget):
    """One unit after another, highest first, whatever fits: by removing them for real."""
    keep = {name: np.zeros(len(v), bool) for name, v in values.items()}
    order = sorted(((-v[i], name, i) for name, v in values.items() for i in range(len(v))))
    for _, name, i in order:
        keep[name][i] = True
        if left_over(keep, params, groups) > budget:
            keep[name][i] = False
    return keep


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [20, 60, 111, FULL - 1])
def test_against_trying_unit_after_unit(seed, budget):
    found = select(scores(seed), GROUPS, PARAMS, budget=budget)
    expected = _reference(scores(seed), GROUPS, PARAMS, budget)
    for name, kept in expected.items():
        np.testing.assert_array_equal(found[name], kept)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_the_asked_size_is_reached_within_one_percent(sparsity):
    params = make_params((784, 300, 100, 10))
    groups = gates.layer_units(params, [f"{name}/kernel" for name in NAMES])
    keep = select(scores(1, groups), groups, params, sparsity=sparsity)
    full = sum(leaf.size for leaf in jax.tree.leaves(params))
    target = (1 - sparsity) * full
    assert 0.99 * target <= left_over(keep, params, groups) <= target
    if sparsity == 0:
        assert all(kept.all() for kept in keep.values())


def test_a_target_of_one_and_one_that_is_too_small():
    with pytest.raises(ValueError, match=rf"budget 0.* the least possible is 3 of {FULL} \(sparsity 0.97"):
        select(scores(), GROUPS, PARAMS, sparsity=1.0)
    keep = select(scores(), GROUPS, PARAMS, budget=3)
    assert left_over(keep) == 3
    keep = select(scores(), GROUPS, PARAMS, sparsity=1, costs=parameter_costs(PARAMS, select=by_path("first/.*")))
    small = shrink(PARAMS, GROUPS, keep)
    assert small["first"]["kernel"].size == small["first"]["bias"].size == 0
    # One of each group: 1 x 1 + 1, 1 x 1 + 1, 1 x 3 + 3.
    with pytest.raises(ValueError, match=f"the least possible is 10 of {FULL}"):
        select(scores(), GROUPS, PARAMS, budget=9, at_least=1)
    keep = select(scores(), GROUPS, PARAMS, budget=10, at_least=1)
    assert [kept.sum() for kept in keep.values()] == [1, 1, 1]
    assert all(kept[np.argmax(scores()[name])] for name, kept in keep.items())
    keep = select(scores(), GROUPS, PARAMS, budget=40, at_least={"inputs": 4, "second/kernel": 2})
    assert keep["inputs"].sum() >= 4
    assert keep["second/kernel"].sum() >= 2


def test_equal_scores_are_dealt_evenly():
    groups = [
        UnitGroup(name=f"rows{i}", count=count, slices=(UnitSlices(path=f"w{i}", axis=0, gated=True),))
        for i, count in enumerate((10, 20))
    ]
    params = {"w0": jnp.ones((10, 3)), "w1": jnp.ones((20, 3))}
    keep = select({"rows0": np.zeros(10), "rows1": np.zeros(20)}, groups, params, sparsity=0.5)
    assert keep["rows0"].tolist() == [True] * 5 + [False] * 5
    assert keep["rows1"].tolist() == [True] * 10 + [False] * 10


def test_groups_of_one_unit_and_of_one_weight():
    group = UnitGroup(name="all", count=1, slices=(UnitSlices(path="w", axis=0, unit=0, gated=True),))
    params = {"w": jnp.ones((4, 2)), "v": jnp.ones((1, 1))}
    single = UnitGroup(name="one", count=1, slices=(UnitSlices(path="v", axis=0, gated=True),))
    for budget, expected in ((9, (True, True)), (8, (True, False)), (7, (False, True)), (0, (False, False))):
        keep = select({"all": [1.0], "one": [0.0]}, [group, single], params, budget=budget)
        assert (bool(keep["all"][0]), bool(keep["one"][0])) == expected


def test_a_layer_that_goes_leaves_room_for_others():
    heads = [
        UnitGroup(name=f"heads{i}", count=2, slices=(UnitSlices(path=f"w{i}", axis=0, width=2, gated=True),))
        for i in range(2)
    ]
    layers = UnitGroup(
        name="layers",
        count=2,
        slices=tuple(UnitSlices(path=f"w{i}", axis=0, unit=i, gated=True) for i in range(2)),
    )
    params = {f"w{i}": jnp.ones((4, 5)) for i in range(2)}
    values = {"heads0": [3.0, 3.0], "heads1": [2.0, 1.0], "layers": [-1.0, 2.0]}
    keep = select(values, [*heads, layers], params, budget=20)
    assert keep["layers"].tolist() == [False, True]
    assert left_over(keep, params, [*heads, layers]) == 20


def test_flops_and_repeated_slices():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 1, 4)), "bias": jnp.ones(4)},
        "dense": {"kernel": jnp.ones((36 * 4, 5)), "bias": jnp.ones(5)},
    }

    def model(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(x + params["conv"]["bias"][None, None, None]).reshape(len(x), -1) @ params["dense"]["kernel"]

    groups = gates.layer_units(params, ["conv/kernel", "dense/kernel"])
    assert [(group.name, group.kind, group.count) for group in groups] == [
        ("inputs", "inputs", 1),
        ("conv/kernel", "channels", 4),
    ]
    assert groups[1].slices[-1].repeat == 36
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    costs = flop_costs(params, layouts=trace.layouts(model, params, x))
    keep = select({"inputs": [5.0], "conv/kernel": [0.0, 3.0, 1.0, 2.0]}, groups, params, sparsity=0.5, costs=costs)
    assert keep["conv/kernel"].tolist() == [False, True, False, True]
    values = {name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()}
    masked = gates.multiply_gates(params, groups, values)
    np.testing.assert_allclose(model(shrink(params, groups, keep), x), model(masked, x), rtol=1e-5)


def test_the_size_is_that_of_the_expected_one_at_certain_gates():
    for seed in range(5):
        keep = {name: values > 0 for name, values in scores(seed).items()}
        gates_ = {name: jnp.asarray(own, jnp.float32) for name, own in keep.items()}
        assert expected_cost(PARAMS, GROUPS, keep) == left_over(keep) == float(expected_cost(PARAMS, GROUPS, gates_))


def test_single_weights_compete_with_units():
    params = {"w": jnp.ones((2, 3)), "v": jnp.ones((4, 2))}
    rows = UnitGroup(name="rows", count=4, slices=(UnitSlices(path="v", axis=0, gated=True),))
    values = {"rows": [0.5, 3.0, -1.0, 0.0], "w": np.array([[1.0, -2.0, 0.1], [4.0, 0.2, -3.0]])}
    keep = select(values, [rows], params, budget=7)
    assert keep["rows"].tolist() == [True, True, False, False]
    assert keep["w"].tolist() == [[True, False, False], [True, True, False]]
    masked = gates.multiply_gates(
        params, [rows], gates.gate_values(dict.fromkeys(["w"], jnp.full((2, 3), 4.0)), keep=keep)
    )
    np.testing.assert_array_equal(masked["w"], keep["w"].astype(np.float32))


def test_an_exact_shape():
    keep = select(scores(), GROUPS, PARAMS, shape={"neurons": 3}, rule="total")
    assert keep["inputs"].all()
    for name in ("first/kernel", "second/kernel"):
        assert set(np.flatnonzero(keep[name])) == set(np.argsort(-scores()[name])[:3])
    keep = select(scores(), GROUPS, PARAMS, shape={"neurons": 0, "inputs": 9}, rule="total")
    assert keep["inputs"].all()
    assert not keep["first/kernel"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give one of `sparsity`, `budget` and `shape`"),
        ({"sparsity": 0.5, "budget": 3.0}, "Give one of"),
        ({"sparsity": -0.1}, r"must be in \[0, 1\]"),
        ({"shape": {"heads": 1}}, "`shape` names 'heads'"),
        ({"shape": {"neurons": 6}}, "'second/kernel' has 5"),
        ({"budget": 50, "at_least": {"heads": 1}}, "`at_least` names 'heads'"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        select(scores(), GROUPS, PARAMS, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": np.zeros(3)}, r"'inputs' need the shape \(9,\), got \(3,\)"),
        ({"inputs": np.full(9, np.nan)}, "'inputs' hold NaN"),
        ({"others": np.zeros(3)}, "'others', which is neither a unit group nor a leaf"),
    ],
)
def test_scores_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        select(scores() | change, GROUPS, PARAMS, budget=50)


def test_layers_without_biases_and_of_convolutions():
    params = {"a": jnp.ones((3, 3, 2, 4)), "b": jnp.ones((3, 3, 4, 6)), "c": jnp.ones((6, 5))}
    groups = gates.layer_units(params, ["a", "b", "c"], inputs=False)
    check_groups(groups, params)
    assert [(group.name, group.count, len(group.slices)) for group in groups] == [("a", 4, 2), ("b", 6, 2)]
    assert [group.gated[0].axis for group in groups] == [2, 0]


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ([], "`kernels` is empty"),
        (["first/bias"], "'first/bias' is no kernel of two or four axes. The leaves are:\n  first/bias"),
        (["absent"], "'absent' is no kernel"),
        (["first/kernel", "last/kernel"], "'last/kernel' reads 5 features, and 'first/kernel' has 7 outputs"),
    ],
)
def test_layers_that_do_not_fit_are_named(kernels, message):
    with pytest.raises(ValueError, match=message):
        gates.layer_units(PARAMS, kernels)


def test_budgets_that_are_no_numbers_and_no_units():
    rows = UnitGroup(name="rows", count=4, slices=(UnitSlices(path="w", axis=0),))
    params = {"w": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="`budget` must be at least 0, got nan"):
        select({"rows": [1.0, 2.0, 3.0, 4.0]}, [rows], params, budget=float("nan"))
    with pytest.raises(ValueError, match="`scores` has no entry for the unit group 'rows'"):
        select({}, [rows], params, sparsity=0.0)
