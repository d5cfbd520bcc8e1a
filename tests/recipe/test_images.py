"""Image sets, without a network: files of the same form with other contents."""

import gzip
import hashlib
import struct

import numpy as np
import pytest

from jaxcompress import recipe

RNG = np.random.default_rng(0)


def _write_idx(path, array):
    head = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def clothes(tmp_path):
    arrays = {}
    for part, count in (("train", 5), ("t10k", 3)):
        arrays[part] = RNG.integers(0, 256, (count, 4, 3)), RNG.integers(0, 10, count)
        _write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", arrays[part][0])
        _write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", arrays[part][1])
    return tmp_path, arrays


def test_fashion_mnist_is_read_as_it_lies_there(clothes):
    directory, arrays = clothes
    found = recipe.fashion_mnist(directory)
    np.testing.assert_allclose(found.train_images, arrays["train"][0] / 255, rtol=1e-6)
    np.testing.assert_allclose(found.test_images, arrays["t10k"][0] / 255, rtol=1e-6)
    np.testing.assert_array_equal(found.train_labels, arrays["train"][1])
    np.testing.assert_array_equal(found.test_labels, arrays["t10k"][1])
    assert found.train_images.dtype == np.float32
    assert found.train_labels.dtype == found.test_labels.dtype == np.int32


def test_what_is_no_idx_file_is_named(clothes):
    directory, _ = clothes
    path = directory / "t10k-labels-idx1-ubyte.gz"
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:-1]))
    with pytest.raises(ValueError, match=r"t10k-labels.*should hold \(3,\) bytes, found 2"):
        recipe.fashion_mnist(directory)
    path.write_bytes(gzip.compress(b"text"))
    with pytest.raises(ValueError, match="is no IDX file of bytes"):
        recipe.fashion_mnist(directory)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels"):
        recipe.fashion_mnist(directory)


def _write_digits(path, rows):
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    return path


def test_the_digits_are_split_by_their_hash(tmp_path):
    pixels = RNG.integers(0, 256, (5000, 784))
    digits = np.repeat(np.arange(10), 500)
    found = recipe.mnist_5k(_write_digits(tmp_path / "digits.csv.gz", np.c_[pixels, digits]))
    assert found.train_images.shape == (4000, 28, 28)
    assert found.test_images.shape == (1000, 28, 28)
    images = np.concatenate([found.test_images, found.train_images])
    back = np.rint(images * 255).astype(np.uint8).reshape(5000, -1)
    hashes = [hashlib.sha256(row.tobytes()).hexdigest() for row in back]
    assert hashes == sorted(hashes)
    digit_of = {row.astype(np.uint8).tobytes(): digit for row, digit in zip(pixels, digits, strict=True)}
    labels = np.concatenate([found.test_labels, found.train_labels])
    assert [digit_of[row.tobytes()] for row in back] == labels.tolist()
    assert found.train_images.min() == 0.0
    assert found.train_images.max() == 1.0


def test_other_digits_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must have 5,000 rows of 785 numbers.*found \(2, 785\)"):
        recipe.mnist_5k(_write_digits(tmp_path / "few.csv.gz", np.zeros((2, 785), int)))
    with pytest.raises(FileNotFoundError, match="mnist_5k"):
        recipe.mnist_5k(tmp_path / "absent")


def test_a_failed_download_says_what_to_give_instead(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("jaxcompress.recipe._assets._installed", lambda asset: [])
    with pytest.raises(recipe.AssetError, match=r"there is no apt-get here \(or give a directory with the four files"):
        recipe.fashion_mnist(note=lambda line: None)
