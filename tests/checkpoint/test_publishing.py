"""One version takes the place of another at once, whoever reads, writes or dies meanwhile."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.checkpoint import locks as _locks
from jaxcompress._src.checkpoint import read as _read
from jaxcompress._src.checkpoint import restore as _restore
from jaxcompress._src.checkpoint import save as _save
from jaxcompress._src.checkpoint.read import read_manifest
from jaxcompress._src.checkpoint.versions import close_workspace, open_workspace
from jaxcompress.checkpoint import CheckpointError, restore, save

TORTURE = Path(__file__).parents[2] / "examples" / "benchmarks" / "checkpoint_torture.py"
GOLDEN = Path(__file__).parent / "golden"


def tree(number):
    return {"a": jnp.full((4, 4), number, jnp.int32), "b": np.full(3, number)}


def number_of(params, info):
    (number,) = {int(params["a"][0, 0]), int(params["b"][0]), info.metadata["number"]}
    return number


def put(path, number, storage="orbax"):
    save(path, tree(number), metadata={"number": number}, overwrite=True, storage=storage)


def listing(path):
    """What is in a checkpoint that is not a part of it, and what is beside it."""
    manifest = read_manifest(path)
    inside = {manifest.arrays, "manifest.json" if manifest.storage == "orbax" else "manifest.z"}
    return sorted(set(os.listdir(path)) ^ inside) + sorted(set(os.listdir(path.parent)) - {path.name})


@pytest.fixture
def path(tmp_path):
    put(tmp_path / "c", 0)
    return tmp_path / "c"


@pytest.fixture
def no_locks(monkeypatch):
    """As on a file system that has none."""
    monkeypatch.setattr(_locks, "fcntl", None)


def test_readers_beside_a_writer_kills_and_damage():
    """The small form of the benchmark: no mixed tree, nothing lost, nothing left behind, no raw error, no hang."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
    done = subprocess.run(
        [sys.executable, str(TORTURE), "--quick"], env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["faults"] == 0, done.stdout + done.stderr
    readers, kills, damage = figures["readers"], figures["kills"], figures["damage"]
    assert min(readers["restores"], readers["saves"]) >= 8
    assert readers["versions"] > 1
    assert kills["kills"] >= 12
    assert kills["old"] + kills["new"] == kills["saves"]
    assert min(kills["old"], kills["new"]) > 1
    assert damage["refused"] > damage["equal"] > 0


def race(monkeypatch, module, name, *, times, act):
    """Lets `act(n)` happen right before the n-th call of a function, for so many calls."""
    function, calls = getattr(module, name), []

    def racing(*args, **kwargs):
        calls.append(0)
        if len(calls) <= times:
            act(len(calls))
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, racing)
    return calls


@pytest.mark.parametrize("storage", ["orbax", "entropy"])
def test_a_reader_keeps_its_version_while_others_are_published(path, monkeypatch, storage):
    put(path, 1, storage)
    race(monkeypatch, _restore, "_check_files", times=1, act=lambda _: [put(path, 2), put(path, 3, "entropy")])
    assert number_of(*restore(path)) == 1
    assert number_of(*restore(path)) == 3
    assert listing(path) == []


def test_without_locks_a_reader_starts_again(path, monkeypatch, no_locks):
    calls = race(
        monkeypatch, _restore, "_check_files", times=3, act=lambda n: put(path, n, ["orbax", "entropy"][n % 2])
    )
    assert number_of(*restore(path)) == 3
    assert len(calls) == 4
    assert listing(path) == []


def test_without_locks_arrays_that_go_while_they_are_read(path, monkeypatch, no_locks):
    race(monkeypatch, _restore, "read_arrays", times=1, act=lambda _: put(path, 1))
    assert number_of(*restore(path)) == 1


def test_a_reader_that_is_always_overtaken_says_so(path, monkeypatch, no_locks):
    monkeypatch.setattr(_read, "_ATTEMPTS", 3)
    race(monkeypatch, _restore, "_check_files", times=3, act=lambda n: put(path, n))
    with pytest.raises(CheckpointError, match="was replaced 3 times while it was read"):
        restore(path)


def test_an_error_of_the_newer_version_is_told(path, monkeypatch, no_locks):
    race(monkeypatch, _restore, "_check_files", times=1, act=lambda _: shutil.rmtree(path))
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        restore(path)


@pytest.mark.parametrize("first", ["orbax", "entropy"])
@pytest.mark.parametrize("second", ["orbax", "entropy"])
def test_of_two_writers_the_last_to_publish_wins(tmp_path, monkeypatch, first, second):
    """Also where both began when there was nothing, and whatever their storages."""
    race(monkeypatch, _save, "write_manifest", times=1, act=lambda _: put(tmp_path / "c", 2, second))
    put(tmp_path / "c", 1, first)
    assert number_of(*restore(tmp_path / "c")) == 1
    assert listing(tmp_path / "c") == []


def test_something_else_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    def make(_):
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "thesis.tex").write_text("text")

    race(monkeypatch, _save, "write_manifest", times=1, act=make)
    with pytest.raises(FileExistsError, match=r"appeared while .* is not a checkpoint"):
        put(tmp_path / "c", 1)
    assert [*os.listdir(tmp_path), *os.listdir(tmp_path / "c")] == ["c", "thesis.tex"]


def test_workspaces_of_the_living_stay_and_those_of_the_dead_go(path):
    workspace, descriptor = open_workspace(str(path))
    Path(workspace.new, "part").write_text("half written")
    arrays = path / f"arrays-{workspace.identity}"
    arrays.mkdir()
    restore(path)
    assert os.path.exists(workspace.new)
    put(path, 1)
    assert os.path.exists(workspace.new)
    # What a live writer is about to publish stays too.
    assert arrays.is_dir()
    os.close(descriptor)
    restore(path)
    assert listing(path) == []
    close_workspace(*open_workspace(str(path)))
    assert listing(path) == []


def test_without_locks_the_dead_go_after_a_day(path, no_locks):
    workspace, descriptor = open_workspace(str(path))
    os.close(descriptor)
    lock = os.path.join(workspace.directory, "lock")
    restore(path)
    assert os.path.exists(lock)
    os.utime(lock, (0, time.time() - 25 * 3600))
    restore(path)
    assert listing(path) == []


def test_leftovers_of_older_versions(path):
    writing, replaced = path.parent / ".c.writing-0123456789ab", path.parent / ".c.replaced-0123456789ab"
    for leftover in (writing, replaced):
        leftover.mkdir()
        (leftover / "manifest.json").write_text("{}")
    other = path.parent / ".c.writing-notes"
    other.mkdir()
    restore(path)
    assert sorted(os.listdir(path.parent)) == [".c.writing-0123456789ab", ".c.writing-notes", "c"]
    os.utime(writing, (0, time.time() - 25 * 3600))
    put(path, 1)
    assert sorted(os.listdir(path.parent)) == [".c.writing-notes", "c"]


def test_a_save_that_died_before_it_published_with_the_other_storage(path):
    """`manifest.z` is in place and `manifest.json` still counts."""
    put(path.parent / "d", 1, "entropy")
    arrays = read_manifest(path.parent / "d").arrays
    shutil.move(path.parent / "d" / arrays, path / arrays)
    shutil.move(path.parent / "d" / "manifest.z", path / "manifest.z")
    os.rmdir(path.parent / "d")
    assert read_manifest(path).storage == "orbax"
    assert number_of(*restore(path)) == 0
    assert listing(path) == []


@pytest.mark.parametrize(("name", "version"), [("format_1", 1), ("format_2", 2)])
def test_checkpoints_of_older_versions(tmp_path, name, version):
    """Written by version 0.1.0 before manifests had checksums: they restore, say so, and can be replaced."""
    path = Path(shutil.copytree(GOLDEN / name, tmp_path / "c"))
    with pytest.warns(UserWarning, match=f"format version {version}, without a checksum"):
        params, info = restore(path)
    codes = np.arange(32).reshape(8, 4) % 15 - 7
    np.testing.assert_array_equal(params["layer"]["kernel"].materialize(), codes / 4)
    np.testing.assert_array_equal(params["layer"]["bias"], np.arange(4))
    assert (params["steps"], info.config, info.metadata) == (3, {"width": 4}, {"note": "old"})
    assert (info.format_version, info.verified) == (version, False)
    assert info.disk_bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for storage in ("orbax", "entropy", "orbax"):
        put(path, 7, storage)
        restored = restore(path)
        assert number_of(*restored) == 7
        assert restored[1].verified
        assert listing(path) == []


def test_every_name_of_arrays_is_new(path):
    names = {read_manifest(path).arrays}
    for number in range(3):
        put(path, number)
        names.add(read_manifest(path).arrays)
    assert len(names) == 4
