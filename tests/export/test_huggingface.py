"""Hugging Face directories, decoded by the published formulas in NumPy."""

import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from export_models import CONFIGS, INT4
from safetensors.numpy import load_file

import jaxcompress as jc
from jaxcompress._src.export import huggingface
from jaxcompress._src.models.families import family_of
from jaxcompress.export import round_scales, save_huggingface
from jaxcompress.models import LlamaConfig, from_pretrained
from jaxcompress.quantization import QuantSpec

INT8, UINT4, UINT8 = (
    QuantSpec(bits=8),
    QuantSpec(bits=4, group_size=16, symmetric=False),
    QuantSpec(bits=8, symmetric=False),
)


def _files(directory):
    return {name: array for file in sorted(directory.glob("*.safetensors")) for name, array in load_file(file).items()}


def _bits(words, count, bits):
    """Codes out of a row of 32-bit words: bit after bit, the lowest first."""
    stream = [(int(word) & 0xFFFFFFFF) >> bit & 1 for word in words for bit in range(32)]
    return [sum(stream[at * bits + bit] << bit for bit in range(bits)) for at in range(count)]


def _unpacked(words, shape, bits, axis):
    lines = np.array([_bits(line, shape[axis], bits) for line in np.moveaxis(words, axis, -1)])
    return np.moveaxis(lines, -1, axis)


def _compressed_tensors(tensors, layer, args):
    """As `PackedQuantizationCompressor.decompress`."""
    shape, scale = tensors[f"{layer}.weight_shape"], tensors[f"{layer}.weight_scale"]
    bits, half = args["num_bits"], 2 ** (args["num_bits"] - 1)
    assert shape.dtype == np.int64
    assert tensors[f"{layer}.weight_packed"].dtype == np.int32
    codes = _unpacked(tensors[f"{layer}.weight_packed"], shape, bits, 1) - half
    zero = 0
    if not args["symmetric"]:
        zero = _unpacked(tensors[f"{layer}.weight_zero_point"], (shape[0], scale.shape[1]), bits, 0) - half
        zero = np.repeat(zero, shape[1] // scale.shape[1], axis=1)
    size = shape[1] if args["strategy"] == "channel" else args["group_size"]
    assert scale.shape == (shape[0], shape[1] // size)
    return ((codes - zero).astype(np.float32) * np.repeat(scale, size, axis=1)).astype(np.float32)


def _group_of(settings, layer):
    groups = settings["config_groups"].values()
    return next(group for group in groups if group["targets"] == ["Linear"] or layer in group["targets"])


CASES = {
    "llama int4 groups": ("llama", INT4, "int4 g32"),
    "llama int8 rows": ("llama", INT8, "int8 per-channel"),
    "tied, asymmetric": ("tied", UINT4, "uint4 g16"),
    "qwen2, asymmetric rows": ("qwen2", UINT8, "uint8 per-channel"),
    "bert, 3 bits in 4": ("bert", QuantSpec(bits=3, group_size=16), "int4 g16"),
    "bert, 5 bits in 8, one scale": ("bert", QuantSpec(bits=5, per_tensor=True), "int8 per-channel"),
    "tiles": ("bert", QuantSpec(bits=4, group_size=16, group_outputs=8), "int4 g16"),
}


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_hold_the_leaves(case, model, flat, tmp_path):
    name, spec, form = CASES[case]
    module, params = model(name, spec)
    info = save_huggingface(tmp_path / "out", module, params, format="compressed-tensors")
    tensors, settings = _files(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = settings["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "pack-quantized")
    seen = set()
    for path, parameter in family_of(module).parameters(module.config).items():
        leaf, layer = flat(params)[path], parameter.tensor.removesuffix(".weight")
        names = [stored for stored in tensors if stored == parameter.tensor or stored.startswith(f"{layer}.weight_")]
        seen |= set(names)
        assert info.leaves[path].nbytes == sum(tensors[stored].nbytes for stored in names)
        assert info.leaves[path].rounding == 0
        if hasattr(leaf, "materialize"):
            assert layer not in quantization["ignore"]
            assert info.leaves[path].form == form
            args = _group_of(quantization, layer)["weights"]
            found = _compressed_tensors(tensors, layer, args).T
            np.testing.assert_array_equal(found, np.asarray(leaf.materialize()), err_msg=path)
        else:
            assert info.leaves[path].form == "float32"
            found = tensors[parameter.tensor]
            np.testing.assert_array_equal(found.T if parameter.transposed else found, leaf)
    assert seen == set(tensors)  # nothing twice, no tied head
    assert ("lm_head" in quantization["ignore"]) == (name != "bert")


def test_leaves_that_differ_are_named_exactly(model, tmp_path):
    specs = {"model/layers/.*self_attn.*/kernel": INT8, "model/layers/0/mlp/.*/kernel": INT4, "lm_head/kernel": INT8}
    module, params = model("llama", specs)
    save_huggingface(tmp_path / "out", module, params, format="compressed-tensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = {name: sorted(group["targets"]) for name, group in settings["config_groups"].items()}
    attention = [f"model.layers.{i}.self_attn.{each}_proj" for i in (0, 1) for each in "kovq"]
    assert sorted(targets.values()) == [
        sorted(["lm_head", *attention]),
        [f"model.layers.0.mlp.{each}_proj" for each in ("down", "gate", "up")],
    ]
    assert sorted(settings["ignore"]) == [f"model.layers.1.mlp.{each}_proj" for each in ("down", "gate", "up")]


def test_layers_that_only_transformers_has_are_ignored(model, tmp_path):
    ignored = {}
    for head, options in {"masked_lm": {}, "encoder": {"pooling": "mean"}}.items():
        config = dataclasses.replace(CONFIGS["bert"], head=head, **options)
        module, params = model(config, {".*layer/.*/kernel": INT4})
        save_huggingface(tmp_path / head, module, params, format="compressed-tensors")
        settings = json.loads((tmp_path / head / "config.json").read_text())["quantization_config"]
        ignored[head] = settings["ignore"]
    assert ignored["masked_lm"] == ["cls.predictions.transform.dense", "cls.predictions.decoder"]
    assert ignored["encoder"] == ["re:.*pooler.*"]


def _gptq(tensors, layer, settings):
    """weight[i, o] = scales[g_idx[i], o] (q[i, o] - (qzeros[g_idx[i], o] + 1))."""
    bits, scales, groups = settings["bits"], tensors[f"{layer}.scales"], tensors[f"{layer}.g_idx"]
    assert (scales.dtype, groups.dtype) == (np.float16, np.int32)
    inputs, outputs = len(groups), scales.shape[1]
    size = inputs if settings["group_size"] == -1 else settings["group_size"]
    np.testing.assert_array_equal(groups, np.arange(inputs) // size)
    assert tensors[f"{layer}.qweight"].shape == (inputs * bits // 32, outputs)
    codes = _unpacked(tensors[f"{layer}.qweight"], (inputs, outputs), bits, 0)
    zeros = _unpacked(tensors[f"{layer}.qzeros"], scales.shape, bits, 1) + 1
    return scales.astype(np.float32)[groups] * (codes - zeros[groups]).astype(np.float32)


GPTQ = {
    "llama": ("llama", INT4, 4, 32),
    "gpt2, 2 bits": ("gpt2", QuantSpec(bits=2, group_size=16), 2, 16),
    "gpt2, 3 bits": ("gpt2", QuantSpec(bits=3, group_size=32), 3, 32),
    "bert, rows of 8 bits": ("bert", INT8, 8, -1),
    "bert, rows and groups, 4 bits and 3": (
        "bert",
        {"encoder/layer/0/.*/kernel": QuantSpec(bits=3), "encoder/layer/1/.*/kernel": UINT4},
        4,
        16,
    ),
}


@pytest.mark.parametrize("case", GPTQ)
def test_gptq_files_hold_the_leaves(case, model, flat, tmp_path):
    name, specs, bits, size = GPTQ[case]
    module, params = model(name, specs)
    params = round_scales(params)
    info = save_huggingface(tmp_path / "out", module, params, format="gptq")
    assert info.rounding == 0
    tensors, config = _files(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config["quantization_config"] == settings
    assert (settings["bits"], settings["group_size"], settings["checkpoint_format"]) == (bits, size, "gptq")
    assert settings["sym"] == (specs is not GPTQ["bert, rows and groups, 4 bits and 3"][1])
    for path, parameter in family_of(module).parameters(module.config).items():
        leaf = flat(params)[path]
        if hasattr(leaf, "materialize"):
            found = _gptq(tensors, parameter.tensor.removesuffix(".weight"), settings)
            np.testing.assert_array_equal(found, np.asarray(leaf.materialize()), err_msg=path)
            assert parameter.tensor not in tensors


def test_scales_of_gptq_files_are_rounded_and_said_to_be(model, flat, tmp_path):
    module, params = model("llama")
    info = save_huggingface(tmp_path / "out", module, params, format="gptq")
    tensors = _files(tmp_path / "out")
    path, layer = "model/layers/0/mlp/up_proj/kernel", "model.layers.0.mlp.up_proj"
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    error = np.abs(_gptq(tensors, layer, settings) - np.asarray(flat(params)[path].materialize())).max()
    assert 0 < error == info.leaves[path].rounding < 1e-3


def test_gptq_names_the_layers_that_stay_plain(model, tmp_path):
    module, params = model("llama", {"model/layers/1/mlp/.*/kernel": INT4})
    save_huggingface(tmp_path / "out", module, params, format="gptq")
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert r"-:^model[.]layers[.]0[.]mlp[.]up_proj$" in settings["dynamic"]
    assert not any("layers[.]1[.]mlp" in name or "lm_head" in name for name in settings["dynamic"])
    assert settings["lm_head"] is False


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_dense_directories_are_read_back(dtype, model, flat, tmp_path):
    module, params = model("tied", dtype=dtype)
    info = save_huggingface(tmp_path / "new" / "out", module, params)
    read, plain = from_pretrained(tmp_path / "new" / "out")
    assert read.config == module.config
    for path, leaf in flat(jc.materialize(params)).items():
        assert (flat(plain)[path].dtype, info.leaves[path].form) == (leaf.dtype, leaf.dtype.name)
        np.testing.assert_array_equal(flat(plain)[path], leaf)


def test_bfloat16_models_keep_their_scales(model, flat, tmp_path):
    module, params = model("tied", dtype=jnp.bfloat16)
    save_huggingface(tmp_path / "out", module, params, format="compressed-tensors", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["torch_dtype"] == "bfloat16"
    path, layer = "model/layers/0/self_attn/k_proj/kernel", "model.layers.0.self_attn.k_proj"
    args = settings["quantization_config"]["config_groups"]["group_0"]["weights"]
    found = _compressed_tensors(_files(tmp_path / "out"), layer, args).T
    np.testing.assert_array_equal(found.astype(jnp.bfloat16), flat(params)[path].materialize())


def test_sparse_codes_become_dense_ones(model, flat, tmp_path):
    module, params = model("bert", {})
    leaf = params["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"]
    keep = jnp.asarray(np.random.default_rng(0).random(leaf.shape) < 0.5)
    sparse = jc.arrays.sparsify(leaf * keep, keep)
    params["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"] = sparse
    params, _ = jc.quantization.quantize(params, INT4, select=jc.tree.by_path("encoder/layer/0/intermediate.*/kernel"))
    save_huggingface(tmp_path / "out", module, params, format="compressed-tensors")
    args = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    found = _compressed_tensors(_files(tmp_path / "out"), "encoder.layer.0.intermediate.dense", args["weights"]).T
    leaf = params["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"]
    np.testing.assert_array_equal(found, leaf.materialize())
    assert (found == 0).mean() > 0.4


REFUSED = {
    "table": ("llama", "compressed-tensors", QuantSpec(format="nf4", group_size=32), "stand for a table of values"),
    "embedding": (
        "llama",
        "compressed-tensors",
        {"model/embed_tokens/embedding": INT4},
        "only kernels of lin",
    ),
    "Conv1D": ("gpt2", "compressed-tensors", INT4, "keeps it in a `Conv1D`.*format='gptq'"),
    "partial": ("llama", "gptq", QuantSpec(bits=4, group_size=40, partial_groups=True), "its last group is partial"),
    "words": ("llama", "gptq", {"lm_head/kernel": INT4}, "23 outputs of 4 bits do not fill whole words"),
    "half zero points": ("llama", "gptq", QuantSpec(bits=1), "its zero points are not whole numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_named_or_written_dense(case, model, flat, tmp_path):
    name, form, specs, message = REFUSED[case]
    module, params = model(name, specs)
    with pytest.raises(ValueError, match=message) as err:
        save_huggingface(tmp_path / "out", module, params, format=form)
    path = next(path for path, leaf in flat(params).items() if hasattr(leaf, "materialize"))
    assert repr(path) in str(err.value)
    assert '`unsupported="dense"`' in str(err.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no kernel is quantized"):
        save_huggingface(tmp_path / "out", module, params, format=form, unsupported="dense")


def test_only_what_cannot_be_held_is_written_dense(model, flat, tmp_path):
    module, params = model("llama", {"model/layers/.*/kernel": INT4, "model/embed_tokens/embedding": INT8})
    info = save_huggingface(tmp_path / "out", module, params, format="compressed-tensors", unsupported="dense")
    assert info.leaves["model/embed_tokens/embedding"].form == "float32"
    stored = _files(tmp_path / "out")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(stored, flat(params)["model/embed_tokens/embedding"].materialize())


def test_zero_points_of_zero_do_not_fit_into_gptq(model, tmp_path):
    module, params = model("bert", {})
    kernel = params["encoder"]["layer"]["0"]["output"]["dense"]["kernel"]
    params["encoder"]["layer"]["0"]["output"]["dense"]["kernel"] = jnp.abs(kernel)
    params, _ = jc.quantization.quantize(params, UINT4, select=jc.tree.by_path("encoder/layer/0/output/.*/kernel"))
    with pytest.raises(ValueError, match="zero points of 0; the layout holds the zero point less 1"):
        save_huggingface(tmp_path / "out", module, params, format="gptq")
    save_huggingface(tmp_path / "out", module, params, format="compressed-tensors")


def test_kinds_that_are_no_integers_are_refused(model, tmp_path):
    module, params = model("bert")
    marked, _ = jc.quantization.quantize_inputs(params, INT8, select=jc.tree.by_path("encoder/layer/.*/kernel"))
    with pytest.raises(ValueError, match="its inputs are quantized too"):
        save_huggingface(tmp_path / "out", module, marked, format="compressed-tensors")
    select = jc.tree.by_path("encoder/layer/0/.*/kernel")
    clustered, _ = jc.clustering.cluster(model("bert", {})[1], jc.clustering.CodebookSpec(values=4), select=select)
    with pytest.raises(ValueError, match="it is a CodebookArray"):
        save_huggingface(tmp_path / "out", module, clustered, format="gptq")


def test_shapes_and_choices_are_checked(model, tmp_path):
    module, params = model("llama")
    for options, message in [
        ({"format": "awq"}, "`format` must be one of .* got 'awq'"),
        ({"unsupported": "skip"}, "`unsupported` must be 'error' or 'dense', got 'skip'"),
        ({"max_shard_size": "big"}, "`max_shard_size`"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_huggingface(tmp_path / "out", module, params, **options)
    uneven = LlamaConfig(**{**CONFIG_SIZES, "intermediate_size": (64, 32)})
    with pytest.raises(ValueError, match=r"transformers cannot load this shape: .*FFN columns"):
        save_huggingface(tmp_path / "out", *model(uneven, {"model/layers/.*/kernel": INT4}), format="gptq")
    params["model"]["norm"] = {}
    with pytest.raises(ValueError, match="'model/norm/weight'"):
        save_huggingface(tmp_path / "out", module, params)
    assert not list(tmp_path.iterdir())


CONFIG_SIZES = {"vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_nothing_is_left_of_a_write_that_fails(model, tmp_path, monkeypatch):
    module, params = model("llama")

    def fail(source, directory):
        assert (directory / "model.safetensors").is_file()
        raise OSError("no space")

    monkeypatch.setattr(huggingface, "copy_companions", fail)
    for target in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(OSError, match="no space"):
            save_huggingface(target, module, params, format="gptq", source=tmp_path)
        assert not list(tmp_path.iterdir())


def test_only_saved_models_are_overwritten(model, tmp_path, monkeypatch):
    module, params = model("tied")
    save_huggingface(tmp_path / "out", module, params, format="gptq")
    with pytest.raises(FileExistsError, match="`overwrite=True`"):
        save_huggingface(tmp_path / "out", module, params)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", _failing_at(2, os.rename))
        with pytest.raises(OSError, match="a rename"):
            save_huggingface(tmp_path / "out", module, params, overwrite=True)
    assert (tmp_path / "out" / "quantize_config.json").is_file()  # the older one is back
    save_huggingface(tmp_path / "out", module, params, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"holds no config.json"):
        save_huggingface(tmp_path / "letters", module, params, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "out"]


@pytest.mark.parametrize("name", ["none", "file.txt"])
def test_a_source_that_is_no_model_is_named(model, tmp_path, name):
    (tmp_path / "file.txt").write_text("")
    module, params = model("llama")
    with pytest.raises(FileNotFoundError, match=r"`source` must be a directory or a GGUF file, got .*" + name):
        save_huggingface(tmp_path / "out", module, params, format="gptq", source=tmp_path / name)
    assert not (tmp_path / "out").exists()


def _failing_at(number, function):
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise OSError("a rename")
        return function(*arguments)

    return call


def test_directories_of_other_formats_are_not_read_as_plain_ones(model, tmp_path):
    for name, form in (("llama", "compressed-tensors"), ("gpt2", "gptq"), ("bert", "gptq")):
        save_huggingface(tmp_path / name, *model(name), format=form)
        with pytest.raises(ValueError, match=r"`quantization_config` is .*; only None is supported"):
            from_pretrained(tmp_path / name)


def test_scales_beyond_float16_are_refused(model):
    _, params = model("bert")
    dense = params["encoder"]["layer"]["0"]["output"]["dense"]
    leaf = dense["kernel"]
    for factor in (1e7, 1e-8):
        dense["kernel"] = dataclasses.replace(leaf, scale=leaf.scale * factor)
        with pytest.raises(ValueError, match=r"'encoder/layer/0/output/dense/kernel'.*which float16 does not hold"):
            round_scales(params)
