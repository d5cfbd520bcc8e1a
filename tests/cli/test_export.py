"""`jaxcompress export`: every format written, run or read back; differences that are seen; nothing half-written."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

from jaxcompress._src.cli.export_formats import FORMATS
from jaxcompress._src.cli.export_runners import compare_weights
from jaxcompress._src.models.leaves import flatten_params
from jaxcompress.export import save_huggingface
from jaxcompress.models import from_pretrained, save_pretrained
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.recipe import load_model
from jaxcompress.tree import by_path

NAMES = {"onnx": "m.onnx", "litert": "m.tflite", "gguf": "m.gguf"}


@pytest.fixture
def export(run):
    """`export(model, format, out, ...)` -> figures of a run that must succeed."""

    def call(model, format, out, *arguments):
        options = ("--format", format, "--out", out, "--repeats", 1, "--json")
        code, stdout, stderr = run("export", model, *options, *arguments)
        assert code == 0, stderr
        return json.loads(stdout)

    return call


@pytest.fixture
def fails(run, tmp_path):
    """Runs an export that must fail, and gives back its one line."""

    def call(*arguments):
        before = sorted(tmp_path.rglob("*"))
        code, stdout, stderr = run("export", *arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert sorted(tmp_path.rglob("*")) == before
        return stderr

    return call


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(export, llamas, tmp_path, format):
    out = tmp_path / NAMES.get(format, "m")
    figures = export(llamas["int4"], format, out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    files = [out] if out.is_file() else list(out.iterdir())
    assert figures["bytes_disk"] == sum(path.stat().st_size for path in files)
    assert figures["bytes_dense"] == 4 * sum(leaf.size for leaf in _flat(load_model(llamas["dense"]).params))
    assert figures["problem"] is None
    assert figures.get("relative_error", 0.0) < (0.1 if format == "litert" else 2e-3)
    assert ("relative_error" in figures) == (format not in ("compressed-tensors", "gptq"))
    assert ("weight_difference" in figures) == (format not in ("onnx", "litert", "stablehlo"))
    timed = {"exported", "dense", "compressed"} if format in ("onnx", "litert", "stablehlo") else set()
    assert figures.get("seconds", {}).keys() == timed
    assert any("4" in form for form in figures["forms"]) or format == "huggingface"


def _flat(params):
    return [leaf for value in params.values() for leaf in (_flat(value) if isinstance(value, dict) else [value])]


@pytest.mark.parametrize(("format", "options"), [
    ("onnx", ("--accuracy-level", "4", "--tokens", "2x5")),
    ("litert", ("--float-inputs", "--tokens", "2x5")),
    ("stablehlo", ("--platforms", "cpu,tpu")),
    ("gguf", ("--dense", "bfloat16", "--no-tokenizer")),
])  # fmt: skip
def test_options_reach_the_writers(export, llamas, tmp_path, format, options):
    out = tmp_path / NAMES.get(format, "m")
    figures = export(llamas["int8"], format, out, *options)
    if format == "litert":
        assert figures["relative_error"] < 1e-3
        assert "int8 per-channel, computed in float32" in figures["forms"]
    elif format == "stablehlo":
        assert json.loads((out / "export.json").read_text())["platforms"] == ["cpu", "tpu"]
    elif format == "gguf":
        assert "BF16" in figures["forms"]
    else:
        assert figures["accepted_error"] == 0.1


def test_an_encoder_has_its_sentence_vectors_at_any_size(export, heads, tmp_path):
    export(heads["encoder"], "onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    ids, mask = np.arange(12, dtype=np.int32).reshape(2, 6), np.ones((2, 6), np.int32)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {"input_ids": ids, "attention_mask": mask}), strict=True))
    # Its files say that the first token's state is the vector.
    np.testing.assert_array_equal(outputs["sentence_vector"], outputs["last_hidden_state"][:, 0])
    module, params = from_pretrained(heads["encoder"])
    wanted = module.apply({"params": params}, ids, mask)["last_hidden_state"]
    np.testing.assert_allclose(outputs["last_hidden_state"], wanted, atol=1e-4)


def test_tables_and_what_is_not_run(run, llamas, tmp_path):
    code, stdout, stderr = run("export", llamas["int4"], "--format", "compressed-tensors", "--out", tmp_path / "m")
    assert code == 0, stderr
    for text in ("int4 g32", "smaller than in float32", "largest difference of a weight", "are no dependencies"):
        assert text in stdout
    assert stdout.endswith(f"Written to {tmp_path / 'm'}\n")


def test_differences_are_seen_and_the_file_stays(run, llamas, tmp_path):
    out = tmp_path / "m.onnx"
    options = ("--format", "onnx", "--out", out, "--repeats", 1, "--accuracy-level", 4, "--max-error", 0)
    code, stdout, stderr = run("export", llamas["int8"], *options, "--json")
    assert code == 1
    assert json.loads(stdout)["relative_error"] > 0
    assert stderr.splitlines()[-1].startswith(f"jaxcompress: error: {str(out)!r} was written and stays there, but its ")
    assert out.exists()


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "huggingface"])
def test_a_weight_that_is_not_the_models_is_named(export, llamas, tmp_path, format):
    export(llamas["int8"], format, tmp_path / "m")
    loaded = load_model(llamas["int8"])
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    stored = {"compressed-tensors": "weight_packed", "gptq": "qweight", "huggingface": "weight"}[format]
    name = f"model.layers.0.mlp.up_proj.{stored}"
    tensors[name] = np.array(tensors[name])
    tensors[name].flat[3] += 1 << 6 if tensors[name].dtype == np.int32 else 0.1
    save_file(tensors, file)
    weights = FORMATS[format].weights(tmp_path / "m", loaded.module)
    rounding = dict.fromkeys(flatten_params(loaded.params), 1e-3)
    difference, wrong = compare_weights(loaded.params, rounding, weights)
    assert difference > 0.01
    assert wrong == "model/layers/0/mlp/up_proj/kernel"


def _raising(path):
    raise RuntimeError("an operator is missing")


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (
            lambda ids: np.zeros((1, 1)),
            "its outputs are {'logits': (1, 1)}, those of the model {'logits': (1, 40, 32)}",
        ),
        (lambda ids: np.full((*ids.shape, 32), np.nan), "jax.export gives NaN or infinity in 'logits'"),
        (lambda ids: np.zeros((*ids.shape, 32)), "its outputs differ from JAX's by 100 % of their size"),
        (None, "jax.export fails on it: an operator is missing"),
    ],
)
def test_runtimes_that_fail_or_give_something_else(run, llamas, tmp_path, monkeypatch, logits, message):
    run_file = _raising if logits is None else lambda path: lambda ids, mask: {"logits": logits(ids)}
    monkeypatch.setitem(FORMATS, "stablehlo", dataclasses.replace(FORMATS["stablehlo"], run=run_file))
    options = ("--format", "stablehlo", "--out", tmp_path / "m", "--platforms", "cpu", "--repeats", 1)
    code, _, stderr = run("export", llamas["int4"], *options)
    assert code == 1
    assert message in stderr.splitlines()[-1]
    assert (tmp_path / "m" / "export.json").exists()


def test_a_model_of_nan_is_said_to_be_one(run, llamas, tmp_path):
    module, params = from_pretrained(llamas["dense"])
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[0, 0].set(np.nan)
    save_pretrained(tmp_path / "model", module, params)
    options = ("--format", "stablehlo", "--out", tmp_path / "m", "--repeats", 1)
    code, _, stderr = run("export", tmp_path / "model", *options)
    assert code == 1
    assert "could not be compared: the model itself gives NaN or infinity in 'logits'" in stderr


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "huggingface"])
def test_weights_that_are_not_finite_are_those_of_the_model(llamas, tmp_path, format):
    module, params = from_pretrained(llamas["dense"])
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[0, :3].set([np.nan, np.inf, -np.inf])
    small, _ = quantize(params, QuantSpec(bits=8), select=by_path("model/layers/.*/kernel"))
    info = save_huggingface(tmp_path / "m", module, small, format="dense" if format == "huggingface" else format)
    weights = FORMATS[format].weights(tmp_path / "m", module)
    rounding = {path: leaf.rounding for path, leaf in info.leaves.items()}
    difference, wrong = compare_weights(small, rounding, weights)
    assert (difference < 0.01, wrong) == (True, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnxx", "--out", "m"], "--format must be one of onnx, litert, stablehlo, huggingface"),
        (["--format", "onnx", "--out", "m"], "must end in '.onnx' for this format"),
        (["--format", "onnx", "--out", "none/m.onnx"], "there is no directory"),
        (["--format", "onnx", "--out", "m.onnx", "--tokens", "1x41"], "has rows of 41 tokens; "),
        (["--format", "litert", "--out", "m.tflite", "--tokens", "all"], "--tokens is rows x tokens"),
        (["--format", "gptq", "--out", "m", "--tokens", "1x4"], "--tokens is not for --format gptq"),
        (["--format", "gptq", "--out", "m", "--max-error", "0"], "--max-error is not for --format gptq"),
        (["--format", "onnx", "--out", "m.onnx", "--dense", "float16"], "--dense is not for --format onnx, whose own"),
        (["--format", "stablehlo", "--out", "m", "--no-tokenizer"], "--no-tokenizer is not for --format stablehlo"),
        (["--format", "onnx", "--out", "m.onnx", "--input-ranges", "all"], "`input_ranges` must be one of"),
        (
            ["--format", "stablehlo", "--out", "m", "--platforms", "cpu,gpu"],
            "--platforms is some of cpu, cuda, rocm, tpu",
        ),
        (
            ["--format", "stablehlo", "--out", "m", "--platforms", "tpu"],
            "--platforms must have cpu, on which the file is",
        ),
        (["--format", "gguf", "--out", "m.gguf", "--dense", "int4"], "`dense` must be one of"),
    ],
)
def test_mistakes(fails, llamas, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(llamas["int4"], *arguments)


@pytest.mark.parametrize(
    ("format", "name", "module", "extra"),
    [
        ("onnx", "m.onnx", "onnx", "onnx"),
        ("onnx", "m.onnx", "onnxruntime", "onnx"),
        ("litert", "m.tflite", "litert_converter", "litert"),
        ("litert", "m.tflite", "ai_edge_litert", "litert"),
        ("gguf", "m.gguf", "gguf", "gguf"),
        ("stablehlo", "m", "flatbuffers", "stablehlo"),
    ],
)
def test_a_missing_extra_is_named_before_the_work(fails, llamas, tmp_path, monkeypatch, format, name, module, extra):
    for loaded in [each for each in sys.modules if each.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)
    line = fails(llamas["int4"], "--format", format, "--out", tmp_path / name)
    assert f"--format {format} needs {module}: pip install 'jaxcompress[{extra}]'" in line


def test_what_is_there_is_replaced_when_asked_for(export, fails, llamas, tmp_path):
    for format, name in (("onnx", "m.onnx"), ("huggingface", "m")):
        export(llamas["dense"], format, tmp_path / name)
        arguments = ("--format", format, "--out", tmp_path / name)
        assert "exists already; give --overwrite to replace it" in fails(llamas["int4"], *arguments)
        export(llamas["int4"], format, tmp_path / name, "--overwrite")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    assert "is not overwritten" in fails(llamas["int4"], "--format", "gptq", "--out", tmp_path / "notes", "--overwrite")
    assert "exists and is no file" in fails(llamas["int4"], "--format", "gguf", "--out", _folder(tmp_path, "m.gguf"))
    model = shutil.copytree(llamas["int4"], tmp_path / "model")
    line = fails(model, "--format", "huggingface", "--out", model, "--overwrite")
    assert "is the model's own folder" in line


@pytest.mark.parametrize("format", FORMATS)
def test_a_link_that_leads_to_itself(fails, llamas, tmp_path, format):
    out = tmp_path / NAMES.get(format, "m")
    out.symlink_to(out)
    for more in ((), ("--overwrite",)):
        assert repr(str(out)) in fails(llamas["int4"], "--format", format, "--out", out, *more)


def _folder(parent, name):
    (parent / name).mkdir()
    return parent / name


def test_what_a_format_cannot_hold(fails, heads, bert_directory, tmp_path):
    for model, format, message in (
        (heads["encoder"], "gguf", "A model of type 'bert' cannot be written as GGUF"),
        (bert_directory, "gptq", "has nothing to hold: no kernel is quantized"),
    ):
        out = tmp_path / NAMES.get(format, "m")
        assert message in fails(model, "--format", format, "--out", out)
