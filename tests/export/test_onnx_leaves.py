"""Compressed leaves: which form each kind takes, and that it computes what `execute` does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kinds import KINDS
from onnx_runs import assert_same, exported

import jaxcompress as jc
from jaxcompress._src.quantization.inputs import InputRange
from jaxcompress.export import save_onnx
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(64, 32)), jnp.float32)
X = RNG.normal(size=(3, 64)).astype(np.float32)
IDS = np.array([[3, 0], [63, 17]], np.int32)


def multiplied(params, x):
    return x @ params["w"]


def stored(**spec):
    return {"w": quantize({"w": W}, QuantSpec(**spec))[0]["w"]}


def check(tmp_path, apply, params, *inputs, **options):
    outputs, info = exported(tmp_path, apply, params, *inputs, **options)
    assert_same(outputs, jax.jit(jc.execute(apply))(params, *inputs))
    return info


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_multiplied(kind, tmp_path):
    layout = jc.trace.layouts(multiplied, {"w": W}, X)["w"]
    info = check(tmp_path, multiplied, {"w": KINDS[kind](W, layout)}, X)
    assert {leaf.path.split("/")[0] for leaf in info.leaves} == {"w"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_looked_up(kind, tmp_path):
    def apply(params, ids):
        return jnp.take(params["w"], ids, axis=0)

    layout = jc.trace.layouts(multiplied, {"w": W}, X)["w"]
    check(tmp_path, apply, {"w": KINDS[kind](W, layout)}, IDS)


FORMS = {
    "int4": ({"bits": 4, "group_size": 32}, "MatMulNBits, 4 bits, blocks of 32"),
    "uint4": ({"bits": 4, "group_size": 16, "symmetric": False}, "MatMulNBits, 4 bits, blocks of 16"),
    "int4 per channel": ({"bits": 4}, "MatMulNBits, 4 bits, blocks of 64"),
    "int3": ({"bits": 3, "group_size": 64}, "MatMulNBits, 4 bits, blocks of 64"),
    "tiles": ({"bits": 4, "group_size": 32, "group_outputs": 4}, "MatMulNBits, 4 bits, blocks of 32"),
    "partial": ({"bits": 4, "group_size": 48, "partial_groups": True}, "MatMulNBits, 4 bits, blocks of 16"),
    "small groups": ({"bits": 4, "group_size": 8}, "int4 g8, unpacked in the graph"),
    "int8": ({"bits": 8}, "int8 per-channel, unpacked in the graph"),
    "int8 groups": ({"bits": 8, "group_size": 32}, "int8 g32, unpacked in the graph"),
    "nf4": ({"format": "nf4", "group_size": 32}, "uint4 levels g32, unpacked in the graph"),
    "mxfp4": ({"format": "mxfp4"}, "uint4 levels g32, unpacked in the graph"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_quantized_weights(name, tmp_path):
    spec, form = FORMS[name]
    info = check(tmp_path, multiplied, stored(**spec), X)
    assert [leaf.form for leaf in info.leaves] == [form]
    assert (info.leaves[0].reason != "") == ("unpacked" in form or name == "int3")


@pytest.mark.parametrize("bits", [4, 8])
def test_matmuls_of_int8_inputs_are_close(bits, tmp_path):
    params = stored(bits=bits, group_size=32)
    outputs, info = exported(tmp_path, multiplied, params, X, accuracy_level=4)
    expected = np.asarray(jc.execute(multiplied)(params, jnp.asarray(X)))
    assert info.leaves[0].form == f"MatMulNBits, {bits} bits, blocks of 32"
    assert np.linalg.norm(outputs[0] - expected) < 0.02 * np.linalg.norm(expected)


def test_the_inputs_need_not_be_a_power_of_two(tmp_path):
    w = jnp.asarray(RNG.normal(size=(40, 6)), jnp.float32)
    params, _ = quantize({"w": w}, QuantSpec(bits=4))
    info = check(tmp_path, multiplied, params, X[:, :40])
    assert "MatMulNBits" in info.operators


ARRANGEMENTS = {
    "on the left": (lambda p, x: jnp.einsum("ko,bk->ob", p["w"], x), "w"),
    "transposed": (lambda p, x: x @ p["t"].T, "t"),
    "heads": (lambda p, x: jnp.einsum("bk,khd->bhd", x, p["h"]), "h"),
    "two input axes": (lambda p, x: jnp.einsum("bhd,hdo->bo", x.reshape(3, 4, 16), p["two"]), "two"),
    "reshaped": (lambda p, x: x @ p["two"].reshape(64, 32), "two"),
    "a slice": (lambda p, x: x @ p["w"][:, 8:24], "w"),
    "a cast": (lambda p, x: (x.astype("bfloat16") @ p["w"].astype("bfloat16")).astype("float32"), "w"),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_leaves_travel_as_they_are_stored(name, tmp_path):
    apply, leaf = ARRANGEMENTS[name]
    params = {"w": W, "t": W.T, "h": W.reshape(64, 4, 8), "two": W.reshape(4, 16, 32)}
    params = {leaf: params[leaf]}
    small, _ = quantize(params, QuantSpec(bits=4, group_size=16), layouts=jc.trace.layouts(apply, params, X))
    outputs, info = exported(tmp_path, apply, small, X)
    assert "MatMulNBits" in info.operators
    # `execute` rounds the weights to bfloat16, too; `MatMulNBits` does not.
    tolerance = 1e-1 if name == "a cast" else 1e-5
    assert_same(outputs, jax.jit(jc.execute(apply))(small, X), rtol=tolerance, atol=tolerance)


def test_what_has_no_rule_is_unpacked_and_said(tmp_path):
    info = check(tmp_path, lambda p, x: jnp.sin(p["w"]) + x.sum(), stored(bits=4, group_size=32), X)
    assert info.leaves == (jc.export.OnnxLeaf(path="w", form="int4 g32, unpacked in the graph", reason="for `sin`"),)


def test_a_leaf_may_come_out(tmp_path):
    check(tmp_path, lambda p, x: (p["w"], x), stored(bits=4, group_size=32), X)


def test_a_tied_table_is_stored_once(tmp_path):
    def apply(params, ids):
        return jnp.take(params["w"], ids, axis=0) @ params["w"].T

    plain = {"w": jnp.asarray(RNG.normal(size=(500, 32)), jnp.float32)}
    for params in (plain, quantize(plain, QuantSpec(bits=8))[0]):
        info = check(tmp_path, apply, params, IDS)
        assert info.nbytes < 1.2 * sum(part.nbytes for part in jax.tree.leaves(params)) + 5000


def test_layers_of_a_scan_are_unrolled(tmp_path):
    def apply(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, params["w"])

    params = {"w": jnp.asarray(RNG.normal(size=(6, 64, 64)), jnp.float32) / 8}
    layouts = jc.trace.layouts(apply, params, X)
    small, _ = quantize(params, QuantSpec(bits=4, group_size=32), layouts=layouts)
    info = check(tmp_path, apply, small, X)
    assert info.operators["MatMulNBits"] == 6
    assert "Scan" not in info.operators


@pytest.mark.parametrize("static", [False, True])
def test_layers_of_a_scan_with_quantized_inputs(static, tmp_path):
    def apply(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    params = {"w": jnp.asarray(RNG.normal(size=(3, 64, 64)), jnp.float32) / 8}
    layouts = jc.trace.layouts(apply, params, X)
    ranges = {"w": InputRange(jnp.asarray([0.02, 0.01, 0.008]))} if static else None
    small, _ = quantize(params, QuantSpec(bits=7), layouts=layouts)
    small, _ = quantize_inputs(small, QuantSpec(bits=8, per_tensor=static), ranges=ranges, layouts=layouts)
    info = check(tmp_path, apply, small, X)
    assert info.operators["MatMulInteger"] == info.operators["QuantizeLinear"] == 3
    assert ("ReduceSum" in info.operators) != static


def test_a_stack_that_cannot_be_taken_apart_is_unpacked(tmp_path):
    def apply(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    w = jnp.asarray(RNG.normal(size=(3, 64, 64)), jnp.float32) / 8
    layout = jc.trace.LeafLayout(kind="linear", input_axes=(0, 1), output_axes=(2,))
    info = check(tmp_path, apply, {"w": KINDS["int8 per tensor"](w, layout)}, X)
    assert info.leaves[0].reason == "for `scan`"


def test_a_stack_in_several_forms(tmp_path):
    def apply(params, x):
        stack = jnp.concatenate([params["a"], params["b"]])
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    w = jnp.asarray(RNG.normal(size=(3, 64, 64)), jnp.float32) / 8
    params = {"a": w[:1], "b": w[1:]}
    layout = jc.trace.LeafLayout(kind="linear", input_axes=(1,), output_axes=(2,), stack_axes=(0,))
    small = {
        name: KINDS["int3 per channel" if name == "a" else "codebook"](leaf, layout) for name, leaf in params.items()
    }
    info = check(tmp_path, apply, small, X)
    assert info.operators["MatMulNBits"] == 1


def test_leaves_in_branches_and_loops(tmp_path):
    def apply(params, x):
        x = lax.cond(x.sum() > 0, lambda: x @ params["w"], lambda: -x @ params["w"])
        return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ params["square"]), x)

    square = jnp.asarray(RNG.normal(size=(32, 32)), jnp.float32)
    params, _ = quantize({"w": W, "square": square}, QuantSpec(bits=4, group_size=16))
    check(tmp_path, apply, params, X)


def test_leaves_that_are_carried_and_come_out(tmp_path):
    def apply(params, x):
        carried = lax.fori_loop(0, 3, lambda _, w: jnp.tanh(w), params["w"])
        chosen = lax.cond(x.sum() > 0, lambda: params["w"], lambda: 2 * params["w"])
        scanned = lax.scan(lambda c, r: (params["w"], r.sum()), params["w"], x)
        return carried, chosen, scanned

    check(tmp_path, apply, stored(bits=4, group_size=32), X)


def test_a_stack_in_several_forms_may_be_cast_and_cut(tmp_path):
    def apply(params, x):
        stack = jnp.concatenate([params["a"], params["b"]]).astype(jnp.float16)[1:]
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x.astype(jnp.float16), stack)[0]

    params = {"a": jnp.asarray(RNG.normal(size=(2, 64, 64)), jnp.float32) / 8}
    params["b"] = params["a"] + 1
    layout = jc.trace.LeafLayout(kind="linear", input_axes=(1,), output_axes=(2,), stack_axes=(0,))
    small = params | {"a": KINDS["int3 per channel"](params["a"], layout)}
    outputs, info = exported(tmp_path, apply, small, X)
    assert_same(outputs, jax.jit(jc.execute(apply))(small, X), rtol=1e-2, atol=1e-2)
    assert info.operators["MatMulNBits"] == 1


def test_a_kernel_of_a_convolution(tmp_path):
    def apply(params, x):
        return lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    image = RNG.normal(size=(2, 5, 6, 8)).astype(np.float32)
    params = {"k": jnp.asarray(RNG.normal(size=(3, 3, 8, 4)), jnp.float32)}
    layouts = jc.trace.layouts(apply, params, image)
    small, _ = quantize(params, QuantSpec(bits=8), layouts=layouts)
    info = check(tmp_path, apply, small, image)
    assert info.leaves[0].reason == "for `conv_general_dilated`"
    rounded, _ = quantize_inputs(small, QuantSpec(bits=8), layouts=layouts)
    assert [leaf.form for leaf in check(tmp_path, apply, rounded, image).leaves][-1] == "inputs rounded as floats"


def test_experts_in_a_batch(tmp_path):
    def apply(params, x):
        return jnp.einsum("eto,eoh->eth", x, params["w"])

    params = {"w": jnp.asarray(RNG.normal(size=(3, 32, 8)), jnp.float32)}
    x = RNG.normal(size=(3, 5, 32)).astype(np.float32)
    small, _ = quantize(params, QuantSpec(bits=4, group_size=16), layouts=jc.trace.layouts(apply, params, x))
    info = check(tmp_path, apply, small, x)
    assert info.leaves[0].reason == "a matmul for each entry of a batch"


# Of 7 bits, whose sums do not saturate on processors with AVX2 alone.
INPUTS = {
    "rows": ({"bits": 7}, {"bits": 8}, {}),
    "rows, full": ({"bits": 7}, {"bits": 8, "convention": "full"}, {}),
    "rows, cut": ({"bits": 7}, {"bits": 8, "range_rule": "percentile", "percentile": 97}, {}),
    "rows with zero points": ({"bits": 7, "symmetric": False}, {"bits": 8, "symmetric": False}, {}),
    "rows with zero points, weights without": ({"bits": 7}, {"bits": 8, "symmetric": False}, {}),
    "int4 weights": ({"bits": 4}, {"bits": 8}, {}),
    "4 bits": ({"bits": 7}, {"bits": 4}, {}),
    "weights in groups": ({"bits": 4, "group_size": 32}, {"bits": 8}, {}),
    "inputs in groups": ({"bits": 8}, {"bits": 8, "group_size": 16}, {}),
    "static": ({"bits": 7}, {"bits": 8, "per_tensor": True}, {}),
    "static, full": ({"bits": 7}, {"bits": 8, "per_tensor": True, "convention": "full"}, {}),
    "static with a zero point": ({"bits": 7}, {"bits": 8, "per_tensor": True, "symmetric": False}, {}),
    "static, weights with zero points": ({"bits": 7, "symmetric": False}, {"bits": 8, "per_tensor": True}, {}),
    "plain weights": (None, {"bits": 8}, {}),
}


def rounded(spec, inputs):
    params = {"w": W} if spec is None else stored(**spec)
    inputs, ranges = QuantSpec(**inputs), None
    if inputs.per_tensor:
        ranges = {"w": InputRange(jnp.float32(0.011), None if inputs.symmetric else jnp.uint8(117))}
    return quantize_inputs(params, inputs, ranges=ranges)[0]


@pytest.mark.parametrize("name", INPUTS)
def test_quantized_inputs_as_jax_has_them(name, tmp_path):
    spec, inputs, options = INPUTS[name]
    info = check(tmp_path, multiplied, rounded(spec, inputs), X, **options)
    whole = "rows" in name or name == "int4 weights" or "static" in name
    assert ("MatMulInteger" in info.operators) == whole


@pytest.mark.parametrize("name", INPUTS)
def test_quantized_inputs_without_rows(name, tmp_path):
    spec, inputs, options = INPUTS[name]
    check(tmp_path, multiplied, rounded(spec, inputs), np.zeros((2, 0, 64), np.float32), **options)


def test_rows_with_weights_of_7_bits(tmp_path):
    params = rounded({"bits": 8, "symmetric": False}, {"bits": 8})
    outputs, info = exported(tmp_path, multiplied, params, X, weight_bits=7)
    plain = np.asarray(multiplied(jc.materialize(params), X))
    assert np.linalg.norm(outputs[0] - plain) < 0.02 * np.linalg.norm(plain)
    assert info.leaves[0].reason == "weights rounded to 7 bits"


def test_a_rule_that_onnx_lacks_names_the_way_out(tmp_path):
    params = rounded({"bits": 7}, {"bits": 8, "range_rule": "mse"})
    with pytest.raises(NotImplementedError, match=r'bit cast .* `input_ranges="tensor"` finds ranges without it'):
        exported(tmp_path, multiplied, params, X)
    assert exported(tmp_path, multiplied, params, X, input_ranges="tensor")


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_and_infinities_are_kept_apart(symmetric, tmp_path):
    params = rounded({"bits": 7}, {"bits": 8, "symmetric": symmetric})
    x = np.array(X)
    x[0], x[1, 3] = 0, np.inf
    outputs, _ = exported(tmp_path, multiplied, params, x)
    expected = np.asarray(multiplied(jc.materialize(params), X))
    assert (outputs[0][0] == 0).all()
    assert not np.isfinite(outputs[0][1]).any()
    np.testing.assert_allclose(outputs[0][2:], expected[2:], atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize(("weight_bits", "error"), [(8, 0.01), (7, 0.02)])
def test_one_range_for_a_tensor_is_close(weight_bits, error, tmp_path):
    params = rounded({"bits": 8 if weight_bits == 7 else 7}, {"bits": 8})
    outputs, info = exported(tmp_path, multiplied, params, X, weight_bits=weight_bits, input_ranges="tensor")
    plain = np.asarray(multiplied(jc.materialize(params), X))
    assert np.linalg.norm(outputs[0] - plain) < error * np.linalg.norm(plain)
    assert info.operators["DynamicQuantizeLinear"] == info.operators["MatMulInteger"] == 1
    assert info.leaves[0].reason == ("weights rounded to 7 bits" if weight_bits == 7 else "7 bits in 8")


def test_projections_share_the_codes_of_their_input(tmp_path):
    params = {name: rounded({"bits": 7}, {"bits": 8})["w"] for name in "qkv"}
    _, info = exported(tmp_path, lambda p, x: [x @ leaf for leaf in p.values()], params, X)
    assert info.operators["QuantizeLinear"] == 1


def test_inputs_that_would_never_be_quantized_are_an_error(tmp_path):
    params = rounded({"bits": 8}, {"bits": 8})
    with pytest.raises(ValueError, match="The inputs of leaf 'w' are to be quantized, but `add`"):
        save_onnx(tmp_path / "m.onnx", lambda p, x: x @ (p["w"] + 1), params, X)
    assert not list(tmp_path.iterdir())
