"""Decoders whose units are masked equal those that are shrunk, and uneven ones are written and read back."""

import json

import jax
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.tree.maps import leaves_by_path
from jaxcompress._src.units.shrink import mask_units
from jaxcompress.models import (
    GPT2Config,
    LlamaConfig,
    from_pretrained,
    make_module,
    resized,
    save_pretrained,
    unit_groups,
)

SIZES = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 3, "max_position_embeddings": 12}
CONFIGS = {
    "llama": LlamaConfig(
        **SIZES,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_size=4,
        intermediate_size=20,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    "qwen3": LlamaConfig(
        **SIZES,
        num_attention_heads=3,
        head_size=6,
        intermediate_size=20,
        qk_norm=True,
        model_type="qwen3",
        head="sequence_classification",
        sliding_window=(None, 4, 4),
    ),
    "gpt2": GPT2Config(**SIZES, num_attention_heads=4, intermediate_size=20, tie_word_embeddings=False),
    "plain": GPT2Config(**SIZES, num_attention_heads=4, intermediate_size=20, head="decoder"),
}
IDS = np.array([[3, 9, 4, 7, 1], [8, 2, 6, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    module = make_module(CONFIGS[request.param])
    params = jax.jit(module.init)(jax.random.key(0), IDS)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return module, jax.tree.unflatten(structure, noisy)


def _hidden(module, params):
    outputs = jax.jit(lambda p: module.apply({"params": p}, IDS, MASK))(params)
    return np.asarray(outputs["last_hidden_state"])[MASK > 0], outputs.get("logits")


@pytest.mark.parametrize("kinds", [("heads", "columns"), ("attentions", "ffns")])
def test_shrunk_is_masked(model, kinds, assert_same_params, tmp_path):
    module, params = model
    groups = unit_groups(module.config, kinds=kinds)
    rng = np.random.default_rng(0)
    keep = {group.name: rng.random(group.count) < 0.6 for group in groups}
    small = jc.structured.shrink(params, groups, keep)
    smaller = resized(module, small)
    (wanted, logits), (hidden, small_logits) = (
        _hidden(*each) for each in ((module, mask_units(params, groups, keep)), (smaller, small))
    )
    np.testing.assert_allclose(hidden, wanted, rtol=1e-5, atol=1e-5)
    if logits is not None:
        np.testing.assert_allclose(small_logits[0], logits[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"transformers cannot load this shape: .* differ from layer to layer"):
        save_pretrained(tmp_path, smaller, small)
    save_pretrained(tmp_path, smaller, small, uneven=True)
    back, restored = from_pretrained(tmp_path)
    assert back == smaller
    assert_same_params(restored, small)


def test_a_thinner_stream_is_a_model_of_that_width(model):
    module, params = model
    groups = unit_groups(module.config, kinds=["hidden"])
    keep = {"hidden": np.arange(16) % 4 != 1}
    small = jc.structured.shrink(params, groups, keep)
    smaller = resized(module, small)
    assert smaller.config.hidden_size == 12
    assert smaller.config.head_size == module.config.head_size
    assert np.isfinite(_hidden(smaller, small)[0]).all()


def test_units_own_every_kernel_of_their_sublayers(model):
    module, params = model
    kernels = {path for path in leaves_by_path(params) if path.endswith("kernel")} - {"lm_head/kernel", "score/kernel"}
    for kinds in (("heads", "columns"), ("attentions", "ffns")):
        owned = {part.path for group in unit_groups(module.config, kinds=kinds) for part in group.slices}
        assert {path for path in owned if path.endswith("kernel")} == kernels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "must be the same multiple of `num_key_value_heads` in every layer, got 6 and 4"),
        ({"head_size": 5}, "`head_size` must be even, for rotary positions, got 5"),
        ({"sliding_window": (3, 3)}, "`sliding_window` must have one entry for each of 3 layers, got 2"),
        ({"sliding_window": 0}, "`sliding_window` must be an int of at least 1, got 0"),
        ({"hidden_act": "tanh"}, "`hidden_act` must be one of .*, got 'tanh'"),
        ({"model_type": "gemma"}, "`model_type` must be one of 'llama', 'mistral', 'qwen2', 'qwen3', got 'gemma'"),
        ({"qk_norm": 3}, "`qk_norm` must be one of False, True, got 3"),
        ({"rope_theta": 0}, "`rope_theta` must be a finite number above 0, got 0"),
    ],
)
def test_configs_name_what_is_wrong(changes, message):
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 8, "head_size": 4}
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**(SIZES | sizes | changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "is of kind 'longrope'; supported: linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "`rope_scaling` has no `factor`"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "`factor` of `rope_scaling` must be at least 1, got 0.5"),
        ({"rope_scaling": 3}, "`rope_scaling` must be a mapping, got 3"),
        ({"rope_parameters": 3}, "`rope_parameters` must be a mapping, got 3"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config` is .*; only None is supported"),
        ({"hidden_size": "8"}, r"`hidden_size` must be an int in \[1, 2147483647\], got '8'"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "known: LlamaModel, LlamaForCausalLM, .* `head=`"),
    ],
)
def test_files_name_what_is_wrong(settings, message, tmp_path):
    whole = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(whole | settings))
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)
