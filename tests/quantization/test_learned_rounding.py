"""Learned rounding, and the blocks that a model is cut into."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.calibration.blocks import blocks_of
from jaxcompress._src.calibration.flat_program import flat_program
from jaxcompress._src.calibration.segments import Model
from jaxcompress._src.pruning.store import store_masked
from jaxcompress._src.quantization.learned_rounding import RoundingSchedule
from jaxcompress.quantization import QuantSpec, fixed_point, learned_rounding, quantize

SPEC = QuantSpec(bits=2, group_size=4, symmetric=False)


def _model(params, x, mask):
    for name in ("one", "two"):
        hidden = jnp.tanh(jax.jit(jnp.matmul)(x, params[name]["up"].T))
        x = x + mask[..., None] * (hidden @ params[name]["down"])
    return x


def _params():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)  # noqa: E731
    return {name: {"up": make(12, 8), "down": make(12, 8)} for name in ("one", "two")}


def _batch():
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(8, 8)) / 2
    return jnp.asarray(rng.normal(size=(6, 5, 8)) @ mixing, jnp.float32), jnp.ones((6, 5)).at[:, 4].set(0)


PATHS = ["one/up", "one/down", "two/up", "two/down"]


def _blocks(params, batch, paths, together):
    return blocks_of(flat_program(_model, params, batch, stacks=[]), dict.fromkeys(paths, ()), together=together)


def test_the_blocks_one_after_another_are_the_model():
    params, batch = _params(), _batch()
    for together, count in ((lambda path: path, 4), (lambda path: path.split("/")[0], 2), (lambda path: 0, 1)):
        blocks = _blocks(params, batch, PATHS, together)
        model = Model(params, [blocks.segments], [batch])
        assert len(blocks.parts) == len(blocks.outputs) == count
        assert [part.name for parts in blocks.parts for part in parts] == PATHS
        for number, outputs in enumerate(blocks.outputs):
            model.run(number)
            assert outputs
            assert all(var in model.values[0] for var in outputs)
        (output,) = blocks.segments.program.outputs
        np.testing.assert_allclose(model.values[0][output], _model(params, *batch), atol=1e-6)
    # A mask that later blocks read, too, is passed on, but is nothing to fit.
    blocks = _blocks(params, batch, PATHS, lambda path: path.split("/")[0])
    model = Model(params, [blocks.segments], [batch])
    model.run(0)
    mask = blocks.segments.program.inputs[1]
    assert mask in blocks.segments.segments[1].reads
    assert mask not in blocks.outputs[0]
    assert [var.aval.shape for var in blocks.outputs[0]] == [batch[0].shape]
    with pytest.raises(ValueError, match="Leaf 'spare' meets no input"):
        _blocks({**params, "spare": jnp.ones(2)}, batch, ["spare"], lambda path: path)


def test_blocks_come_closer_to_the_dense_ones():
    params, batch = _params(), _batch()
    layouts = jc.trace.layouts(_model, params, *batch)
    start, _ = quantize(params, SPEC, layouts=layouts)
    found, info = learned_rounding(
        _model,
        params,
        start,
        [batch],
        together=lambda path: path.split("/")[0],
        schedule=RoundingSchedule(steps=150, rate=0.03),
        row_mask=lambda x, mask: mask,
    )
    wanted, errors = _model(params, *batch), []
    for tree in (start, found):
        gap = jc.execute(_model)(tree, *batch) - wanted
        errors.append(float(jnp.linalg.norm(gap[:, :4])))
    assert errors[1] < 0.7 * errors[0]
    assert list(info) == PATHS
    assert all(entry.error < entry.error_before for entry in info.values())
    for name in ("one", "two"):
        before, after = (np.asarray(tree[name]["up"].codes(), int) for tree in (start, found))
        assert 0 < np.abs(after - before).max() <= 1
        assert after.min() >= 0
        assert after.max() <= 3
        assert found[name]["up"].data.axis == start[name]["up"].data.axis


def test_scales_that_are_powers_of_two_stay():
    params = {"w": jnp.array([[0.29], [0.23], [0.31]])}
    x = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.1], [4.0, 4.1, 0.0]])
    schedule = RoundingSchedule(rate=0.05, steps=200)
    for start, moves in ((fixed_point(params, 3)[0], False), (quantize(params, QuantSpec(bits=4))[0], True)):
        found, _ = learned_rounding(lambda p, x: x @ p["w"], params, start, [(x,)], together=str, schedule=schedule)
        assert bool((found["w"].scale != start["w"].scale).any()) == moves
        assert bool((found["w"].codes() != start["w"].codes()).any()) != moves


def test_rows_count_what_they_weigh():
    params, (x, mask) = _params(), _batch()
    start, _ = quantize(params, SPEC, layouts=jc.trace.layouts(_model, params, x, mask))
    options = {"together": lambda path: path.split("/")[0], "schedule": RoundingSchedule(steps=0)}
    # A row that weighs two is a row that stands there twice.
    weights = jnp.asarray([[2.0], [1.0], [1.0], [1.0], [1.0], [0.0]]) * mask
    twice = jnp.concatenate([x[:5], x[:1]]), jnp.concatenate([mask[:5], mask[:1]])
    _, heavy = learned_rounding(_model, params, start, [(x, mask)], row_mask=lambda *_: weights, **options)
    _, often = learned_rounding(_model, params, start, [twice], row_mask=lambda x, mask: mask, **options)
    _, halves = learned_rounding(_model, params, start, [(x, mask)], row_mask=lambda *_: weights / 64, **options)
    _, plain = learned_rounding(_model, params, start, [(x, mask)], row_mask=lambda x, mask: mask, **options)
    for path in PATHS:
        np.testing.assert_allclose(heavy[path].error, often[path].error, rtol=1e-5)
        np.testing.assert_allclose(heavy[path].error, halves[path].error, rtol=1e-5)
        assert abs(heavy[path].error / plain[path].error - 1) > 1e-3


def test_what_cannot_be_learned_is_named():
    params, batch = _params(), _batch()
    with pytest.raises(ValueError, match="No leaf of `rounded`"):
        learned_rounding(_model, params, params, [batch], together=lambda path: path)
    with pytest.raises(ValueError, match="`batches` is empty"):
        learned_rounding(_model, params, params, [], together=lambda path: path)
    sparse = jax.tree.map(lambda leaf: jnp.where(leaf > 0, leaf, 0), params)
    layouts = jc.trace.layouts(_model, params, *batch)
    masks = jax.tree.map(lambda leaf: leaf != 0, sparse)
    stored = {"one": {"up": store_masked(sparse["one"]["up"], masks["one"]["up"], layouts["one"]["up"], jc.pruning.unstructured())}}  # fmt: skip  # noqa: E501
    small, _ = quantize(stored, QuantSpec(bits=4))
    with pytest.raises(ValueError, match="'one/up' has a table of levels, or sparse codes"):
        learned_rounding(_model, params, {**params, "one": {**params["one"], **small["one"]}}, [batch], together=str)
    small, _ = quantize(params, SPEC, layouts=layouts)
    spoilt = jax.tree.map(lambda leaf: leaf, params)
    spoilt["two"]["up"] = spoilt["two"]["up"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="Leaf 'two/up' holds 1 NaN"):
        learned_rounding(_model, spoilt, small, [batch], together=str)
    with pytest.raises(ValueError, match=r"Leaf 'one/up' is \(12, 8\) in `rounded`, but has shape \(6, 8\)"):
        learned_rounding(
            _model, {**params, "one": {**params["one"], "up": params["one"]["up"][:6]}}, small, [batch], together=str
        )
    with pytest.raises(ValueError, match="the block of leaf 'one/up' passes on holds NaN"):
        learned_rounding(_model, params, small, [(batch[0].at[0, 0].set(jnp.nan), batch[1])], together=str)


def _scanned(params, x, mask):
    def layer(x, own):
        return x + mask[..., None] * (jnp.tanh(x @ own["up"].T) @ own["down"]), x.sum()

    return jax.lax.scan(layer, x, params)[0]


def _indexed(params, x, mask):
    for i in range(2):
        x = x + mask[..., None] * (jnp.tanh(x @ params["up"][i].T) @ params["down"][i])
    return x


@pytest.mark.parametrize("model", [_scanned, jax.checkpoint(_scanned), _indexed])
def test_layers_of_a_stack_are_blocks(model):
    params, batch = _params(), _batch()
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), params["one"], params["two"])
    start, _ = quantize(stacked, SPEC, layouts=jc.trace.layouts(model, stacked, *batch))
    flat, _ = quantize(params, SPEC, layouts=jc.trace.layouts(_model, params, *batch))
    options = {"schedule": RoundingSchedule(steps=60, rate=0.03), "row_mask": lambda x, mask: mask}
    asked = []
    found, info = learned_rounding(
        model, stacked, start, [batch], together=lambda path: asked.append(path) or path.split("[")[1], **options
    )
    wanted, known = learned_rounding(_model, params, flat, [batch], together=lambda path: path.split("/")[0], **options)
    assert set(asked) == set(info) == {"up[0]", "up[1]", "down[0]", "down[1]"}
    for i, layer in enumerate(("one", "two")):
        for name in ("up", "down"):
            assert info[f"{name}[{i}]"].error == pytest.approx(known[f"{layer}/{name}"].error, rel=1e-4)
            assert info[f"{name}[{i}]"].error < info[f"{name}[{i}]"].error_before
            np.testing.assert_array_equal(found[name].codes()[i], wanted[layer][name].codes())
    assert jax.tree.structure(found) == jax.tree.structure(start)


def test_stacks_in_stacks_and_reversed_scans():
    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.normal(size=(2, 3, 4, 4)) / 2, jnp.float32)}
    x = jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)

    def model(params, x):
        def inner(x, w):
            return jnp.tanh(x @ w.astype(jnp.bfloat16).astype(jnp.float32)), x

        def outer(x, w):
            return jax.lax.scan(inner, x, w, reverse=True)[0], None

        return jax.lax.scan(outer, x, params["w"])[0]

    start, _ = quantize(params, QuantSpec(bits=3), layouts=jc.trace.layouts(model, params, x))
    order = []
    found, info = learned_rounding(
        model,
        params,
        start,
        [(x,)],
        together=lambda path: order.append(path) or path,
        schedule=RoundingSchedule(steps=40, rate=0.05),
    )
    assert list(info) == [f"w[{i},{j}]" for i in range(2) for j in reversed(range(3))]
    gaps = [float(jnp.linalg.norm(jc.execute(model)(tree, x) - model(params, x))) for tree in (start, found)]
    assert gaps[1] < gaps[0]


def test_a_scale_that_all_layers_share_keeps_them_together():
    params, batch = _params(), _batch()
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), params["one"], params["two"])
    start, _ = quantize(stacked, QuantSpec(bits=4))
    start["down"] = dataclasses.replace(start["down"], scale=start["down"].scale.max(axis=0, keepdims=True))
    found, info = learned_rounding(
        _scanned, stacked, start, [batch], together=lambda path: path, schedule=RoundingSchedule(steps=3)
    )
    assert "down" in info
    assert found["down"].scale.shape == start["down"].scale.shape


def test_a_stack_along_another_axis_stays_one_leaf():
    rng = np.random.default_rng(3)
    params = {"w": jnp.asarray(rng.normal(size=(4, 2, 4)) / 2, jnp.float32)}
    x = jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)

    def model(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"].transpose(1, 0, 2))[0]

    # Groups of one input: every part of the leaf is as long as it along the first axis, too.
    layouts = jc.trace.layouts(model, params, x)
    assert layouts["w"].stack_axes == (1,)
    start, _ = quantize(params, QuantSpec(bits=8, group_size=1), layouts=layouts)
    assert start["w"].scale.shape == (4, 2, 4)
    _, info = learned_rounding(
        model, params, start, [(x,)], together=lambda path: path, schedule=RoundingSchedule(steps=2)
    )
    assert list(info) == ["w"]


def _scan(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


STACKS = {
    "experts": lambda p, x: jax.vmap(jnp.matmul)(jnp.stack([x] * 3), p["w"]),
    "ragged": lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 2, 2])),
    "index": lambda p, x: jax.lax.fori_loop(0, 3, lambda i, x: x @ p["w"][i], x),
    "flipped": lambda p, x: _scan(p["w"][::-1], x),
    "transposed": lambda p, x: _scan(jnp.swapaxes(p["w"], 1, 2), x),
    "nested": lambda p, x: jax.lax.scan(lambda x, w: (_scan(w, x), None), x, p["w"].reshape(3, 1, 4, 4))[0],
    "branch": lambda p, x: jax.lax.cond(x[0, 0] < 99, lambda w: _scan(w, x), lambda w: x, p["w"]),
    "runs": lambda p, x: _scan(jnp.concatenate([p["w"][:1], p["w"][1:]]), x),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_of_all_kinds_are_learned_entry_by_entry(name):
    rng = np.random.default_rng(5)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    layouts = jc.trace.layouts(STACKS[name], params, x)
    rounded, _ = quantize(params, QuantSpec(bits=3), layouts=layouts)
    schedule = RoundingSchedule(steps=2)
    found, info = learned_rounding(STACKS[name], params, rounded, [(x,)], together=str, schedule=schedule)
    assert sorted(info) == ["w[0]", "w[1]", "w[2]"]
    assert all(own.error <= own.error_before * (1 + 1e-5) for own in info.values())
    outputs = [STACKS[name](tree, x) for tree in (params, jc.materialize(rounded), jc.materialize(found))]
    before, after = (float(jnp.linalg.norm(own - outputs[0])) for own in outputs[1:])
    assert after <= before * 1.01


def test_a_stack_with_an_unused_layer_is_learned_as_one_leaf():
    params, x = {"w": jnp.asarray(np.random.default_rng(5).normal(size=(3, 4, 4)), jnp.float32)}, jnp.ones((6, 4))

    def apply(p, x):
        return x @ p["w"][0] @ p["w"][2]

    rounded, _ = quantize(params, QuantSpec(bits=3), layouts=jc.trace.layouts(apply, params, x))
    schedule = RoundingSchedule(steps=2)
    found, info = learned_rounding(apply, params, rounded, [(x,)], together=str, schedule=schedule)
    assert list(info) == ["w"]
    np.testing.assert_array_equal(found["w"].materialize()[1], rounded["w"].materialize()[1])
