"""Selection against brute force; budgets met as closely as units allow."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress import trace, tree
from jaxcompress._src.units.costs import unit_costs
from jaxcompress.models import BertConfig, from_pretrained, make_module, resized, save_pretrained, unit_groups
from jaxcompress.structured import (
    UnitGroup,
    UnitSlices,
    flop_costs,
    magnitude_unit_scores,
    parameter_costs,
    select_units,
    shrink,
)


def _problem(counts, widths, fixed=3):
    """Groups of `count` rows of `width` weights each, and leaves that belong to nobody."""
    groups = [
        UnitGroup(name=f"g{i}", kind=f"k{width}", count=count, slices=(UnitSlices(path=f"w{i}", axis=0, gated=True),))
        for i, (count, width) in enumerate(zip(counts, widths, strict=True))
    ]
    params = {f"w{i}": jnp.ones((count, width)) for i, (count, width) in enumerate(zip(counts, widths, strict=True))}
    return groups, params | {"fixed": jnp.ones(fixed)}


def _split(flat, counts):
    return dict(zip((f"g{i}" for i in range(len(counts))), np.split(flat, np.cumsum(counts)[:-1]), strict=True))


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    widths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    sparsity=st.floats(0.0, 1.0),
    scores=st.lists(st.integers(0, 5), min_size=12, max_size=12),
)
def test_no_choice_within_the_budget_scores_higher(counts, widths, sparsity, scores):
    groups, params = _problem(counts, widths[: len(counts)], fixed=0)
    values = np.array(scores[: sum(counts)], float)
    cost = np.repeat(widths[: len(counts)], counts)
    found = select_units(_split(values, counts), groups, params, sparsity=sparsity)
    kept = np.concatenate([found.keep[group.name] for group in groups])
    budget = (1 - sparsity + 1e-12) * cost.sum()
    best = max(
        values[np.array(choice, bool)].sum()
        for choice in itertools.product([0, 1], repeat=len(values))
        if cost[np.array(choice, bool)].sum() <= budget
    )
    assert found.exact
    assert found.cost == cost[kept].sum() <= budget
    assert values[kept].sum() == best


def test_the_budget_is_filled_even_by_units_without_a_score():
    groups, params = _problem([6], [2], fixed=0)
    found = select_units({"g0": np.zeros(6)}, groups, params, sparsity=0.5)
    np.testing.assert_array_equal(found.keep["g0"], [True] * 3 + [False] * 3)


def test_what_is_left_has_the_size_that_was_promised(config, params):
    groups = unit_groups(config)
    rng = np.random.default_rng(0)
    costs = parameter_costs(params, select=tree.by_path("bert/encoder/.*"))
    for share in (0.3, 0.5, 0.77, 1.0):
        scores = {group.name: rng.random(group.count) for group in groups}
        found = select_units(scores, groups, params, sparsity=1 - share, costs=costs)
        small = shrink(params, groups, found.keep)["bert"]["encoder"]
        assert sum(leaf.size for _, leaf in tree.leaves_with_paths(small)) == found.cost
        assert found.sparsity >= 1 - share
        removed = [unit_costs(group, params, costs=costs)[~found.keep[group.name]] for group in groups]
        assert min(np.concatenate(removed), default=np.inf) > share * found.total - found.cost
    assert all(kept.all() for kept in found.keep.values())


@pytest.mark.parametrize("rule", ["total", "kind", "group"])
def test_shares_of_zero_and_one(rule):
    groups, params = _problem([3, 2], [2, 5], fixed=0)
    scores = {"g0": [1.0, 1.0, 1.0], "g1": [0.0, 2.0]}
    nothing = select_units(scores, groups, params, sparsity=1, rule=rule)
    assert not any(kept.any() for kept in nothing.keep.values())
    assert nothing.cost == nothing.least == 0
    everything = select_units(scores, groups, params, sparsity=0, rule=rule)
    assert all(kept.all() for kept in everything.keep.values())
    assert everything.sparsity == 0


def test_share_below_what_units_allow_names_the_least():
    groups, params = _problem([3, 2], [2, 5], fixed=4)
    scores = {"g0": np.ones(3), "g1": np.ones(2)}
    with pytest.raises(ValueError, match=r"The budget 2 .* the least possible is 4 of 20 \(sparsity 0\.8\)"):
        select_units(scores, groups, params, sparsity=0.9)
    least = select_units(scores, groups, params, sparsity=0.8)
    assert least.cost == least.least == 4


def test_equal_scores_keep_the_earlier_group_and_the_lower_index():
    groups, params = _problem([3, 3], [2, 2], fixed=0)
    found = select_units({"g0": np.ones(3), "g1": np.ones(3)}, groups, params, sparsity=0.33)
    np.testing.assert_array_equal(np.concatenate(list(found.keep.values())), [1, 1, 1, 1, 0, 0])


def test_every_pool_keeps_the_same_share():
    groups, params = _problem([8, 8, 4], [1, 1, 2], fixed=0)
    scores = {"g0": np.arange(8) + 10.0, "g1": np.arange(8.0), "g2": np.arange(4.0)}
    by_kind = select_units(scores, groups, params, sparsity=0.5, rule="kind").keep
    np.testing.assert_array_equal([kept.sum() for kept in by_kind.values()], [8, 0, 2])
    by_group = select_units(scores, groups, params, sparsity=0.5, rule="group").keep
    np.testing.assert_array_equal(by_group["g1"], [0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(by_group["g2"], [0, 0, 1, 1])


def test_many_costs_are_selected_greedily(monkeypatch):
    from jaxcompress._src.units import knapsack

    monkeypatch.setattr(knapsack, "_MOST_COMBINATIONS", 1)
    groups, params = _problem([2, 2, 2], [1, 2, 5], fixed=0)
    found = select_units({"g0": [1, 0], "g1": [4, 1], "g2": [1, 4.9]}, groups, params, sparsity=0.55)
    assert not found.exact
    np.testing.assert_array_equal(np.concatenate(list(found.keep.values())), [1, 1, 1, 1, 0, 0])
    assert found.cost == 6


def test_units_of_one_group_may_differ_in_cost():
    slices = (UnitSlices(path="w0", axis=0, unit=0, gated=True), UnitSlices(path="w1", axis=0, unit=1, gated=True))
    groups = [UnitGroup(name="layers", count=2, slices=slices)]
    params = {"w0": jnp.ones((2, 4)), "w1": jnp.ones((2, 1))}
    assert select_units({"layers": [1.0, 1.0]}, groups, params, sparsity=0.5).keep["layers"].tolist() == [False, True]
    assert select_units({"layers": [1.0, 1.0]}, groups, params, sparsity=0.2).keep["layers"].tolist() == [True, False]


def test_flops_of_leaves_that_are_used_more_often_weigh_more():
    groups, params = _problem([2, 2], [3, 3], fixed=0)

    def apply(params, x):
        return (x @ params["w0"]).sum() + (x[:1] @ params["w1"]).sum()

    costs = flop_costs(params, layouts=trace.layouts(apply, params, jnp.ones((5, 2))))
    assert costs == {"w0": 10.0, "w1": 2.0}
    found = select_units({"g0": [1, 1], "g1": [1, 1]}, groups, params, sparsity=0.4, costs=costs)
    assert found.total == 72
    assert [kept.tolist() for kept in found.keep.values()] == [[True, False], [True, True]]


def test_what_costs_nothing_stays():
    groups, params = _problem([2, 2], [3, 3], fixed=0)
    scores = {"g0": [1, 1], "g1": [0, 0]}
    found = select_units(scores, groups, params, sparsity=1, costs=parameter_costs(params, select=tree.by_path("w0")))
    assert [kept.tolist() for kept in found.keep.values()] == [[False, False], [True, True]]


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"g0": [1.0, 1.0]}, {}, "`scores` has no entry for the unit group 'g1'"),
        ({"g0": [1.0], "g1": [1.0]}, {}, r"The scores of 'g0' need the shape \(2,\), got \(1,\)"),
        ({"g0": [1.0, np.nan], "g1": [1.0]}, {}, "The scores of 'g0' hold NaN or Inf"),
        ({"g0": [1.0, -1.0], "g1": [1.0]}, {}, "The scores of 'g0' must not be negative"),
        ({"g0": [1.0, 1.0], "g1": [1.0]}, {"sparsity": 1.5}, r"`sparsity` must be in \[0, 1\], got 1.5"),
        (
            {"g0": [1.0, 1.0], "g1": [1.0]},
            {"rule": "row"},
            "`rule` must be one of 'total', 'rank', 'kind', 'group', got 'row'",
        ),
        (
            {"g0": [1.0, 1.0], "g1": [1.0]},
            {"costs": {"w7": 1.0}},
            "`costs` counts nothing .* check its paths",
        ),
    ],
)
def test_bad_input_is_named(scores, options, message):
    groups, params = _problem([2, 1], [3, 3])
    with pytest.raises(ValueError, match=message):
        _unchecked(scores, groups, params, **({"sparsity": 0.5} | options))


def _unchecked(*args, **options):
    """The run-time types of the tests would refuse some of these first."""
    function = select_units
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function(*args, **options)


def test_groups_that_share_a_leaf_are_refused(config, params):
    groups = unit_groups(config, kinds=["heads", "columns", "attentions", "ffns"])
    scores = {group.name: np.ones(group.count) for group in groups}
    with pytest.raises(ValueError, match=r"/layer/\d/heads' and 'bert/encoder/attentions' both own weights"):
        select_units(scores, groups, params, sparsity=0.5)
    with pytest.raises(ValueError, match="`groups` is empty"):
        select_units({}, [], params, sparsity=0.5)


def test_channels_behind_a_flatten_cost_a_row_for_every_position():
    """The share that was asked for is the share that is left."""
    parts = (UnitSlices(path="conv", axis=3, gated=True), UnitSlices(path="dense", axis=0, repeat=36))
    group = UnitGroup(name="channels", count=4, slices=parts)
    rng = np.random.default_rng(0)
    params = {"conv": jnp.asarray(rng.normal(size=(3, 3, 1, 4))), "dense": jnp.asarray(rng.normal(size=(144, 5)))}
    assert unit_costs(group, params).tolist() == [9 + 180] * 4
    for share, kept in ((0.95, 3), (0.75, 3), (0.5, 2), (0.25, 1)):
        found = select_units(magnitude_unit_scores(params, [group]), [group], params, sparsity=1 - share)
        small = shrink(params, [group], found.keep)
        left = sum(leaf.size for leaf in small.values()) / (36 + 720)
        assert found.keep["channels"].sum() == kept
        assert found.sparsity == pytest.approx(1 - left)
        assert left <= share
    # What a channel owns is 9 weights of the one kernel and 36 rows of the other.
    norms = [
        np.sqrt(((np.asarray(params["conv"], np.float64)[..., i] ** 2).sum() + (rows**2).sum()) / 189)
        for i, rows in enumerate(np.asarray(params["dense"], np.float64).reshape(36, 4, 5).swapaxes(0, 1))
    ]
    np.testing.assert_allclose(magnitude_unit_scores(params, [group])["channels"], norms, rtol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    sparsity=st.floats(0.0, 1.0), scores=st.lists(st.integers(0, 5), min_size=14, max_size=14), wide=st.integers(1, 5)
)
def test_equal_widths_against_brute_force(sparsity, scores, wide):
    """Two layers of three heads and of four columns."""
    counts, widths = [3, 3, 4, 4], [wide, wide, 2, 2]
    groups, params = _problem(counts, widths, fixed=0)
    groups = [dataclasses.replace(group, kind="heads" if i < 2 else "columns") for i, group in enumerate(groups)]
    values = _split(np.array(scores, float), counts)
    found = select_units(values, groups, params, sparsity=sparsity, uniform=True)
    numbers = [int(found.keep[f"g{i}"].sum()) for i in range(4)]
    assert numbers[0] == numbers[1]
    assert numbers[2] == numbers[3]
    total = 6 * wide + 16
    best = {name: np.cumsum([0, *sorted(own, reverse=True)]) for name, own in values.items()}
    wanted = max(
        sum(best[f"g{i}"][heads if i < 2 else columns] for i in range(4))
        for heads, columns in itertools.product(range(4), range(5))
        if 2 * heads * wide + 4 * columns <= (1 - sparsity + 1e-12) * total
    )
    assert sum(values[name][kept].sum() for name, kept in found.keep.items()) == wanted
    assert found.cost == 2 * numbers[0] * wide + 4 * numbers[2] <= (1 - sparsity + 1e-12) * total
    pools = select_units(values, groups, params, sparsity=sparsity, uniform=True, rule="kind")
    assert pools.keep["g0"].sum() == pools.keep["g1"].sum()
    assert pools.cost <= (1 - sparsity + 1e-12) * total


def test_a_tree_of_equal_widths_goes_back_into_a_scan_and_into_hugging_face(draw, tmp_path):
    config = BertConfig(
        vocab_size=30,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=10,
        max_position_embeddings=8,
    )
    params, groups = draw(config), unit_groups(config, kinds=["columns"])
    keep = select_units(magnitude_unit_scores(params, groups), groups, params, sparsity=0.1, uniform=True).keep
    assert 0 < keep["encoder/layer/0/columns"].sum() == keep["encoder/layer/1/columns"].sum() < 10
    small = shrink(params, groups, keep)
    layers = small.get("bert", small)["encoder"]["layer"]
    jax.tree.map(lambda *same: jnp.stack(same), layers["0"], layers["1"])
    save_pretrained(tmp_path / "small", resized(make_module(config), small), small)
    module, restored = from_pretrained(tmp_path / "small")
    assert set(module.config.intermediate_size) == {int(keep["encoder/layer/0/columns"].sum())}
    jax.tree.map(np.testing.assert_array_equal, restored, small)


def test_equal_widths_that_cannot_be_are_named():
    groups, params = _problem([3, 4], [2, 2])
    scores = {"g0": np.ones(3), "g1": np.ones(4)}
    with pytest.raises(ValueError, match="'g1' has 4 units, another of kind 'k2' has 3"):
        select_units(scores, groups, params, sparsity=0.5, uniform=True)
    slices = (UnitSlices(path="w0", axis=0, unit=0), UnitSlices(path="fixed", axis=0, unit=1))
    layers = [UnitGroup(name="layers", count=2, slices=slices)]
    with pytest.raises(ValueError, match="the units of group 'layers' differ in cost"):
        select_units({"layers": np.ones(2)}, layers, params, sparsity=0.1, uniform=True)
