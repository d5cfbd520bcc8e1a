"""Masked and shrunk models are one function, and a shrunk tree needs no hand-written config."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcompress import checkpoint
from jaxcompress._src.models.bert.shapes import config_from_params
from jaxcompress._src.units.costs import unit_costs
from jaxcompress._src.units.shrink import mask_units
from jaxcompress.models import from_pretrained, make_module, resized, save_pretrained, unit_groups
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.structured import UnitGroup, UnitSlices, shrink

HEADS, COLUMNS = "bert/encoder/layer/{}/heads", "bert/encoder/layer/{}/columns"


def _random(groups, seed):
    rng = np.random.default_rng(seed)
    return {group.name: rng.random(group.count) < 0.5 for group in groups}


CHOICES = {
    "nothing removed": lambda groups: {group.name: np.ones(group.count, bool) for group in groups},
    "everything removed": lambda groups: {group.name: np.zeros(group.count, bool) for group in groups},
    "some of everything": lambda groups: _random(groups, 1),
    "one layer's heads alone": lambda groups: {HEADS.format(0): [False, True, False]},
    "no entry": lambda groups: {},
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_masked_equals_shrunk_for_heads_and_columns(config, params, module, run, choice):
    groups = unit_groups(config)
    keep = choice(groups)
    small = shrink(params, groups, keep)
    smaller = resized(module, small)
    expected = run(module, mask_units(params, groups, keep))
    np.testing.assert_allclose(run(smaller, small), expected, rtol=0, atol=1e-5)
    left = {group.name: int(np.sum(keep.get(group.name, np.ones(group.count)))) for group in groups}
    assert smaller.config.num_attention_heads == tuple(left[HEADS.format(i)] for i in range(2))
    assert smaller.config.intermediate_size == tuple(left[COLUMNS.format(i)] for i in range(2))
    assert smaller.config == config_from_params(small, config)


@pytest.mark.parametrize("attentions", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("ffns", [(False, True), (False, False)])
def test_masked_equals_shrunk_for_sublayers(config, params, module, run, attentions, ffns):
    groups = unit_groups(config, kinds=["heads", "columns", "attentions", "ffns"])
    keep = {"bert/encoder/attentions": attentions, "bert/encoder/ffns": ffns}
    small = shrink(params, groups, keep)
    smaller = resized(module, small)
    assert smaller.config.num_attention_heads == tuple(n * k for n, k in zip((3, 2), attentions, strict=True))
    assert smaller.config.intermediate_size == tuple(n * k for n, k in zip((7, 11), ffns, strict=True))
    np.testing.assert_allclose(run(smaller, small), run(module, mask_units(params, groups, keep)), rtol=0, atol=1e-5)


def test_heads_of_a_layer_that_goes_are_gone_whatever_keep_says(config, params, module, run):
    groups = unit_groups(config, kinds=["heads", "columns", "attentions", "ffns"])
    keep = {HEADS.format(0): [True, False, True], "bert/encoder/attentions": [False, True]}
    small = shrink(params, groups, keep)
    assert resized(module, small).config.num_attention_heads == (0, 2)
    masked = mask_units(params, groups, keep)
    np.testing.assert_allclose(run(resized(module, small), small), run(module, masked), rtol=0, atol=1e-5)


def test_a_layer_without_sublayers_is_two_norms(config, params, module, run):
    """What stays of a removed layer, in float64: residuals without bias, and the norms."""
    groups = unit_groups(config, kinds=["heads", "columns", "attentions", "ffns"])
    keep = {"bert/encoder/attentions": [True, False], "bert/encoder/ffns": [True, False]}
    small = shrink(params, groups, keep)
    states = run(resized(module, small), small)[config.num_labels * 2 :].reshape(3, -1, config.hidden_size)
    before, after = np.float64(states[1:])
    layer = params["bert"]["encoder"]["layer"]["1"]
    for norm in (layer["attention"]["output"]["LayerNorm"], layer["output"]["LayerNorm"]):
        before = (before - before.mean(-1, keepdims=True)) / np.sqrt(before.var(-1, keepdims=True) + 1e-12)
        before = before * np.float64(norm["scale"]) + np.float64(norm["bias"])
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "pooling"), [("encoder", "cls"), ("sequence_classification", "mean"), ("masked_lm", "cls")]
)
def test_hidden_width_runs_and_differs_by_the_norms_alone(draw, config, head, pooling):
    """The same choice by hand, with norms over the kept features only, is the shrunk model; masking is not."""
    config = dataclasses.replace(config, head=head, pooling=pooling)
    module = make_module(config)
    ids = np.array([[3, 9, 4, 7]])
    params = draw(config)
    groups = unit_groups(config, kinds=["hidden"])
    keep = {"hidden": np.arange(12) % 4 != 2}
    small = shrink(params, groups, keep)
    smaller = resized(module, small)
    assert (smaller.config.hidden_size, smaller.config.head_size) == (9, 5)
    masked = mask_units(params, groups, keep)
    found = jax.jit(smaller.apply)({"params": small}, ids)["last_hidden_state"]
    wide = jax.jit(module.apply)({"params": masked}, ids)["last_hidden_state"]
    np.testing.assert_array_equal(wide[..., 2::4], 0.0)
    gap = np.abs(np.asarray(found) - np.asarray(wide)[..., keep["hidden"]]).max()
    assert gap > 0.05  # LayerNorm over 9 features, not over 12 of which 3 are 0
    corrected = _with_norms_over_the_kept(params, ids, keep["hidden"], config, module)
    np.testing.assert_allclose(found, corrected, rtol=0, atol=2e-5)


def _with_norms_over_the_kept(params, ids, kept, config, module):
    """The embedding and encoder at full width, float64, zeros in what is removed, norms over the kept features."""
    bert = jax.tree.map(np.float64, params if config.head == "encoder" else params["bert"])
    hide = lambda x: np.where(kept, x, 0.0)  # noqa: E731

    def norm(x, of):
        x = x[..., kept]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        full = np.zeros((*x.shape[:-1], len(kept)))
        full[..., kept] = x * of["scale"][kept] + of["bias"][kept]
        return full

    def dense(x, of):
        return x @ of["kernel"] + of["bias"]

    table = bert["embeddings"]
    x = table["word_embeddings"]["embedding"][ids] + table["position_embeddings"]["embedding"][None, : ids.shape[1]]
    x = norm(hide(x + table["token_type_embeddings"]["embedding"][0]), table["LayerNorm"])
    for index, heads in enumerate(config.num_attention_heads):
        layer = bert["encoder"]["layer"][str(index)]
        q, k, v = (
            dense(x, layer["attention"]["self"][name]).reshape(*x.shape[:2], heads, 5)
            for name in ("query", "key", "value")
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(5)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
        output = layer["attention"]["output"]
        x = norm(hide(dense(context.reshape(*x.shape[:2], -1), output["dense"])) + x, output["LayerNorm"])
        inner = np.asarray(jax.nn.gelu(dense(x, layer["intermediate"]["dense"]), approximate=False), np.float64)
        x = norm(hide(dense(inner, layer["output"]["dense"])) + x, layer["output"]["LayerNorm"])
    return x[..., kept]


@pytest.mark.parametrize("seed", range(3))
def test_kept_weights_are_the_same_bits(config, params, seed):
    groups = unit_groups(config)
    keep = _random(groups, seed)
    small = shrink(params, groups, keep)
    before, after = flatten_dict(params, sep="/"), flatten_dict(small, sep="/")
    assert before.keys() == after.keys()
    touched = {part.path for group in groups for part in group.slices}
    for path in before.keys() - touched:
        assert after[path] is before[path]
    heads = np.repeat(keep[HEADS.format(0)], 5)
    path = "bert/encoder/layer/0/attention"
    np.testing.assert_array_equal(after[f"{path}/self/key/kernel"], before[f"{path}/self/key/kernel"][:, heads])
    np.testing.assert_array_equal(after[f"{path}/self/value/bias"], before[f"{path}/self/value/bias"][heads])
    np.testing.assert_array_equal(after[f"{path}/output/dense/kernel"], before[f"{path}/output/dense/kernel"][heads])
    sizes = [np.sum(unit_costs(group, params)[~keep[group.name]]) for group in groups]
    assert sum(leaf.size for leaf in after.values()) == sum(leaf.size for leaf in before.values()) - sum(sizes)


def test_shrinking_twice_equals_shrinking_once(config, params, module):
    groups = unit_groups(config)
    keep = _random(groups, 5)
    first = {name: kept for name, kept in keep.items() if name.endswith("heads")}
    half = shrink(params, groups, first)
    rest = unit_groups(resized(module, half).config)
    second = shrink(half, rest, {name: kept for name, kept in keep.items() if name.endswith("columns")})
    jax.tree.map(np.testing.assert_array_equal, second, shrink(params, groups, keep))


@pytest.mark.parametrize("choice", ["everything removed", "some of everything"])
def test_shrunk_tree_is_saved_restored_and_run(config, params, module, run, tmp_path, choice):
    groups = unit_groups(config)
    small = shrink(params, groups, CHOICES[choice](groups))
    smaller = resized(module, small)
    expected = run(smaller, small)
    checkpoint.save(tmp_path / "checkpoint", small)
    restored, _ = checkpoint.restore(tmp_path / "checkpoint")
    np.testing.assert_array_equal(run(resized(module, restored), restored), expected)
    with pytest.raises(ValueError, match="transformers cannot load this shape"):
        save_pretrained(tmp_path / "directory", smaller, small)
    save_pretrained(tmp_path / "directory", smaller, small, uneven=True)
    np.testing.assert_array_equal(run(*from_pretrained(tmp_path / "directory")), expected)


def test_uniform_shape_is_written_for_transformers_without_a_word(draw, config, run, tmp_path):
    config = dataclasses.replace(config, num_attention_heads=2, head_size=6, intermediate_size=7)
    params, groups = draw(config), unit_groups(config, kinds=["columns"])
    small = shrink(params, groups, {group.name: np.arange(7) % 3 > 0 for group in groups})
    smaller = resized(make_module(config), small)
    save_pretrained(tmp_path, smaller, small)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["num_attention_heads"], settings["intermediate_size"]) == (2, 4)
    assert "jaxcompress" not in settings
    np.testing.assert_array_equal(run(*from_pretrained(tmp_path)), run(smaller, small))


def test_sharded_parameters_shrink_to_the_same(config, params):
    mesh = jax.make_mesh((4,), ("model",))
    sharding = jax.NamedSharding(mesh, jax.P())
    split = jax.NamedSharding(mesh, jax.P("model"))
    placed = jax.tree.map(lambda x: jax.device_put(x, split if x.shape[0] % 4 == 0 else sharding), params)
    groups = unit_groups(config, kinds=["heads", "columns", "attentions", "ffns"])
    keep = _random(groups, 2)
    for function in (shrink, mask_units):
        jax.tree.map(np.testing.assert_array_equal, function(placed, groups, keep), function(params, groups, keep))


def test_hidden_units_own_every_axis_of_the_residual_stream(config, params):
    """Every leaf that shapes tie to `hidden_size` is owned along exactly those axes; 12 is no other size here."""
    (group,) = unit_groups(config, kinds=["hidden"])
    owned = {(part.path, part.axis) for part in group.slices}
    sizes = {(path, axis) for path, leaf in flatten_dict(params, sep="/").items() for axis in range(leaf.ndim)}
    leaves = flatten_dict(params, sep="/")
    assert owned == {(path, axis) for path, axis in sizes if leaves[path].shape[axis] == 12}


def test_compressed_and_stacked_leaves_are_named(config):
    groups = unit_groups(config)
    rows = UnitGroup(name="rows", count=4, slices=(UnitSlices(path="w", axis=0),))
    with pytest.raises(ValueError, match="'w' is compressed: remove units before quantizing"):
        shrink(quantize({"w": jnp.ones((4, 3))}, QuantSpec(bits=8))[0], [rows], {"rows": [True, False, True, True]})
    stacked = {"layers": {"kernel": jnp.ones((2, 3, 4))}}
    with pytest.raises(ValueError, match=r"needs the leaf 'bert/encoder/layer/0/attention.*\n  layers/kernel"):
        shrink(stacked, groups, {})


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"heads": [True]}, "`keep` names the unit group 'heads'; the groups are bert/encoder/layer/0/heads, "),
        ({HEADS.format(1): [True] * 3}, r"`keep\['bert/encoder/layer/1/heads'\]` needs 2 values, got shape \(3,\)"),
        ({HEADS.format(1): True}, r"needs 2 values, got shape \(\)"),
    ],
)
@pytest.mark.parametrize("function", [shrink, mask_units])
def test_keep_that_does_not_fit_is_named(config, params, function, keep, message):
    with pytest.raises(ValueError, match=message):
        function(params, unit_groups(config), keep)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (UnitGroup(name="x", count=2, slices=(UnitSlices(path="absent", axis=0),)), "needs the leaf 'absent'"),
        (
            UnitGroup(
                name="x",
                count=3,
                slices=(UnitSlices(path="bert/encoder/layer/0/attention/output/dense/kernel", axis=0, width=3),),
            ),
            "'bert/encoder/layer/0/heads' and 'x' are in conflict on axis 0",
        ),
    ],
)
def test_groups_that_do_not_fit_are_named(config, params, group, message):
    with pytest.raises(ValueError, match=message):
        shrink(params, (*unit_groups(config), group), {})


def test_a_gate_of_zero_hides_inf_and_nan():
    group = UnitGroup(name="g", count=2, slices=(UnitSlices(path="w", axis=0, gated=True),))
    masked = mask_units({"w": jnp.array([[1.0], [jnp.nan]])}, [group], {"g": [True, False]})
    np.testing.assert_array_equal(masked["w"], [[1.0], [0.0]])


def test_numbers_of_units_are_not_taken_for_flags():
    group = UnitGroup(name="rows", count=3, slices=(UnitSlices(path="w", axis=0, gated=True),))
    for act in (shrink, mask_units):
        with pytest.raises(ValueError, match=r"`keep\['rows'\]` must hold True and False, got \[0, 1, 2\]"):
            act({"w": jnp.ones((3, 2))}, [group], {"rows": [0, 1, 2]})
        act({"w": jnp.ones((3, 2))}, [group], {"rows": [0, 1, 1]})
