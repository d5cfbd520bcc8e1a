"""Files for LiteRT: the codes that are in them, what the runtime computes, and what is refused."""

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from ai_edge_litert import interpreter
from litert_converter import schema_py_generated as schema

import jaxcompress as jc
from jaxcompress._src.arrays.packed import pack
from jaxcompress.arrays import LowRankArray, QuantizedArray
from jaxcompress.export import FloatLeafWarning, save_litert
from jaxcompress.models import BertConfig, GPT2Config, make_module
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs
from jaxcompress.trace import LeafLayout

LAYOUT = LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,))
RNG = np.random.default_rng(0)
INT8, INT4 = schema.TensorType.INT8, schema.TensorType.INT4


def _normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def _run(info, *inputs):
    """The outputs, by the names of the signature."""
    runner = interpreter.Interpreter(model_path=str(info.path), num_threads=1).get_signature_runner()
    return runner(**dict(zip(info.inputs, map(np.asarray, inputs), strict=True)))


def _constants(info, kind):
    """(codes, tensor) of the constants of a type."""
    model = schema.ModelT.InitFromPackedBuf(info.path.read_bytes(), 0)
    graph, found = model.subgraphs[0], []
    for tensor in graph.tensors:
        data = model.buffers[tensor.buffer].data
        if tensor.type != kind or data is None or not len(data):
            continue
        codes = np.asarray(data).view(np.int8)
        if kind == INT4:
            # Two's complement: left, then right with the sign.
            codes = np.stack([np.int8(codes << 4) >> 4, codes >> 4], -1)
        found.append((codes.reshape(tensor.shape), tensor))
    return found, graph


def _relative(found, wanted):
    return np.linalg.norm(np.asarray(found) - np.asarray(wanted)) / np.linalg.norm(np.asarray(wanted))


def _scattered(bits, group=None):
    """Codes that no rounding of a range would choose, and scales to match."""
    top = 2 ** (bits - 1)
    codes = RNG.integers(-top, top, (64, 6)).astype(np.int8)
    codes[:, 2] = RNG.integers(-2, 2, 64)
    scale = RNG.uniform(0.01, 0.1, (1 if group is None else 64 // group, 6)).astype(np.float32)
    return QuantizedArray(data=pack(codes, bits=bits, axis=0), scale=jnp.asarray(scale), dtype=jnp.dtype("float32"))


@pytest.mark.parametrize(("bits", "group"), [(8, None), (6, None), (4, None), (3, None), (4, 32)])
def test_the_file_has_our_codes_and_scales(tmp_path, bits, group):
    leaf, x = _scattered(bits, group), _normal(5, 64)
    info = save_litert(
        tmp_path / "m.tflite", lambda p, x: x @ p["w"] + p["b"][None], {"w": leaf, "b": jnp.arange(6.0)}, x
    )
    ((codes, tensor),), graph = _constants(info, INT8 if bits > 4 else INT4)
    np.testing.assert_array_equal(codes, np.asarray(leaf.codes()).T)
    scale = np.asarray(leaf.scale)
    if group is None:
        np.testing.assert_array_equal(tensor.quantization.scale, scale[0])
        assert not np.any(tensor.quantization.zeroPoint)
    else:
        assert tensor.quantization.details.blockSize == group
        steps = graph.tensors[tensor.quantization.details.scales]
        model = schema.ModelT.InitFromPackedBuf(info.path.read_bytes(), 0)
        stored = np.asarray(model.buffers[steps.buffer].data).view(np.float16).reshape(6, -1)
        np.testing.assert_array_equal(stored, scale.T.astype(jnp.bfloat16).astype(np.float32))
        leaf = QuantizedArray(data=leaf.data, scale=jnp.asarray(stored.T, jnp.float32), dtype=leaf.dtype)
    words = {8: "int8 per-channel", 6: "int8 per-channel", 4: "int4 per-channel", 3: "int4 per-channel"}[bits]
    words = "int4 g32, scales rounded to bfloat16" if group else words
    assert info.leaves == {"w": f"{words}, inputs rounded to 8 bits"}
    # The bias is added by the operation itself.
    assert len(graph.operators) == 1
    wanted = np.asarray(x, np.float64) @ np.asarray(leaf.materialize(), np.float64) + np.arange(6)
    assert _relative(_run(info, x)["output_0"], wanted) < 2e-2


def test_without_rounded_inputs_the_result_is_that_of_the_plain_array(tmp_path):
    leaf, x = _scattered(8), _normal(5, 64)
    info = save_litert(tmp_path / "m.tflite", lambda p, x: x @ p, leaf, x, round_inputs=False)
    assert info.leaves == {".": "int8 per-channel, computed in float32"}
    np.testing.assert_array_equal(_constants(info, INT8)[0][0][0], np.asarray(leaf.codes()).T)
    assert _relative(_run(info, x)["output_0"], np.asarray(x) @ np.asarray(leaf.materialize())) < 1e-6


def test_zero_points_are_taken_off_where_8_bits_hold_the_rest(tmp_path):
    leaf = quantize({"w": _normal(64, 6)}, QuantSpec(bits=4, symmetric=False))[0]["w"]
    x = _normal(5, 64)
    info = save_litert(tmp_path / "m.tflite", lambda p, x: x @ p["w"], {"w": leaf}, x, round_inputs=False)
    ((codes, _),), _ = _constants(info, INT8)
    np.testing.assert_array_equal(codes, (np.asarray(leaf.codes(), int) - np.asarray(leaf.zero_points(), int)).T)
    assert _relative(_run(info, x)["output_0"], np.asarray(x) @ np.asarray(leaf.materialize())) < 1e-6


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_kind_is_right_and_none_is_a_float_in_silence(tmp_path, kind):
    leaf, x = kinds.KINDS[kind](_normal(64, 6), LAYOUT), _normal(5, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        info = save_litert(tmp_path / "m.tflite", lambda p, x: x @ p["w"], {"w": leaf}, x, round_inputs=False)
    warned = [warning for warning in caught if warning.category is FloatLeafWarning]
    assert len(warned) == ("float32 (" in info.leaves["w"])
    assert all(f"w: {info.leaves['w']}" in str(warning.message) for warning in warned)
    tolerance = 4e-3 if "bfloat16" in info.leaves["w"] else 1e-5
    assert _relative(_run(info, x)["output_0"], np.asarray(x) @ np.asarray(leaf.materialize())) < tolerance


def test_inputs_that_are_rounded_as_the_runtime_does_and_others(tmp_path):
    weights = quantize({"w": _normal(64, 6)}, QuantSpec(bits=8))[0]
    dynamic = quantize_inputs(weights, QuantSpec(bits=8))[0]
    x = _normal(5, 64)
    info = save_litert(tmp_path / "m.tflite", lambda p, x: x @ p["w"], dynamic, x, round_inputs=False)
    assert info.leaves == {"w": "int8 per-channel, inputs rounded to 8 bits"}
    np.testing.assert_array_equal(_constants(info, INT8)[0][0][0], np.asarray(weights["w"].codes()).T)
    wanted = jc.execute(lambda p, x: x @ p["w"])(dynamic, x)
    assert _relative(_run(info, x)["output_0"], wanted) < 1e-2
    coarse = quantize_inputs(weights, QuantSpec(bits=4))[0]
    with pytest.warns(FloatLeafWarning, match="rounded as asked"):
        info = save_litert(tmp_path / "coarse.tflite", lambda p, x: x @ p["w"], coarse, x)
    wanted = jc.execute(lambda p, x: x @ p["w"])(coarse, x)
    assert _relative(_run(info, x)["output_0"], wanted) < 1e-5


def test_both_sides_several_axes_and_a_scan(tmp_path):
    tree = {
        "left": _normal(6, 64),  # (outputs, inputs), on the left
        "heads": _normal(64, 3, 4),
        "out": _normal(3, 4, 64),
        "stack": _normal(3, 64, 64) / 8,
    }
    layouts = {
        "left": LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,)),
        "heads": LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1, 2)),
        "out": LeafLayout(kind="matmul", input_axes=(0, 1), output_axes=(2,)),
        "stack": LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,)),
    }
    tree, _ = quantize(tree, QuantSpec(bits=8), layouts=layouts)

    def apply(p, x):
        def layer(x, w):
            return jax.nn.relu(x @ w), x.sum()

        heads = jnp.einsum("btd,dhk->bthk", x, p["heads"])
        x = x + jnp.einsum("bthk,hkd->btd", heads, p["out"])
        x, sums = jax.lax.scan(jax.checkpoint(layer), x, p["stack"], reverse=True)
        return {"y": jnp.einsum("od,btd->obt", p["left"], x), "sums": sums}

    x = _normal(2, 5, 64)
    info = save_litert(tmp_path / "m.tflite", apply, tree, x, round_inputs=False)
    assert set(info.leaves.values()) == {"int8 per-channel, computed in float32"}
    outputs, wanted = _run(info, x), jax.jit(jc.execute(apply))(tree, x)
    assert info.outputs == ("sums", "y")
    for name in wanted:
        assert _relative(outputs[name], wanted[name]) < 1e-5
    stack = [codes for codes, _ in _constants(info, INT8)[0] if codes.shape == (64, 64)]
    for layer in np.asarray(tree["stack"].codes()):
        assert any(np.array_equal(codes, layer.T) for codes in stack)


def test_branches(tmp_path):
    leaf, x = _scattered(8), _normal(5, 64)

    def apply(p, x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: -2 * (x @ p["w"]), x)

    info = save_litert(tmp_path / "m.tflite", apply, {"w": leaf}, x, round_inputs=False)
    assert info.leaves == {"w": "int8 per-channel, computed in float32"}
    for sign in (1, -1):
        assert _relative(_run(info, sign * x)["output_0"], apply({"w": leaf.materialize()}, sign * x)) < 1e-6


CONVOLUTIONS = {
    "same": ((3, 2, 6, 8), (2, 1), "SAME", 1, (1, 1)),
    "padded, dilated": ((3, 3, 6, 8), (1, 1), ((2, 1), (0, 2)), 1, (2, 1)),
    "depthwise": ((3, 2, 1, 12), (1, 2), "VALID", 6, (1, 1)),
    "one axis": ((3, 6, 8), (2,), "SAME", 1, (1,)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(tmp_path, name):
    shape, strides, padding, groups, dilation = CONVOLUTIONS[name]
    numbers = ("NHWC", "HWIO", "NHWC") if len(shape) == 4 else ("NWC", "WIO", "NWC")

    def apply(p, x):
        options = {"rhs_dilation": dilation, "feature_group_count": groups, "dimension_numbers": numbers}
        return jax.nn.relu(
            jax.lax.conv_general_dilated(x, p["k"], strides, padding, **options)
            + p["b"].reshape((1,) * (x.ndim - 1) + (-1,))
        )

    x = _normal(2, *(12, 10)[: len(strides)], 6)
    params = {"k": _normal(*shape), "b": _normal(shape[-1])}
    params, _ = quantize(params, QuantSpec(bits=8), layouts=jc.trace.layouts(apply, params, x))
    for round_inputs, tolerance in ((True, 2e-2), (False, 1e-6)):
        info = save_litert(tmp_path / f"{round_inputs}.tflite", apply, params, x, round_inputs=round_inputs)
        assert _relative(_run(info, x)["output_0"], jc.execute(apply)(params, x)) < tolerance
        ((codes, tensor),), _ = _constants(info, INT8)
        wanted = np.asarray(params["k"].codes())
        wanted = np.moveaxis(wanted[None] if len(shape) == 3 else wanted, -1, 0)  # (outputs, height, width, inputs)
        np.testing.assert_array_equal(codes, wanted.transpose(3, 1, 2, 0) if name == "depthwise" else wanted)
        np.testing.assert_array_equal(tensor.quantization.scale, np.asarray(params["k"].scale).ravel())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_bert_with_its_tables_and_its_gelu(tmp_path, bits):
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    module = make_module(BertConfig(**sizes, intermediate_size=64, max_position_embeddings=16))
    ids, mask = jnp.asarray(RNG.integers(0, 60, (2, 8)), jnp.int32), jnp.ones((2, 8), jnp.int32).at[1, 5:].set(0)
    params = jax.jit(module.init)(jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim == 2 else leaf, params)

    def apply(params, batch):
        return module.apply({"params": params}, batch["ids"], batch["mask"])

    batch = {"ids": ids, "mask": mask}
    layouts = jc.trace.layouts(apply, params, batch)
    tree, _ = quantize(params, QuantSpec(bits=bits), layouts=layouts)
    info = save_litert(tmp_path / "m.tflite", apply, tree, batch)
    assert info.inputs == ("0/ids", "0/mask")
    assert info.leaves["embeddings/word_embeddings/embedding"] == f"int{bits} look-up"
    wanted = jax.jit(jc.execute(apply))(tree, batch)
    outputs = _run(info, ids, mask)
    assert set(outputs) == {"last_hidden_state", "pooler_output"}
    for name, value in outputs.items():
        assert _relative(value, wanted[name]) < 5e-2
    model = schema.ModelT.InitFromPackedBuf(info.path.read_bytes(), 0)
    names = [model.operatorCodes[op.opcodeIndex].builtinCode for op in model.subgraphs[0].operators]
    assert names.count(schema.BuiltinOperator.GELU) == 1
    exact = save_litert(tmp_path / "exact.tflite", apply, tree, batch, round_inputs=False)
    for name, value in _run(exact, ids, mask).items():
        assert _relative(value, wanted[name]) < 1e-5


def test_a_table_that_is_looked_up_and_multiplied_is_stored_once(tmp_path):
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    module = make_module(GPT2Config(**sizes, max_position_embeddings=16))
    ids = jnp.asarray(RNG.integers(0, 60, (1, 8)), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), ids)["params"]

    def apply(params, ids):
        return module.apply({"params": params}, ids)["logits"]

    for bits in (8, 4):
        tree, _ = quantize(params, QuantSpec(bits=bits), layouts=jc.trace.layouts(apply, params, ids))
        info = save_litert(tmp_path / f"{bits}.tflite", apply, tree, ids)
        assert any(f"int{bits} look-up; int{bits} per-channel" in form for form in info.leaves.values())
        model = schema.ModelT.InitFromPackedBuf(info.path.read_bytes(), 0)
        # Numbers of all shapes but those of the table are far fewer.
        large = [
            tensor.buffer for tensor in model.subgraphs[0].tensors if model.buffers[tensor.buffer].data is not None
        ]
        large = [number for number in large if len(model.buffers[number].data) == 512 * 32 * bits // 8]
        assert len(large) == 2
        assert len(set(large)) == 1
        assert _relative(_run(info, ids)["output_0"], jax.jit(jc.execute(apply))(tree, ids)) < 2e-2


def test_quantized_factors(tmp_path):
    layouts = {
        "left": LeafLayout(kind="matmul", input_axes=(0, 1), output_axes=(2,)),
        "right": LeafLayout(kind="matmul", input_axes=(2,), output_axes=(0, 1)),
    }
    factors = {"left": _normal(64, 1, 32), "right": _normal(1, 6, 32)}
    factors = quantize(factors, QuantSpec(bits=8), layouts=layouts)[0]
    leaf, x = LowRankArray(**factors, dtype=jnp.dtype("float32")), _normal(5, 64)
    info = save_litert(tmp_path / "m.tflite", lambda p, x: x @ p, leaf, x, round_inputs=False)
    assert info.leaves == {".": "factors; int8 per-channel, computed in float32"}
    assert len(_constants(info, INT8)[0]) == 2
    assert _relative(_run(info, x)["output_0"], np.asarray(x) @ np.asarray(leaf.materialize())) < 1e-5


LOW_RANK = [kind for kind in kinds.KINDS if kind.startswith("low rank")]
SMALL = ["bfloat16", "float16"]


@pytest.mark.filterwarnings("ignore::jaxcompress.export.FloatLeafWarning")  # their residuals
@pytest.mark.parametrize("kind", LOW_RANK)
def test_low_rank_leaves_are_looked_up_and_multiplied(tmp_path, kind):
    leaf = kinds.KINDS[kind](_normal(64, 8), LAYOUT)
    rows = jnp.array([[3, 63, 0]])
    info = save_litert(tmp_path / "m.tflite", lambda p, i: p["w"][i] @ p["w"].T, {"w": leaf}, rows, round_inputs=False)
    w = np.asarray(leaf.materialize())
    assert _relative(_run(info, rows)["output_0"], w[np.asarray(rows)] @ w.T) < 1e-5


@pytest.mark.filterwarnings("ignore::jaxcompress.export.FloatLeafWarning")  # kinds that LiteRT lacks
@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("kind", ["int8 per channel", "int4 groups", "one bit", "codebook", "2:4", *LOW_RANK])
def test_leaves_of_other_dtypes(tmp_path, kind, dtype):
    leaf, x = kinds.KINDS[kind](_normal(64, 8).astype(dtype), LAYOUT), _normal(3, 64)
    info = save_litert(
        tmp_path / "m.tflite", lambda p, x: (x.astype(dtype) @ p["w"]).astype(jnp.float32), {"w": leaf}, x,
        round_inputs=False,
    )  # fmt: skip
    wanted = np.asarray(x.astype(dtype), np.float32) @ np.asarray(leaf.materialize(), np.float32)
    assert _relative(_run(info, x)["output_0"], wanted) < 1e-2


def test_groups_are_floats_where_inputs_are_not_rounded(tmp_path):
    """The runtime's dequantization of groups gives zeros."""
    leaf, x = _scattered(4, 32), _normal(5, 64)
    with pytest.warns(FloatLeafWarning, match="groups of int4 codes beside inputs of 8 bits alone"):
        info = save_litert(tmp_path / "m.tflite", lambda p, x: x @ p["w"], {"w": leaf}, x, round_inputs=False)
    assert _relative(_run(info, x)["output_0"], np.asarray(x) @ np.asarray(leaf.materialize())) < 1e-6


def test_arguments_are_checked_first(tmp_path):
    path, tree = tmp_path / "m.tflite", {"w": jnp.ones((4, 4))}
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 4"), jnp.float32)
    with pytest.raises(ValueError, match=r"Input 0 has the symbolic shape .*; LiteRT files have fixed shapes"):
        save_litert(path, lambda p, x: x @ p["w"], tree, symbolic)
    with pytest.raises(TypeError, match="Input 1 is 3, not an array"):
        save_litert(path, lambda p, x, n: x @ p["w"], tree, jnp.ones((2, 4)), 3)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        save_litert(path, lambda p, x: x @ p["w"], tree, jnp.ones((2, 4)))
    assert path.read_text() == "mine"


def test_without_the_converter_the_error_names_the_extra(tmp_path):
    code = "import sys; sys.modules['litert_converter'] = None; import jax.numpy as jnp, jaxcompress as jc\n"
    code += "try: jc.export.save_litert('unwritten', lambda p, x: x, {}, jnp.ones(2))\n"
    code += "except ModuleNotFoundError as err: print(err)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "LiteRT files need litert_converter: pip install 'jaxcompress[litert]'"


def test_inputs_and_outputs_whose_paths_read_the_same_stay_apart(tmp_path):
    tree = {"a/b": _normal(3), "a": {"b": _normal(3)}}
    info = save_litert(
        tmp_path / "m.tflite", lambda p, x: {"a/b": x["a/b"] - x["a"]["b"], "a": {"b": x["a"]["b"]}}, {}, tree
    )
    assert len(set(info.inputs)) == len(set(info.outputs)) == 2
    outputs = _run(info, *jax.tree.leaves(tree))
    np.testing.assert_allclose(outputs[info.outputs[0]], tree["a"]["b"])
    np.testing.assert_allclose(outputs[info.outputs[1]], tree["a/b"] - tree["a"]["b"])
