"""Reading images, without a network: small files written here, and stand-ins for apt-get and dpkg-deb."""

import dataclasses
import gzip
import hashlib
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from jaxcompress._src.recipe.assets import Asset, AssetError, cache_directory, fetch
from jaxcompress._src.recipe.images import fashion_mnist, mnist_5k


def _gzip(data: bytes) -> bytes:
    """Without the time of day, which would make each test process collect tests of other names."""
    return gzip.compress(data, compresslevel=1, mtime=0)


def _idx(array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return _gzip(header + array.tobytes())


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte.gz": rng.integers(0, 256, (7, 28, 28), np.uint8),
        "train-labels-idx1-ubyte.gz": rng.integers(0, 10, 7, np.uint8),
        "t10k-images-idx3-ubyte.gz": rng.integers(0, 256, (3, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte.gz": rng.integers(0, 10, 3, np.uint8),
    }
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(_idx(array))
    return tmp_path, list(arrays.values())


def test_fashion_mnist_from_a_directory(fashion):
    directory, (train_images, train_labels, test_images, test_labels) = fashion
    found = fashion_mnist(directory)
    assert found.train_images.dtype == np.float32
    assert found.train_labels.dtype == np.int32
    np.testing.assert_array_equal(np.rint(found.train_images * 255), train_images)
    np.testing.assert_array_equal(np.rint(found.test_images * 255), test_images)
    np.testing.assert_array_equal(found.train_labels, train_labels)
    np.testing.assert_array_equal(found.test_labels, test_labels)
    assert found.train_images.max() <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "train-images-idx3-ubyte.gz is needed, and cannot be read"),
        (b"not gzip", "cannot be read"),
        (_gzip(b""), "is not a file of bytes in the IDX format"),
        (_gzip(b"\0\0\x08\x03\0\0"), "is not a file of bytes in the IDX format"),
        (_gzip(b"\0\0\x0d\x01\0\0\0\1\1"), "is not a file of bytes in the IDX format"),
        (_gzip(b"\0\0\x08\x01\0\0\0\5ab"), "is not a file of bytes in the IDX format"),
    ],
)
def test_what_is_no_idx_file_is_named(fashion, content, message):
    directory, _ = fashion
    file = directory / "train-images-idx3-ubyte.gz"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(AssetError, match=message):
        fashion_mnist(directory)


def _digits(path, labels):
    """Pixel 0 of a row is its number inside its sort, modulo 250."""
    table = np.zeros((len(labels), 785), np.uint8)
    table[:, 0] = np.arange(len(labels)) % 500 % 250
    table[:, -1] = labels
    with gzip.open(path, "wt", compresslevel=1) as file:
        np.savetxt(file, table, fmt="%d", delimiter=",")
    return path


def test_the_split_of_the_digits_takes_the_sorts_in_turn(tmp_path):
    found = mnist_5k(_digits(tmp_path / "mnist_5k.csv.gz", np.repeat(np.arange(10), 500)))
    assert found.train_images.shape == (4000, 28, 28)
    assert found.test_images.shape == (1000, 28, 28)
    np.testing.assert_array_equal(found.train_labels, np.tile(np.arange(10), 400))
    np.testing.assert_array_equal(found.test_labels, np.tile(np.arange(10), 100))
    order = np.repeat(np.arange(500) % 250, 10)
    np.testing.assert_array_equal(np.rint(found.train_images[:, 0, 0] * 255), order[:4000])
    np.testing.assert_array_equal(np.rint(found.test_images[:, 0, 0] * 255), order[4000:])


def test_another_table_of_digits_is_refused(tmp_path):
    with pytest.raises(AssetError, match=r"500 of each label in order, got \(20, 785\)"):
        mnist_5k(_digits(tmp_path / "short.csv.gz", np.arange(20) % 10))
    with pytest.raises(AssetError, match="is not a table of pixels and labels"):
        mnist_5k(tmp_path / "absent.csv.gz")


ASSET = Asset(
    distribution="no-such-package",
    version="1.0-1",
    size=1,
    registry="debian",
    members={"usr/share/no-such-package/rows.gz": hashlib.sha256(b"rows").hexdigest()},
)


def _apt_that_brings(content, monkeypatch, *, failing=None):
    """Stand-ins for `apt-get download` (leaves a .deb where it runs) and `dpkg-deb -x` (unpacks it)."""
    calls = []

    def run(command, *, cwd, **_):
        calls.append(command)
        if failing == command[0]:
            raise FileNotFoundError(command[0])
        if command[0] == "apt-get":
            (Path(cwd) / "no-such-package_1.0-1_all.deb").write_bytes(b"deb")
        else:
            folder = Path(command[-1]) / "usr/share/no-such-package"
            folder.mkdir(parents=True)
            (folder / "rows.gz").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


@pytest.fixture
def notes(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCOMPRESS_CACHE", str(tmp_path / "cache"))
    return []


def test_a_debian_package_is_downloaded_once_and_never_installed(notes, monkeypatch):
    calls = _apt_that_brings(b"rows", monkeypatch)
    for _ in range(2):
        directory = fetch(ASSET, note=notes.append)
        assert [file.name for file in directory.iterdir()] == ["rows.gz"]
    assert calls[0] == ["apt-get", "download", "no-such-package=1.0-1"]
    assert [call[:2] for call in calls[1:]] == [["dpkg-deb", "-x"]]
    assert notes == ["Downloading no-such-package 1.0-1 (1 MB, once) ..."]


def test_the_files_of_an_installed_debian_package_are_copied(notes, tmp_path, monkeypatch):
    calls = _apt_that_brings(b"", monkeypatch)
    (tmp_path / "rows.gz").write_bytes(b"rows")
    placed = dataclasses.replace(
        ASSET, members={str(tmp_path / "rows.gz").lstrip("/"): hashlib.sha256(b"rows").hexdigest()}
    )
    assert (fetch(placed, note=notes.append) / "rows.gz").read_bytes() == b"rows"
    assert calls == notes == []


@pytest.mark.parametrize(
    ("content", "failing", "message"),
    [
        (b"others", None, "does not have sha256"),
        (b"", "apt-get", "could not be downloaded with apt-get: apt-get does not exist here"),
        (b"", "dpkg-deb", "could not be unpacked with dpkg-deb: dpkg-deb does not exist here"),
    ],
)
def test_what_fails_is_said_and_nothing_is_left(notes, monkeypatch, content, failing, message):
    _apt_that_brings(content, monkeypatch, failing=failing)
    with pytest.raises(AssetError, match=message):
        fetch(ASSET, note=notes.append)
    assert list(cache_directory().iterdir()) == []


def test_a_package_without_the_member_is_named(notes, monkeypatch):
    _apt_that_brings(b"rows", monkeypatch)
    other = dataclasses.replace(ASSET, members={"usr/share/other.gz": "0"})
    with pytest.raises(AssetError, match=r"all\.deb does not hold usr/share/other\.gz"):
        fetch(other, note=notes.append)
