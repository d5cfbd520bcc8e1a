"""Whole models: those of this library, a vision transformer and a ResNet in Flax."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_runs import assert_same, run_session, session

import jaxcompress as jc
from jaxcompress.export import save_onnx
from jaxcompress.models import BertConfig, GPT2Config, LlamaConfig, generate, init_cache, make_module
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs

SIZES = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 24}
CONFIGS = {
    "bert": BertConfig(**SIZES, num_attention_heads=4, intermediate_size=64, head="sequence_classification"),
    "gpt2": GPT2Config(**SIZES, num_attention_heads=4, intermediate_size=64),
    "llama": LlamaConfig(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        sliding_window=(None, 3),
        qk_norm=True,
        tie_word_embeddings=True,
    ),
}
IDS = np.array([[5, 9, 2, 7, 0, 0], [3, 1, 4, 1, 5, 9], [0, 0, 0, 8, 2, 6]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0, 0], [1] * 6, [0, 0, 0, 1, 1, 1]], np.int32)
KERNELS = jc.tree.by_path(r".*kernel")


def noisy(params):
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noise = [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, noise)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    module = make_module(CONFIGS[request.param])
    return module, noisy(jax.jit(module.init)(jax.random.key(0), IDS)["params"])


def tokens():
    batch, length = jax.export.symbolic_shape("batch, length", constraints=["length <= 24"])
    return 2 * [jax.ShapeDtypeStruct((batch, length), jnp.int32)]


def test_transformers_at_any_size(model, tmp_path):
    module, params = model

    def apply(params, input_ids, attention_mask):
        return module.apply({"params": params}, input_ids, attention_mask)

    info = save_onnx(tmp_path / "m.onnx", apply, params, *tokens())
    runner = session(tmp_path / "m.onnx")
    assert info.inputs == ("input_ids", "attention_mask")
    for rows, length in ((3, 6), (1, 1), (2, 4)):
        inputs = IDS[:rows, -length:], np.maximum(MASK[:rows, -length:], np.eye(length, dtype=np.int32)[-1])
        expected = apply(params, *inputs)
        # Dicts come out in the order of JAX's trees.
        assert set(info.outputs) == set(expected)
        assert_same(run_session(runner, info.inputs, inputs), expected)


@pytest.mark.parametrize("name", ["int8 inputs", "int4"])
def test_compressed_transformers(model, name, tmp_path):
    module, params = model

    def apply(params, ids, mask):
        return jax.tree.leaves(module.apply({"params": params}, ids, mask))[-1]

    if name == "int4":
        small, _ = quantize(params, QuantSpec(bits=4, group_size=16), select=KERNELS)
    else:
        # 7 bits: sums do not saturate on any processor.
        small, _ = quantize(params, QuantSpec(bits=7), select=KERNELS)
        small, _ = quantize_inputs(small, QuantSpec(bits=8), select=KERNELS)
    info = save_onnx(tmp_path / "m.onnx", apply, small, *tokens())
    outputs = run_session(session(tmp_path / "m.onnx"), info.inputs, (IDS, MASK))
    assert_same(outputs, jax.jit(jc.execute(apply))(small, IDS, MASK), rtol=2e-3, atol=2e-3)
    assert not any("unpacked" in leaf.form for leaf in info.leaves)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", [None, 8])
def test_decoding_with_a_cache_is_what_generate_does(family, bits, tmp_path):
    module = make_module(CONFIGS[family])
    params = noisy(jax.jit(module.init)(jax.random.key(0), IDS)["params"])

    def step(params, ids, cache):
        outputs = module.apply({"params": params}, ids, cache=cache)
        return {"logits": outputs["logits"], "cache": outputs["cache"]}

    prompt = IDS[1:2]
    cache = init_cache(module.config, 1, 12, bits=bits)
    names = {}
    for length in (6, 1):
        one = jax.ShapeDtypeStruct((1, length), jnp.int32)
        info = save_onnx(tmp_path / f"{length}.onnx", step, params, one, jax.eval_shape(lambda: cache))
        names[length] = info
    ids, state, found = prompt, [np.asarray(leaf) for leaf in jax.tree.leaves(cache)], []
    for _ in range(4):
        length = ids.shape[1]
        expected = jax.jit(step)(params, ids, jax.tree.unflatten(jax.tree.structure(cache), state))
        info = names[length]
        outputs = run_session(session(tmp_path / f"{length}.onnx"), info.inputs, (ids, state))
        assert_same(outputs, expected)
        *state, logits = outputs
        assert info.outputs[-1] == "logits"
        found.append(int(logits[0, -1].argmax()))
        ids = np.array([found[-1:]], np.int32)
    assert found == generate(module, params, prompt, max_new_tokens=4, cache_bits=bits).tokens[0].tolist()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h)
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))


class VisionTransformer(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(16, (4, 4), strides=(4, 4))(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, 16))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 16)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(1.0), (1, x.shape[1], 16))
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(5)(nn.LayerNorm()(x[:, 0]))


class Residual(nn.Module):
    features: int
    strides: int

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(self.features, (3, 3), strides=self.strides, use_bias=False)(x)
        h = nn.relu(nn.BatchNorm(use_running_average=True)(h))
        h = nn.BatchNorm(use_running_average=True)(nn.Conv(self.features, (3, 3), use_bias=False)(h))
        if x.shape != h.shape:
            x = nn.Conv(self.features, (1, 1), strides=self.strides)(x)
        return nn.relu(x + h)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (7, 7), strides=2)(images)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for features, strides in ((8, 1), (12, 2)):
            x = Residual(features, strides)(x)
        x = nn.avg_pool(x, (2, 2), (1, 1))
        return nn.Dense(5)(x.mean((1, 2)))


@pytest.mark.parametrize("module", [VisionTransformer(), ResNet()], ids=["vit", "resnet"])
def test_models_of_images(module, tmp_path):
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), images)
    variables = jax.tree.map(jnp.abs, noisy(variables)) if "batch_stats" in variables else noisy(variables)
    (batch,) = jax.export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, 16, 16, 3), jnp.float32)
    info = save_onnx(tmp_path / "m.onnx", module.apply, variables, spec)
    runner = session(tmp_path / "m.onnx")
    for rows in (3, 1):
        outputs = run_session(runner, info.inputs, images[:rows])
        assert_same(outputs, jax.jit(module.apply)(variables, images[:rows]), rtol=1e-4, atol=1e-4)


def test_layers_under_a_scan(tmp_path):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.remat(Block)
            scan = nn.scan(
                lambda block, x, _: (block(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=5
            )
            return scan(layer(), x, None)[0]

    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    module = Scanned()
    params = jax.jit(module.init)(jax.random.key(0), x)
    info = save_onnx(tmp_path / "m.onnx", module.apply, params, x)
    assert_same(run_session(session(tmp_path / "m.onnx"), info.inputs, x), jax.jit(module.apply)(params, x))
    assert "Scan" not in info.operators


def test_a_fresh_process_needs_neither_jax_nor_this_library(model, tmp_path):
    module, params = model
    small, _ = quantize(params, QuantSpec(bits=4, group_size=16), select=KERNELS)

    def apply(params, ids, mask):
        return jax.tree.leaves(module.apply({"params": params}, ids, mask))[-1]

    save_onnx(tmp_path / "m.onnx", apply, small, *tokens(), output_names=["logits"])
    np.savez(tmp_path / "inputs.npz", ids=IDS, mask=MASK)
    code = (
        "import sys, numpy as np, onnxruntime as ort\n"
        f"runner = ort.InferenceSession({str(tmp_path / 'm.onnx')!r}, providers=['CPUExecutionProvider'])\n"
        f"outputs = runner.run(['logits'], dict(np.load({str(tmp_path / 'inputs.npz')!r})))\n"
        f"np.save({str(tmp_path / 'out.npy')!r}, outputs[0])\n"
        "assert not {'jax', 'jaxcompress', 'onnx'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert_same([np.load(tmp_path / "out.npy")], jax.jit(jc.execute(apply))(small, IDS, MASK))
