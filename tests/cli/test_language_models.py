"""Causal language models on the command line: compressed, evaluated by perplexity, compared with one another."""

import json

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxcompress._src.models.gpt2.parameters import parameter_shapes
from jaxcompress.models import GPT2Config, make_module, save_pretrained
from jaxcompress.recipe import load_model

WORDS = ["<pad>", "good", "bad", "film", "plot", "the", "dull", "bright", "is"]
RECIPE = """
[calibrate]
rows = 8
batch_size = 8

[[quantize]]
method = "gptq"
select = 'transformer/h/.*/attn/.*/kernel'
bits = 2
group_size = 8

[[prune]]
method = "wanda"
select = 'transformer/h/0/mlp/.*/kernel'
sparsity = 0.5
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    rng = np.random.default_rng(7)
    leaves = {
        path: np.float32(rng.normal(path.endswith("scale"), 0.3, shape))
        for path, shape in parameter_shapes(config).items()
    }
    save_pretrained(path, make_module(config), unflatten_dict(leaves, sep="/"))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    rng = np.random.default_rng(0)
    # The last is longer than the model can read at once.
    lengths = [*rng.integers(2, 14, 11), 70]
    path.write_text("\n".join(["text", *(" ".join(rng.choice(WORDS[1:], length)) for length in lengths)]))
    return path


def _reference(directory, rows, window):
    """-log p of every token but the first of each row, float64, each given the tokens of its window."""
    loaded = load_model(directory)
    terms = []
    for line in rows.read_text().split("\n")[1:]:
        ids, reached = [WORDS.index(word) for word in line.split()], 1
        for start in range(0, len(ids), window // 2):
            part = ids[start : start + window]
            padded = np.array([part + [0] * (window - len(part))])
            logits = np.asarray(loaded.module.apply({"params": loaded.params}, padded)["logits"], np.float64)[0]
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            terms += [-logs[place - 1, part[place]] for place in range(reached - start, len(part))]
            reached = start + len(part)
            if reached == len(ids):
                break
    return np.array(terms)


def test_perplexity_of_whole_rows(run, directory, rows):
    code, stdout, stderr = run("evaluate", directory, "--data", rows, "--max-length", 16, "--json")
    assert code == 0, stderr
    figures = json.loads(stdout)
    terms = _reference(directory, rows, 16)
    assert (figures["rows"], figures["window"], figures["tokens"]) == (12, 16, len(terms))
    np.testing.assert_allclose(figures["perplexity"], np.exp(terms.mean()), rtol=1e-4)


def test_a_recipe_and_how_far_its_model_is(run, directory, rows, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    options = ("--recipe", tmp_path / "recipe.toml", "--data", rows, "--out", tmp_path / "small", "--max-length", 16)
    code, _, stderr = run("compress", directory, *options)
    assert code == 0, stderr
    code, stdout, stderr = run("evaluate", tmp_path / "small", "--against", directory, "--data", rows, "--json")
    assert code == 0, stderr
    figures = json.loads(stdout)
    dense = _reference(directory, rows, 32)
    np.testing.assert_allclose(figures["perplexity_against"], np.exp(dense.mean()), rtol=1e-4)
    assert figures["perplexity"] != figures["perplexity_against"]
    assert 0 < figures["kl_interval"][0] < figures["kl"]


def test_what_a_language_model_does_not_have(run, directory, rows, tmp_path):
    code, _, stderr = run("evaluate", directory, "--data", rows, "--outputs", tmp_path / "out.npz")
    assert code == 2
    assert "--outputs is not for a causal language model" in stderr
    code, _, stderr = run("evaluate", directory, "--data", rows, "--max-length", 33)
    assert code == 2
    assert "`--max-length` must be between 2 and 32, the positions of the model, got 33" in stderr
