"""Fixtures: a tiny BERT on disk, and sentences to classify."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.models import BertConfig, make_module, save_pretrained

WORDS = ["good", "bad", "film", "plot", "the", "a", "is", "was", "very", "not", "dull", "bright"]


def small_classifier(**sizes):
    """The module of a BERT, by default of two layers, that tells two classes apart."""
    common = {"vocab_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 16}
    return make_module(BertConfig(**common | sizes, head="sequence_classification"))


@pytest.fixture(scope="session")
def bert_directory(tmp_path_factory):
    """A tiny classifier with a tokenizer, as Hugging Face would write it."""
    directory = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        head="sequence_classification",
        pooling="mean",
    )
    module = make_module(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    save_pretrained(directory, module, params)
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """Sentences whose label is whether `good` is in them."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    rows = [rng.choice(WORDS, size=rng.integers(2, 14)) for _ in range(150)]
    lines = ["text,label", *(f"{' '.join(row)},{int('good' in row)}" for row in rows)]
    path.write_text("\n".join(lines))
    return path
