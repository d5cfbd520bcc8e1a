"""Plain encoders and masked language models: compared by what they give, trained by the losses they have."""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import recipe
from jaxcompress._src.models.bert.family import BERT
from jaxcompress._src.recipe.heads import possible_losses
from jaxcompress._src.recipe.recipe import packaged_recipes
from jaxcompress._src.recipe.selections import check_selections
from jaxcompress._src.recipe.text import read_texts

ONE_SHOT = "[[quantize]]\nselect = '.*/kernel'\nbits = 2\ngroup_size = 16\n"
DISTIL = (
    "[[quantize]]\nselect = '(bert/)?encoder/.*/kernel'\nbits = 4\n"
    "[distil]\nepochs = 3\nlearning_rate = 1e-3\nsoft_targets = 1\npooled = 1\nhidden = 1\n"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    lines = [f"{'good bad film plot the dull '[: 5 * (1 + i % 5)]}{'bright ' * (i % 7)}" for i in range(40)]
    path.write_text("\n".join(["text", *lines]))
    return path


@pytest.fixture
def compressed(run, heads, tmp_path):
    def make(head):
        (tmp_path / "recipe.toml").write_text(ONE_SHOT)
        out = tmp_path / head
        code, _, stderr = run("compress", heads[head], "--recipe", tmp_path / "recipe.toml", "--out", out)
        assert code == 0, stderr
        return out

    return make


def _hidden(directory, tokens):
    """float64 hidden states and logits of each row by itself, with plain weights."""
    loaded = recipe.load_model(directory)
    params = jc.materialize(loaded.params)
    ids = np.zeros((len(tokens), 24), np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(tokens.ids):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    outputs = loaded.module.apply({"params": params}, ids, mask)
    return {name: np.asarray(value, np.float64) for name, value in outputs.items()}, mask


def test_encoders_are_compared_by_the_sentence_vectors_of_their_files(run, heads, compressed, rows, tmp_path):
    out, dense = compressed("encoder"), heads["encoder"]
    outputs = tmp_path / "vectors.npz"
    code, stdout, stderr = run("evaluate", out, "--against", dense, "--data", rows, "--outputs", outputs, "--json")
    assert code == 0, stderr
    tokens = recipe.tokenize(dense, read_texts(rows))
    v, w = (_hidden(path, tokens)[0]["last_hidden_state"][:, 0] for path in (dense, out))
    error = np.linalg.norm(v - w, axis=-1) / np.linalg.norm(v, axis=-1)
    cosine = (v * w).sum(-1) / np.linalg.norm(v, axis=-1) / np.linalg.norm(w, axis=-1)
    figures = json.loads(stdout)
    assert 0.05 < error.mean() < 1
    np.testing.assert_allclose(figures["vector_error"], error.mean(), rtol=1e-4)
    np.testing.assert_allclose(figures["cosine"], cosine.mean(), rtol=1e-5)
    half = 1.959964 * error.std(ddof=1) / np.sqrt(len(error))
    np.testing.assert_allclose(figures["vector_error_interval"], [error.mean() - half, error.mean() + half], rtol=1e-3)
    with np.load(outputs) as stored:
        np.testing.assert_allclose(stored["sentence_vector"], w, rtol=1e-4, atol=1e-5)

    # Without the files of sentence-transformers, the mean over the tokens.
    vectors = recipe.predict(*_loaded(dense), tokens)["sentence_vector"]
    hidden, mask = _hidden(dense, tokens)
    mean = (hidden["last_hidden_state"] * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(vectors, mean, rtol=1e-4, atol=1e-5)


def _loaded(directory):
    loaded = recipe.load_model(directory)
    return loaded.module, loaded.params


def test_masked_language_models_are_compared_by_their_distributions(run, heads, compressed, rows, tmp_path):
    out, dense = compressed("masked_lm"), heads["masked_lm"]
    code, stdout, stderr = run("evaluate", out, "--against", dense, "--data", rows, "--json")
    assert code == 0, stderr
    tokens = recipe.tokenize(dense, read_texts(rows))
    (p, mask), (q, _) = (_hidden(path, tokens) for path in (dense, out))
    log_p, log_q = (x["logits"] - np.log(np.exp(x["logits"]).sum(-1, keepdims=True)) for x in (p, q))
    divergence = ((np.exp(log_p) * (log_p - log_q)).sum(-1) * mask).sum(1) / mask.sum(1)
    agreement = ((log_p.argmax(-1) == log_q.argmax(-1)) * mask).sum(1) / mask.sum(1)
    figures = json.loads(stdout)
    assert divergence.mean() > 0.01
    np.testing.assert_allclose(figures["kl"], divergence.mean(), rtol=1e-3)
    np.testing.assert_allclose(figures["agreement"], agreement.mean(), rtol=1e-6)
    found = recipe.predict(*_loaded(out), tokens)["token"]
    np.testing.assert_array_equal(found, np.where(mask > 0, log_q.argmax(-1), -1))


@pytest.mark.parametrize(("head", "left_out"), [("encoder", "soft_targets"), ("masked_lm", "pooled")])
def test_what_a_head_has_is_distilled_and_what_it_lacks_is_said(run, heads, rows, tmp_path, head, left_out):
    (tmp_path / "recipe.toml").write_text(DISTIL)
    out = tmp_path / "out"
    options = ("--recipe", tmp_path / "recipe.toml", "--data", rows, "--out", out)
    code, _, stderr = run("compress", heads[head], *options)
    assert code == 0, stderr
    assert stderr.count(f"`{left_out}` is left out") == stderr.count("is left out") == 1
    assert "loss" in stderr
    before, after = recipe.load_model(heads[head]).params, recipe.load_model(out).params
    kinds = [jc.report.describe_leaf(leaf) for _, leaf in jc.tree.leaves_with_paths(after)]
    assert sum(kind.startswith("int4") for kind in kinds) == 6
    pairs = zip(*(jax.tree.leaves(jc.materialize(params)) for params in (before, after)), strict=True)
    assert sum(bool((x != y).any()) for x, y in pairs) > 12


@pytest.mark.parametrize("head", ["encoder", "masked_lm", "sequence_classification"])
@pytest.mark.parametrize("name", sorted({*packaged_recipes()} - {"demo-smollm2"}))  # that one is for a decoder
def test_the_recipes_of_the_library_fit_every_head(heads, head, name):
    steps, loaded = recipe.read_recipe(name), recipe.load_model(heads[head])
    check_selections(steps, loaded.params)
    if steps.distil is not None:
        possible, left_out = possible_losses(steps.distil, BERT.heads[head])
        assert possible.hidden > 0
        assert ("soft_targets" in left_out) == (head == "encoder")


def test_losses_that_a_head_lacks_altogether_are_an_error(run, heads, rows, tmp_path):
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(DISTIL.replace("pooled = 1\nhidden = 1", "hard_labels = 1"))
    code, _, stderr = run(
        "compress", heads["encoder"], "--recipe", recipe_file, "--data", rows, "--out", tmp_path / "o"
    )
    assert (code, stderr.count("\n")) == (2, 1)
    assert "give a weight to `pooled` or `hidden`" in stderr


def test_a_reference_without_a_tokenizer_reads_the_rows_by_that_of_the_model(run, heads, rows, tmp_path):
    bare = shutil.copytree(heads["encoder"], tmp_path / "bare", ignore=shutil.ignore_patterns("vocab*", "tokenizer*"))
    code, stdout, stderr = run("evaluate", heads["encoder"], "--against", bare, "--data", rows, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["vector_error"] == 0
    assert "has no tokenizer" in stderr


def test_models_that_differ_in_kind_are_not_compared(run, heads, rows):
    code, _, stderr = run("evaluate", heads["encoder"], "--against", heads["masked_lm"], "--data", rows)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "a plain encoder and a masked language model" in stderr


def test_the_result_opens_from_python_and_goes_back_to_hugging_face(heads, compressed, tmp_path):
    """One call each; the plain directory has the same weights, and every file that the original has beside them."""
    out, plain = compressed("encoder"), tmp_path / "plain"
    loaded = jc.recipe.load_model(out)
    assert loaded.compressed
    jc.export.save_huggingface(plain, loaded.module, loaded.params, source=loaded.directory)
    module, params = jc.models.from_pretrained(plain)
    assert module == loaded.module
    for x, y in zip(*map(jax.tree.leaves, (params, jc.materialize(loaded.params))), strict=True):
        np.testing.assert_array_equal(x, y)
    names = {"1_Pooling/config.json", "modules.json", "vocab.txt", "tokenizer_config.json"}
    for directory in (out, plain):
        for name in names:
            assert (directory / name).read_bytes() == (heads["encoder"] / name).read_bytes()
    texts = recipe.Texts(texts=("good film", "bad plot"), labels=np.zeros(2, np.int32))
    assert recipe.tokenize(out, texts).ids == recipe.tokenize(plain, texts).ids
    with pytest.raises(FileExistsError, match="give a new directory"):
        jc.export.save_huggingface(plain, loaded.module, loaded.params, source=loaded.directory)
    with pytest.raises(FileNotFoundError, match="load_model"):
        jc.models.from_pretrained(out)


def test_texts_are_cut_at_the_limit_of_the_model_and_it_is_said(run, heads, tmp_path):
    """Two texts that differ after 64 tokens are different texts."""
    directory, data = heads["sequence_classification"], tmp_path / "rows.csv"
    shared = "good " * 70
    data.write_text(f"text\n{shared}bad dull\n{shared}film plot\n{shared * 2}\n")
    outputs = tmp_path / "logits.npz"
    for options, cut, limit, equal in (((), 1, 96, False), (("--max-length", 64), 3, 64, True)):
        code, stdout, stderr = run("evaluate", directory, "--data", data, "--outputs", outputs, "--json", *options)
        assert code == 0, stderr
        figures = json.loads(stdout)
        assert (figures["rows_cut"], figures["max_length"]) == (cut, limit)
        assert f"{cut} of 3 rows of {data} are cut to {limit} tokens" in stderr
        with np.load(outputs) as stored:
            assert np.array_equal(stored["logits"][0], stored["logits"][1]) == equal
    code, _, stderr = run("evaluate", directory, "--data", data, "--max-length", 97)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "`max_length` must be between 3 and 96" in stderr


def test_files_of_another_model_do_not_survive_an_overwrite(run, heads, compressed, tmp_path):
    out = compressed("encoder")
    code, _, stderr = run(
        "compress", heads["masked_lm"], "--recipe", tmp_path / "recipe.toml", "--out", out, "--overwrite"
    )
    assert code == 0, stderr
    assert not (out / "1_Pooling").exists()
    assert not (out / "modules.json").exists()
    shutil.rmtree(out / "checkpoint")
    code, _, stderr = run("inspect", out)
    assert (code, "no weights" in stderr) == (2, True)
