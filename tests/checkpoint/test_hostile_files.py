"""What is no file, has no end, or does not fit: one clear error at once, never a hang and never a raw exception."""

import json
import logging
import os
import resource
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.checkpoint.read import read_manifest
from jaxcompress.checkpoint import CheckpointError, restore, save

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "n": 1}


@pytest.fixture(autouse=True)
def no_hang():
    def give_up(*_):
        raise TimeoutError("it hangs")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module", params=["orbax", "entropy"])
def original(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "c"
    save(path, TREE, storage=request.param)
    return path


def _directory_in_its_place(file):
    file.mkdir()


KINDS = {
    "pipe": (os.mkfifo, "a pipe"),
    "endless": (lambda file: file.symlink_to("/dev/zero"), "a device"),
    "loop": (lambda file: file.symlink_to(file), "a link that leads nowhere"),
    "dangling": (lambda file: file.symlink_to(file.parent / "nothing"), "link to nothing"),
    "directory": (_directory_in_its_place, "a directory"),
    "link to a directory": (lambda file: file.symlink_to(file.parent), "a directory"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file(original, tmp_path, kind):
    make, what = KINDS[kind]
    files = sorted(file.relative_to(original) for file in original.rglob("*") if file.is_file())
    for at, name in enumerate(files):
        path = shutil.copytree(original, tmp_path / f"{at}" / "c")
        (path / name).unlink()
        make(path / name)
        is_manifest = name.name.startswith("manifest.") and len(name.parts) == 1
        with pytest.raises(CheckpointError, match=what if is_manifest else f"{name}' is missing"):
            restore(path)
        if is_manifest:
            with pytest.raises(CheckpointError, match=what):
                read_manifest(path)


def test_links_to_files_are_fine(original, tmp_path):
    """As content-addressed stores have them."""
    path = shutil.copytree(original, tmp_path / "c")
    for at, file in enumerate([file for file in path.rglob("*") if file.is_file()]):
        shutil.move(file, tmp_path / f"store-{at}")
        file.symlink_to(tmp_path / f"store-{at}")
    np.testing.assert_array_equal(restore(path)[0]["a"], TREE["a"])


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "pipe"):
        for function in (restore, read_manifest):
            with pytest.raises(CheckpointError, match=name):
                function(tmp_path / name)
        with pytest.raises(FileExistsError, match="is not a checkpoint"):
            save(tmp_path / name, TREE, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*nothing'"):
        restore(tmp_path / "dangling")
    with pytest.raises(OSError, match="loop"):
        save(tmp_path / "loop" / "c", TREE)


def test_a_manifest_without_an_end(original, tmp_path, monkeypatch):
    from jaxcompress._src.checkpoint import manifest_file as _manifest_file

    monkeypatch.setattr(_manifest_file, "_LIMIT", 100)
    for function in (restore, read_manifest):
        with pytest.raises(CheckpointError, match=r"manifest\.(z|json)' has more than 100 bytes"):
            function(original)


@pytest.mark.parametrize("storage", ["orbax", "entropy"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_is_one_os_error(tmp_path, caplog, capfd, storage, existing):
    if existing:
        save(tmp_path / "c", TREE)
    noise = jnp.asarray(np.random.default_rng(0).integers(0, 256, (512, 1024)), jnp.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="File too large") as caught:
            save(tmp_path / "c", {"noise": noise}, overwrite=existing, storage=storage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == 27
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert (caplog.records, capfd.readouterr().err) == ([], "")
    assert os.listdir(tmp_path) == (["c"] if existing else [])
    if existing:
        np.testing.assert_array_equal(restore(tmp_path / "c")[0]["a"], TREE["a"])


@pytest.mark.parametrize("axes", [33, 64])
@pytest.mark.parametrize("make", [jnp.ones, np.ones])
def test_more_axes_than_can_be_stored_are_refused_first(tmp_path, axes, make):
    with pytest.raises(TypeError, match=rf"Leaf 'deep': an array of {axes} axes cannot be stored, 32 are the most"):
        save(tmp_path / "c", {"deep": make((1,) * axes)})
    assert os.listdir(tmp_path) == []
    save(tmp_path / "c", {"deep": make((1,) * 32)})
    assert restore(tmp_path / "c")[0]["deep"].shape == (1,) * 32


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([1] * 70, "32 axes"),
        ([2**40, 2**40], r"2\*\*56 elements"),
        ([2**62, 2**62, 0], r"2\*\*56 elements"),
        ([2**55], "Array 'leaf_00001'"),
        ([True], "list of sizes"),
    ],
)
def test_shapes_of_an_old_manifest_that_cannot_be(tmp_path, shape, message):
    """Without a checksum, anything may stand there."""
    golden = os.path.join(os.path.dirname(__file__), "golden", "format_1")
    path = shutil.copytree(golden, tmp_path / "c")
    content = json.loads((path / "manifest.json").read_text())
    content["leaves"][1]["value"]["shape"] = shape
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        restore(path)
