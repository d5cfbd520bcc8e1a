"""Saving: whole or not at all, and every refusal comes before anything is written."""

import copy
import dataclasses
import math
import os
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.checkpoint import save as _save
from jaxcompress._src.checkpoint.read import read_manifest
from jaxcompress.checkpoint import CheckpointError, restore, save

PARAMS = {"dense": {"kernel": jnp.ones((2, 3))}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ForeignArray:
    """A compressed array of another library."""

    data: jax.Array

    shape, dtype, nbits = (2,), jnp.dtype("float32"), 64

    def materialize(self):
        return self.data


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (object(), TypeError, "a leaf of type object cannot be stored"),
        ("text", TypeError, "a leaf of type str cannot be stored"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), TypeError, "a leaf of type ShapeDtypeStruct"),
        (np.array([object()]), TypeError, "dtype object cannot be stored"),
        (np.array(["a"]), TypeError, "cannot be stored"),
        (np.array([1], "datetime64[s]"), TypeError, r"dtype datetime64\[s\] cannot be stored"),
        (np.zeros(2, [("a", "i4")]), TypeError, "cannot be stored"),
        (np.ma.masked_array([1.0], [True]), TypeError, "a leaf of type MaskedArray"),
        (jnp.ones(2, jnp.int4), TypeError, r"dtype int4 cannot be stored; pack .* `jaxcompress\.arrays\.pack`"),
        (ForeignArray(jnp.ones(2)), TypeError, "compressed arrays of class ForeignArray cannot be stored yet"),
    ],
)
def test_leaves_that_cannot_be_stored_are_named(tmp_path, leaf, error, message):
    with pytest.raises(error, match=rf"Leaf 'a/1': .*{message}"):
        save(tmp_path / "c", {"a": [jnp.ones(2), leaf]})
    assert os.listdir(tmp_path) == []


def test_parts_and_static_fields_that_cannot_be_stored(tmp_path, compressed):
    leaf = compressed["int8 2:4"]
    with pytest.raises(TypeError, match=r"Leaf 'a': in `scale`: a leaf of type str"):
        save(tmp_path / "c", {"a": dataclasses.replace(leaf, scale="wide")})
    for levels, message in (([0.5], r"\[0\.5\] is of type list, expected tuple"), ((math.inf,), "inf is not finite")):
        broken = copy.copy(leaf)
        object.__setattr__(broken, "levels", levels)
        with pytest.raises(TypeError, match=rf"Leaf 'a': a static field of QuantizedArray: {message}"):
            save(tmp_path / "c", {"a": broken})
    assert os.listdir(tmp_path) == []


def test_numpy_numbers_in_static_fields_come_back_as_python_numbers(tmp_path, compressed):
    leaf = copy.copy(compressed["levels"])
    object.__setattr__(leaf, "levels", tuple(np.float32(level) for level in range(16)))
    save(tmp_path / "c", leaf)
    found, _ = restore(tmp_path / "c")
    assert {type(level) for level in found.levels} == {float}
    assert jax.tree.structure(found) == jax.tree.structure(leaf)


def test_traced_and_donated_arrays(tmp_path):
    with pytest.raises(TypeError, match="Leaf 'a': a traced value cannot be stored"):
        jax.jit(lambda x: save(tmp_path / "c", {"a": x}))(jnp.ones(2))
    donated = jnp.ones(2)
    donated.delete()
    with pytest.raises(ValueError, match="Leaf 'a': its array was deleted"):
        save(tmp_path / "c", {"a": donated})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", [1.5, (1, 2), True, b"a", np.int64(3), None])
def test_dict_keys_that_cannot_be_stored(tmp_path, key):
    with pytest.raises(TypeError, match=r"In the dict at 'outer', the key .* only str and int"):
        save(tmp_path / "c", {"outer": {key: jnp.ones(2)}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["config", "metadata"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"a": object()}, TypeError, r"\.a` is of type object"),
        ({"a": [1, {2, 3}]}, TypeError, r"\.a\[1\]` is of type set"),
        ({"a": {1: 2}}, TypeError, r"\.a` has the key 1 of type int"),
        ({"a": {"b": float("nan")}}, ValueError, r"\.a\.b` is nan"),
        ({"a": np.ones(2)}, TypeError, r"\.a` is of type ndarray"),
    ],
)
def test_config_and_metadata_that_json_would_change(tmp_path, name, value, error, message):
    with pytest.raises(error, match=f"`{name}{message}"):
        save(tmp_path / "c", PARAMS, **{name: value})
    assert os.listdir(tmp_path) == []


def test_config_metadata_versions_and_size_come_back(tmp_path):
    config = {"layers": 2, "names": ("a", "ö"), "rate": 0.1, "deep": {"none": None, "yes": True}}
    save(tmp_path / "c", PARAMS, config=config, metadata={"accuracy": np.float32(0.5), "step": np.int64(3)})
    _, info = restore(tmp_path / "c")
    assert info.config == config | {"names": ["a", "ö"]}
    assert info.metadata == {"accuracy": 0.5, "step": 3}
    assert type(info.metadata["step"]) is int
    assert info.format_version == 3
    assert set(info.versions) == {"jaxcompress", "jax", "orbax"}
    assert info.versions["jax"] == jax.__version__
    assert info.disk_bytes == sum(file.stat().st_size for file in (tmp_path / "c").rglob("*") if file.is_file())


def test_relative_paths_new_parents_and_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("runs/first", PARAMS)
    np.testing.assert_array_equal(restore("runs/first")[0]["dense"]["kernel"], 1)
    os.symlink("first", "runs/latest")
    save("runs/latest", {"new": 2}, overwrite=True)
    assert os.path.islink("runs/latest")
    assert restore("runs/first")[0] == restore("runs/latest")[0] == {"new": 2}
    assert sorted(os.listdir("runs")) == ["first", "latest"]
    with pytest.raises(ValueError, match="local file system, got 'gs://bucket/c'"):
        save("gs://bucket/c", PARAMS)


def test_directory_is_as_readable_as_the_user_allows(tmp_path):
    previous = os.umask(0o022)
    try:
        save(tmp_path / "c", PARAMS)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(os.stat(tmp_path / "c").st_mode) == 0o755


def test_existing_paths_are_kept(tmp_path):
    save(tmp_path / "c", {"old": 1})
    with pytest.raises(FileExistsError, match=r"exists; pass `overwrite=True`"):
        save(tmp_path / "c", PARAMS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("text")
    (tmp_path / "file").write_text("text")
    for name in ("data", "file"):
        with pytest.raises(FileExistsError, match="is not a checkpoint"):
            save(tmp_path / name, PARAMS, overwrite=True)
    assert restore(tmp_path / "c")[0] == {"old": 1}
    assert (tmp_path / "data" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "text"
    assert sorted(os.listdir(tmp_path)) == ["c", "data", "file"]


def test_overwrite_replaces_everything(tmp_path):
    save(tmp_path / "c", {"old": jnp.ones(100)}, metadata={"old": True})
    (tmp_path / "c" / "note").write_text("of the old one")
    save(tmp_path / "c", PARAMS, overwrite=True)
    found, info = restore(tmp_path / "c")
    assert list(found) == ["dense"]
    assert info.metadata == {}
    assert sorted(os.listdir(tmp_path / "c")) == [read_manifest(tmp_path / "c").arrays, "manifest.json"]
    assert os.listdir(tmp_path) == ["c"]


def _fail(*_args, **_kwargs):
    raise OSError("No space left on device")


@pytest.mark.parametrize("name", ["write_arrays", "digests", "write_manifest"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, name, existing):
    if existing:
        save(tmp_path / "c", {"old": 1})
    with monkeypatch.context() as patch:
        patch.setattr(_save, name, _fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / "c", PARAMS, overwrite=existing)
    assert os.listdir(tmp_path) == (["c"] if existing else [])
    if existing:
        assert restore(tmp_path / "c")[0] == {"old": 1}


@pytest.mark.parametrize("failing", ["rename", "replace"])
def test_a_failed_rename_keeps_the_old_checkpoint(tmp_path, monkeypatch, failing):
    save(tmp_path / "c", {"old": 1})
    before, whole = sorted(os.listdir(tmp_path / "c")), getattr(os, failing)

    def fail_in_checkpoint(source, target):
        # Orbax renames inside the directory it writes to.
        if os.path.dirname(target) == str(tmp_path / "c"):
            _fail()
        whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail_in_checkpoint)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / "c", PARAMS, overwrite=True)
    assert restore(tmp_path / "c")[0] == {"old": 1}
    assert os.listdir(tmp_path) == ["c"]
    assert sorted(os.listdir(tmp_path / "c")) == before


def test_a_checkpoint_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    write = _save.write_arrays

    def write_and_race(directory, arrays):
        write(directory, arrays)
        monkeypatch.undo()
        save(tmp_path / "c", {"other": 1})

    monkeypatch.setattr(_save, "write_arrays", write_and_race)
    with pytest.raises(FileExistsError, match="appeared while the checkpoint was written"):
        save(tmp_path / "c", PARAMS)
    assert restore(tmp_path / "c")[0] == {"other": 1}
    assert os.listdir(tmp_path) == ["c"]


def test_killed_between_the_renames_the_old_one_is_beside(tmp_path):
    save(tmp_path / "c", {"old": 1})
    aside = tmp_path / ".c.replaced-0123456789ab"
    os.rename(tmp_path / "c", aside)
    with pytest.raises(FileNotFoundError, match=r"interrupted save left .*\.c\.replaced-0123456789ab"):
        restore(tmp_path / "c")
    assert restore(aside)[0] == {"old": 1}


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file" / "c", PARAMS)
    assert os.listdir(tmp_path) == ["file"]


def test_manifest_describes_every_leaf(tmp_path, compressed):
    tree = {"a": {1: [compressed["int4 2:4"]]}, "b": (jnp.ones((2, 0)), jax.random.key(0), 3)}
    save(tmp_path / "c", tree)
    manifest = read_manifest(tmp_path / "c")
    assert [leaf.name for leaf in manifest.leaves] == ["a/1/0", "b/0", "b/1", "b/2"]
    assert [leaf.path for leaf in manifest.leaves] == [
        path
        for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is compressed["int4 2:4"])[
            0
        ]
    ]
    assert [(leaf.value.kind, leaf.value.shape, leaf.value.dtype) for leaf in manifest.leaves] == [
        ("QuantizedArray", (16, 8), "float32"),
        ("jax.Array", (2, 0), "float32"),
        ("prng_key", (), "key<fry>"),
        ("python", (), "int"),
    ]
    assert [array.array for array in manifest.leaves[0].value.arrays()] == [
        "leaf_00000.data.values.data",
        "leaf_00000.data.index.data",
        "leaf_00000.scale",
    ]
    assert manifest.leaves[0].value.nbytes * 8 == compressed["int4 2:4"].nbits


def test_moved_and_copied_checkpoints_restore(tmp_path):
    save(tmp_path / "c", PARAMS)
    shutil.copytree(tmp_path / "c", tmp_path / "elsewhere" / "d")
    shutil.rmtree(tmp_path / "c")
    np.testing.assert_array_equal(restore(tmp_path / "elsewhere" / "d")[0]["dense"]["kernel"], 1)
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*/c'\.$"):
        restore(tmp_path / "c")
    assert issubclass(CheckpointError, ValueError)
