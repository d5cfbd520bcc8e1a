"""A second family takes one file and one row: it is read, written, shrunk, compressed and evaluated as BERT is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from toy_family import TOY, ToyConfig

import jaxcompress as jc
from jaxcompress._src.models.families import FAMILIES, family_of
from jaxcompress._src.recipe.directories import save_compressed
from jaxcompress._src.recipe.progress import Silent
from jaxcompress._src.units.shrink import mask_units
from jaxcompress.models import BertConfig, from_pretrained, make_module, resized, save_pretrained, unit_groups

CONFIG = ToyConfig(vocab_size=20, hidden_size=6, inner_size=10, num_labels=3)
IDS, MASK = jnp.array([[3, 9, 4, 0], [8, 2, 6, 7]]), jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", TOY)


@pytest.fixture
def model():
    module = make_module(CONFIG)
    return module, jax.jit(module.init)(jax.random.key(0), IDS, MASK)["params"]


def _logits(module, params):
    return module.apply({"params": params}, IDS, MASK)["logits"]


def test_its_files_are_written_and_read(model, assert_same_params, tmp_path):
    from safetensors.numpy import load_file

    module, params = model
    save_pretrained(tmp_path, module, params)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "toy"
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["toy.layer.in.weight"].shape == (10, 6)
    np.testing.assert_array_equal(stored["toy.vectors"], params["words"]["embedding"])
    back, restored = from_pretrained(tmp_path)
    assert back == module
    assert_same_params(restored, params)
    wider, restored = from_pretrained(tmp_path, num_labels=3, key=jax.random.key(1))
    assert wider.config == CONFIG
    with pytest.raises(ValueError, match="`pooling` is no option of a model of type 'toy'"):
        from_pretrained(tmp_path, pooling="mean")


def test_a_head_that_its_files_lack_is_new_or_missing(model, tmp_path):
    from safetensors.numpy import load_file, save_file

    save_pretrained(tmp_path, *model)
    tensors = load_file(tmp_path / "model.safetensors")
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("classes")}
    save_file(headless, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing tensors: 'classes.weight', 'classes.bias'. .* for a new head\.$"):
        from_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path, num_labels=5, key=jax.random.key(1))
    assert _logits(module, params).shape == (2, 5)


def test_it_shrinks(model):
    module, params = model
    groups = unit_groups(CONFIG)
    scores = jc.structured.magnitude_unit_scores(params, groups)
    keep = jc.structured.select_units(scores, groups, params, sparsity=0.3).keep
    small = jc.structured.shrink(params, groups, keep)
    smaller = resized(module, small)
    assert smaller.config.inner_size == keep["neurons"].sum() < 10
    masked = mask_units(params, groups, keep)
    np.testing.assert_allclose(_logits(smaller, small), _logits(module, masked), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="A model of type 'toy' has no units 'heads'; it has 'neurons'"):
        unit_groups(CONFIG, kinds=["heads"])


def test_a_recipe_compresses_it_and_the_result_opens(model, tmp_path):
    module, params = model
    (tmp_path / "recipe.toml").write_text(
        '[[prune]]\nselect = "down/kernel"\nsparsity = 0.5\n\n[[quantize]]\nselect = ".*/kernel"\nbits = 4\n'
    )
    recipe = jc.recipe.read_recipe(tmp_path / "recipe.toml")
    compressed = jc.recipe.compress(recipe, module, params)
    assert (jc.materialize(compressed)["down"]["kernel"] == 0).sum() >= 30
    assert jc.report.describe_leaf(compressed["up"]["kernel"]).startswith("int4")
    save_pretrained(tmp_path / "source", module, params)
    save_compressed(tmp_path / "out", module, compressed, source=tmp_path / "source", recipe=recipe)
    loaded = jc.recipe.load_model(tmp_path / "out")
    assert loaded.compressed
    assert loaded.module == module
    tokens = jc.recipe.Tokens(ids=((3, 9, 4), (8, 2, 6, 7)), labels=np.zeros(2, np.int32), pad_id=0)
    found = jc.recipe.predict(loaded.module, loaded.params, tokens)
    assert set(found) == {"logits"}
    np.testing.assert_allclose(found["logits"], _logits(module, jc.materialize(compressed)), rtol=1e-4, atol=1e-5)


def test_a_recipe_distils_it_by_the_outputs_that_it_has(model, tmp_path):
    module, params = model
    (tmp_path / "recipe.toml").write_text(
        '[[quantize]]\nselect = ".*/kernel"\nbits = 3\n\n[distil]\nepochs = 2\nlearning_rate = 1e-2\n'
        "batch_size = 8\nsoft_targets = 1\nhidden = 1\npooled = 1\n"
    )
    rng = np.random.default_rng(0)
    rows = tuple(tuple(row) for row in rng.integers(1, 20, (16, 5)).tolist())
    tokens = jc.recipe.Tokens(ids=rows, labels=np.zeros(16, np.int32), pad_id=0)
    notes = _Notes()
    compressed = jc.recipe.compress(
        jc.recipe.read_recipe(tmp_path / "recipe.toml"), module, params, tokens, progress=notes
    )
    assert notes.said == ["`pooled` is left out: a bag of words has no output for it."]
    assert jc.report.describe_leaf(compressed["down"]["kernel"]).startswith("int3")
    assert bool((compressed["up"]["bias"] != params["up"]["bias"]).any())


class _Notes(Silent):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


def test_what_is_of_no_family_says_what_to_do_instead(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    known = ", ".join(map(repr, FAMILIES))
    assert {"'bert'", "'roberta'", "'xlm-roberta'", "'distilbert'", "'toy'"} <= set(known.split(", "))
    with pytest.raises(ValueError, match=rf"`model_type` is 'mamba'; supported: {known}\. .* its own `apply"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"Dense is of no family of `jaxcompress.models` \({known}\)"):
        family_of(nn.Dense(3))
    bert = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    assert family_of(bert) is FAMILIES["bert"]
