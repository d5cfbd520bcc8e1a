"""Every mistake of a user is one line that names the file, the row or the option; exit code 2, nothing left behind."""

import json
import os
import shutil
import sys
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcompress import checkpoint
from jaxcompress._src.cli import commands as _commands
from jaxcompress._src.recipe import directories

INT8 = "[[quantize]]\nselect = '.*/kernel'\nbits = 8\n"
DISTIL = INT8 + "[distil]\nepochs = 1\nlearning_rate = 1e-3\nhard_labels = 1\nbatch_size = 2\n"


@pytest.fixture
def model(heads, tmp_path):
    """A copy of the classifier that a test may damage."""
    return shutil.copytree(heads["sequence_classification"], tmp_path / "model")


@pytest.fixture
def fails(run, model, tmp_path):
    """Runs a command that must fail, and gives back its one line."""

    def call(*arguments):
        before = sorted(tmp_path.rglob("*"))
        code, stdout, stderr = run(*arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert stderr.startswith("jaxcompress: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return stderr

    return call


def _write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\ngood,1\nb\xe4d,0\n", "line 3: not UTF-8"),
        ("text,label\n".encode("utf-16"), "line 1: not UTF-8"),
        ("good film,1\nbad,0\n", "needs a column `text`, its columns are good film, 1"),
        ("text,text\na,b\n", "needs a column `text`"),
        ("", "its columns are none"),
        ("text,label\n", "has no rows"),
        ("label,text\n1\n", "line 2: the row has no text"),
        ("text,label\ngood, but long,1\n", "line 2: the row has more cells than the 2 columns"),
        ('text,label\n"good,1\nbad,0\n', "not CSV"),
        ("text,label\ngood,1\nbad,2\n", "Row 2 has the label 2, and the model has 2 classes"),
        ("text,label\ngood,-1\n", "line 2: a label is a class, counted from 0, found -1"),
        ("text,label\ngood,99999999999999999999\n", "line 2: a label is a class"),
        ("text,label\ngood,1.5\n", "line 2: the label must be an integer, found '1.5'"),
    ],
)
def test_data(fails, model, tmp_path, content, message):
    data = _write(tmp_path / "rows.csv", content)
    recipe = _write(tmp_path / "recipe.toml", DISTIL)
    for arguments in (
        ("evaluate", model, "--data", data),
        ("compress", model, "--recipe", recipe, "--data", data, "--out", tmp_path / "out"),
    ):
        line = fails(*arguments)
        if "batch_size" not in line:
            assert message in line
            assert "rows.csv" in line


def test_data_that_is_unusual_and_right(run, model, tmp_path):
    """A byte order mark, a text of 200,000 letters, empty labels, Windows line ends."""
    data = _write(tmp_path / "rows.csv", "\ufefftext,label\r\n" + "good " * 40_000 + ",1\r\nbad,\r\nfilm,0\r\n")
    code, stdout, stderr = run("evaluate", model, "--data", data, "--json")
    assert code == 0, stderr
    figures = json.loads(stdout)
    assert (figures["rows"], figures["rows_cut"], figures["rows_with_label"]) == (3, 1, 2)
    assert "1 of 3 rows have no label" in stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "line 1 is not UTF-8"),
        (b"[" * 5000, "Recipe"),
        (b"a = " + b"[" * 5000, "nested too deeply"),
        (b"#" * (2**20 + 1), "more than 1048576 bytes"),
        ("[[quantize]]\nselect = '['\nbits = 4", "[[quantize]] 1: `select` '[' is not a regular expression"),
        ("[[quantize]]\nselect = ''\nbits = 4", "[[quantize]] 1: `select` is empty"),
        ("[[prune]]\nselect = 'a{99999999999}'\nsparsity = 0.5", "[[prune]] 1: `select`"),
        ("[[quantize]]\nselect = 5\nbits = 4", "`select` must be of type str, found 5"),
        ("[[quantize]]\nselect = '.*'\nbits = true", "`bits` must be of type int, found True"),
        ("[[quantize]]\nselect = '.*'\nbits = 1e400", "`bits` must be of type int, found inf"),
        ("[[quantize]]\nselect = '.*kernel'\nbits = 4\ngroup_size = -1", "`group_size`"),
        ("[[quantize]]\nselect = '.*kernel'\nbits = 4\ngroup_size = 99999999999", "`group_size` must be at most"),
        ("[[quantize]]\nselect = '.*kernel'\nbits = 4\ngroup_size = 7", "at leaf"),
        ("[[quantize]]\nselect = '.*kernel'\nbits = 4\nscale_dtype = 'int8'", "`scale_dtype`"),
        ("[[quantize]]\nselect = '.*kernel'\nbits = 4\nconvention = 'wide'", "`convention`"),
        (
            "[[quantize]]\nselect = 'no/such'\nbits = 4",
            "[[quantize]] 1: The selector by_path('no/such') matches no leaf",
        ),
        ("[[cluster]]\nselect = '.*kernel'\nvalues = 4\ngroup_size = 7", "`group_size` 7 does not divide"),
        ("[[prune]]\nselect = '.*kernel'\nsparsity = nan", "`sparsity` must be finite, got nan"),
        (f"{DISTIL}widths = 64", "[distil]: `widths` must be a list, such as [32, 64], found 64"),
        (f"{DISTIL}widths = [true]", "`widths` must be of type int, found True"),
        (f"{DISTIL}widths = [-3, 4]", "`widths` must be positive and ascending"),
        (f"{DISTIL}widths = [32, 97]", "`widths` may go up to the 96 positions of the model, got 97"),
        (DISTIL.replace("1e-3", "inf"), "`learning_rate` must be finite, got inf"),
        (DISTIL.replace("1e-3", "1e300"), "`learning_rate` must be finite, got 1e+300"),
        (DISTIL.replace("1e-3", "1e-300"), "`learning_rate` is 1e-300, which float32 rounds to 0"),
        (DISTIL.replace("1e-3", "'fast'"), "`learning_rate` must be of type float, found 'fast'"),
        (f"{DISTIL}seed = -1", "`seed` must not be negative, got -1"),
        (f"{DISTIL}dropout = 1", "`dropout` must be of type bool, found 1"),
        (f"{DISTIL}weight_decay = nan", "`weight_decay` must be finite, got nan"),
        (DISTIL.replace("hard_labels = 1", "hard_labels = inf"), "`hard_labels` must be finite"),
        (DISTIL.replace("batch_size = 2", "batch_size = 99"), "`batch_size` is 99, and there are only 3 rows"),
        (f"{DISTIL}[save]\nstorage = 1", "[save]: `storage` must be 'orbax' or 'entropy', found 1"),
        ("distil = 1", "[distil] must be a table"),
        ("distil = [1]", "[distil] must be a table"),
    ],
)
def test_recipes(fails, model, tmp_path, content, message):
    recipe = _write(tmp_path / "recipe.toml", content)
    data = _write(tmp_path / "rows.csv", "text,label\ngood,1\nbad,0\nfilm,0\n")
    line = fails("compress", model, "--recipe", recipe, "--data", data, "--out", tmp_path / "new" / "out")
    assert message in line


def test_recipes_that_are_no_files(fails, model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in {".": "is not a file", "pipe": "is not a file", "loop": "does not exist"}.items():
        line = fails("compress", model, "--recipe", tmp_path / name, "--out", tmp_path / "out")
        assert message in line


def _json(name, **changes):
    def damage(model):
        path = model / name
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in (settings | changes).items() if value is not None}))

    return damage


def _bytes(name, change):
    return lambda model: (model / name).write_bytes(change((model / name).read_bytes()))


def _tensors(change):
    def damage(model):
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_json("config.json", architectures=[5]), "config.json': `architectures` is [5]"),
        (_json("config.json", architectures=5), "config.json': `architectures` must be a list of names, got 5"),
        (_json("config.json", architectures=[["BertModel"]]), "`architectures` is [['BertModel']]"),
        (_json("config.json", hidden_size=None), "config.json': these sizes are missing: hidden_size"),
        (_json("config.json", num_hidden_layers="1"), "`num_hidden_layers` must be an int"),
        (_json("config.json", num_hidden_layers=10**9), "`num_hidden_layers` must be an int in [1, 10000]"),
        (_json("config.json", pruned_heads=[1]), "`pruned_heads` must be a mapping"),
        (_json("config.json", jaxcompress=[1]), "`jaxcompress` must be a mapping"),
        (_json("config.json", hidden_act=["gelu"]), "`hidden_act` must be one of"),
        (_json("config.json", layer_norm_eps=True), "`layer_norm_eps` must be a finite number"),
        (_json("config.json", model_type="mamba"), "`model_type` is 'mamba'"),
        (_bytes("config.json", lambda _: b"[" * 100_000), "config.json' is not JSON"),
        (_bytes("config.json", lambda _: b"\xff\xfe{}"), "config.json' is not JSON"),
        (_bytes("config.json", lambda _: b"[]"), "config.json' must hold a JSON object"),
        (_bytes("model.safetensors", lambda content: content[:-100]), "model.safetensors' is damaged"),
        (_bytes("model.safetensors", lambda content: content[:5]), "model.safetensors' is damaged"),
        (_bytes("model.safetensors", lambda _: b""), "model.safetensors' is damaged"),
        (_bytes("model.safetensors", lambda _: b"\xff" * 99), "model.safetensors' is damaged"),
        (_tensors(lambda tensors: tensors.pop("classifier.weight")), "missing tensors: 'classifier.weight'"),
        (_tensors(lambda t: t.update({"classifier.weight": np.ones((3, 16), np.float32)})), "expected (2, 16)"),
        (_tensors(lambda t: t.update({"classifier.bias": np.ones(2, np.int32)})), "'classifier.bias' is int32"),
        (_tensors(lambda t: t["classifier.bias"].fill(np.nan)), "'classifier/bias' holds 2 NaN"),
        (lambda model: (model / "model.safetensors").unlink(), "There are no weights in"),
        (lambda model: (model / "config.json").unlink(), "There is no config.json"),
        (lambda model: (model / "modules.json").write_text("{"), "modules.json' is not JSON"),
        (lambda model: (model / "modules.json").write_text('[{"path": "../x", "type": "a"}]'), "is not a plain name"),
        (lambda model: (model / "modules.json").write_text("[7]"), "must list modules"),
    ],
)
def test_models(fails, model, tmp_path, damage, message):
    damage(model)
    assert message in fails("compress", model, "--recipe", "int4", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: (model / "tokenizer.json").write_text("{"), "The tokenizer in"),
        (lambda model: (model / "tokenizer.json").write_bytes(b"\x00\xff"), "The tokenizer in"),
        (lambda model: (model / "tokenizer.json").write_text("[]"), "The tokenizer in"),
        (lambda model: (model / "tokenizer_config.json").write_text("5"), "The tokenizer in"),
        (lambda model: (model / "vocab.txt").unlink(), "neither tokenizer.json nor vocab.txt"),
        (
            lambda model: (model / "vocab.txt").write_text((model / "vocab.txt").read_text() + "\nextra"),
            "gives the token 17, and the model has only 17",
        ),
    ],
)
def test_tokenizers(fails, model, tmp_path, damage, message):
    damage(model)
    data = _write(tmp_path / "rows.csv", "text,label\nextra,1\nbad,0\n")
    assert message in fails("evaluate", model, "--data", data)
    recipe = _write(tmp_path / "recipe.toml", DISTIL)
    assert message in fails("compress", model, "--recipe", recipe, "--data", data, "--out", tmp_path / "out")


def test_outputs(fails, run, model, tmp_path):
    """OUT is a folder of its own that can be written, and nothing that others wrote is replaced."""
    recipe = _write(tmp_path / "recipe.toml", INT8)
    other = shutil.copytree(model, tmp_path / "other")
    (tmp_path / "foreign" / "checkpoint").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    checkpoint.save(tmp_path / "mine" / "checkpoint", {"kernel": np.ones(3, np.float32)})

    def line(out, *options):
        return fails("compress", model, "--recipe", recipe, "--out", out, *options)

    assert "is the model's own folder" in line(model, "--overwrite")
    assert "lie one inside the other" in line(model / "small")
    assert "lie one inside the other" in line(tmp_path)
    assert "holds 'config.json' of another model" in line(other)
    assert "'/proc/jaxcompress' cannot be written" in line("/proc/jaxcompress")
    assert "is not a directory" in line(recipe / "out")
    assert "a link to nothing" in line(tmp_path / "dangling")
    for name in ("foreign", "mine"):
        for options in ((), ("--overwrite",)):
            assert "was not written by `jaxcompress compress`" in line(tmp_path / name, *options)

    out = tmp_path / "deep" / "out"
    code, _, stderr = run("compress", model, "--recipe", recipe, "--out", out)
    assert code == 0, stderr
    assert "give --overwrite" in line(out)
    assert "is compressed already" in fails("compress", out, "--recipe", recipe, "--out", tmp_path / "twice")


def test_output_files(fails, model, tmp_path):
    data = _write(tmp_path / "rows.csv", "text\ngood\n")
    for outputs, message in {
        tmp_path / "absent" / "x.npz": "there is no directory",
        tmp_path: "is not a file",
        data: "is a file of another kind",
        "/proc/x.npz": "cannot be written",
    }.items():
        assert message in fails("evaluate", model, "--data", data, "--outputs", outputs)
    assert "has one row" in fails("evaluate", model, "--data", data, "--against", model)


def test_arguments(fails, model, tmp_path):
    data = _write(tmp_path / "rows.csv", "text\ngood\n")
    for arguments, message in {
        ("evaluate", model, "--data", data, "--max-length", "x"): "'--max-length'",
        ("evaluate", model, "--data", data, "--max-length", "0"): "'--max-length'",
        ("evaluate", model, "--data", data, "--max-length", "2"): "`max_length` must be between 3 and 96",
        ("evaluate", model, "--data"): "'--data' requires an argument",
        ("evaluate", model): "Missing option '--data'. See 'jaxcompress evaluate --help'",
        ("evaluate", tmp_path / "absent", "--data", data): "There is no directory",
        ("evaluate", data, "--data", data): "There is no directory",
        ("evaluate", model, "--data", model): "is not a file",
        ("evaluate", model, "--data", data, "--against", tmp_path / "absent"): "There is no directory",
        ("inspect", model, "x"): "unexpected extra argument",
        ("frobnicate",): "No such command 'frobnicate'",
        ("--frobnicate",): "No such option",
    }.items():
        assert message in fails(*arguments)


def test_a_pooling_that_is_not_known_is_named_where_sentences_are_compared(fails, heads, tmp_path):
    encoder = shutil.copytree(heads["encoder"], tmp_path / "encoder")
    (encoder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    data = _write(tmp_path / "rows.csv", "text\ngood\nbad\n")
    line = fails("evaluate", encoder, "--data", data)
    assert "1_Pooling/config.json': sentence vectors by mean or first token are supported" in line


def test_a_gguf_file_without_its_extra(fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    data = _write(tmp_path / "rows.csv", "text\ngood\n")
    recipe = _write(tmp_path / "recipe.toml", INT8)
    for arguments in (
        ("inspect",),
        ("evaluate", "--data", data),
        ("compress", "--recipe", recipe, "--out", tmp_path / "x"),
    ):
        line = fails(arguments[0], tmp_path / "model.gguf", *arguments[1:])
        assert "GGUF files need gguf: pip install 'jaxcompress[gguf]'" in line


def test_a_failure_while_writing_leaves_no_folder(fails, model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directories, "save", full)
    recipe = _write(tmp_path / "recipe.toml", INT8)
    assert "No space left" in fails("compress", model, "--recipe", recipe, "--out", tmp_path / "a" / "b")


def test_the_version(run):
    import jaxcompress

    code, stdout, _ = run("--version")
    assert (code, stdout) == (0, f"jaxcompress {jaxcompress.__version__}\n")
    assert jaxcompress.__version__.count(".") == 2


def test_a_folder_named_checkpoint_beside_weights_is_not_a_compressed_model(run, model):
    """Training programs write such folders."""
    (model / "checkpoint").mkdir()
    code, stdout, stderr = run("inspect", model, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["total"]["dense_bytes"] > 0


def test_warnings_are_one_line(run, model, monkeypatch):
    def load(_):
        warnings.warn("First line,\nsecond line.", stacklevel=2)
        raise ValueError("No model.")

    monkeypatch.setattr(_commands, "load_model", load)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, stderr = run("inspect", model)
    assert code == 2
    assert stderr == "jaxcompress: warning: First line, second line.\njaxcompress: error: No model.\n"
