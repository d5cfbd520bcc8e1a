"""`jaxcompress bench`: what is run, counted and shown. Times are read, never compared."""

import json

import jax
import jax.numpy as jnp
import pytest

import jaxcompress as jc
from jaxcompress.models import LlamaConfig, make_module
from jaxcompress.recipe import load_model

KERNELS = 7  # that are compressed


def _bench(run, *arguments):
    code, stdout, stderr = run("bench", *arguments, "--repeats", 2, "--json")
    assert code == 0, stderr
    return json.loads(stdout)


def test_a_compressed_model_beside_its_dense_form(run, llamas):
    figures = _bench(run, llamas["int4"], "--tokens", "2x8", "--plan")
    assert (figures["rows"], figures["length"], figures["repeats"]) == (2, 8, 2)
    model, baseline = figures["model"], figures["baseline"]
    assert (model["name"], baseline["name"]) == (str(llamas["int4"]), "the same, dense")
    params = load_model(llamas["int4"]).params
    for each, tree in ((model, params), (baseline, jc.materialize(params))):
        assert each["parameter_bytes"] == jc.report.size_report(tree).total.stored_bytes
        assert 0 < each["seconds_min"] <= each["seconds"] <= each["seconds_max"]
        assert each["tokens_per_second"] == pytest.approx(16 / each["seconds"])
        assert each["first_call_seconds"] > each["compile_seconds"] > 0
        assert each["temporary_bytes"] >= 0
    assert baseline["wall_ratio"] == baseline["cpu_ratio"] == [1.0, 1.0, 1.0]
    assert sorted(model["wall_ratio"])[1] == model["wall_ratio"][0] > 0
    assert (sum(model["kernels"].values()), baseline["kernels"]) == (KERNELS, {})
    # One row of one token: nothing else is multiplied with.
    assert sum(model["decoding"]["kernels"].values()) == KERNELS
    assert (model["decoding"]["prompt"], model["decoding"]["new_tokens"]) == (8, 32)
    assert {each["path"].split("/")[2] for each in figures["plan"]} == {"0"}
    assert {(each["rows"], each["kind"]) for each in figures["plan"]} == {(16, "int4 g32"), (16, "int4 per-channel")}


def test_another_model_as_the_baseline_and_none(run, heads, bert_directory, llamas):
    figures = _bench(run, heads["masked_lm"], "--against", bert_directory, "--tokens", "1x4")
    assert figures["baseline"]["name"] == str(bert_directory)
    assert "decoding" not in figures["model"]
    figures = _bench(run, llamas["dense"])
    # As many tokens as it has positions; the prompt leaves room for what is generated.
    assert (figures["rows"], figures["length"]) == (8, 40)
    assert (figures["model"]["decoding"]["prompt"], figures["model"]["wall_ratio"]) == (8, [1.0, 1.0, 1.0])
    assert "baseline" not in figures


def test_tables(run, llamas):
    code, stdout, stderr = run("bench", llamas["int8"], "--tokens", "1x2", "--repeats", 1, "--plan")
    assert code == 0, stderr
    for text in ("wall time / baseline", "the same, dense", "products by kernel", "decoding", "mlp/down_proj/kernel"):
        assert text in stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1x41"], "has rows of 41 tokens; "),
        (["--tokens", "8*64"], "--tokens is rows x tokens, such as 8x64, got '8*64'"),
        (["--tokens", "0x4"], "--tokens is rows x tokens, such as 8x64, got '0x4'"),
        (["--repeats", "0"], "Invalid value for '--repeats'"),
    ],
)
def test_mistakes(run, llamas, arguments, message):
    code, stdout, stderr = run("bench", llamas["int4"], *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert message in stderr


def test_more_tokens_than_there_is_memory_for(run, llamas, tmp_path):
    """Of the arrays of NumPy, and of those of JAX."""
    for tokens in ("99999999999999x40", "99999999999x1"):
        code, stdout, stderr = run("bench", llamas["dense"], "--tokens", tokens)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert "there is not enough memory here" in stderr
        options = ("--format", "stablehlo", "--out", tmp_path / tokens, "--platforms", "cpu", "--tokens", tokens)
        code, stdout, stderr = run("export", llamas["dense"], *options)
        assert (code, stdout) == (2, "")
        assert "there is not enough memory here" in stderr.splitlines()[-1]


def test_a_model_of_one_position_generates_nothing(run, tmp_path):
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=1,
    )  # fmt: skip
    module = make_module(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    jc.models.save_pretrained(tmp_path / "m", module, params)
    assert "decoding" not in _bench(run, tmp_path / "m")["model"]


def test_the_model_with_fewer_positions_is_named(run, llamas, bert_directory):
    code, stdout, stderr = run("bench", llamas["int4"], "--against", bert_directory, "--tokens", "1x36")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert f"--tokens 1x36 has rows of 36 tokens; {str(bert_directory)!r} reads up to 32." in stderr


def test_zeros_of_sparse_leaves_may_be_stored_first(run, llamas, tmp_path):
    recipe, out = tmp_path / "half.toml", tmp_path / "half"
    recipe.write_text("[[prune]]\nmethod = 'magnitude'\nselect = '.*kernel'\npattern = '2:4'\n")
    assert run("compress", llamas["dense"], "--recipe", recipe, "--out", out)[0] == 0
    as_stored, expanded = (_bench(run, out, "--tokens", "1x8", "--plan", *more) for more in ((), ("--expand",)))
    assert {each["kind"] for each in as_stored["plan"]} == {"float32 2:4"}
    assert expanded["model"]["kernels"] == {}
    assert "baseline" not in expanded  # it is the dense form
    assert expanded["model"]["parameter_bytes"] == as_stored["baseline"]["parameter_bytes"]
    assert as_stored["model"]["parameter_bytes"] < expanded["model"]["parameter_bytes"]
