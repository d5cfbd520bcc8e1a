"""The demo of a decoder from beginning to end, on a tiny GGUF file and texts of its letters."""

import json

import numpy as np
import pytest
from tiny_gguf import CONFIG, gguf_tensors, write_gguf

from jaxcompress._src.cli import decoder_demo
from jaxcompress._src.recipe.brown import Corpus
from jaxcompress.recipe import load_model

RECIPE = """
[calibrate]
rows = 8
batch_size = 8

[[quantize]]
method = "gptq"
select = 'model/layers/.*/kernel'
bits = 3
group_size = 16
symmetric = false
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """What the registries would give."""
    (tmp_path / "package").mkdir()
    write_gguf(tmp_path / "package" / "tiny.gguf", gguf_tensors(CONFIG), {})
    (tmp_path / "package" / "corpus.tgz").touch()
    rng = np.random.default_rng(0)
    texts = {str(name): " ".join(rng.choice(["ab", "abc", "j", "def"], 60)) for name in range(73)}
    corpus = Corpus(dict(list(texts.items())[9:]), dict(list(texts.items())[:9]))
    monkeypatch.setattr(decoder_demo, "fetch", lambda asset, note: tmp_path / "package")
    monkeypatch.setattr(decoder_demo, "brown", lambda path: corpus)
    monkeypatch.setattr(decoder_demo, "_WINDOW", 16)
    monkeypatch.setattr(decoder_demo, "_PROMPT", "ab ab")
    monkeypatch.setattr(decoder_demo, "_NEW_TOKENS", 8)


def test_the_demo_of_a_decoder(run, packages, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    out = tmp_path / "out"
    code, output, _ = run("demo", "--model", "smollm2", "--recipe", tmp_path / "recipe.toml", "--out", out, "--json")
    assert code == 0
    figures = json.loads(output)
    assert figures["texts"] == 3
    # Weights of 3 bits in groups of 16; the embedding stays.
    assert 0.1 < figures["groups"]["decoder"][1] / figures["groups"]["decoder"][0] < 0.25
    assert figures["bytes_stored"] < 0.3 * figures["bytes_dense"]
    assert np.isfinite([figures["perplexity_dense"], figures["perplexity_compressed"]]).all()
    assert figures["perplexity_dense"] != figures["perplexity_compressed"]
    assert load_model(out).compressed
