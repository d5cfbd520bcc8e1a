import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import zoo

from jaxcompress import trace, tree
from jaxcompress._src.arrays.reshaping import reshape_runs
from jaxcompress._src.weights.selection import selected_layouts


def _by_path(apply, params, *inputs):
    found = trace.layouts(apply, params, *inputs)
    assert jax.tree.structure(found) == jax.tree.structure(jax.tree.map(lambda _: 0, params))
    return dict(tree.leaves_with_paths(found))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_axes_of_every_layer_kind(name):
    model = zoo.MODELS[name]()
    found = _by_path(model.apply, model.params, *model.inputs)
    for path, expected in model.expected.items():
        layout = found[path]
        assert (layout.kind, layout.stack_axes, layout.input_axes, layout.output_axes) == expected, path


@pytest.mark.parametrize("name", zoo.MODELS)
def test_axes_are_a_partition_of_the_leaf(name):
    model = zoo.MODELS[name]()
    leaves = dict(tree.leaves_with_paths(model.params))
    for path, layout in _by_path(model.apply, model.params, *model.inputs).items():
        if hasattr(leaves[path], "shape"):
            axes = (*layout.stack_axes, *layout.input_axes, *layout.output_axes)
            assert sorted(axes) == list(range(leaves[path].ndim))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_abstract_parameters_are_enough(name):
    model = zoo.MODELS[name]()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, model.params
    )
    assert _by_path(model.apply, abstract, *model.inputs) == _by_path(model.apply, model.params, *model.inputs)


def test_order_and_shared_inputs_of_attention():
    model = zoo.attention()
    found = _by_path(model.apply, model.params, *model.inputs)
    kernels = {path.split("/")[0]: layout for path, layout in found.items() if path.endswith("kernel")}
    assert kernels["query"].input_id == kernels["key"].input_id == kernels["value"].input_id == 0
    assert kernels["out"].input_id == 1
    assert kernels["query"].order < kernels["out"].order
    assert sorted(layout.order for layout in found.values()) == list(range(8))


def test_shared_inputs_in_bfloat16():
    """Each projection casts its input by itself: the casts are looked through."""
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16, dtype=jnp.bfloat16)
    x = jnp.ones((2, 5, 16))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    found = _by_path(lambda p, y: module.apply({"params": p}, y), params, x)
    assert found["query/kernel"].input_id == found["value/kernel"].input_id is not None


def test_flops_count_every_iteration_of_a_scan():
    model = zoo.scanned()
    found = _by_path(model.apply, model.params, *model.inputs)
    assert found["Dense_0/kernel"].flops == 3 * 2 * (2 * 5) * 16 * 32


def test_flops_of_convolutions_and_experts():
    conv = zoo.conv()
    assert _by_path(conv.apply, conv.params, *conv.inputs)["kernel"].flops == 2 * (2 * 6 * 6 * 8) * (3 * 3 * 16)
    experts = zoo.batched_experts()
    assert _by_path(experts.apply, experts.params, *experts.inputs)["experts"].flops == 2 * 3 * 5 * 16 * 8


def test_unused_leaves_are_found_even_behind_dead_code():
    def apply(params, x):
        _ = x @ params["dead"]
        return x @ params["live"]

    params = {"dead": jnp.ones((3, 4)), "live": jnp.ones((3, 4)), "absent": jnp.ones((3, 4))}
    found = _by_path(apply, params, jnp.ones((2, 3)))
    assert {path: layout.kind for path, layout in found.items()} == {
        "absent": "unused",
        "dead": "unused",
        "live": "matmul",
    }
    assert found["dead"].order is None


def test_a_bias_added_to_activations_is_no_origin():
    """The sum has the shape of the bias's broadcast, but is no re-arrangement of it."""

    def apply(params, x):
        return ((x @ params["a"]) + params["bias"]) @ params["b"]

    params = {"a": jnp.ones((3, 4)), "bias": jnp.ones((2, 4)), "b": jnp.ones((4, 5))}
    assert _by_path(apply, params, jnp.ones((2, 3)))["bias"].kind == "other"


def test_reshapes_carry_axes():
    def apply(params, x):
        split = params["w"].reshape(6, 2, 4)
        return jnp.einsum("bi,iho->bho", x, split)

    layout = _by_path(apply, {"w": jnp.ones((6, 8))}, jnp.ones((3, 6)))["w"]
    assert (layout.input_axes, layout.output_axes) == ((0,), (1,))


def test_a_stack_indexed_by_hand():
    def apply(params, x):
        for i in range(2):
            x = x @ params["w"][i]
        return jax.lax.fori_loop(0, 2, lambda i, y: y @ params["v"][i], x)

    params = {"w": jnp.ones((2, 4, 4)), "v": jnp.ones((2, 4, 4))}
    found = _by_path(apply, params, jnp.ones((3, 4)))
    for path in ("v", "w"):
        assert (found[path].stack_axes, found[path].input_axes, found[path].output_axes) == ((0,), (1,), (2,))
    assert found["w"].flops == 2 * 2 * 3 * 4 * 4


def test_static_flags_stay_static():
    def apply(params, x, train):
        return x @ params["w"] if train else x

    assert _by_path(apply, {"w": jnp.ones((3, 4))}, jnp.ones((2, 3)), True)["w"].kind == "matmul"
    assert _by_path(apply, {"w": jnp.ones((3, 4))}, jnp.ones((2, 3)), False)["w"].kind == "unused"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((2, 6, 5), (12, 1, 5)),
        ((1, 3), (3,)),
        ((4,), (2, 1, 2)),
        ((), (1, 1)),
        ((0, 3), (3, 0)),
        ((2, 3, 4), (4, 3, 2)),
    ],
)
def test_reshape_runs_cover_both_shapes(old, new):
    runs = reshape_runs(old, new)
    assert [axis for left, _ in runs for axis in left] == list(range(len(old)))
    assert [axis for _, right in runs for axis in right] == list(range(len(new)))
    for left, right in runs:
        a, b = 1, 1
        for axis in left:
            a *= old[axis]
        for axis in right:
            b *= new[axis]
        assert a == b


def test_default_layouts_and_selection():
    params = {"embed": {"embedding": jnp.ones((9, 4))}, "dense": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones(4)}}
    chosen = selected_layouts(params)
    assert chosen["dense"]["bias"] is tree.Unselected
    assert chosen["dense"]["kernel"].input_axes == (0, 1)
    assert chosen["embed"]["embedding"].input_axes == (1,)
    only = selected_layouts(params, select=tree.by_path("dense/kernel"))
    assert only["embed"]["embedding"] is tree.Unselected
    with pytest.raises(ValueError, match="nothing is selected"):
        selected_layouts({"bias": jnp.ones(4)})


def test_selection_by_layouts_leaves_out_what_is_no_weight():
    params = {"positions": jnp.ones((3, 4)), "kernel": jnp.ones((5, 4))}
    found = trace.layouts(lambda p, x: x @ p["kernel"] + p["positions"], params, jnp.ones((3, 5)))
    chosen = selected_layouts(params, layouts=found)
    assert chosen["positions"] is tree.Unselected
    assert chosen["kernel"] == dataclasses.replace(found["kernel"])


def test_a_leaf_that_is_no_weight_says_what_it_is_used_for():
    def apply(params, x):
        state = jax.lax.fori_loop(0, 2, lambda i, y: y * 2, params["carried"])
        return jnp.sin(params["angle"]) * x + state, params["returned"]

    params = {"angle": jnp.ones(3), "carried": jnp.ones(3), "returned": jnp.ones(3), "flag": 3}
    reasons = {path: layout.reason for path, layout in _by_path(apply, params, jnp.ones(3)).items()}
    assert reasons == {
        "angle": "it goes into `sin`",
        "carried": "it is carried through a loop",
        "flag": "it is no array",
        "returned": "the model returns it",
    }
