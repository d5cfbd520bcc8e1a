"""Trees: which leaves are quantized, and what the errors say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.arrays import QuantizedArray, component_shardings, sparsify
from jaxcompress.quantization import QuantSpec, fake_quantize, fixed_point, quantize, quantize_inputs
from jaxcompress.trace import LeafLayout
from jaxcompress.tree import by_path


def params():
    rng = np.random.default_rng(0)
    return {
        "layer": {
            "kernel": jnp.asarray(rng.normal(size=(16, 6)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=6), jnp.float32),
        },
        "embedding": jnp.asarray(rng.normal(size=(7, 16)), jnp.bfloat16),
    }


def kinds(tree):
    return {path: type(leaf).__name__ for path, leaf in jc.tree.leaves_with_paths(tree)}


def test_default_takes_every_leaf_with_two_axes():
    small, _ = quantize(params(), QuantSpec(bits=4, group_size=8))
    assert kinds(small) == {
        "embedding": "QuantizedArray",
        "layer/bias": "ArrayImpl",
        "layer/kernel": "QuantizedArray",
    }
    assert small["embedding"].scale.shape == (7, 2)
    assert small["layer"]["kernel"].scale.shape == (2, 6)
    assert small["embedding"].dtype == jnp.bfloat16


def test_calls_with_different_selectors_compose():
    small, _ = quantize(params(), QuantSpec(bits=8), select=by_path("embedding"))
    small, _ = quantize(small, QuantSpec(bits=4))
    assert (small["embedding"].bits, small["layer"]["kernel"].bits) == (8, 4)
    again, _ = quantize(small, QuantSpec(bits=2))
    assert again["embedding"] is small["embedding"]


def test_infos_hold_the_stored_bits_of_every_entry_of_a_stack():
    stack = {"layers": jnp.ones((2, 16, 6)), "kernel": jnp.ones((16, 6))}
    layouts = {
        "layers": LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,)),
        "kernel": LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,)),
    }
    grouped = QuantSpec(bits=4, group_size=8, scale_dtype="bfloat16")
    small, info = quantize(stack, grouped, layouts=layouts)
    bits = {name: own.bits_per_weight for name, own in info.items()}
    assert bits == {"kernel": 6.0, "layers[0]": 6.0, "layers[1]": 6.0}
    assert {own.error for own in info.values()} == {None}
    _, marked = quantize_inputs(small, QuantSpec(bits=8), select=by_path("layers"), layouts=layouts)
    assert {name: own.bits_per_weight for name, own in marked.items()} == {"layers[0]": 6.0, "layers[1]": 6.0}
    _, fixed = fixed_point(stack, 8, layouts=layouts)
    assert fixed["kernel"].bits_per_weight == 8 + 32 / 96


def test_layouts_give_the_axes():
    layouts = {
        "layer": {"kernel": LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,)), "bias": None},
        "embedding": LeafLayout(kind="other", output_axes=(0, 1)),
    }
    layouts["layer"]["bias"] = LeafLayout(kind="other", output_axes=(0,))
    with pytest.warns(jc.trace.LeftOutWarning, match="embedding"):
        small, _ = quantize(params(), QuantSpec(bits=4), layouts=layouts)
    assert kinds(small)["embedding"] == "ArrayImpl"
    assert small["layer"]["kernel"].scale.shape == (16, 1)
    assert small["layer"]["kernel"].data.axis == -1


@pytest.mark.parametrize(
    "spec", [QuantSpec(bits=4, group_size=8), QuantSpec(bits=1), QuantSpec(bits=3, symmetric=False)]
)
def test_fake_quantize_equals_quantize(spec):
    tree = params()
    tree["layer"]["kernel"] = tree["layer"]["kernel"].at[2:5].set(0.0)
    fake = jax.jit(lambda p: fake_quantize(p, spec))(tree)
    plain = jax.jit(jc.materialize)(quantize(tree, spec)[0])
    for x, y in zip(jax.tree.leaves(fake), jax.tree.leaves(plain), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def test_fake_quantize_leaves_quantized_leaves_alone():
    tree, _ = quantize(params(), QuantSpec(bits=8), select=by_path("embedding"))
    fake = fake_quantize(tree, QuantSpec(bits=4))
    assert fake["embedding"] is tree["embedding"]
    assert fake["layer"]["bias"] is tree["layer"]["bias"]


def test_other_compressed_leaves_stand_for_the_plain_array():
    tree = params()
    kernel = jnp.where(jnp.abs(tree["layer"]["kernel"]) > 0.7, tree["layer"]["kernel"], 0)
    tree["layer"]["kernel"] = sparsify(kernel, kernel != 0)
    spec = QuantSpec(bits=4)
    fake = jax.jit(lambda p: fake_quantize(p, spec))(tree)["layer"]["kernel"]
    np.testing.assert_array_equal(fake, quantize(tree, spec)[0]["layer"]["kernel"].materialize())
    np.testing.assert_array_equal(fake == 0, kernel == 0)


def test_straight_through_gradients_are_ones():
    tree = params()
    tree["layer"]["kernel"] = tree["layer"]["kernel"].at[0].set(0.0).at[1].set(100.0)
    for spec in (QuantSpec(bits=2), QuantSpec(bits=4, symmetric=False), QuantSpec(bits=1)):
        grads = jax.grad(lambda p, spec=spec: sum(x.sum() for x in jax.tree.leaves(fake_quantize(p, spec))))(tree)
        for leaf, grad in zip(jax.tree.leaves(tree), jax.tree.leaves(grads), strict=True):
            assert grad.dtype == leaf.dtype
            assert (grad == 1).all()


def test_nan_spreads_over_its_block_only():
    tree = params()
    tree["layer"]["kernel"] = tree["layer"]["kernel"].at[3, 2].set(jnp.nan).at[5, 4].set(jnp.inf)
    fake = jax.jit(lambda p: fake_quantize(p, QuantSpec(bits=4)))(tree)["layer"]["kernel"]
    finite = jnp.isfinite(fake)
    assert finite[:, jnp.array([0, 1, 3, 5])].all()
    assert not finite[3, 2]
    assert not finite[5, 4]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("compress", [lambda p: quantize(p, QuantSpec(bits=4))[0], lambda p: fixed_point(p, 4)[0]])
def test_values_that_are_not_finite_are_named(compress, bad):
    tree = params()
    tree["layer"]["kernel"] = tree["layer"]["kernel"].at[3, 2].set(bad)
    with pytest.raises(ValueError, match="'layer/kernel' holds"):
        compress(tree)


def test_integers_are_named():
    tree = params() | {"positions": jnp.zeros((1, 16), jnp.int32)}
    for function in (quantize, fake_quantize):
        with pytest.raises(ValueError, match=r"'positions' of dtype int32 and shape \(1, 16\)"):
            function(tree, QuantSpec(bits=4))


def test_groups_that_do_not_fit_name_the_leaf():
    with pytest.raises(ValueError, match="`group_size` 5") as caught:
        quantize(params(), QuantSpec(bits=4, group_size=5), select=by_path("layer/kernel"))
    assert "at leaf 'layer/kernel'" in caught.value.__notes__


def test_a_selector_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="matches no leaf"):
        quantize(params(), QuantSpec(bits=4), select=by_path("kernel"))
    with pytest.raises(ValueError, match="nothing is selected"):
        fake_quantize({"bias": jnp.ones(3)}, QuantSpec(bits=4))


def test_sharded_equals_unsharded():
    """Ranges by maxima and sums of whole numbers are the same in any order."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 16)), jnp.float32)
    specs = [QuantSpec(bits=4, group_size=32), QuantSpec(bits=8, symmetric=False), QuantSpec(bits=1)]

    def all_specs(w):
        return [fake_quantize({"kernel": w}, spec)["kernel"] for spec in specs]

    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    for x, y in zip(jax.jit(all_specs)(jax.device_put(w, sharding)), jax.jit(all_specs)(w), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
    leaf = quantize({"kernel": w}, specs[0])[0]["kernel"]
    placed = jax.device_put(leaf, component_shardings(leaf, sharding))
    np.testing.assert_array_equal(jax.jit(lambda leaf: leaf.materialize())(placed), leaf.materialize())


def test_abstract_trees():
    small, info = jax.eval_shape(lambda p: quantize(p, QuantSpec(bits=4)), params())
    assert info == quantize(params(), QuantSpec(bits=4))[1]
    assert isinstance(small["embedding"], QuantizedArray)
    assert small["embedding"].shape == (7, 16)
