"""`InputQuantizedArray` in every kind of layer: each input is rounded once, in whole numbers where that can be."""

import dataclasses

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import zoo

import jaxcompress as jc
from jaxcompress import trace, tree
from jaxcompress._src.arrays.packed import pack
from jaxcompress._src.arrays.validate import validate_array
from jaxcompress._src.execution.execute import fallbacks
from jaxcompress._src.tree.partition import partition
from jaxcompress._src.tree.unselected import is_unselected, map_selected
from jaxcompress._src.types import is_compressed
from jaxcompress._src.weights.selection import selected_layouts
from jaxcompress.arrays import InputQuantizedArray, QuantizedArray, sparsify
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Stands for rounding: multiplies inputs by their scale, or by 1/2 without one; both are seen in the output."""

    def rounded(self, x, axes, scale, zero_point):
        del axes, zero_point
        return x * (0.5 if scale is None else scale)

    def codes(self, x, axes, scale, zero_point):
        del axes, scale, zero_point
        one = jnp.ones((1,) * x.ndim)
        return QuantizedArray(data=jnp.zeros(x.shape, jnp.uint8), scale=one, dtype=x.dtype, levels=(1e9,))


def wrapped(model, layouts, make, static):
    """(tree whose inputs are scaled, tree whose weights are scaled instead)."""

    def visit(path, leaf, layout):
        if is_unselected(layout):
            return leaf
        scale = None
        if static and layout.stack_axes == tuple(range(len(layout.stack_axes))):
            stack = [leaf.shape[axis] for axis in layout.stack_axes]
            scale = 2.0 ** jnp.arange(1, 1 + int(np.prod(stack)), dtype=jnp.float32).reshape(stack)
        weight = make(leaf, layout) if make else leaf
        return InputQuantizedArray(weight=weight, inputs=Scaling(), scale=scale)

    def moved(_, leaf):
        if not isinstance(leaf, InputQuantizedArray):
            return leaf
        factor = jnp.float32(0.5) if leaf.scale is None else leaf.scale
        return leaf.materialize() * factor.reshape(*factor.shape, *(1,) * (leaf.ndim - factor.ndim))

    multiplied = selected_layouts(model.params, layouts=layouts)
    multiplied = map_selected(lambda _, own: own if own.kind != "lookup" else tree.Unselected, multiplied)
    found = tree.map_with_path(visit, model.params, multiplied)
    return found, tree.map_with_path(moved, found)


@pytest.mark.parametrize("name", [name for name in zoo.MODELS if name not in ("embed", "tied_embed", "control_flow")])
def test_every_input_is_rounded_once(name):
    model = zoo.MODELS[name]()
    layouts = trace.layouts(model.apply, model.params, *model.inputs)
    made = {}
    for kind, static in ((None, False), (None, True), ("int4 groups", True), ("2:4", False)):
        made[f"{kind} {static}"] = wrapped(model, layouts, kinds.KINDS[kind] if kind else None, static)
    arrays, rest = partition(lambda leaf: hasattr(leaf, "dtype"), made)

    @jax.jit
    def both(arrays, *inputs):
        full = tree.combine(arrays, rest)
        return {
            kind: (jc.execute(model.apply)(found, *inputs), model.apply(moved, *inputs))
            for kind, (found, moved) in full.items()
        }

    for kind, (found, wanted) in both(arrays, *model.inputs).items():
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max()), err_msg=kind)


def test_a_tied_table_is_looked_up_as_it_is():
    model = zoo.tied_embed()
    table = model.params["Embed_0"]["embedding"]
    leaf = InputQuantizedArray(weight=table, inputs=Scaling())
    found = jax.jit(jc.execute(model.apply))(model.params | {"Embed_0": {"embedding": leaf}}, *model.inputs)
    np.testing.assert_allclose(found, model.apply(model.params, *model.inputs) / 2, rtol=1e-5, atol=1e-6)


def test_what_would_not_be_rounded_is_an_error():
    model = zoo.control_flow()
    params = {name: InputQuantizedArray(weight=leaf, inputs=Scaling()) for name, leaf in model.params.items()}
    with pytest.raises(ValueError, match=r"inputs of leaf 'a' are to be quantized, but `mul` changes it"):
        jc.execute(model.apply)(params, *model.inputs)


def test_codes_that_cannot_move_leave_a_plain_weight_with_quantized_inputs():
    """From bfloat16 to float32 a quantized leaf has no rule: it falls back, and its inputs are rounded all the same."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.bfloat16)
    leaf = kinds.KINDS["int4 groups"](w, trace.LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,)))
    leaf = dataclasses.replace(leaf, dtype=jnp.dtype("bfloat16"))
    params = {"w": InputQuantizedArray(weight=leaf, inputs=Scaling())}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 16)), jnp.float32)

    def apply(p, x):
        return x @ p["w"].astype(jnp.float32)

    np.testing.assert_array_equal(jc.execute(apply)(params, x), (x / 2) @ leaf.materialize().astype(jnp.float32))
    (fallback,) = fallbacks(apply, params, x)
    assert (fallback.path, fallback.primitive) == ("w", "convert_element_type")


INT8, UINT8 = QuantSpec(bits=8), QuantSpec(bits=8, symmetric=False)


@pytest.mark.parametrize(
    "weights", [INT8, UINT8, QuantSpec(bits=4), QuantSpec(bits=5, symmetric=False), QuantSpec(bits=8, per_tensor=True)]
)
@pytest.mark.parametrize("inputs", [INT8, UINT8, QuantSpec(bits=8, per_tensor=True)])
def test_whole_numbers_are_exact(weights, inputs):
    """Against float64, with the sum in int32; and seen in the program."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(40, 7)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(3, 4, 40)) + 0.3, jnp.float32)
    apply = jax.jit(jc.execute(lambda p, x: x @ p["kernel"]))
    stored, _ = quantize_inputs(quantize(params, weights)[0], inputs)
    leaf = stored["kernel"]
    codes = leaf.inputs.codes(x, (2,), None, None)
    exact = np.asarray(codes.materialize(), np.float64) @ np.asarray(leaf.materialize(), np.float64)
    found = apply(stored, x)
    np.testing.assert_allclose(found, exact, rtol=3e-7, atol=3e-7 * np.abs(exact).max())
    assert "tensor<3x4x7xi32>" in apply.lower(stored, x).as_text()


@pytest.mark.parametrize(
    ("weights", "inputs", "most"),
    [
        (UINT8, UINT8, 33025),
        (INT8, UINT8, 65793),
        (INT8, INT8, 131071),
        (QuantSpec(bits=4, convention="narrow"), UINT8, 1052688),
    ],
)
@pytest.mark.parametrize("terms", ["most", "more"])
def test_sums_that_int32_does_not_hold_run_on_rounded_floats(weights, inputs, most, terms):
    depth = most if terms == "most" else most + 1
    # Ones have the outermost codes of both sides.
    params = {"kernel": jnp.ones((depth, 1))}
    apply = jax.jit(jc.execute(lambda p, x: x @ p["kernel"], kernels=()))
    stored, x = quantize_inputs(quantize(params, weights)[0], inputs)[0], jnp.ones((2, depth))
    np.testing.assert_allclose(apply(stored, x), depth, rtol=1e-5)
    assert ("tensor<2x1xi32>" in apply.lower(stored, x).as_text()) == (terms == "most")


@pytest.mark.parametrize("side", [0, 1])
def test_whole_numbers_on_either_side_and_in_batches(side):
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(3, 16, 5)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(4, 3, 16)), jnp.float32)
    layout = trace.LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
    stored, _ = quantize_inputs(quantize({"w": w}, UINT8, layouts={"w": layout})[0], UINT8, layouts={"w": layout})

    def apply(p, x):
        numbers = (((1,), (2,)), ((0,), (1,)))
        if side == 0:
            return jax.lax.dot_general(p["w"], x, numbers)
        return jax.lax.dot_general(x, p["w"], (((2,), (1,)), ((1,), (0,))))

    rounded = stored["w"].inputs.rounded(x, (2,), None, None)
    wanted = np.einsum(
        "tei,eio->eot" if side == 0 else "tei,eio->eto", *map(np.float64, (rounded, stored["w"].materialize()))
    )
    found = jax.jit(jc.execute(apply))(stored, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_groups_and_sparse_zero_points_run_on_rounded_floats():
    rng = np.random.default_rng(2)
    params = {"kernel": jnp.asarray(rng.normal(size=(32, 6)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(2, 32)), jnp.float32)
    sparse = {"kernel": sparsify(params["kernel"], params["kernel"] > 0)}
    for stored in (quantize(params, QuantSpec(bits=4, group_size=8))[0], quantize(sparse, UINT8)[0]):
        marked, _ = quantize_inputs(stored, INT8)
        wanted = marked["kernel"].inputs.rounded(x, (1,), None, None) @ stored["kernel"].materialize()
        found = jax.jit(jc.execute(lambda p, x: x @ p["kernel"]))(marked, x)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_derivatives_are_those_of_rounded_floats():
    rng = np.random.default_rng(3)
    params = {"kernel": jnp.asarray(rng.normal(size=(32, 6)), jnp.float32)}
    stored, _ = quantize_inputs(quantize(params, INT8)[0], INT8)
    x = jnp.asarray(rng.normal(size=(2, 32)), jnp.float32)
    grad = jax.grad(lambda x: jnp.sin(jc.execute(lambda p, x: x @ p["kernel"])(stored, x)).sum())(x)
    out = jc.execute(lambda p, x: x @ p["kernel"])(stored, x)
    np.testing.assert_allclose(grad, jnp.cos(out) @ stored["kernel"].materialize().T, rtol=1e-5, atol=1e-6)


def test_convolutions_round_their_inputs():
    model = zoo.conv()
    stored, _ = quantize_inputs(
        model.params, QuantSpec(bits=3), layouts=trace.layouts(model.apply, model.params, *model.inputs)
    )
    (x,) = model.inputs
    rounded = stored["kernel"].inputs.rounded(x, (3,), None, None)
    np.testing.assert_allclose(
        jax.jit(jc.execute(model.apply))(stored, x), model.apply(model.params, rounded), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("weights", [None, QuantSpec(bits=8), QuantSpec(bits=4, group_size=8)])
def test_the_rows_of_experts_are_rounded(weights):
    def apply(params, x):
        return jax.lax.ragged_dot(x, params["w"], jnp.array([3, 0, 4]))

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 16, 4)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(7, 16)), jnp.float32)
    layouts = trace.layouts(apply, params, x)
    if weights is not None:
        params, _ = quantize(params, weights, layouts=layouts)
    stored, _ = quantize_inputs(params, QuantSpec(bits=3), layouts=layouts)
    rounded = np.asarray(stored["w"].inputs.rounded(x, (1,), None, None), np.float64)
    dense = np.asarray(jc.materialize(stored)["w"], np.float64)
    expected = np.concatenate([rounded[:3] @ dense[0], rounded[3:] @ dense[2]])
    for run in (jc.execute(apply), jax.jit(jc.execute(apply))):
        np.testing.assert_allclose(run(stored, x), expected, rtol=1e-5, atol=1e-5)
    assert [use.primitive for use in fallbacks(apply, stored, x)] == ["ragged_dot_general"] * (weights is not None)
    seen = jax.grad(lambda x: jc.execute(apply)(stored, x).sum())(x)
    np.testing.assert_allclose(seen, jax.grad(lambda x: apply(jc.materialize(stored), x).sum())(x), rtol=1e-5)


def test_the_wrapper_is_validated():
    leaf = InputQuantizedArray(weight=jnp.ones((3, 4, 2)), inputs=Scaling(), scale=jnp.ones(3))
    validate_array(leaf)
    assert is_compressed(leaf)
    assert (leaf.shape, leaf.ndim, leaf.dtype, leaf.nbits) == ((3, 4, 2), 3, jnp.float32, 32 * 27)
    for change, message in (
        ({"scale": jnp.ones(4)}, "Input scales of shape"),
        ({"scale": jnp.zeros(3)}, "positive and finite"),
        ({"zero_point": jnp.ones(2)}, "differ"),
        ({"weight": dataclasses.replace(pack(jnp.ones((3, 4, 2), "int8"), bits=4), bits=9)}, "1 to 7 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            validate_array(dataclasses.replace(leaf, **change))
