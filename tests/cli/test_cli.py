"""The commands, run as a user runs them; every user error is one line and exit code 2."""

import json

import jax
import numpy as np
import pytest

from jaxcompress import checkpoint, recipe
from jaxcompress._src.cli import commands as _commands
from jaxcompress._src.types import is_compressed

RECIPE = """
[[prune]]
select = 'bert/encoder/.*/kernel'
sparsity = 0.5
pattern = "2:4"
every = 2
[[quantize]]
select = 'bert/encoder/.*/kernel'
bits = 4
group_size = 32
[[quantize]]
select = 'bert/embeddings/.*/embedding'
bits = 4
group_size = 32
frozen = true
[distil]
epochs = 2
learning_rate = 1e-3
soft_targets = 1.0
hidden = 1.0
widths = [16]
"""

DEEP = """
[[prune]]
select = 'bert/encoder/.*/kernel'
sparsity = 0.6
[[cluster]]
select = 'bert/encoder/.*/kernel'
values = 8
[[cluster]]
select = 'bert/embeddings/.*/embedding'
values = 8
zero = false
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_the_main_job_end_to_end(run, bert_directory, data_file, recipe_file, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = run(
        "compress", bert_directory, "--recipe", recipe_file, "--data", data_file, "--out", out, "--json"
    )
    assert code == 0, stderr
    written = json.loads(stdout)
    assert written["bytes_stored"] < written["bytes_dense"] / 6
    assert "loss" in stderr
    assert "s left" in stderr

    params, info = checkpoint.restore(written["checkpoint"])
    kernel = params["bert"]["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"]
    assert is_compressed(kernel)
    assert float((kernel.materialize() == 0).mean()) >= 0.5
    assert info.metadata["recipe"]["prune"][0]["pattern"] == "2:4"

    code, stdout, _ = run("evaluate", out, "--against", bert_directory, "--data", data_file, "--json")
    figures = json.loads(stdout)
    assert code == 0
    assert figures["rows"] == 150
    assert figures["agreement"] > 0.5
    assert figures["kl"] < 0.1

    code, stdout, _ = run("inspect", out)
    assert code == 0
    assert "embedding" in stdout
    assert "on disk" in stdout
    code, stdout, _ = run("inspect", out, "--leaves", "--json")
    assert {leaf["kind"] for leaf in json.loads(stdout)["leaves"]} >= {"float32", "int4 g32 2:4"}


def test_one_shot_needs_no_data_and_overwriting_is_asked_for(run, bert_directory, tmp_path):
    out = tmp_path / "out"
    arguments = ("compress", bert_directory, "--recipe", "int4", "--out", out)
    code, _, stderr = run(*arguments)
    assert code == 0, stderr
    code, _, stderr = run(*arguments)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "--overwrite" in stderr
    assert run(*arguments, "--overwrite")[0] == 0


def test_a_recipe_may_ask_for_an_entropy_coded_file(run, bert_directory, tmp_path, monkeypatch):
    """The same leaves in fewer bytes, restored from the path alone, and run."""
    written, restored, compressed = {}, {}, []

    def once(*arguments, **options):
        if not compressed:
            compressed.append(recipe.compress(*arguments, **options))
        return compressed[0]

    monkeypatch.setattr(_commands, "run_recipe", once)
    for name, table in {"plain": "", "coded": '[save]\nstorage = "entropy"\n'}.items():
        (tmp_path / f"{name}.toml").write_text(DEEP + table)
        out = ("--out", tmp_path / name, "--json")
        code, stdout, stderr = run("compress", bert_directory, "--recipe", tmp_path / f"{name}.toml", *out)
        assert code == 0, stderr
        written[name] = json.loads(stdout)
        restored[name], _ = checkpoint.restore(written[name]["checkpoint"])
    assert written["coded"]["bytes_disk"] < 0.7 * written["plain"]["bytes_disk"]
    assert jax.tree.structure(restored["coded"]) == jax.tree.structure(restored["plain"])
    for x, y in zip(*map(jax.tree.leaves, restored.values()), strict=True):
        np.testing.assert_array_equal(x, y)
    code, stdout, _ = run("inspect", tmp_path / "coded", "--json")
    assert (code, json.loads(stdout)["metadata"]["recipe"]["save"]) == (0, {"storage": "entropy"})


def test_help_shows_examples(run):
    for command in ("demo", "compress", "inspect", "evaluate"):
        code, stdout, _ = run(command, "--help")
        assert code == 0
        assert f"jaxcompress {command}" in stdout
        assert "Examples" in stdout


def _case(*arguments, message):
    return pytest.param(arguments, message, id=message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        _case("inspect", "{tmp}/absent", message="There is no directory"),
        _case("inspect", "{tmp}", message="config.json"),
        _case("compress", "{bert}", "--recipe", "int5", "--out", "{tmp}/o", message="recipes of the library"),
        _case("compress", "{bert}", "--recipe", "{recipe}", "--out", "{tmp}/o", message="give --data"),
        _case("compress", "{bert}", "--recipe", "int4", "--out", "{data}/o", message="is not a directory"),
        _case("compress", "{tmp}/absent", "--recipe", "int4", "--out", "{tmp}/o", message="There is no directory"),
        _case("compress", "{bert}", "--recipe", "{nothing}", "--out", "{tmp}/o", message="matches no leaf"),
        _case("compress", "{bert}", "--recipe", "{uneven}", "--out", "{tmp}/o", message="at leaf"),
        _case("evaluate", "{bert}", "--data", "{tmp}/absent.csv", message="There is no file"),
        _case("evaluate", "{bert}", message="Missing option"),
        _case("evaluate", "{bert}", "--dat", "x", message="No such option"),
        _case("frobnicate", message="No such command"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    run, arguments, message, bert_directory, data_file, recipe_file, tmp_path
):
    nothing, uneven = tmp_path / "nothing.toml", tmp_path / "uneven.toml"
    nothing.write_text("[[quantize]]\nselect = 'no/such/leaf'\nbits = 4")
    uneven.write_text("[[quantize]]\nselect = '.*kernel'\nbits = 4\ngroup_size = 7")
    (tmp_path / "empty").mkdir()
    names = {"bert": bert_directory, "data": data_file, "recipe": recipe_file, "nothing": nothing, "uneven": uneven}
    code, _, stderr = run(*(argument.format(tmp=tmp_path / "empty", **names) for argument in arguments))
    assert code == 2
    assert message in " ".join(stderr.split())
    assert "Traceback" not in stderr
    if stderr.startswith("jaxcompress: error"):
        assert stderr.count("\n") == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_damaged_checkpoint_is_named(run, bert_directory, tmp_path):
    out = tmp_path / "out"
    assert run("compress", bert_directory, "--recipe", "int4", "--out", out)[0] == 0
    (out / "checkpoint" / "manifest.json").write_text("{")
    code, _, stderr = run("inspect", out)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "manifest.json" in stderr


def test_recipes_are_listed_and_explained(run, tmp_path):
    code, stdout, _ = run("recipes")
    assert code == 0
    assert "int3-reconstruct" in stdout
    assert "sparsegpt" in stdout
    code, stdout, _ = run("recipes", "show", "half-fisher")
    assert code == 0
    assert 'method = "fisher"' in stdout
    assert "[[shrink]] 1, fisher: Takes out the units" in stdout
    assert "number of texts" in stdout
    code, stdout, _ = run("recipes", "show", "magnitude", "--json")
    assert (code, set(json.loads(stdout)["options"])) == (0, {"shrink", "prune"})
    code, _, stderr = run("recipes", "show", "int5")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "recipes of the library: 2of4-alps, deep-compression" in stderr


def test_a_recipe_that_takes_units_out(run, bert_directory, data_file, tmp_path):
    """What is left says for itself how large it is: read again, evaluated, shown."""
    (tmp_path / "half.toml").write_text(
        "[calibrate]\nrows = 32\n[[shrink]]\nmethod = 'fisher'\nselect = 'bert/encoder/.*'\nsparsity = 0.5\n"
        "rounds = 1\n"
    )
    out = tmp_path / "out"
    arguments = ("compress", bert_directory, "--recipe", tmp_path / "half.toml", "--out", out, "--json")
    code, _, stderr = run(*arguments)
    assert (code, "calibrates: give --data" in stderr) == (2, True)
    code, stdout, stderr = run(*arguments, "--data", data_file)
    assert code == 0, stderr
    assert "units are left" in stderr
    written = json.loads(stdout)
    assert written["bytes_stored"] < 0.8 * written["bytes_original"]
    code, stdout, _ = run("evaluate", out, "--against", bert_directory, "--data", data_file, "--json")
    assert code == 0
    assert json.loads(stdout)["kl"] < 0.1
