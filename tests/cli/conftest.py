"""Fixtures of the command line: running it, and tiny models with each head."""

import json
import shutil
import sys

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from jaxcompress._src.cli.main import main
from jaxcompress._src.models.bert.parameters import parameter_shapes
from jaxcompress._src.models.families import family_of
from jaxcompress._src.recipe.directories import save_compressed
from jaxcompress._src.recipe.recipe import read_recipe
from jaxcompress.models import BertConfig, LlamaConfig, make_module, save_pretrained
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.tree import by_path

POOLING = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("inspect", path)` -> (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxcompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture(scope="package")
def heads(bert_directory, tmp_path_factory):
    """Directories of a model of one layer with each head; the encoder has the files of sentence-transformers."""
    directories = {}
    for head in ("encoder", "masked_lm", "sequence_classification"):
        directory = tmp_path_factory.mktemp(head)
        config = BertConfig(
            vocab_size=17, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=96, head=head,
        )  # fmt: skip
        # Drawn, not initialised: nothing to compile.
        rng = np.random.default_rng(7)
        leaves = {
            path: np.float32(rng.normal(path.endswith("scale"), 0.2, shape))
            for path, shape in parameter_shapes(config).items()
        }
        save_pretrained(directory, make_module(config), unflatten_dict(leaves, sep="/"))
        for name in ("vocab.txt", "tokenizer_config.json"):
            shutil.copy(bert_directory / name, directory / name)
        directories[head] = directory
    encoder = directories["encoder"]
    (encoder / "modules.json").write_text(json.dumps(MODULES))
    (encoder / "1_Pooling").mkdir()
    (encoder / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    return directories


@pytest.fixture(scope="package")
def llamas(tmp_path_factory):
    """Directories of a Llama of one layer: `dense`; and `int4` and `int8`, whose kernels are compressed."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40,
    )  # fmt: skip
    rng = np.random.default_rng(7)
    leaves = {
        path: np.float32(rng.normal("norm" in path, 0.2, parameter.shape))
        for path, parameter in family_of(config).parameters(config).items()
    }
    module, params = make_module(config), unflatten_dict(leaves, sep="/")
    directory = tmp_path_factory.mktemp("llamas")
    save_pretrained(directory / "dense", module, params)
    recipe = read_recipe("int4")
    for name, spec in (("int4", QuantSpec(bits=4, group_size=32)), ("int8", QuantSpec(bits=8))):
        small, _ = quantize(params, spec, select=by_path("model/layers/.*/kernel"))
        save_compressed(directory / name, module, small, source=directory / "dense", recipe=recipe)
    return {name: directory / name for name in ("dense", "int4", "int8")}
