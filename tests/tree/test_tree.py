"""Paths, selectors, partitions, keys: on dicts, FrozenDicts, NNX states and Equinox modules alike."""

import copy
import pickle

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc
from jaxcompress import tree
from jaxcompress._src.tree.checks import check_finite
from jaxcompress._src.tree.keys import split_key
from jaxcompress._src.tree.maps import leaf_paths
from jaxcompress._src.tree.unselected import map_selected
from jaxcompress.arrays import QuantizedArray


def _quantized():
    return QuantizedArray(data=jnp.ones((4, 3), jnp.int8), scale=jnp.ones((1, 3)), dtype=jnp.dtype("float32"))


def _trees():
    plain = {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    _, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    return {
        "dict": (plain, "layer/kernel"),
        "frozen": (flax.core.freeze(plain), "layer/kernel"),
        "list": ([plain["layer"], (jnp.ones((2, 2)),)], "0/kernel"),
        "nnx": (state, "kernel"),
        "equinox": (eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0)), "layers/0/weight"),
    }


@pytest.mark.parametrize("name", _trees())
def test_one_leaf_can_be_selected_in_every_container(name):
    params, path = _trees()[name]
    assert path in leaf_paths(params)
    marks = tree.by_path(path)(params)
    assert [p for p, mark in tree.leaves_with_paths(marks) if mark] == [path]
    assert jax.tree.structure(marks) == jax.tree.structure(jax.tree.map(lambda _: 0, params))


@pytest.mark.parametrize("name", _trees())
def test_partition_and_combine_are_inverse(name):
    params, _ = _trees()[name]
    trainable, rest = tree.partition_trainable(params)
    again = tree.combine(trainable, rest)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert x is y


def test_codes_are_never_trainable_and_scales_are():
    trainable, rest = tree.partition_trainable({"w": _quantized(), "key": jax.random.key(0), "name": "text"})
    assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == [(1, 3)]
    assert rest["w"].scale is tree.Unselected
    frozen, _ = tree.partition_trainable({"w": _quantized(), "b": jnp.ones(2)}, select=tree.by_path("b"))
    assert [leaf.shape for leaf in jax.tree.leaves(frozen)] == [(2,)]


def test_combine_refuses_what_is_in_both():
    with pytest.raises(ValueError, match="one of the trees only"):
        tree.combine({"a": 1}, {"a": 2})
    assert tree.combine({"a": tree.Unselected}, {"a": tree.Unselected})["a"] is tree.Unselected
    with pytest.raises(ValueError, match="structure"):
        tree.combine({"a": 1}, {"b": tree.Unselected})


def test_a_selector_that_matches_nothing_lists_what_exists():
    params = {"dense": {"kernel": jnp.ones((2, 3))}, "name": "text"}
    with pytest.raises(ValueError, match=r"by_path\('kernel'\) matches no leaf[\s\S]*dense/kernel \(2, 3\)") as caught:
        tree.by_path("kernel")(params)
    assert "name" not in str(caught.value).split("are:")[1]
    with pytest.raises(ValueError, match="by_ndim"):
        tree.by_ndim(min=3)(params)
    with pytest.raises(ValueError, match="all_of"):
        tree.all_of(tree.by_path("dense/.*"), tree.exclude(tree.by_path("dense/.*")))(params | {"other": jnp.ones(2)})
    with pytest.raises(ValueError, match="exclude"):
        tree.exclude(tree.by_path(".*"))(params)
    with pytest.raises(ValueError, match="at least one selector"):
        tree.any_of()


def test_selectors_combine():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2), "c": jnp.ones((2, 2))}
    assert tree.all_of(tree.by_ndim(min=2), tree.by_path("[ab]"))(params) == {"a": True, "b": False, "c": False}
    assert tree.any_of(tree.by_ndim(max=1), tree.by_path("a"))(params) == {"a": True, "b": True, "c": False}
    assert tree.exclude(tree.by_path("a"))(params) == {"a": False, "b": True, "c": True}
    assert tree.by_ndim(min=2)({"q": _quantized()}) == {"q": True}


def test_unselected_is_one_childless_node():
    again = pickle.loads(pickle.dumps(tree.Unselected))
    assert again is tree.Unselected is copy.deepcopy(tree.Unselected)
    assert jax.tree.leaves({"a": tree.Unselected}) == []
    assert jax.tree.map(lambda x: x + 1, {"a": tree.Unselected, "b": 1}) == {"a": tree.Unselected, "b": 2}
    assert jax.jit(lambda t: t)({"a": tree.Unselected})["a"] is tree.Unselected


def test_map_selected_passes_over_unselected_and_takes_compressed_leaves_whole():
    params = {"a": _quantized(), "b": jnp.ones(3)}
    seen = []
    out = map_selected(lambda path, mark, leaf: seen.append((path, type(leaf))), {"a": 1, "b": tree.Unselected}, params)
    assert seen == [("a", QuantizedArray)]
    assert out["b"] is tree.Unselected


def test_errors_in_maps_name_the_leaf():
    def fail(path, leaf):
        raise ValueError("bad value")

    with pytest.raises(ValueError, match="bad value") as caught:
        tree.map_with_path(fail, {"dense": {"kernel": 1}})
    assert caught.value.__notes__ == ["at leaf 'dense/kernel'"]
    with pytest.raises(ValueError, match="structure"):
        tree.map_with_path(lambda path, x, y: x, {"a": 1}, {"b": 1})


def test_paths_do_not_confuse_keys_with_dots_and_the_root_has_a_name():
    assert leaf_paths({"a.b": 1, "a": {"b": 2}}) == ["a/b", "a.b"]
    assert leaf_paths(jnp.ones(2)) == ["."]
    assert leaf_paths({"value": jnp.ones(2)}) == ["value"]


def test_keys_are_distinct_and_reproducible():
    params = {"a": jnp.ones(2), "b": {"c": _quantized()}}
    keys = split_key(jax.random.key(0), params)
    drawn = [float(jax.random.normal(key)) for key in jax.tree.leaves(keys)]
    assert len(drawn) == 2
    assert drawn[0] != drawn[1]
    again = split_key(jax.random.key(0), params)
    assert [float(jax.random.normal(key)) for key in jax.tree.leaves(again)] == drawn


def test_only_concrete_floats_are_checked_for_nan():
    check_finite("a", jnp.array([1, 2]))
    check_finite("a", np.ones(3, np.float32))
    check_finite("a", jnp.zeros((0,)))
    jax.jit(lambda x: check_finite("a", x))(jnp.array([jnp.nan]))
    with pytest.raises(ValueError, match="'a' holds 1 NaN and 2 Inf among 4"):
        check_finite("a", jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0], jnp.bfloat16))


def test_cubic_schedule_against_the_formula():
    schedule = jc.schedules.cubic(0.1, 0.7, begin=5, end=25)
    for step in range(40):
        progress = min(max((step - 5) / 20, 0.0), 1.0)
        np.testing.assert_allclose(schedule(jnp.int32(step)), 0.7 + (0.1 - 0.7) * (1 - progress) ** 3, rtol=1e-6)
    for bad in ({"initial": -0.1, "final": 0.5}, {"initial": 0.1, "final": 1.5}):
        with pytest.raises(ValueError, match="sparsity"):
            jc.schedules.cubic(**bad, begin=0, end=1)
    with pytest.raises(ValueError, match="`end` must be greater"):
        jc.schedules.cubic(0.0, 0.5, begin=5, end=5)


def test_the_statistics_of_a_leaf_are_one_leaf():
    params = {"dense": {"kernel": jnp.ones((4, 3))}, "table": jnp.ones((5, 4))}
    ids = jnp.array([1, 2])
    statistics = jc.calibration.input_statistics(lambda p, i: p["table"][i] @ p["dense"]["kernel"], params, [(ids,)])
    found = dict(tree.leaves_with_paths(statistics))
    assert {path: type(leaf) for path, leaf in found.items()} == {
        "dense/kernel": jc.calibration.InputStatistics,
        "table": jc.calibration.LookupCounts,
    }
    assert leaf_paths(statistics) == leaf_paths(params)
    counts = tree.map_with_path(lambda path, leaf: (path, float(leaf.count)), statistics)
    assert counts["dense"]["kernel"] == ("dense/kernel", 2.0)
