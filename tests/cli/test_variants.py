"""A RoBERTa and a DistilBERT from directory to directory: compressed, compared, inspected, with all of their files."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxcompress as jc
from jaxcompress import recipe
from jaxcompress._src.models.bert.parameters import parameter_shapes
from jaxcompress._src.models.hf.companions import copy_companions
from jaxcompress._src.recipe.recipe import packaged_recipes
from jaxcompress._src.recipe.selections import check_selections
from jaxcompress.models import BertConfig, make_module, save_pretrained

BYTE_PAIRS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abdefghilmnopstu", "Ġ", "go", "od", "good", "Ġf"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "the"]
ROWS = ["good film", "the plot", "bad bad film the plot", "the good the bad", "film", "good plot " * 9]
RECIPES = {
    "roberta": (
        "[[shrink]]\nmethod = 'magnitude'\nselect = 'roberta/encoder/.*'\nsparsity = 0.4\n"
        "[[quantize]]\nselect = '.*/(kernel|embedding)'\nbits = 4\n"
    ),
    "distilbert": (
        "[[quantize]]\nselect = 'distilbert/transformer/.*/kernel'\nbits = 4\n"
        "[distil]\nepochs = 1\nlearning_rate = 1e-3\nbatch_size = 2\nsoft_targets = 1\npooled = 1\nhidden = 1\n"
    ),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A classifier of each, with its tokenizer."""
    made = {}
    for variant, vocabulary in (("roberta", BYTE_PAIRS), ("distilbert", WORDS)):
        directory = made[variant] = tmp_path_factory.mktemp(variant)
        config = BertConfig(
            model_type=variant, vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=32, max_position_embeddings=14, head="sequence_classification",
        )  # fmt: skip
        rng = np.random.default_rng(7)
        leaves = {
            path: np.float32(rng.normal(path.endswith("scale"), 0.2, shape))
            for path, shape in parameter_shapes(config).items()
        }
        save_pretrained(directory, make_module(config), unflatten_dict(leaves, sep="/"))
    (made["roberta"] / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(BYTE_PAIRS)}))
    (made["roberta"] / "merges.txt").write_text("#version: 0.2\ng o\no d\ngo od\nĠ f\n")
    (made["distilbert"] / "vocab.txt").write_text("\n".join(WORDS))
    return made


@pytest.mark.parametrize("variant", RECIPES)
def test_compressed_compared_and_inspected(run, directories, tmp_path, variant):
    model, out, data, outputs = directories[variant], tmp_path / "out", tmp_path / "rows.csv", tmp_path / "logits.npz"
    data.write_text("\n".join(["text,label", *(f"{row},{i % 2}" for i, row in enumerate(ROWS))]))
    (tmp_path / "recipe.toml").write_text(RECIPES[variant])
    options = ["--data", data] if "[distil]" in RECIPES[variant] else []
    code, _, stderr = run("compress", model, "--recipe", tmp_path / "recipe.toml", "--out", out, *options)
    assert code == 0, stderr
    files = {path.name for path in model.iterdir()} - {"config.json", "model.safetensors"}
    assert files == {"roberta": {"vocab.json", "merges.txt"}, "distilbert": {"vocab.txt"}}[variant]
    for name in files:
        assert (out / name).read_bytes() == (model / name).read_bytes()

    code, stdout, stderr = run("evaluate", out, "--against", model, "--data", data, "--outputs", outputs, "--json")
    assert code == 0, stderr
    figures = json.loads(stdout)
    # Positions of a RoBERTa begin at 2: of 14 there are 12 for tokens.
    assert (figures["max_length"], figures["rows_cut"]) == {"roberta": (12, 3), "distilbert": (14, 1)}[variant]
    assert 0 < figures["kl"] < 1
    loaded = recipe.load_model(out)
    rows = recipe.tokenize(model, _texts()).ids
    ids, mask = np.zeros((2, len(rows), figures["max_length"]), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    logits = jax.jit(loaded.module.apply)({"params": jc.materialize(loaded.params)}, ids, mask)["logits"]
    np.testing.assert_allclose(logits, np.load(outputs)["logits"], rtol=0, atol=1e-4)

    code, stdout, stderr = run("inspect", out, "--leaves", "--json")
    assert code == 0, stderr
    leaves = json.loads(stdout)["leaves"]
    assert {leaf["path"] for leaf in leaves} == set(flatten_dict(jc.materialize(loaded.params), sep="/"))
    assert any(leaf["kind"].startswith("int4") for leaf in leaves)
    if "shrink" in RECIPES[variant]:
        assert loaded.module.config.intermediate_size[0] < 32


def _texts():
    return recipe.Texts(texts=tuple(ROWS), labels=np.zeros(len(ROWS), np.int32))


@pytest.mark.parametrize("variant", RECIPES)
def test_the_recipes_of_the_library_fit(directories, variant):
    params = recipe.load_model(directories[variant]).params
    for name in {*packaged_recipes()} - {"demo-smollm2"}:  # that one is for a decoder
        check_selections(recipe.read_recipe(name), params)


def test_files_of_tokenizers_and_generation_come_along(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    files = {
        "tokenizer.json", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "tokenizer.model",
        "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    for directory in (source, out):
        directory.mkdir()
    for name in (*files, "config.json", "model.safetensors", "training_args.bin"):
        (source / name).write_text(name)
    (out / "vocab.txt").write_text("of another model")
    copy_companions(source, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: name for name in files}


def test_half_a_tokenizer_is_none(directories, tmp_path):
    for name in ("config.json", "vocab.json"):
        (tmp_path / name).write_bytes((directories["roberta"] / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor vocab.txt nor vocab.json and merges.txt"):
        recipe.tokenize(tmp_path, _texts())
    assert recipe.tokenize(directories["roberta"], _texts()).ids[0] == (0, 24, 25, 12, 13, 14, 2)
