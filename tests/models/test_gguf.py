"""GGUF files, written by the `gguf` package as llama.cpp's converter does."""

import json

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_gguf import CONFIG, TOKENS, gguf_tensors, write_gguf

from jaxcompress._src.models.decoder.rotary import RopeScaling
from jaxcompress._src.models.hf.gguf import read_gguf
from jaxcompress._src.recipe.directories import load_model
from jaxcompress._src.recipe.text import Texts
from jaxcompress._src.recipe.tokens import tokenize
from jaxcompress.export import save_huggingface
from jaxcompress.models import GPT2Config, LlamaConfig, from_pretrained, make_module

IDS = np.array([[3, 9, 4, 7, 1]])


@pytest.fixture
def file(tmp_path):
    kinds = {
        "q_proj": gguf.GGMLQuantizationType.Q4_1,
        "k_proj": gguf.GGMLQuantizationType.Q8_0,
        "v_proj": gguf.GGMLQuantizationType.F16,
        "down_proj": gguf.GGMLQuantizationType.Q4_0,
    }
    path = tmp_path / "tiny.gguf"
    return path, write_gguf(path, gguf_tensors(CONFIG), kinds)


def test_it_is_the_model_of_its_dequantized_blocks(file, assert_same_params, tmp_path):
    path, stored = file
    module, params = from_pretrained(path)
    assert module.config == CONFIG
    directory = tmp_path / "reference"
    directory.mkdir()
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(TOKENS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(stored, directory / "model.safetensors")
    assert_same_params(params, from_pretrained(directory)[1])
    # Rounding aside, it is the model that was written: queries and keys are back in their order.
    plain = make_module(CONFIG)
    logits = jax.jit(lambda p: plain.apply({"params": p}, IDS)["logits"])(params)
    save_file(gguf_tensors(CONFIG), directory / "model.safetensors")
    wanted = plain.apply({"params": from_pretrained(directory)[1]}, IDS)["logits"]
    assert np.abs(logits - wanted).max() < 0.2 * np.abs(wanted).max()


def test_an_untied_head_and_uneven_layers(tmp_path):
    config = LlamaConfig(
        **{name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=(64, 32),
    )
    tensors = gguf_tensors(config)
    path = tmp_path / "uneven.gguf"
    head = tensors.pop("lm_head.weight")
    write_gguf(
        path,
        tensors,
        {},
        [
            lambda writer: writer.kv_data[0].pop("llama.feed_forward_length"),
            lambda writer: writer.add_feed_forward_length([64, 32]),
            lambda writer: writer.add_tensor("output.weight", head),
        ],
    )
    module, params = from_pretrained(path)
    assert (module.config.intermediate_size, module.config.tie_word_embeddings) == ((64, 32), False)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], head.T)


def test_gpt2_kernels_are_turned_back(tmp_path):
    config = GPT2Config(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    tensors = gguf_tensors(config)
    path = tmp_path / "gpt2.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(1)
    writer.add_context_length(1024)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    names = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    names |= {"ln_1": "attn_norm", "ln_2": "ffn_norm"}
    outer = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    for name, array in tensors.items():
        parent, _, leaf = name.removeprefix("transformer.").rpartition(".")
        turned = array.T if "c_" in parent and leaf == "weight" else array
        stored = outer.get(parent) or f"blk.0.{names[parent.removeprefix('h.0.')]}"
        writer.add_tensor(f"{stored}.{leaf}", np.ascontiguousarray(turned))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    module, params = from_pretrained(path)
    assert module.config == config
    kernel = params["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["transformer.h.0.attn.c_attn.weight"])


def test_its_tokenizer_comes_along(file, tmp_path):
    path, _ = file
    texts = Texts(texts=("ab ab12", "j"), labels=np.array([-1, -1], np.int32))
    tokens = tokenize(path, texts, config=CONFIG)
    assert tokens.ids == ((13, 14, 15, 16), (11,))
    assert (tokens.pad_id, tokens.max_length) == (1, 32)
    loaded = load_model(path)
    assert (loaded.directory, loaded.weights, loaded.compressed) == (path, path, False)
    save_huggingface(tmp_path / "plain", loaded.module, loaded.params, source=path)
    assert tokenize(tmp_path / "plain", texts).ids == tokens.ids
    assert from_pretrained(tmp_path / "plain")[0] == loaded.module


def test_divisors_of_frequencies_are_the_scaling_of_llama_3(tmp_path):
    """As `convert_hf_to_gguf.py` computes them, whose fields do not name the kind."""
    divisors = []
    for wavelength in 2 * np.pi * 4e5 ** (np.arange(0, 8, 2) / 8):
        share = (8192 / wavelength - 1) / 3
        between = 1 / ((1 - share) / 8 + share)
        divisors.append(1.0 if wavelength < 2048 else 8.0 if wavelength > 8192 else between)
    assert divisors[1] == 1 < divisors[2] < 8 == divisors[3]

    def change(writer):
        writer.kv_data[0]["llama.rope.freq_base"].value = 4e5
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))

    path = tmp_path / "llama3.gguf"
    write_gguf(path, gguf_tensors(CONFIG), {}, [change])
    module, _ = from_pretrained(path)
    assert module.config.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original=8192)


def _damaged(path):
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", np.ones((2, 2), np.float32)), "'blk.0.ffn_gate_exps.w"),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 4], np.float32)),
            "are not the divisors of Llama 3.1 for heads of width 8 and a factor of 4;",
        ),
        (lambda w: w.kv_data[0].pop("llama.attention.head_count"), "no field `llama.attention.head_count`"),
        (lambda w: w.add_sliding_window(8), "has a sliding window of 8 tokens; none is supported"),
        (lambda w: [w.add_key_length(8), w.add_rope_dimension_count(4)], "turns 4 of the 8 features of a head"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "no field `llama.rope.scaling.factor`"),
    ],
)
def test_what_is_not_known_is_named(tmp_path, change, message):
    path = tmp_path / "other.gguf"
    write_gguf(path, gguf_tensors(CONFIG), {}, [change])
    with pytest.raises(ValueError, match=message):
        read_gguf(path)


def test_other_files_are_refused(file, tmp_path):
    path, _ = file
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*none.gguf'"):
        from_pretrained(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="head"):
        from_pretrained(path, head="masked_lm")
    _damaged(path)
    with pytest.raises(ValueError, match=r"tiny.gguf' is damaged or not a GGUF file"):
        from_pretrained(path)
    other = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.write_tensors_to_file()
    other.close()
    with pytest.raises(ValueError, match="is of architecture 'mamba'; supported: llama, qwen2, qwen3, gpt2"):
        from_pretrained(tmp_path / "mamba.gguf")
