"""GGUF files, read by `gguf.GGUFReader`, by formulas in NumPy, and by `from_pretrained`."""

import dataclasses
import json
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_models import CONFIGS, INT4, kernels
from tiny_gguf import CONFIG, TOKENS, gguf_tensors, write_gguf

import jaxcompress as jc
from jaxcompress._src.export import gguf as export_gguf
from jaxcompress._src.models.decoder.rotary import RopeScaling
from jaxcompress._src.recipe.text import Texts
from jaxcompress._src.recipe.tokens import tokenize
from jaxcompress.export import round_scales, save_gguf
from jaxcompress.models import GPT2Config, LlamaConfig, from_pretrained
from jaxcompress.quantization import QuantSpec

WIDE = dataclasses.replace(CONFIG, vocab_size=len(TOKENS) + 1)
IDS = np.array([[3, 9, 4, 7, 1, 22]])
ARCHITECTURES = {"tied": "llama", "mistral": "llama"}


def _logits(module, params):
    return jax.jit(jc.execute(lambda p: module.apply({"params": p}, IDS)["logits"]))(params)


@pytest.mark.parametrize("name", ["llama", "tied", "mistral", "qwen2", "qwen3", "gpt2"])
def test_leaves_are_read_back_bit_by_bit(name, model, flat, tmp_path):
    specs = {kernels(name): INT4, ".*(embed_tokens|wte)/embedding": QuantSpec(bits=8, group_size=32)}
    module, params = model(name, specs)
    params = round_scales(params)
    info = save_gguf(tmp_path / "m.gguf", module, params, dense="float32")
    read, plain = from_pretrained(tmp_path / "m.gguf")
    for field in dataclasses.fields(module.config):
        if field.name not in ("model_type", "extra"):
            assert getattr(read.config, field.name) == getattr(module.config, field.name), field.name
    assert flat(plain).keys() == flat(params).keys()
    for path, leaf in flat(jc.materialize(params)).items():
        np.testing.assert_array_equal(flat(plain)[path], leaf, err_msg=path)
    np.testing.assert_allclose(_logits(read, plain), _logits(module, params), atol=2e-5)
    assert info.rounding == 0
    forms = {
        leaf.form for path, leaf in info.leaves.items() if path.endswith("/kernel") and "/lm_head" not in f"/{path}"
    }
    assert forms == {"Q4_0"}
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.architecture"].contents() == ARCHITECTURES.get(name, name)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert sum(tensor.n_bytes for tensor in reader.tensors) == info.nbytes
    names = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert ("output.weight" in names) == (name not in ("tied", "gpt2"))
    assert names["token_embd.weight"] == "Q8_0"
    assert all(kind == "F32" for stored, kind in names.items() if "norm" in stored or "bias" in stored)


def _half(scale):
    return np.asarray(scale, np.float16).astype(np.float32)


def _block_values(data, kind):
    """The formulas of ggml, block by block: (weights,)."""
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
    values = []
    for block in np.asarray(data).reshape(-1, sizes[kind]):
        d = block[:2].view(np.float16)[0].astype(np.float32)
        if kind == "Q8_0":
            values += [d * np.float32(q) for q in block[2:].view(np.int8)]
            continue
        m = block[2:4].view(np.float16)[0].astype(np.float32) if kind.endswith("_1") else None
        nibbles = [*(block[-16:] & 15), *(block[-16:] >> 4)]
        if kind.startswith("Q5"):
            high = int(block[-20:-16].view("<u4")[0])
            nibbles = [int(q) + 16 * (high >> i & 1) for i, q in enumerate(nibbles)]
        middle = 16 if kind.startswith("Q5") else 8
        values += [d * np.float32(int(q) - middle) if m is None else d * np.float32(q) + m for q in nibbles]
    return np.array(values, np.float32)


BLOCKS = {
    "groups": (INT4, "Q4_0"),
    "rows of 3 bits": (QuantSpec(bits=3), "Q4_0"),
    "groups of 64 of 2 bits, bfloat16 scales": (QuantSpec(bits=2, group_size=64, scale_dtype="bfloat16"), "Q4_0"),
    "5 bits": (QuantSpec(bits=5, group_size=32), "Q5_0"),
    "6 bits": (QuantSpec(bits=6, group_size=32), "Q8_0"),
    "8 bits, full range": (QuantSpec(bits=8, convention="full"), "Q8_0"),
    "asymmetric": (QuantSpec(bits=4, group_size=32, symmetric=False), "Q4_1"),
    "asymmetric, 5 bits": (QuantSpec(bits=5, group_size=32, symmetric=False), "Q5_1"),
    "one bit": (QuantSpec(bits=1, group_size=32), "Q4_1"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_are_those_of_ggml(case, model, flat, tmp_path):
    spec, kind = BLOCKS[case]
    path = "model/layers/0/mlp/gate_proj/kernel"
    module, params = model("llama", {path: spec})
    info = save_gguf(tmp_path / "m.gguf", module, params)
    (tensor,) = [each for each in gguf.GGUFReader(tmp_path / "m.gguf").tensors if each.name == "blk.0.ffn_gate.weight"]
    assert tensor.tensor_type.name == kind == info.leaves[path].form
    leaf = flat(params)[path]
    wanted = np.asarray(leaf.materialize()).T
    found = _block_values(tensor.data, kind).reshape(wanted.shape)
    np.testing.assert_array_equal(found, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert info.leaves[path].rounding == np.abs(found - wanted).max()
    # float16 scales are off by 2^-11 of themselves at most, and so is the offset.
    scale = np.abs(np.asarray(leaf.scale, np.float32)).max()
    zero = 0 if leaf.zero_point is None else float(np.abs(np.asarray(leaf.zero_points())).max())
    assert info.leaves[path].rounding <= 2.0**-11 * scale * (
        2 ** (spec.bits - (spec.symmetric and spec.bits > 1)) + zero
    )
    rounded = round_scales(params)
    info = save_gguf(tmp_path / "m.gguf", module, rounded, overwrite=True)
    assert leaf.zero_point is not None or info.leaves[path].rounding == 0


@pytest.mark.parametrize("dense", ["float32", "float16", "bfloat16"])
def test_plain_matrices_have_the_type_asked_for(dense, model, flat, tmp_path):
    module, params = model("tied", dtype=jnp.bfloat16)
    info = save_gguf(tmp_path / "m.gguf", module, params, dense=dense)
    leaf, read = info.leaves["model/embed_tokens/embedding"], flat(from_pretrained(tmp_path / "m.gguf")[1])
    assert leaf.form == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dense]
    found, wanted = (np.asarray(tree["model/embed_tokens/embedding"], np.float32) for tree in (read, flat(params)))
    assert leaf.rounding == np.abs(found - wanted).max()
    assert dense == "float16" or leaf.rounding == 0


def test_values_beyond_float16_are_refused(model, tmp_path):
    module, params = model("tied")
    params["model"]["embed_tokens"]["embedding"] *= 1e6
    with pytest.raises(ValueError, match=r"'model/embed_tokens/embedding' has values up to .* take another `dense`"):
        save_gguf(tmp_path / "m.gguf", module, params)
    save_gguf(tmp_path / "m.gguf", module, params, dense="bfloat16")


def test_uneven_layers_are_read_back(model, flat, tmp_path):
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=(4, 2),
        num_key_value_heads=(2, 1),
        head_size=16,
        intermediate_size=(64, 32),
    )
    module, params = model(config, {"model/layers/.*/kernel": INT4})
    params = round_scales(params)
    save_gguf(tmp_path / "m.gguf", module, params, dense="float32")
    read, plain = from_pretrained(tmp_path / "m.gguf")
    assert read.config == config
    for path, leaf in flat(jc.materialize(params)).items():
        np.testing.assert_array_equal(flat(plain)[path], leaf, err_msg=path)


def test_stretched_positions_are_read_back(model, tmp_path):
    for scaling in (
        RopeScaling(kind="llama3", factor=8.0, original=8192),
        RopeScaling(kind="yarn", factor=4.0, original=16),
        RopeScaling(kind="linear", factor=2.0, original=32),
    ):
        config = dataclasses.replace(CONFIGS["tied"], rope_scaling=scaling, rope_theta=5e5)
        save_gguf(tmp_path / "m.gguf", *model(config, {kernels("tied"): INT4}), overwrite=True)
        assert from_pretrained(tmp_path / "m.gguf")[0].config == config


UNSAID = {
    "sliding_window": (dataclasses.replace(CONFIGS["mistral"], sliding_window=8), "`sliding_window` is"),
    "biases": (dataclasses.replace(CONFIGS["llama"], qkv_bias=True), "`qkv_bias` is True"),
    "activation": (dataclasses.replace(CONFIGS["llama"], hidden_act="relu"), "`hidden_act` is 'relu'"),
    "frequencies": (
        dataclasses.replace(
            CONFIGS["llama"], rope_scaling=RopeScaling(kind="yarn", factor=2.0, original=8, beta_fast=9.0)
        ),
        "`rope_scaling` is",
    ),
    "other positions": (
        dataclasses.replace(CONFIGS["llama"], rope_scaling=RopeScaling(kind="llama3", factor=2.0, original=16)),
        "not the divisors of Llama 3.1",
    ),
    "heads": (
        GPT2Config(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, head_size=2),
        "`head_size` is 2",
    ),
    "classifier": (dataclasses.replace(CONFIGS["llama"], head="sequence_classification"), "`head` is 'sequence_class"),
    "family": (
        CONFIGS["bert"],
        "of type 'bert' cannot be written as GGUF; supported: llama, qwen2, qwen3, gpt2, mistral",
    ),
}


@pytest.mark.parametrize("case", UNSAID)
def test_what_the_format_does_not_say_is_named(case, model, tmp_path):
    config, message = UNSAID[case]
    with pytest.raises(ValueError, match=message):
        save_gguf(tmp_path / "m.gguf", *model(config, {}))
    assert not list(tmp_path.iterdir())


REFUSED = {
    "groups": (QuantSpec(bits=4, group_size=16), "groups of 16 inputs are no multiple of 32"),
    "zero points": (QuantSpec(bits=8, symmetric=False), "it has 8 bits with zero points"),
    "table": (QuantSpec(format="nf4", group_size=32), "stand for a table of values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_blocks_cannot_hold_is_named_or_written_dense(case, model, flat, tmp_path):
    spec, message = REFUSED[case]
    path = "model/layers/0/self_attn/q_proj/kernel"
    module, params = model("llama", {path: spec})
    with pytest.raises(ValueError, match=rf"'{path}': .*{message}"):
        save_gguf(tmp_path / "m.gguf", module, params)
    assert not list(tmp_path.iterdir())
    info = save_gguf(tmp_path / "m.gguf", module, params, dense="float32", unsupported="dense")
    assert info.leaves[path].form == "F32"
    found = flat(from_pretrained(tmp_path / "m.gguf")[1])[path]
    np.testing.assert_array_equal(found, flat(params)[path].materialize())


def test_the_tokenizer_of_a_file_comes_along(model, tmp_path):
    source = tmp_path / "source.gguf"
    write_gguf(source, gguf_tensors(CONFIG), {})
    module, params = from_pretrained(source)
    save_gguf(tmp_path / "m.gguf", module, params, source=source, name="tiny")
    before, after = (gguf.GGUFReader(path).fields for path in (source, tmp_path / "m.gguf"))
    names = [name for name in before if name.startswith("tokenizer.")]
    assert len(names) == 7
    for name in names:
        assert (after[name].contents(), after[name].types) == (before[name].contents(), before[name].types)
    assert after["general.name"].contents() == "tiny"
    texts = Texts(texts=("ab ab12", "j"), labels=np.array([-1, -1], np.int32))
    assert tokenize(tmp_path / "m.gguf", texts, config=CONFIG).ids == tokenize(source, texts, config=CONFIG).ids


PIECES = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}],
}


def _tokenizer(directory, kind="smollm", **changes):
    """As `tokenizers` writes it."""
    directory.mkdir(exist_ok=True)
    pieces = PIECES[kind]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {0: TOKENS[0], 1: TOKENS[1], len(TOKENS): "<|new|>"}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": at, "content": token, "special": at == 0, **flags} for at, token in added.items()],
        "normalizer": None,
        "pre_tokenizer": pieces[0] if len(pieces) == 1 else {"type": "Sequence", "pretokenizers": pieces},
        "post_processor": None,
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(TOKENS)},
            "merges": [["a", "b"], ["Ġ", "ab"]],
        },
    } | changes
    (directory / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
        "chat_template": "{{ x }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("kind", PIECES)
def test_a_byte_level_bpe_becomes_fields(kind, model, tmp_path):
    source = _tokenizer(tmp_path / "source", kind)
    config = dataclasses.replace(CONFIG, vocab_size=len(TOKENS) + 2)
    module, params = model(config, {})
    save_gguf(tmp_path / "m.gguf", module, params, source=source)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["tokenizer.ggml.pre"] == kind
    assert fields["tokenizer.ggml.tokens"] == [*TOKENS, "<|new|>", f"[PAD{len(TOKENS) + 1}]"]
    assert fields["tokenizer.ggml.token_type"] == [3, 4, *[1] * (len(TOKENS) - 2), 4, 5]
    assert fields["tokenizer.ggml.merges"] == ["a b", "Ġ ab"]
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.add_bos_token"]) == (0, False)
    assert fields["tokenizer.chat_template"] == "{{ x }}"
    texts = Texts(texts=("ab ab12", "j<|end|><|new|>a"), labels=np.array([-1, -1], np.int32))
    assert tokenize(tmp_path / "m.gguf", texts, config=config).ids == tokenize(source, texts, config=config).ids


def test_a_first_token_is_written(model, tmp_path):
    single = [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    source = _tokenizer(tmp_path / "source", post_processor={"type": "TemplateProcessing", "single": single})
    with pytest.raises(ValueError, match=r"texts begin with '<|end|>', which is not `bos_token`"):
        save_gguf(tmp_path / "m.gguf", *model(WIDE, {}), source=source)
    (source / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|end|>"}))
    save_gguf(tmp_path / "m.gguf", *model(WIDE, {}), source=source)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 0


OTHER_TOKENIZERS = {
    "its model is 'WordPiece'": {"model": {"type": "WordPiece"}},
    "its pre-tokenizer ends with 'Whitespace'": {"pre_tokenizer": {"type": "Whitespace"}},
    "its normalizer is {'type': 'NFC'}": {"normalizer": {"type": "NFC"}},
    "it has a token of id 99, and the embedding 18 rows": {"added_tokens": [{"id": 99, "content": "x"}]},
    "its post-processor is 'BertProcessing'": {"post_processor": {"type": "BertProcessing"}},
    "its pre-tokenizer is none of": {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}},
}


@pytest.mark.parametrize("message", OTHER_TOKENIZERS)
def test_other_tokenizers_are_refused(message, model, tmp_path):
    source = _tokenizer(tmp_path / "source", **OTHER_TOKENIZERS[message])
    with pytest.raises(ValueError, match=message):
        save_gguf(tmp_path / "m.gguf", *model(WIDE, {}), source=source)
    assert not (tmp_path / "m.gguf").exists()


def test_sources_without_a_tokenizer(model, tmp_path):
    module, params = model("tied")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        save_gguf(tmp_path / "m.gguf", module, params, source=tmp_path)
    save_gguf(tmp_path / "m.gguf", module, params)
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.model"].contents() == "none"
    with pytest.raises(ValueError, match="has no tokenizer"):
        save_gguf(tmp_path / "n.gguf", module, params, source=tmp_path / "m.gguf")
    write_gguf(tmp_path / "source.gguf", gguf_tensors(CONFIG), {})
    with pytest.raises(ValueError, match=r"has 17 tokens, and the embedding 23 rows"):
        save_gguf(tmp_path / "n.gguf", module, params, source=tmp_path / "source.gguf")


def test_nothing_is_left_of_a_write_that_fails(model, tmp_path, monkeypatch):
    module, params = model("tied")
    save_gguf(tmp_path / "m.gguf", module, params, name="first")
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(FileExistsError, match="`overwrite=True`"):
        save_gguf(tmp_path / "m.gguf", module, params)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(FileExistsError, match="exists and is no file"):
        save_gguf(tmp_path / "folder.gguf", module, params, overwrite=True)

    def fail(self, *arguments, **options):
        raise OSError("no space")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    for path in (tmp_path / "m.gguf", tmp_path / "m2.gguf"):
        with pytest.raises(OSError, match="no space"):
            save_gguf(path, module, params, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.gguf", "m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == before


def test_arguments_are_checked(model, tmp_path, monkeypatch):
    module, params = model("tied")
    for name, options, message in [
        ("m.bin", {}, r"`path` must end in '.gguf'"),
        ("m.gguf", {"dense": "int8"}, "`dense` must be one of"),
        ("m.gguf", {"unsupported": "skip"}, "`unsupported` must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_gguf(tmp_path / name, module, params, **options)
    params["model"]["norm"] = {}
    with pytest.raises(ValueError, match="'model/norm/weight'"):
        save_gguf(tmp_path / "m.gguf", module, params)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxcompress\[gguf\]"):
        export_gguf.save_gguf(tmp_path / "m.gguf", module, params)
    assert not list(tmp_path.iterdir())
