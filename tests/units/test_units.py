import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.units.costs import expected_cost, unit_costs
from jaxcompress._src.units.group import check_groups
from jaxcompress._src.units.slices import multiply_units, sum_units, unit_masks
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.structured import UnitGroup, UnitSlices, shrink

HEADS = UnitGroup(
    name="heads",
    count=3,
    kind="heads",
    slices=(
        UnitSlices(path="fused", axis=0, offset=0, width=2),
        UnitSlices(path="fused", axis=0, offset=6, width=2),
        UnitSlices(path="out/kernel", axis=0, width=2, gated=True),
    ),
)
LAYERS = UnitGroup(
    name="layers",
    count=2,
    kind="layers",
    slices=(
        UnitSlices(path="fused", axis=0, unit=0),
        UnitSlices(path="out/kernel", axis=0, unit=0, gated=True),
        UnitSlices(path="out/bias", axis=None, unit=0, gated=True),
    ),
)


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "fused": jnp.asarray(rng.normal(size=(12, 5)), jnp.float32),
        "out": {"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "bias": jnp.ones(4)},
    }


def test_gates_multiply_the_gated_slices_only(params):
    values = {"heads": jnp.array([2.0, 0.0, 1.0]), "layers": jnp.array([0.5, 7.0])}
    found = multiply_units(params, [HEADS, LAYERS], values)
    factor = np.repeat([2.0, 0.0, 1.0], 2)[:, None] * 0.5
    np.testing.assert_array_equal(found["out"]["kernel"], params["out"]["kernel"] * factor)
    np.testing.assert_array_equal(found["out"]["bias"], 0.5 * params["out"]["bias"])
    np.testing.assert_array_equal(found["fused"], params["fused"])


def test_the_gradient_of_a_gate_is_the_sum_over_its_slices(params):
    def loss(z):
        return (multiply_units(params, [HEADS], {"heads": z})["out"]["kernel"] ** 2).sum()

    grads = jax.jit(jax.grad(loss))(jnp.ones(3))
    squares = jax.tree.map(jnp.square, params)
    np.testing.assert_allclose(grads, 2 * sum_units(HEADS, squares, gated_only=True), rtol=1e-6)


def test_removing_takes_the_same_indices_as_masking(params):
    keep = {"heads": np.array([True, False, True])}
    masks = unit_masks(params, [HEADS], keep)
    small = shrink(params, [HEADS], keep)
    assert small["fused"].shape == (8, 5)
    assert small["out"]["kernel"].shape == (4, 4)
    for path, leaf, full in (
        ("fused", small["fused"], params["fused"]),
        ("out/kernel", small["out"]["kernel"], params["out"]["kernel"]),
    ):
        rows = np.flatnonzero(np.broadcast_to(masks[path], full.shape).all(axis=1))
        np.testing.assert_array_equal(leaf, np.asarray(full)[rows])
    assert small["out"]["bias"] is params["out"]["bias"]


def test_a_layer_takes_everything_of_its_heads(params):
    small = shrink(params, [HEADS, LAYERS], {"heads": [True] * 3, "layers": [False, True]})
    assert small["fused"].shape == (0, 5)
    assert small["out"]["kernel"].shape == (0, 4)
    np.testing.assert_array_equal(small["out"]["bias"], np.zeros(4))
    masks = unit_masks(params, [HEADS, LAYERS], {"layers": jnp.array([False, True])})
    assert not any(bool(mask.any()) for mask in masks.values())


@pytest.mark.parametrize("kept", [(True, True, True), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("layer", [True, False])
def test_the_expected_size_is_exact_for_certain_units(params, kept, layer):
    keep = {"heads": np.array(kept), "layers": np.array([layer, True])}
    small = shrink(params, [HEADS, LAYERS], keep)
    size = sum(leaf.size for leaf in jax.tree.leaves(small)) - (0 if layer else 4)
    assert float(expected_cost(params, [HEADS, LAYERS], keep)) == size


def test_the_expected_size_is_the_mean_over_draws(params):
    """Units are independent: the expectation over all eight outcomes, by their probabilities."""
    p = np.array([0.9, 0.3, 0.5])
    total = 0.0
    for outcome in np.ndindex(2, 2, 2):
        chance = np.prod(np.where(outcome, p, 1 - p))
        total += chance * float(expected_cost(params, [HEADS], {"heads": np.array(outcome, bool)}))
    np.testing.assert_allclose(float(expected_cost(params, [HEADS], {"heads": p})), total, rtol=1e-6)


def test_counts_of_single_units_and_of_weighted_leaves(params):
    assert unit_costs(HEADS, params)[0] == 2 * 5 + 2 * 5 + 2 * 4
    assert unit_costs(LAYERS, params)[0] == 12 * 5 + 6 * 4 + 4
    found = expected_cost(params, [HEADS], {"heads": [1.0, 1.0, 0.5]}, costs={"out/kernel": 10.0})
    assert float(found) == 10 * 5 * 4


def test_sums_of_units_of_whole_leaves(params):
    found = sum_units(LAYERS, params)
    np.testing.assert_allclose(found, [sum(float(leaf.sum()) for leaf in jax.tree.leaves(params)), 0.0], rtol=1e-6)


def test_bfloat16_leaves_keep_their_dtype():
    params = {"fused": jnp.ones((12, 5)), "out": {"kernel": jnp.ones((6, 4), jnp.bfloat16), "bias": jnp.ones(4)}}
    found = multiply_units(params, [HEADS], {"heads": jnp.array([0.5, 0.0, 1.0])})
    assert found["out"]["kernel"].dtype == jnp.bfloat16
    assert sum_units(HEADS, params).dtype == jnp.float32


def _group(name="other", count=1, **options):
    return UnitGroup(name=name, count=count, slices=(UnitSlices(**options),))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (lambda: _group(path="absent", axis=0), "needs the leaf 'absent'. The leaves are:\n  fused"),
        (lambda: _group(path="fused", axis=2), r"needs axis 2 of 'fused', whose shape is \(12, 5\)"),
        (lambda: _group(path="fused", axis=1, count=6), "needs indices 0 to 5 on axis 1"),
        (lambda: _group(path="out/kernel", axis=0, count=2, width=3), "in conflict on axis 0 of 'out/kernel'"),
        (lambda: _group(path="out/kernel", axis=0, count=1, offset=1, width=4), "in conflict on axis 0"),
        (lambda: _group("heads", path="fused", axis=1), "Two unit groups have the name 'heads'"),
        (lambda: _group(path="fused", axis=0, count=0), "`count` must be at least 1"),
        (lambda: _group(path="fused", axis=0, unit=1), "belongs to unit 1, but there are 1"),
        (lambda: _group(path="fused", axis=None), "`axis` may be None only where `unit` is given"),
        (lambda: _group(path="fused", axis=-1), "`axis` must not be negative"),
        (lambda: _group(path="fused", axis=0, width=0), "`width` at least 1"),
        (lambda: _group(path="fused", axis=0, repeat=0), "`repeat` at least 1, got 0, 1 and 0"),
        (lambda: _group(path="fused", axis=0, count=5, repeat=3), "needs indices 0 to 14 on axis 0 of 'fused'"),
        (lambda: _group(path="out/kernel", axis=0, count=3, repeat=2), "in conflict on axis 0 of 'out/kernel'"),
    ],
)
def test_bad_groups_are_named(params, group, message):
    with pytest.raises(ValueError, match=message):
        check_groups([HEADS, group()], params)


def test_nested_and_disjoint_groups_are_no_conflict(params):
    pairs = _group("pairs", path="fused", axis=0, count=3, width=4)
    single = _group("single", path="fused", axis=0, count=12)
    behind = _group("behind", path="out/kernel", axis=1, count=4)
    check_groups([HEADS, LAYERS, single, behind], params)
    check_groups([single, pairs], params)


def test_values_of_the_wrong_length_and_compressed_leaves_are_named(params):
    with pytest.raises(ValueError, match=r"`keep\['heads'\]` needs 3 values"):
        shrink(params, [HEADS], {"heads": [True]})
    with pytest.raises(ValueError, match="'heads' needs 3 values"):
        multiply_units(params, [HEADS], {"heads": jnp.ones(2)})
    with pytest.raises(ValueError, match="Leaf 'fused' is compressed"):
        shrink(quantize(params, QuantSpec(bits=8))[0], [HEADS], {"heads": [True, False, True]})


def test_a_channel_owns_a_row_for_every_position():
    """After flattening (2, 2, 3) in the order of NHWC, channel c has the rows c, 3 + c, 6 + c and 9 + c."""
    slices = (
        UnitSlices(path="conv", axis=3),
        UnitSlices(path="dense", axis=0, offset=1, repeat=4, gated=True),
    )
    group = UnitGroup(name="channels", count=3, slices=slices)
    rng = np.random.default_rng(1)
    params = {
        "conv": jnp.asarray(rng.normal(size=(5, 5, 1, 3)), jnp.float32),
        "dense": jnp.asarray(rng.normal(size=(14, 2)), jnp.float32),
    }
    check_groups([group], params)
    assert unit_costs(group, params)[0] == 25 + 4 * 2
    rows = np.array([0, *(1 + np.array([0, 2, 3, 5, 6, 8, 9, 11])), 13])
    small = shrink(params, [group], {"channels": [True, False, True]})
    np.testing.assert_array_equal(small["dense"], np.asarray(params["dense"])[rows])
    assert small["conv"].shape == (5, 5, 1, 2)
    gates = np.array([0.5, 2.0, 3.0])
    found = multiply_units(params, [group], {"channels": gates})["dense"]
    np.testing.assert_allclose(found, params["dense"] * np.array([1, *np.tile(gates, 4), 1])[:, None], rtol=1e-6)
    expected = np.asarray(params["dense"])[1:13].reshape(4, 3, 2).sum(axis=(0, 2))
    np.testing.assert_allclose(sum_units(group, params, gated_only=True), expected, rtol=1e-5)
    size = expected_cost(params, [group], {"channels": [1.0, 0.5, 0.0]})
    assert float(size) == 25 * 1.5 + 2 * (2 + 4 * 1.5)


def test_units_of_repeated_runs_may_nest_in_pixels_but_not_cut_pairs():
    params = {"dense": jnp.ones((12, 2))}
    channels = _group("channels", path="dense", axis=0, count=3, repeat=4)
    check_groups([channels, _group("rows", path="dense", axis=0, count=12)], params)
    check_groups([channels, _group("all", path="dense", axis=0, count=1, width=12)], params)
    with pytest.raises(ValueError, match="in conflict"):
        check_groups([channels, _group("pairs", path="dense", axis=0, count=6, width=2)], params)


@pytest.mark.parametrize(
    "part",
    [
        UnitSlices(path="w", axis=0, offset=2, width=3, repeat=2, gated=True),
        UnitSlices(path="w", axis=1, gated=True, repeat=5),
    ],
)
def test_sizes_sums_masks_and_removal_agree_for_any_slices(part):
    """One weight after another, by the definition of slices."""
    count, w = 2, np.random.default_rng(3).normal(size=(16, 10))
    params, group = {"w": jnp.asarray(w, jnp.float32)}, UnitGroup(name="units", count=count, slices=(part,))
    sizes, sums = np.zeros(count), np.zeros(count)
    for place in itertools.product(range(16), range(10)):
        run, within = divmod(place[part.axis] - part.offset, count * part.width)
        if place[part.axis] >= part.offset and run < part.repeat:
            sizes[within // part.width] += 1
            sums[within // part.width] += w[place]
    np.testing.assert_array_equal(unit_costs(group, params), sizes)
    np.testing.assert_allclose(sum_units(group, params), sums, rtol=1e-5)
    small = shrink(params, [group], {"units": [True, False]})
    assert small["w"].size == w.size - sizes[1]
    assert float(expected_cost(params, [group], {"units": [1.0, 0.0]})) == small["w"].size
    assert expected_cost(params, [group], {"units": np.array([True, False])}, {"w": 1.0}) == small["w"].size
    assert float(expected_cost(params, [group], {"units": jnp.array([1.0, 0.0])})) == small["w"].size
    masked = np.broadcast_to(unit_masks(params, [group], {"units": np.array([True, False])})["w"], w.shape)
    assert masked.sum() == w.size - sizes[1]
