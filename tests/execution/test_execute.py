"""`execute(apply)(compressed, x)` against `apply(materialize(compressed), x)`: every array kind on every layer kind."""

import functools

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import zoo
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress import trace, tree
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.execution.execute import fallbacks
from jaxcompress._src.execution.values import Fallback
from jaxcompress._src.trace.layout import default_layout
from jaxcompress._src.tree.partition import partition
from jaxcompress._src.tree.unselected import is_unselected, map_selected
from jaxcompress._src.types import is_compressed
from jaxcompress._src.weights.selection import selected_layouts
from jaxcompress.arrays import component_shardings


@functools.cache
def _model(name):
    model = zoo.MODELS[name]()
    return model, trace.layouts(model.apply, model.params, *model.inputs)


@functools.cache
def _compressed(name, kind):
    model, layouts = _model(name)
    chosen = selected_layouts(model.params, layouts=layouts)

    def compress(path, layout, leaf):
        made = kinds.KINDS[kind](leaf, layout)
        validate_array(made)
        return made

    made = map_selected(compress, chosen, model.params)
    return tree.map_with_path(
        lambda _, leaf, old: old if is_unselected(leaf) else leaf,
        made,
        model.params,
        is_leaf=lambda x: is_unselected(x) or is_compressed(x),
    )


@functools.cache
def _wanted(name):
    """What the plain model makes of the arrays that leaves of all kinds stand for: it is compiled once for them all."""
    model, _ = _model(name)
    # An Equinox module holds functions, which `jit` cannot take.
    arrays, static = partition(_is_array, {kind: _compressed(name, kind) for kind in kinds.KINDS})
    plain = jax.jit(lambda arrays: partition(_is_array, jc.materialize(tree.combine(arrays, static)))[0])(arrays)
    functions = partition(_is_array, model.params)[1]
    run = jax.jit(lambda arrays, *inputs: model.apply(tree.combine(arrays, functions), *inputs))
    return {kind: run(own, *model.inputs) for kind, own in plain.items()}


def _is_array(leaf):
    return hasattr(leaf, "dtype")


def _close(got, wanted, what=""):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(np.abs(y).max()), err_msg=what)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_equals_the_plain_model(name):
    """All kinds in one program: compiling is what takes the time."""
    model, _ = _model(name)
    params = {kind: _compressed(name, kind) for kind in kinds.KINDS}
    for tree_of_kind in params.values():
        assert any(is_compressed(leaf) for _, leaf in tree.leaves_with_paths(tree_of_kind))
    arrays, static = partition(_is_array, params)

    @jax.jit
    def run(arrays, *inputs):
        full = tree.combine(arrays, static)
        return {kind: jc.execute(model.apply)(p, *inputs) for kind, p in full.items()}

    got, wanted = run(arrays, *model.inputs), _wanted(name)
    for kind in kinds.KINDS:
        _close(got[kind], wanted[kind], kind)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_gradients_equal_those_of_the_plain_model(name):
    """With respect to the inputs, the scales, the kept values and the leaves that stayed plain."""
    model, _ = _model(name)
    chosen = ("int8 per channel", "uint4 groups zero point", "int4 2:4 groups", "bit mask")
    chosen += ("low rank + int4 groups", "codebook", "additive codebooks scaled")
    params = {kind: _compressed(name, kind) for kind in chosen}
    trainable, rest = tree.partition_trainable(params)
    floats, others = partition(lambda x: jnp.issubdtype(x.dtype, jnp.floating), model.inputs)

    def loss(run, trainable, floats):
        full = tree.combine(trainable, rest)
        return sum(jnp.sum(jnp.sin(run(p, *tree.combine(floats, others)))) for p in full.values())

    def plain(params, *inputs):
        return model.apply(jc.materialize(params), *inputs)

    @jax.jit
    def both(trainable, floats):
        gradients = [jax.grad(functools.partial(loss, run), argnums=(0, 1)) for run in (jc.execute(model.apply), plain)]
        return [gradient(trainable, floats) for gradient in gradients]

    for x, y in zip(*map(jax.tree.leaves, both(trainable, floats)), strict=True):
        # Some are 0, such as those of key biases under a softmax: the sums of rounding errors.
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * float(np.abs(y).max(initial=0)) + 5e-6)


@pytest.mark.parametrize(
    "kind",
    [
        "int8 per channel",
        "int4 groups",
        "int4 2:4 groups",
        "2:4",
        "low rank",
        "codebook per output",
        "additive codebooks scaled",
    ],
)
@pytest.mark.parametrize("name", ["dense", "attention", "tied_embed", "scanned", "batched_experts"])
def test_sharded_over_eight_devices(name, kind):
    """Weights are cut along their first output axis where it can hold whole shares."""
    model, layouts = _model(name)
    params = _compressed(name, kind)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))

    def place(path, leaf, layout):
        cut = [axis for axis in layout.output_axes if leaf.shape[axis] % 8 == 0]
        spec = [None] * len(leaf.shape)
        if cut and layout.is_weight:
            spec[cut[0]] = "model"
        return jax.device_put(leaf, component_shardings(leaf, NamedSharding(mesh, PartitionSpec(*spec))))

    placed = tree.map_with_path(place, params, layouts)
    assert any(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(placed))
    with jax.set_mesh(mesh):
        got = jax.jit(jc.execute(model.apply))(placed, *model.inputs)
    _close(got, _wanted(name)[kind])


@pytest.mark.parametrize("kind", ["int4 groups", "low rank", "low rank + int4 groups"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_weights_in_matmuls_and_lookups_need_no_fallback(name, kind):
    model, _ = _model(name)
    notes = fallbacks(model.apply, _compressed(name, kind), *model.inputs)
    if name == "conv" and "rank" not in kind:
        assert {(note.path, note.primitive) for note in notes} == {("kernel", "conv_general_dilated")}
    elif name == "control_flow":
        assert {note.primitive for note in notes} == {"mul"}
    else:
        assert notes == ()


def test_fallbacks_name_leaf_primitive_and_bytes():
    params = {"layer": {"kernel": _compressed("dense", "int8 per channel")["kernel"]}}
    (note,) = fallbacks(lambda p: jnp.sin(p["layer"]["kernel"]), params)
    assert note == Fallback(path="layer/kernel", primitive="sin", shape=(16, 24), nbytes=16 * 24 * 4)


def test_a_fallback_inside_a_scan_is_found():
    leaf = _compressed("scanned", "int8 per channel")["Dense_0"]["kernel"]

    def apply(params, x):
        return jax.lax.scan(lambda c, w: (c + jnp.tanh(w).sum(), None), x, params["kernel"])[0]

    (note,) = fallbacks(apply, {"kernel": leaf}, jnp.zeros(()))
    assert (note.path, note.primitive) == ("kernel", "tanh")


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_rearrangements_are_exact(kind):
    leaf = _compressed("dense", kind)["kernel"]

    def apply(w, i):
        return (
            w.T,
            w.reshape(16, 4, 6),
            w.reshape(4, 4, 24),
            w.reshape(384),
            w[:, 3:11],
            w[4:8],
            w[5:6, ::2],
            w[i],
            jax.lax.dynamic_slice(w, (i, 20), (2, 8)),
            w[None, :, None],
            jnp.squeeze(w[None], 0).astype(jnp.bfloat16),
            jnp.broadcast_to(w, (2, 16, 24)),
            jax.lax.stop_gradient(w),
            w,
        )

    run = jax.jit(jc.execute(apply))
    plain = jax.jit(lambda leaf, i: apply(leaf.materialize(), i))
    for i in (0, 3, 15):
        for x, y in zip(run(leaf, jnp.int32(i)), plain(leaf, jnp.int32(i)), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_lookups_out_of_range(kind):
    def apply(table, ids):
        return [jnp.take(table, ids, axis=0, mode=mode) for mode in ("fill", "clip", "wrap")]

    table, ids = _compressed("embed", kind)["embedding"], jnp.array([[0, 23, 24], [-1, -25, 7]])
    got, wanted = (
        jax.jit(jc.execute(apply))(table, ids),
        jax.jit(apply)(table.materialize(), ids),
    )
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(x, y)


def test_lookups_read_only_the_rows_asked_for():
    """Nothing as large as the table appears in the program."""
    table = _compressed("embed", "int4 groups")["embedding"]
    big = jax.tree.map(lambda part: jnp.tile(part, (1000, 1)), table)
    text = jax.jit(jc.execute(lambda t, i: t[i])).lower(big, jnp.array([1, 2])).compile().as_text()
    assert "f32[24000,16]" not in text
    assert "s8[24000,16]" not in text


def test_few_tokens_run_block_by_block_and_many_do_not():
    model, _ = _model("few_tokens")
    params = _compressed("few_tokens", "int4 groups")
    run = jax.jit(jc.execute(model.apply))
    few = run.lower(params, jnp.ones((1, 512))).compile().as_text()
    many = run.lower(params, jnp.ones((64, 512))).compile().as_text()
    assert "f32[512,768]" not in few
    assert "f32[512,768]" in many


def test_vmap_outside_and_inside():
    model, _ = _model("dense")
    leaf = _compressed("dense", "int4 groups")["kernel"]
    x = model.inputs[0]

    def apply(w, x):
        return jax.vmap(lambda row: row @ w)(x)

    np.testing.assert_allclose(jc.execute(apply)(leaf, x), x @ leaf.materialize(), rtol=1e-5, atol=1e-5)
    outside = jax.vmap(jc.execute(lambda w, row: row @ w), in_axes=(None, 0))(leaf, x)
    np.testing.assert_allclose(outside, x @ leaf.materialize(), rtol=1e-5, atol=1e-5)
    stack = jax.tree.map(lambda part: jnp.stack([part, part]), leaf)
    both = jax.vmap(jc.execute(lambda w, x: x @ w), in_axes=(0, None))(stack, x)
    np.testing.assert_allclose(both[1], x @ leaf.materialize(), rtol=1e-5, atol=1e-5)


def test_derivatives_of_the_models_own_survive():
    """The custom derivative (3 instead of 2) is that of the plain model: it is not traced through."""
    model, _ = _model("control_flow")
    params = _compressed("control_flow", "int8 per channel")
    got = jax.grad(lambda x: jc.execute(model.apply)(params, x).sum())(model.inputs[0])
    wanted = jax.grad(lambda x: model.apply(jc.materialize(params), x).sum())(model.inputs[0])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_custom_derivative_of_a_weight_survives():
    @jax.custom_jvp
    def soft(w):
        return jnp.tanh(w)

    soft.defjvp(lambda primals, tangents: (soft(*primals), 7.0 * tangents[0]))
    leaf = _compressed("dense", "int8 per channel")["kernel"]
    trainable, rest = tree.partition_trainable(leaf)

    def loss(run, part):
        return run(lambda w: soft(w).sum())(tree.combine(part, rest))

    got = jax.grad(functools.partial(loss, jc.execute))(trainable)
    wanted = jax.grad(functools.partial(loss, lambda f: lambda w: f(w.materialize())))(trainable)
    np.testing.assert_allclose(got.scale, wanted.scale, rtol=1e-5)


def test_shard_map_gets_plain_arrays():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    leaf = _compressed("dense", "int8 per channel")["kernel"]

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec("data")
    )
    def apply(w, x):
        return x @ w

    x = jax.random.normal(jax.random.key(1), (16, 16))
    np.testing.assert_allclose(jax.jit(jc.execute(apply))(leaf, x), x @ leaf.materialize(), rtol=1e-5, atol=1e-5)


def test_sharding_constraints_reach_the_parts():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    leaf = _compressed("dense", "int4 groups")["kernel"]

    def apply(w, x):
        return x @ jax.lax.with_sharding_constraint(w, sharding)

    x = jnp.ones((4, 16))
    assert fallbacks(apply, leaf, x) == ()
    np.testing.assert_allclose(jax.jit(jc.execute(apply))(leaf, x), x @ leaf.materialize(), rtol=1e-5, atol=1e-5)


def test_flags_and_keywords_stay_static_and_outputs_keep_their_structure():
    leaf = _compressed("dense", "int8 per channel")["kernel"]

    def apply(params, x, *, train, scale=None):
        if train:
            return {"logits": x @ params["w"], "rest": (x, None)}
        return {"logits": x, "rest": (x, None)}

    got = jc.execute(apply)({"w": leaf, "name": "text"}, jnp.ones((2, 16)), train=True, scale=None)
    np.testing.assert_allclose(got["logits"], jnp.ones((2, 16)) @ leaf.materialize(), rtol=1e-5, atol=1e-5)
    assert got["rest"][1] is None


def test_without_compressed_leaves_the_model_is_called_as_it_is():
    calls = []
    assert jc.execute(lambda x: calls.append(x) or x)(3.0) == 3.0
    assert calls == [3.0]


def test_leaf_times_leaf():
    leaf = _compressed("dense", "int8 per channel")["kernel"]
    got = jc.execute(lambda a, b: a @ b.T)(leaf, leaf)
    np.testing.assert_allclose(got, leaf.materialize() @ leaf.materialize().T, rtol=1e-5, atol=1e-4)


def test_a_leaf_without_stacked_scales_is_made_plain_before_a_scan():
    """Scales guessed without layouts run over the layer axis too: slicing the parts would be wrong."""
    leaf = kinds.KINDS["int8 per tensor"](jnp.arange(24.0).reshape(2, 3, 4), default_layout("w", jnp.ones((2, 3, 4))))

    def apply(w, x):
        return jax.lax.scan(lambda c, layer: (c + (x @ layer).sum(), None), 0.0, w)[0]

    x = jnp.ones((5, 3))
    np.testing.assert_allclose(jc.execute(apply)(leaf, x), apply(leaf.materialize(), x), rtol=1e-5)
    assert [note.primitive for note in fallbacks(apply, leaf, x)] == ["scan"]
