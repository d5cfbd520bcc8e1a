"""Where exports are written: what is there stays unless asked, and what cannot be written is said before the work."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_runs import assert_same, run_session, session

from jaxcompress._src.export.onnx import model_file
from jaxcompress.export import save_gguf, save_huggingface, save_litert, save_onnx, save_stablehlo
from jaxcompress.models import LlamaConfig, make_module

X = np.ones((1, 4), np.float32)
CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)  # fmt: skip


def _apply(params, x):
    return x @ params["w"]


def _worked(*_):
    raise AssertionError("The work began.")


@pytest.fixture(scope="module")
def language_model():
    module = make_module(CONFIG)
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]


@pytest.fixture
def writers(language_model):
    """By name of the file: `write(path, apply=..., **options)`, which writes with an `apply` where there is one."""

    def of_function(save):
        return lambda path, apply=_apply, **options: save(path, apply, {"w": jnp.ones((4, 2))}, X, **options)

    def of_module(save):
        return lambda path, apply=None, **options: save(path, *language_model, **options)

    return {
        "m.onnx": of_function(save_onnx),
        "m.tflite": of_function(save_litert),
        "m.gguf": of_module(save_gguf),
        "stablehlo": of_function(save_stablehlo),
        "huggingface": of_module(save_huggingface),
    }


FILES = ["m.onnx", "m.tflite", "m.gguf"]
ALL = [*FILES, "stablehlo", "huggingface"]


@pytest.mark.parametrize("name", ALL)
def test_what_exists_is_replaced_only_where_asked(writers, tmp_path, name):
    path, write = tmp_path / name, writers[name]
    write(path)
    before = _contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"exists; give a new .*overwrite=True"):
        write(path, apply=_worked)
    assert _contents(tmp_path) == before
    write(path, overwrite=True)
    assert _contents(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_has_a_directory_and_takes_no_place_of_one(writers, tmp_path, name, overwrite):
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=r"exists and is no file"):
        writers[name](tmp_path / name, apply=_worked, overwrite=overwrite)
    os.mkfifo(tmp_path / f"pipe.{name}")
    with pytest.raises(FileExistsError, match=r"exists and is no file"):
        writers[name](tmp_path / f"pipe.{name}", apply=_worked, overwrite=overwrite)
    with pytest.raises(FileNotFoundError, match=r"no directory .*none' to write"):
        writers[name](tmp_path / "none" / name, apply=_worked, overwrite=overwrite)
    assert {path.name for path in tmp_path.iterdir()} == {name, f"pipe.{name}"}


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_written_is_said_before_the_work(writers, tmp_path, name, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is not a directory") as caught:
        writers[name](tmp_path / "file" / name, apply=_worked)
    assert "\n" not in str(caught.value)

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(OSError, match="cannot be written: Read-only file system in"):
        writers[name](tmp_path / name, apply=_worked)
    assert _contents(tmp_path) == {"file": b""}


@pytest.mark.parametrize("name", ["m.onnx", "m.tflite", "stablehlo"])
def test_nothing_is_left_behind_where_the_work_fails(writers, tmp_path, name):
    (tmp_path / "out").mkdir()
    with pytest.raises(AssertionError, match="The work began"):
        writers[name](tmp_path / "out" / name, apply=_worked)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ALL)
def test_names_with_spaces_and_other_letters_and_links(writers, tmp_path, name):
    folder = tmp_path / "mein Modell \u00fc\u65e5\u672c"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    writers[name](tmp_path / "link" / name)
    (folder / f"2.{name}").symlink_to(folder / name)
    writers[name](folder / f"2.{name}", overwrite=True)
    assert {path.name for path in folder.iterdir()} == {name, f"2.{name}"}
    assert (folder / f"2.{name}").is_symlink()
    (folder / f"loop.{name}").symlink_to(folder / f"loop.{name}")
    with pytest.raises(OSError, match="link"):
        writers[name](folder / f"loop.{name}", apply=_worked, overwrite=True)


def test_the_constants_beside_an_onnx_file_belong_to_it(tmp_path, monkeypatch):
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    data.write_text("mine")
    with pytest.raises(FileExistsError, match=r"m.onnx.data' exists"):
        save_onnx(path, _worked, {}, X)
    assert _contents(tmp_path) == {"m.onnx.data": b"mine"}
    monkeypatch.setattr(model_file, "_MOST_INSIDE", 10)
    params = {"w": jnp.arange(800.0).reshape(4, 200)}
    save_onnx(path, _apply, params, X, overwrite=True)
    assert data.stat().st_size >= 3200
    assert_same(run_session(session(path), ["x"], X), X @ params["w"])
    monkeypatch.undo()
    save_onnx(path, _apply, params, X, overwrite=True)
    assert not data.exists()


def _contents(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
